"""A store in memory that fails on demand, and the remote tier over it against a dict."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kvtier.errors import RemoteError
from kvtier.testing.tiers import NAMESPACE, assert_right_bytes, load_job, meta_of, store_job, wait_for
from kvtier.tiers.health import Health
from kvtier.tiers.remote import Deadline, Get, Put, RemoteSettings, RemoteTier, Reply
from kvtier.tiers.remote.client import ABSENT, DONE, OTHER_SIZE, Answer
from kvtier.types import BlockKey, BlockMeta, JobKind, JobResult, Outcome, ProbeJob, ProbeResult, TransferJob

PREFIX = "test/"


class MemoryStore:
    """The server's side: what every client of it sees."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: dict[str, bytes] = {}


class MemoryClient:
    """Implements :class:`~kvtier.tiers.remote.client.RemoteClient` over a :class:`MemoryStore`.

    ``faults``: what happens to the next items, one entry each, None for nothing: ``cut`` breaks the call off, ``garbage`` flips a byte of
    what is read, ``full`` refuses a write.  ``gate``, where it is closed, holds every call until it opens or the client is aborted.
    """

    max_value_bytes: int | None = None

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.address = "memory"
        self.store = store or MemoryStore()
        self.faults: deque[str | None] = deque()
        self.is_down = False
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        """every call: what, and which names"""
        self.is_closed = False
        self._is_aborted = False

    def ping(self, deadline: Deadline) -> None:
        self._begin("ping", ())

    def put(self, items: Sequence[Put], deadline: Deadline) -> Iterator[Reply]:
        self._begin("put", [item.name for item in items])
        for item in items:
            if self._fault() == "full":
                yield Reply(Answer.REFUSED, "the store is full")
                continue
            with self.store.lock:
                self.store.values.setdefault(item.name, item.header + bytes(item.payload))
            yield DONE

    def get_into(self, items: Sequence[Get], deadline: Deadline) -> Iterator[Reply]:
        self._begin("get", [item.name for item in items])
        for item in items:
            fault = self._fault()
            with self.store.lock:
                value = self.store.values.get(item.name)
            if value is None:
                yield ABSENT
            elif len(value) != len(item.header) + len(item.payload):
                yield OTHER_SIZE
            else:
                item.header[:] = value[: len(item.header)]
                item.payload[:] = value[len(item.header) :]
                if fault == "garbage":
                    item.payload[-1] ^= 0x40
                yield DONE

    def sizes(self, names: Sequence[str], deadline: Deadline) -> list[int | None]:
        self._begin("sizes", names)
        self._fault()
        with self.store.lock:
            return [len(self.store.values[name]) if name in self.store.values else None for name in names]

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        self._begin("delete", names)
        self._fault()
        with self.store.lock:
            for name in names:
                self.store.values.pop(name, None)

    def take_events(self) -> dict[str, int]:
        return {}

    def abort(self) -> None:
        self._is_aborted = True
        self.gate.set()

    def close(self) -> None:
        self.is_closed = True

    def _begin(self, what: str, names: Sequence[str]) -> None:
        self.calls.append((what, tuple(names)))
        self.gate.wait()
        if self.is_down or self._is_aborted:
            raise RemoteError("connect_errors", "memory: down", may_pass=not self._is_aborted)

    def _fault(self) -> str | None:
        fault = self.faults.popleft() if self.faults else None
        if fault == "cut":
            raise RemoteError("timeouts", "memory: cut")
        return fault


def wait_for_probe(tier: RemoteTier, job: ProbeJob) -> ProbeResult:
    """Probes and waits for the answer."""
    tier.probe(job)
    while True:
        found = tier.take_probes()
        if found:
            return found[0]
        tier.poll(1.0)


numbers = st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True)
faults = st.lists(st.sampled_from([None, None, "cut", "full"]), max_size=3)
_ENOUGH_RETRIES = 1000
"""no plan of faults breaks a call off as often, so that nothing fails for good (what does is tested step by step)"""


