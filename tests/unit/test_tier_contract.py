"""Every tier and every wrapper keeps the tier contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.errors import ClosedError
from kvtier.testing.tiers import FaultyTier, SlowTier, TierContract, load, meta_of, store, store_job
from kvtier.tiers import NullTier, Tier
from kvtier.tiers.disk import DiskTier
from kvtier.types import JobKind, Outcome

SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = (1 << 20) + (32 << 10) + 6 * SEGMENT_BYTES


class TestDiskTier(TierContract):
    """The disk tier."""

    is_persistent = True

    def make_tier(self, directory: Path) -> Tier:
        return DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES)


class TestDiskTierInThePageCache(TierContract):
    """The disk tier without direct I/O, with one thread and without syncing."""

    is_persistent = True

    def make_tier(self, directory: Path) -> Tier:
        return DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, direct_io="off", io_threads=1, durable=False)


class TestDiskTierOnThreads(TierContract):
    """The disk tier without io_uring."""

    is_persistent = True

    def make_tier(self, directory: Path) -> Tier:
        return DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, io_engine="threads", queue_depth=2)


class TestFaultyTierWithoutFaults(TierContract):
    """The fault injector is invisible until told otherwise."""

    is_persistent = True

    def make_tier(self, directory: Path) -> Tier:
        return FaultyTier(DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES))


class TestSlowTier(TierContract):
    """The delay changes when results come, nothing else."""

    is_persistent = True

    def make_tier(self, directory: Path) -> Tier:
        return SlowTier(DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES), delay_s=0.002)

    def test_close_finishes_jobs(self, tmp_path: Path) -> None:
        """``close`` ends submitting; results still come when their time has come."""
        tier = self.make_tier(tmp_path)
        tier.submit(store_job(1, self.metas(8)))
        tier.close()
        (result,) = tier.poll(5.0)
        assert (Outcome.OK,) * 8 == result.outcomes


def test_slow_tier_follows_the_given_clock(tmp_path: Path) -> None:
    """With a clock of its own the slow tier reports exactly when that clock has passed the delay."""
    now = [0.0]
    tier = SlowTier(NullTier(), delay_s=5.0, clock=lambda: now[0])
    tier.submit(store_job(1, [meta_of(1, 10)]))
    now[0] = 4.9
    assert [] == tier.poll()
    now[0] = 5.0
    assert [1] == [result.job_id for result in tier.poll()]


def test_faulty_tier_fails_as_told(tmp_path: Path) -> None:
    """A planned outcome hits the next job of its kind only, and a corrupt block is forgotten."""
    tier = FaultyTier(DiskTier(tmp_path, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES))
    metas = [meta_of(1, 100)]
    tier.fail_next(JobKind.STORE, Outcome.FAILED)
    assert (Outcome.FAILED,) == store(tier, metas)
    assert 0 == tier.lookup([metas[0].key])
    assert (Outcome.OK,) == store(tier, metas)
    tier.fail_next(JobKind.LOAD, Outcome.CORRUPT)
    assert (Outcome.CORRUPT,) == load(tier, metas)
    assert (Outcome.MISS,) == load(tier, metas)
    tier.is_offline = True
    assert not tier.online
    assert (Outcome.FAILED,) == store(tier, metas)
    tier.close()


def test_null_tier_keeps_nothing() -> None:
    """The null tier rejects stores, misses loads and honours the rest of the contract."""
    tier = NullTier()
    metas = [meta_of(1, 100), meta_of(2, 100)]
    assert (Outcome.REJECTED,) * 2 == store(tier, metas)
    assert (Outcome.MISS,) * 2 == load(tier, metas)
    assert 0 == tier.lookup([metas[0].key])
    assert 0 == tier.max_blocks(100)
    tier.remove([metas[0].key])
    assert [] == list(tier.entries())
    assert [] == tier.check()
    tier.close()
    tier.close()
    with pytest.raises(ClosedError):
        tier.submit(store_job(1, metas))
