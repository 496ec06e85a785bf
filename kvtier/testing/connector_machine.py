"""A Hypothesis state machine: anything that can happen to a connector, against the fake engine that checks every byte.

Requests with shared prefixes come, run, are aborted and preempted in a host memory that is far too small, while copies fail, slots get
other tenants and the cache is reset.  Then everything must have finished with the right tokens, and nothing may be left over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.connectors.messages import RequestOptions, StepMessage
from kvtier.connectors.requests import DefaultSettings
from kvtier.hashing import Namespace
from kvtier.testing.fake_engine import FakeRequest
from kvtier.testing.fake_system import FakeSystem, FakeSystemOptions
from kvtier.testing.tiers import FaultyTier, SlowTier
from kvtier.tiers.base import Tier
from kvtier.types import JobKind, Outcome


def prompt_of(branches: Sequence[int], length: int) -> list[int]:
    """A prompt out of a tree: two prompts share their tokens until their branches differ; a branch is 12 tokens long."""
    return [(branches[min(position // 12, len(branches) - 1)] * 31 + position) % 89 for position in range(length)]


class ConnectorMachine(RuleBasedStateMachine):
    """Subclass it to change what is tried: ``make_options`` narrows the options, ``make_tier`` adds a tier below host memory."""

    namespace = Namespace(model="connector-machine")
    max_steps = 3000

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="kvtier-machine-")
        self.system: FakeSystem | None = None
        self.tier: FaultyTier | None = None
        self.slow: SlowTier | None = None
        self.submitted: list[FakeRequest] = []
        self.now = 0.0
        self.num_steals = 0

    def make_options(self, draw: FakeSystemOptions) -> FakeSystemOptions:
        """The options to run with, given those that were drawn."""
        return draw

    def make_tier(self, directory: Path) -> Tier | None:
        """The tier below host memory; it will be made slow and faulty."""
        return None

    @initialize(
        options=st.builds(
            FakeSystemOptions,
            num_ranks=st.sampled_from([1, 2]),
            num_polls=st.sampled_from([0, 0, 1, 3]),
            blocks_per_slot=st.sampled_from([1, 2]),
            num_engine_blocks=st.sampled_from([24, 40]),
            host_blocks=st.sampled_from([3, 8, 30]),
            prefix_caching=st.booleans(),
            recompute=st.just(True),
            device_slots=st.sampled_from([0, 0, 2, 7]),
            by_layer=st.sampled_from(["", "", "thread", "late"]),
            settings=st.builds(
                DefaultSettings,
                async_load=st.booleans(),
                store_decode_blocks=st.booleans(),
                promote_wait_s=st.sampled_from([0.0, 0.5]),
                max_pinned_fraction=st.sampled_from([0.0, 0.5, 1.0]),
            ),
        )
    )
    def start(self, options: FakeSystemOptions) -> None:
        directory = Path(self.directory.name)
        tier = self.make_tier(directory)
        tiers = []
        if tier is not None:
            self.tier = FaultyTier(tier)
            self.slow = SlowTier(self.tier, 0.05, lambda: self.now)
            tiers = [self.slow]
        self.system = FakeSystem(directory, self.namespace, self.make_options(options), tiers=tiers, clock=lambda: self.now)
        self.system.engine.tamper = self._steal

    # ---- what happens -------------------------------------------------------------------------------------------

    @rule(
        branches=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        length=st.integers(1, 60),
        max_new_tokens=st.integers(1, 12),
        adapter=st.sampled_from([b"", b"", b"", b"lora"]),
        options=st.sampled_from([RequestOptions()] * 4 + [RequestOptions(load=False), RequestOptions(store=False)]),
    )
    def submit(self, branches: list[int], length: int, max_new_tokens: int, adapter: bytes, options: RequestOptions) -> None:
        engine = self._system().engine
        request_id = f"r{len(self.submitted)}"
        prompt = prompt_of(branches, length)
        self.submitted.append(engine.submit(request_id, prompt, max_new_tokens, adapter=adapter, options=options))

    @rule(count=st.integers(1, 25))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.now += 0.02
            self._system().engine.step()

    @rule(seconds=st.sampled_from([0.1, 1.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: bool(self.submitted))
    @rule(choice=st.integers(0, 1000))
    def abort(self, choice: int) -> None:
        request = self.submitted[-1 - choice % min(len(self.submitted), 6)]
        self._system().engine.abort(request.request_id)

    @precondition(lambda self: bool(self.submitted))
    @rule(choice=st.integers(0, 1000), length=st.integers(1, 28), max_new_tokens=st.integers(1, 12))
    def follow_up(self, choice: int, length: int, max_new_tokens: int) -> None:
        """The next round of a conversation."""
        engine = self._system().engine
        before = self.submitted[choice % len(self.submitted)]
        prompt = before.tokens[:50] + prompt_of([choice % 3], length)
        self.submitted.append(engine.submit(f"r{len(self.submitted)}", prompt, max_new_tokens, adapter=before.adapter))

    @rule(
        fault=st.sampled_from(["load", "load", "load", "store", "steal", "reset", "new weights"]),
        rank=st.integers(0, 1),
        copies=st.lists(st.sampled_from(["start", "end", "none"]), min_size=1, max_size=3),
    )
    def goes_wrong(self, fault: str, rank: int, copies: list[str]) -> None:
        """A copy fails, the next jobs lose a slot, or somebody empties the cache."""
        system = self._system()
        copier = system.copiers[rank % len(system.copiers)]
        if fault == "load":
            copier.load_faults.extend(copies)
        elif fault == "store":
            copier.store_faults.extend(copies)
        elif fault == "steal":
            self.num_steals += 1
        else:
            system.engine.reset(new_weights=fault == "new weights")

    @precondition(lambda self: self.tier is not None)
    @rule(
        kind=st.sampled_from(list(JobKind)),
        outcome=st.sampled_from([Outcome.MISS, Outcome.CORRUPT, Outcome.REJECTED, Outcome.FAILED]),
        count=st.integers(1, 3),
    )
    def tier_fails(self, kind: JobKind, outcome: Outcome, count: int) -> None:
        assert self.tier is not None
        self.tier.fail_next(kind, outcome, count)

    @precondition(lambda self: self.tier is not None)
    @rule(delay_s=st.sampled_from([0.0, 0.1, 5.0]), is_offline=st.sampled_from([False, False, False, True]))
    def tier_changes(self, delay_s: float, is_offline: bool) -> None:
        """It becomes slower or faster, or is away for some time."""
        assert self.tier is not None
        assert self.slow is not None
        self.slow.delay_s = delay_s
        self.tier.is_offline = is_offline

    def _steal(self, message: StepMessage) -> None:
        """The next jobs find that their first slot has a new tenant."""
        for job in (*message.loads, *message.async_loads, *message.stores):
            if self.num_steals and job.slots:
                self.num_steals -= 1
                self._system().arena.generations[job.slots[0]] += 1

    # ---- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def books_are_right(self) -> None:
        if self.system is not None:
            assert [] == self.system.cache.check()

    def teardown(self) -> None:
        system = self.system
        try:
            if system is not None:
                self._wind_up(system)
        finally:
            if system is not None:
                system.close()
            self.directory.cleanup()

    def _wind_up(self, system: FakeSystem) -> None:
        """Without further faults everything ends, with the right tokens, and leaves nothing behind."""
        for copier in system.copiers:
            copier.heal()
        self.num_steals = 0
        if self.tier is not None and self.slow is not None:
            self.tier.is_offline = False
            self.slow.delay_s = 0.0
        self._run_out(system)
        for position, request in enumerate(self.submitted):
            # Whatever is in the cache must be right: ask for all of it.
            if request.weights == system.engine.weights:
                system.engine.submit(f"audit{position}", request.tokens[: len(request.tokens)], adapter=request.adapter)
        self._run_out(system)
        self.now += 1000.0
        system.settle(self.max_steps)
        assert [] == system.problems()
        for request in self.submitted:
            if request.weights is not None and len(request.output) == request.max_new_tokens:
                assert request.expected_output() == request.output

    def _run_out(self, system: FakeSystem) -> None:
        for _ in range(self.max_steps):
            if not system.engine.requests:
                return
            self.step(1)
        system.engine.run(0)

    def _system(self) -> FakeSystem:
        assert self.system is not None
        return self.system
