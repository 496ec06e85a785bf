"""State machines for stores that several engines use: the planner with one that others fill and empty, and two engines over one."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtier.connectors.requests import DefaultSettings
from kvtier.control.absent import ABSENT_S
from kvtier.control.commands import Command, Demote, Forget, Probe, Promote, Remove
from kvtier.control.host_space import PAGE_BYTES
from kvtier.control.lower import LowerTierSpec, WriteMode
from kvtier.hashing import Namespace
from kvtier.testing.connector_machine import prompt_of
from kvtier.testing.fake_requests import FakeRequest
from kvtier.testing.fake_system import FakeSystem, FakeSystemOptions
from kvtier.testing.planner_machine import MAX_BLOCKS, PROMPTS, PlannerMachine, chain, tenant_of
from kvtier.testing.remote import PREFIX, MemoryClient, MemoryStore
from kvtier.tiers.remote import RemoteSettings, RemoteTier
from kvtier.tiers.remote.records import key_of
from kvtier.types import BlockKey, Outcome

SHARED = 2
"""number of the shared tier, below the disk"""


class SharingPlannerMachine(PlannerMachine):
    """The planner over host memory, a disk, and a store that another writer fills, that evicts by itself, and that others read."""

    known_blocks = 100
    """of the shared tier; set it low to have them forgotten"""

    def __init__(self) -> None:
        self.store: set[BlockKey] = set()
        self.condemned: set[BlockKey] = set()
        """what may be deleted in the store: somebody said so"""
        self.is_online = True
        super().__init__()

    def more_tiers(self) -> list[LowerTierSpec]:
        return [LowerTierSpec(self.residency("redis"), lambda _: self.known_blocks, WriteMode.THROUGH, 4 * PAGE_BYTES, is_shared=True)]

    # ---- others -------------------------------------------------------------------------------------------------

    @rule(prompt=st.integers(0, PROMPTS - 1), count=st.integers(1, MAX_BLOCKS))
    def others_store(self, prompt: int, count: int) -> None:
        self.store |= set(chain(prompt, count))

    @rule(prompt=st.integers(0, PROMPTS - 1), position=st.integers(0, MAX_BLOCKS - 1))
    def the_store_evicts(self, prompt: int, position: int) -> None:
        self.store.discard(chain(prompt, MAX_BLOCKS)[position])

    @rule(offline=st.integers(0, 5))
    def shared_health(self, offline: int) -> None:
        self.is_online = offline != 0
        self.planner.set_online(SHARED, self.is_online)

    # ---- this engine --------------------------------------------------------------------------------------------

    @rule(prompt=st.integers(0, PROMPTS - 1), count=st.integers(1, MAX_BLOCKS))
    def probe(self, prompt: int, count: int) -> None:
        """The store is asked at most once at a time for the same blocks, and for nothing that is known."""
        keys = chain(prompt, count)
        known = self.planner.match(keys).hit_blocks
        if known < count:
            is_awaited = self.planner.probe(keys, known, PAGE_BYTES, self.now, tenant_of(prompt))
            self.carry_on()
            asked = Counter(command.keys[0] for command in self.queue if isinstance(command, Probe))
            assert is_awaited or not self.is_online or keys[known] not in asked
            again = self.planner.probe(keys, known, PAGE_BYTES, self.now, tenant_of(prompt))
            assert is_awaited == again
            assert [] == self.planner.take_commands()

    @rule(prompt=st.integers(0, PROMPTS - 1))
    def what_others_stored_is_found(self, prompt: int) -> None:
        """However this engine came to its view: once the store is asked without failures, all that it holds of a prompt is a hit."""
        keys = chain(prompt, MAX_BLOCKS)
        self.shared_health(1)
        self.settle()
        self.now += ABSENT_S
        self.store |= set(keys)
        for _ in range(MAX_BLOCKS):
            known = self.planner.match(keys).hit_blocks
            if known < MAX_BLOCKS and self.planner.probe(keys, known, PAGE_BYTES, self.now, tenant_of(prompt)):
                self.settle()
        assert self.known_blocks < 2 * MAX_BLOCKS or MAX_BLOCKS == self.planner.match(keys).hit_blocks

    @rule(prompt=st.integers(0, PROMPTS - 1))
    def what_is_absent_is_not_asked_again(self, prompt: int) -> None:
        """For some time after the answer, and then it is."""
        keys = chain(prompt, 1)
        self.shared_health(1)
        self.settle()
        if self.planner.match(keys).hit_blocks or keys[0] in self.store:
            return
        if self.planner.probe(keys, 0, PAGE_BYTES, self.now, tenant_of(prompt)):
            self.settle()
        assert not self.planner.probe(keys, 0, PAGE_BYTES, self.now, tenant_of(prompt))
        self.now += ABSENT_S
        assert self.planner.probe(keys, 0, PAGE_BYTES, self.now, tenant_of(prompt))
        self.carry_on()

    @rule(prompt=st.none() | st.integers(0, PROMPTS - 1), really=st.integers(0, 2), everywhere=st.booleans())
    def clear_shared(self, prompt: int | None, really: int, everywhere: bool) -> None:
        if really:
            return
        tenant = None if prompt is None else tenant_of(prompt)
        if everywhere:
            self.condemned |= {key for p in range(PROMPTS) if tenant in (None, tenant_of(p)) for key in chain(p, MAX_BLOCKS)}
        self.planner.clear({SHARED}, tenant, everywhere=everywhere)
        self.carry_on()
        for command in [each for each in self.queue if isinstance(each, Probe)]:  # asked before: the answers are no longer used
            self.queue.remove(command)
            self.answer(command, Outcome.OK)
        for other in range(PROMPTS):
            if tenant in (None, tenant_of(other)):
                assert not self.planner.holdings(chain(other, MAX_BLOCKS))[SHARED].num_blocks

    @rule(prompt=st.integers(0, PROMPTS - 1), count=st.integers(1, MAX_BLOCKS), everywhere=st.booleans())
    def evict_shared(self, prompt: int, count: int, everywhere: bool) -> None:
        if everywhere:
            self.condemned |= {key for p in range(PROMPTS) for key in chain(p, MAX_BLOCKS)}
        self.planner.evict(chain(prompt, count), {SHARED}, everywhere=everywhere)
        self.carry_on()

    # ---- the store ----------------------------------------------------------------------------------------------

    def do(self, command: Command, outcomes: Callable[[int], list[Outcome]]) -> None:
        if command.tier != SHARED:
            super().do(command, outcomes)
        elif isinstance(command, Remove):
            assert set(command.keys) <= self.condemned, "a block was deleted for others although nobody said so"
            self.store -= set(command.keys)
        elif isinstance(command, Probe):
            self.answer(command, outcomes(1)[0])
        elif isinstance(command, (Demote, Promote)):
            self.transfer(command, outcomes(len(command.blocks)))
        else:
            assert isinstance(command, Forget)

    def answer(self, command: Probe, outcome: Outcome) -> None:
        """The store is asked; it may break off, or have something else under the name."""
        run = list(itertools.takewhile(lambda key: key in self.store, command.keys))
        sizes = [PAGE_BYTES] * len(run)
        if outcome is Outcome.CORRUPT and sizes:
            sizes[-1] += 1
        self.planner.probed(command.job_id, sizes[:1] if outcome is Outcome.FAILED else sizes, self.now)

    def transfer(self, command: Demote | Promote, outcomes: list[Outcome]) -> None:
        for position, (meta, slot) in enumerate(zip(command.blocks, command.slots, strict=True)):
            if isinstance(command, Demote):
                assert meta.key == self.memory[slot]
                self.store |= {meta.key} if outcomes[position] is Outcome.OK else set()
            elif meta.key not in self.store:
                outcomes[position] = Outcome.MISS
            elif outcomes[position] is Outcome.OK:
                self.memory[slot] = meta.key
            elif outcomes[position] is Outcome.CORRUPT:
                self.store.discard(meta.key)
        if isinstance(command, Demote):
            self.planner.demoted(command.job_id, outcomes, (), self.now)
        else:
            self.planner.promoted(command.job_id, outcomes, self.now)

    @invariant()
    def knowledge_is_bounded(self) -> None:
        assert self.planner.num_blocks()["redis"] <= self.known_blocks


class TwoEnginesMachine(RuleBasedStateMachine):
    """Two engines over one store, against a dict of what the store was given: no engine ever computes with KV that is not its own model's.

    The store evicts, breaks calls off and goes down; an engine forgets, deletes, or gets new weights, after which it shares nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="kvtier-two-engines-")
        self.memory = MemoryStore()
        self.given: dict[str, bytes] = {}
        """what the store was seen to hold, by name: it may lose it, and never change it"""
        self.now = 0.0
        self.clients: list[MemoryClient] = []
        self.systems: list[FakeSystem] = []
        self.requests: list[FakeRequest] = []
        self.has_left = [False, False]

    @initialize(host_blocks=st.sampled_from([4, 40]), async_load=st.booleans(), waits=st.sampled_from([0.0, 60.0, 60.0]))
    def start(self, host_blocks: int, async_load: bool, waits: float) -> None:
        self.host_blocks, self.waits = host_blocks, waits
        for number in range(2):
            directory = Path(self.directory.name, str(number))
            directory.mkdir()
            client = MemoryClient(self.memory)
            settings = RemoteSettings(prefix=PREFIX, threads=2, retries=1, total_timeout_s=60.0)
            options = FakeSystemOptions(
                host_blocks=host_blocks, settings=DefaultSettings(async_load=async_load, promote_wait_s=waits), num_engine_blocks=60
            )
            tier = RemoteTier(client, name="redis", settings=settings)
            tier._caller.sleep = lambda _: None
            self.clients.append(client)
            self.systems.append(FakeSystem(directory, Namespace(model="shared"), options, tiers=[tier], clock=lambda: self.now))

    @rule(
        engine=st.integers(0, 1),
        branches=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        length=st.integers(1, 44),
        faults=st.lists(st.sampled_from([None, None, "cut", "garbage", "full"]), max_size=3),
    )
    def ask(self, engine: int, branches: list[int], length: int, faults: list[str | None]) -> None:
        """A prompt, while calls of the store may break off."""
        self.clients[engine].faults.extend(faults)
        self.run(engine, prompt_of(branches, length))
        self.clients[engine].faults.clear()

    @rule(engine=st.integers(0, 1), branches=st.lists(st.integers(0, 1), min_size=1, max_size=3), length=st.integers(8, 44))
    def what_one_computed_the_other_loads(self, engine: int, branches: list[int], length: int) -> None:
        """All full blocks but that of the last token, which is computed always, where both share and have room to wait."""
        prompt = prompt_of(branches, length)
        self.run(engine, prompt)
        self.now += ABSENT_S
        other = self.run(1 - engine, prompt)
        num_blocks = (length - 1) // 4
        if not any(self.has_left) and self.waits and self.host_blocks > 2 * num_blocks and self.is_stored(prompt, num_blocks):
            assert 4 * num_blocks == other.num_loaded_tokens

    @rule(choice=st.integers(0, 1000))
    def the_store_evicts(self, choice: int) -> None:
        with self.memory.lock:
            names = sorted(name for name in self.memory.values if key_of(PREFIX, name))
            if names:
                del self.memory.values[names[choice % len(names)]]

    @rule(engine=st.integers(0, 1), what=st.sampled_from(["host", "shared", "everywhere", "everywhere", "new weights"]))
    def goes(self, engine: int, what: str) -> None:
        """An engine loses its memory, its knowledge, deletes, or gets other weights."""
        system = self.systems[engine]
        before = dict(self.memory.values)
        if what == "new weights":
            system.engine.reset(new_weights=True)
            self.has_left[engine] = True
        else:
            system.cache.verbs.clear({0} if what == "host" else {1}, None, everywhere=what == "everywhere")
        system.settle()
        assert what == "everywhere" or before == self.memory.values, "forgetting deleted something"

    @invariant()
    def the_dict_and_the_store_agree(self) -> None:
        """A value is what it was when it came; the books of both engines are right."""
        with self.memory.lock:
            values = dict(self.memory.values)
        for name, value in values.items():
            assert self.given.setdefault(name, value) == value
        for system in self.systems:
            assert [] == system.cache.check()

    def is_stored(self, prompt: list[int], num_blocks: int) -> bool:
        """Whether the store holds the first blocks of a prompt, by the keys that the connector gives them."""
        half = self.systems[0].half
        half.add_request("keys", prompt, num_prompt_tokens=len(prompt))
        keys = half._requests["keys"].keys(num_blocks, 4)
        half.request_finished("keys")
        held = {found[1] for name in self.memory.values if (found := key_of(PREFIX, name))}
        return set(keys) <= held

    def run(self, engine: int, prompt: list[int]) -> FakeRequest:
        """A prompt from its coming to its end, with all that it leaves to be written; the fake engine looks at every byte."""
        system = self.systems[engine]
        request = system.engine.submit(f"r{len(self.requests)}", prompt, 2)
        self.requests.append(request)
        steps = 0
        while system.engine.requests:
            assert steps < 2000, "a request does not come to an end"
            steps += 1
            self.now += 0.01
            system.engine.step()
        system.settle()
        assert request.expected_output() == request.output
        return request

    def teardown(self) -> None:
        for system in self.systems:
            self.now += 1000.0
            system.settle()
            problems = system.problems()
            system.close()
            assert [] == problems
        self.directory.cleanup()