class RemoteMachine(RuleBasedStateMachine):
    """Any sequence of stores, loads, removals and probes, with calls that break off and are tried again, ends as a dict says.

    What may be refused is only what the store refused.  A second tier over the same store sees what the first one wrote.
    """

    @initialize()
    def start(self) -> None:
        self.client = MemoryClient()
        options = RemoteSettings(prefix=PREFIX, threads=3, batch_bytes=1 << 10, retries=_ENOUGH_RETRIES, total_timeout_s=60.0)
        self.tier = RemoteTier(self.client, name="remote", settings=options)
        self.tier._caller.sleep = lambda _: None
        self.tier._caller.health = Health("a store that is never given up", lambda: 0.0)
        self.tier._caller.health.failed = lambda error: None  # type: ignore[method-assign]  # noqa: ARG005
        self.present: dict[BlockKey, BlockMeta] = {}
        self.submitted: list[TransferJob | list[BlockKey]] = []
        self.next_id = 0

    @rule(numbers=numbers, faults=faults)
    def store(self, numbers: list[int], faults: list[str | None]) -> None:
        self.client.faults.extend(faults)
        self.submit(store_job(self.next_id, [meta_of(number, 100 + number) for number in numbers]))

    @rule(numbers=numbers, faults=faults)
    def load(self, numbers: list[int], faults: list[str | None]) -> None:
        self.client.faults.extend(faults)
        self.submit(load_job(self.next_id, [meta_of(number, 100 + number) for number in numbers]))

    @rule(numbers=numbers)
    def remove(self, numbers: list[int]) -> None:
        keys = [meta_of(number, 1).key for number in numbers]
        self.tier.remove(keys)
        assert 0 == self.tier.lookup(keys[:1])
        self.submitted.append(keys)

    @rule()
    def wait(self) -> None:
        jobs = [step for step in self.submitted if isinstance(step, TransferJob)]
        results = {result.job_id: result for result in wait_for(self.tier, len(jobs))} if jobs else {}
        assert {job.job_id for job in jobs} == results.keys()
        for step in self.submitted:
            if isinstance(step, TransferJob):
                self.replay(step, results[step.job_id])
            else:
                for key in step:
                    self.present.pop(key, None)
        self.submitted = []
        assert self.present.keys() == {meta.key for meta in self.tier.entries()}
        self.client.faults.clear()
        assert [] == self.tier.check()

    @rule(count=st.integers(0, 12))
    def probe(self, count: int) -> None:
        self.wait()
        keys = tuple(meta_of(number, 1).key for number in range(count))
        result = wait_for_probe(self.tier, ProbeJob(7, NAMESPACE, keys))
        expected = next((index for index, key in enumerate(keys) if key not in self.present), count)
        assert (7, True, expected) == (result.job_id, result.is_complete, len(result.num_bytes))
        assert tuple(100 + number for number in range(expected)) == result.num_bytes

    def submit(self, job: TransferJob) -> None:
        """Hands a job in without waiting."""
        self.next_id += 1
        self.tier.submit(job)
        self.submitted.append(job)

    def replay(self, job: TransferJob, result: JobResult) -> None:
        """Compares a result with what the dict says at this point of the order."""
        assert_right_bytes(job, result)
        for block, outcome in zip(job.blocks, result.outcomes, strict=True):
            key = block.meta.key
            if job.kind is JobKind.STORE:
                assert outcome in ((Outcome.OK,) if key in self.present else (Outcome.OK, Outcome.REJECTED))
                if outcome is Outcome.OK:
                    self.present[key] = block.meta
            else:
                # a block that was refused later could be read while it was on its way out
                allowed = (Outcome.OK,) if key in self.present else (Outcome.MISS, Outcome.OK)
                assert outcome in allowed, f"{outcome} for {key.hex()}"

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.client.faults.clear()
            self.wait()
            self.tier.close()
            assert self.client.is_closed


RemoteMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # threads have a say in what fails: shrinking would try in vain
)
