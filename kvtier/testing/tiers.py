"""The contract of a tier as tests to subclass, and doubles that make a tier fail or wait.

::

    class TestMyTier(TierContract):
        def make_tier(self, directory: Path) -> Tier:
            return MyTier(directory)
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from kvtier.errors import ClosedError
from kvtier.tiers.base import LastingTier, Tier
from kvtier.types import BlockIO, BlockKey, BlockMeta, Damage, JobKind, JobResult, Outcome, TransferJob

NAMESPACE = bytes(range(16))
"""the namespace of all jobs made here"""

_DEADLINE_S = 30.0


def key_of(number: int) -> BlockKey:
    """A key for a number."""
    return BlockKey(number.to_bytes(16, "little"))


def payload_of(key: BlockKey, num_bytes: int) -> bytes:
    """The only right content of a block: it follows from the key, so that any mix-up shows."""
    return random.Random(key).randbytes(num_bytes)


def meta_of(number: int, num_bytes: int) -> BlockMeta:
    """A block whose parent is the one before it."""
    return BlockMeta(key_of(number), key_of(number - 1) if number else None, num_bytes)


def store_job(job_id: int, metas: Sequence[BlockMeta], namespace: bytes = NAMESPACE) -> TransferJob:
    """A job that stores the right content of blocks."""
    blocks = tuple(BlockIO(meta, memoryview(bytearray(payload_of(meta.key, meta.num_bytes)))) for meta in metas)
    return TransferJob(job_id, JobKind.STORE, namespace, blocks)


def load_job(job_id: int, metas: Sequence[BlockMeta], namespace: bytes = NAMESPACE) -> TransferJob:
    """A job that loads blocks into buffers of its own."""
    return TransferJob(job_id, JobKind.LOAD, namespace, tuple(BlockIO(meta, memoryview(bytearray(meta.num_bytes))) for meta in metas))


def wait_for(tier: Tier, num_results: int = 1) -> list[JobResult]:
    """Polls until that many results came in. Fails after half a minute."""
    results: list[JobResult] = []
    deadline = time.monotonic() + _DEADLINE_S
    while len(results) < num_results:
        assert time.monotonic() < deadline, f"only {len(results)} of {num_results} results came"
        results += tier.poll(1.0)
    return results


def store(tier: Tier, metas: Sequence[BlockMeta], job_id: int = 1) -> tuple[Outcome, ...]:
    """Stores blocks and waits."""
    tier.submit(store_job(job_id, metas))
    (result,) = wait_for(tier)
    return result.outcomes


def load(tier: Tier, metas: Sequence[BlockMeta], job_id: int = 2, namespace: bytes = NAMESPACE) -> tuple[Outcome, ...]:
    """Loads blocks, waits, and checks the bytes of each that came out OK."""
    job = load_job(job_id, metas, namespace)
    tier.submit(job)
    (result,) = wait_for(tier)
    assert_right_bytes(job, result)
    return result.outcomes


def assert_right_bytes(job: TransferJob, result: JobResult) -> None:
    """Every block that came out OK has the content that its key demands."""
    assert len(job.blocks) == len(result.outcomes)
    for block, outcome in zip(job.blocks, result.outcomes, strict=True):
        if outcome is Outcome.OK:
            assert payload_of(block.meta.key, block.meta.num_bytes) == bytes(block.buffer), f"wrong bytes for {block.meta.key.hex()}"


class TierContract(ABC):
    """What :class:`~kvtier.tiers.base.Tier` promises. The tier must hold at least 16 blocks of ``block_bytes``."""

    block_bytes = 8192
    is_persistent = False
    """whether a second tier made for the directory finds what the first one stored before ``close()``"""

    @abstractmethod
    def make_tier(self, directory: Path) -> Tier:
        """A tier; the directory is its own."""

    def metas(self, count: int, first: int = 0) -> list[BlockMeta]:
        """Blocks of the usual size."""
        return [meta_of(number, self.block_bytes) for number in range(first, first + count)]

    def test_what_was_stored_is_loaded(self, tmp_path: Path) -> None:
        """A stored block comes back byte for byte, and only then is it looked up."""
        tier = self.make_tier(tmp_path)
        metas = self.metas(5)
        assert 0 == tier.lookup([meta.key for meta in metas])
        assert (Outcome.OK,) * 5 == store(tier, metas)
        assert 5 == tier.lookup([meta.key for meta in metas])
        assert (Outcome.OK,) * 5 == load(tier, metas)
        assert [] == tier.check()
        tier.close()

    def test_sizes_around_a_page(self, tmp_path: Path) -> None:
        """Payloads of any length come back, several lengths side by side."""
        tier = self.make_tier(tmp_path)
        metas = [meta_of(number, num_bytes) for number, num_bytes in enumerate((1, 4095, 4096, 4097, 8191))]
        for meta in metas:
            assert (Outcome.OK,) == store(tier, [meta])
        assert (Outcome.OK,) * len(metas) == load(tier, metas)
        assert [] == tier.check()
        tier.close()

    def test_lookup_counts_the_leading_run(self, tmp_path: Path) -> None:
        """``lookup`` stops at the first key that is absent."""
        tier = self.make_tier(tmp_path)
        metas = self.metas(4)
        store(tier, [metas[0], metas[1], metas[3]])
        assert 2 == tier.lookup([meta.key for meta in metas])
        assert 0 == tier.lookup([])
        tier.close()

    def test_absent_blocks_miss(self, tmp_path: Path) -> None:
        """A load of absent blocks is a MISS for those and OK for the others, in the job's order."""
        tier = self.make_tier(tmp_path)
        metas = self.metas(3)
        store(tier, [metas[1]])
        assert (Outcome.MISS, Outcome.OK, Outcome.MISS) == load(tier, metas)
        tier.close()

    def test_other_namespace_and_size_miss(self, tmp_path: Path) -> None:
        """A block is never handed to a job of another namespace, nor with another length."""
        tier = self.make_tier(tmp_path)
        metas = self.metas(1)
        store(tier, metas)
        assert (Outcome.MISS,) == load(tier, metas, namespace=bytes(16))
        assert (Outcome.MISS,) == load(tier, [meta_of(0, self.block_bytes + 1)])
        assert (Outcome.OK,) == load(tier, metas)
        tier.close()

    def test_store_of_a_present_block_is_ok(self, tmp_path: Path) -> None:
        """Values are immutable: a second store is OK and changes nothing."""
        tier = self.make_tier(tmp_path)
        metas = self.metas(2)
        store(tier, metas)
        assert (Outcome.OK, Outcome.OK) == store(tier, metas)
        assert (Outcome.OK, Outcome.OK) == load(tier, metas)
        tier.close()

    def test_every_job_is_reported_once(self, tmp_path: Path) -> None:
        """Each submitted job appears in exactly one poll, an empty one too, and no poll invents results."""
        tier = self.make_tier(tmp_path)
        assert [] == tier.poll()
        assert [] == tier.poll(5.0)  # nothing is running: no wait
        for job_id in range(8):
            tier.submit(store_job(job_id, self.metas(job_id)))
        results = wait_for(tier, 8)
        assert list(range(8)) == sorted(result.job_id for result in results)
        assert {result.job_id: result.job_id for result in results} == {result.job_id: len(result.outcomes) for result in results}
        assert [] == tier.poll()
        tier.close()

    def test_removed_blocks_are_gone(self, tmp_path: Path) -> None:
        """After ``remove`` a key is absent at once; removing absent keys is fine; it can be stored again."""
        tier = self.make_tier(tmp_path)
        metas = self.metas(2)
        store(tier, metas)
        tier.remove([metas[0].key, key_of(99)])
        assert 0 == tier.lookup([metas[0].key])
        assert (Outcome.MISS, Outcome.OK) == load(tier, metas)
        assert (Outcome.OK, Outcome.OK) == store(tier, metas)
        assert (Outcome.OK, Outcome.OK) == load(tier, metas)
        assert [] == tier.check()
        tier.close()

    def test_calls_take_effect_in_order(self, tmp_path: Path) -> None:
        """A load sees the store submitted before it and not the removal submitted after it, without a poll in between."""
        tier = self.make_tier(tmp_path)
        metas = self.metas(6)
        keys = [meta.key for meta in metas]
        jobs = [store_job(1, metas), load_job(2, metas)]
        tier.submit(jobs[0])
        tier.submit(jobs[1])
        tier.remove(keys)
        jobs += [load_job(3, metas), store_job(4, metas), load_job(5, metas)]
        for job in jobs[2:]:
            tier.submit(job)
        results = {result.job_id: result for result in wait_for(tier, 5)}
        expected = {1: Outcome.OK, 2: Outcome.OK, 3: Outcome.MISS, 4: Outcome.OK, 5: Outcome.OK}
        assert {job_id: (outcome,) * 6 for job_id, outcome in expected.items()} == {
            job_id: result.outcomes for job_id, result in results.items()
        }
        for job in jobs:
            assert_right_bytes(job, results[job.job_id])
        assert [] == tier.check()
        tier.close()

    def test_room_of_removed_blocks_is_free_for_later_stores(self, tmp_path: Path) -> None:
        """A full tier rejects; right after ``remove`` the same number of blocks fits, while loads of the old ones still end well."""
        tier = self.make_tier(tmp_path)
        bound = tier.max_blocks(self.block_bytes)
        if bound is None:
            tier.close()
            return
        old = self.metas(bound)
        assert (Outcome.OK,) * bound == store(tier, old)
        assert (Outcome.REJECTED,) == store(tier, self.metas(1, first=bound))
        last_look = load_job(10, old[: bound // 2])
        new = self.metas(bound // 2, first=bound)
        tier.submit(last_look)
        tier.remove([meta.key for meta in old[: bound // 2]])
        tier.submit(store_job(11, new))
        results = {result.job_id: result for result in wait_for(tier, 2)}
        assert {Outcome.OK} == set(results[10].outcomes)
        assert {Outcome.OK} == set(results[11].outcomes)
        assert_right_bytes(last_look, results[10])
        assert {Outcome.OK} == set(load(tier, new + old[bound // 2 :]))
        assert [] == tier.check()
        tier.close()

    def test_entries_are_ordered_by_age(self, tmp_path: Path) -> None:
        """``entries`` names every readable block with parent and size, oldest store first."""
        tier = self.make_tier(tmp_path)
        metas = self.metas(6)
        for meta in (metas[3], metas[0], metas[5], metas[1]):
            store(tier, [meta])
        tier.remove([metas[5].key])
        assert [metas[3], metas[0], metas[1]] == list(tier.entries())
        tier.close()

    def test_close_finishes_jobs(self, tmp_path: Path) -> None:
        """``close`` lets running jobs end, their results stay to be polled, it may be called twice, and ends submitting."""
        tier = self.make_tier(tmp_path)
        tier.submit(store_job(1, self.metas(8)))
        tier.close()
        tier.close()
        (result,) = tier.poll()
        assert (Outcome.OK,) * 8 == result.outcomes
        try:
            tier.submit(store_job(2, self.metas(1)))
        except ClosedError:
            return
        raise AssertionError("submit after close did not raise ClosedError")

    def test_a_second_tier_finds_the_blocks(self, tmp_path: Path) -> None:
        """Persistent tiers: what was stored and not removed is there after reopening, in the order of the stores."""
        if not self.is_persistent:
            return
        metas = self.metas(8)
        tier = self.make_tier(tmp_path)
        store(tier, metas)
        tier.remove([metas[2].key])
        tier.close()
        tier = self.make_tier(tmp_path)
        rest = metas[:2] + metas[3:]
        assert rest == list(tier.entries())
        assert (Outcome.OK,) * 7 == load(tier, rest)
        assert (Outcome.MISS,) == load(tier, [metas[2]])
        assert [] == tier.check()
        tier.close()


class _WrappedTier:
    """Hands every call to another tier."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.name = tier.name
        self.capacity_bytes = tier.capacity_bytes

    @property
    def online(self) -> bool:
        return self.tier.online

    def max_blocks(self, num_bytes: int) -> int | None:
        return self.tier.max_blocks(num_bytes)

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        return self.tier.lookup(keys)

    def submit(self, job: TransferJob) -> None:
        self.tier.submit(job)

    def poll(self, timeout_s: float = 0.0) -> list[JobResult]:
        return self.tier.poll(timeout_s)

    def remove(self, keys: Collection[BlockKey]) -> None:
        self.tier.remove(keys)

    def reset(self) -> None:
        if isinstance(self.tier, LastingTier):
            self.tier.reset()

    def entries(self) -> Iterator[BlockMeta]:
        return self.tier.entries()

    def take_events(self) -> Mapping[str, int]:
        return self.tier.take_events()

    def check(self) -> list[Damage]:
        return self.tier.check()

    def close(self) -> None:
        self.tier.close()


class FaultyTier(_WrappedTier):
    """Gives jobs bad outcomes on demand, the way a real tier would: what it reports is what it then is.

    ``fail_next(kind, outcome, count)`` decides the fate of whole jobs; ``is_offline`` makes everything fail until reset.
    """

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier)
        self.is_offline = False
        self.num_faults = 0
        self._planned: dict[JobKind, deque[Outcome]] = {kind: deque() for kind in JobKind}
        self._results: list[JobResult] = []

    @property
    def online(self) -> bool:
        """False while ``is_offline``."""
        return not self.is_offline and self.tier.online

    def fail_next(self, kind: JobKind, outcome: Outcome, count: int = 1) -> None:
        """Every block of the next ``count`` jobs of a kind comes out as ``outcome``."""
        self._planned[kind].extend([outcome] * count)

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        """Nothing while offline."""
        return 0 if self.is_offline else self.tier.lookup(keys)

    def submit(self, job: TransferJob) -> None:
        """Hands the job on, unless it is to fail."""
        planned = self._planned[job.kind]
        if self.is_offline:
            self._fault(job, Outcome.FAILED)
        elif planned:
            self._fault(job, planned.popleft())
        else:
            self.tier.submit(job)

    def poll(self, timeout_s: float = 0.0) -> list[JobResult]:
        """The results of failed jobs at once, the others when they come."""
        results, self._results = self._results, []
        return results + self.tier.poll(0.0 if results else timeout_s)

    def _fault(self, job: TransferJob, outcome: Outcome) -> None:
        self.num_faults += 1
        if job.kind is JobKind.LOAD:
            for block in job.blocks:
                block.buffer[:] = bytes([0xA5]) * block.buffer.nbytes  # undefined content, as undefined as can be
            if outcome in (Outcome.MISS, Outcome.CORRUPT):
                self.tier.remove([block.meta.key for block in job.blocks])
        self._results.append(JobResult(job.job_id, job.kind, (outcome,) * len(job.blocks), 0.0, 0, error="injected"))


class SlowTier(_WrappedTier):
    """Reports every job only ``delay_s`` after it was submitted, by the given clock.

    With a clock of one's own nothing ever sleeps: results appear when that clock has moved far enough.
    """

    def __init__(self, tier: Tier, delay_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(tier)
        self.delay_s = delay_s
        self._clock = clock
        self._due: dict[int, float] = {}
        self._held: list[JobResult] = []

    def submit(self, job: TransferJob) -> None:
        """Hands the job on at once; only its result is late."""
        self._due[job.job_id] = self._clock() + self.delay_s
        self.tier.submit(job)

    def poll(self, timeout_s: float = 0.0) -> list[JobResult]:
        """The results whose time has come."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._held += self.tier.poll(0.0)
            now = self._clock()
            ready = [result for result in self._held if self._due[result.job_id] <= now]
            if ready or not self._due or time.monotonic() >= deadline:
                break
            time.sleep(min(0.001, timeout_s))
        self._held = [result for result in self._held if result not in ready]
        for result in ready:
            del self._due[result.job_id]
        return ready
