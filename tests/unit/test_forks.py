"""A forked child counts what its parent has open as closed, and touches nothing of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.config import Config
from kvtier.engine import CacheEngine
from kvtier.errors import ClosedError
from kvtier.hashing import Namespace
from kvtier.io import EngineKind
from kvtier.testing.remote import PREFIX, MemoryClient
from kvtier.testing.tiers import NAMESPACE, load, meta_of, store, store_job, wait_for
from kvtier.tiers.base import Tier
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.remote import RemoteSettings, RemoteTier
from kvtier.types import Outcome, ProbeJob

METAS = [meta_of(number, 5000) for number in range(6)]
KEYS = [meta.key for meta in METAS]


def in_child(work: Callable[[], None]) -> None:
    """Does something in a forked child, which must end well and soon."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(10)
            work()
            status = 0
        finally:
            os._exit(status)
    assert (child, 0) == os.waitpid(child, 0)


def assert_closed(tier: Tier) -> None:
    """Closed, and without a memory of the parent's jobs."""
    with pytest.raises(ClosedError):
        tier.submit(store_job(7, METAS))
    assert [] == tier.poll()
    assert [] == tier.poll(60.0)
    tier.remove(KEYS)
    tier.take_events()
    tier.close()
    tier.close()


@pytest.mark.parametrize("io_engine", ["auto", "threads"])
def test_disk_tier(tmp_path: Path, io_engine: EngineKind) -> None:
    """With jobs under way, a result that nobody has asked for and the lock taken: the parent goes on as if there were no child."""
    tier = DiskTier(tmp_path, 16 << 20, segment_bytes=1 << 20, io_engine=io_engine)
    assert {Outcome.OK} == set(store(tier, METAS[:2]))
    tier.submit(store_job(2, []))
    tier.submit(store_job(3, METAS[2:4]))
    with tier._lock:
        in_child(lambda: assert_closed(tier))
    assert {2, 3} == {result.job_id for result in wait_for(tier, 2)}
    in_child(lambda: assert_closed(tier))
    assert not (tmp_path / "clean").exists(), "the parent has the index open"
    assert {Outcome.OK} == set(store(tier, METAS[4:]))
    assert {Outcome.OK} == set(load(tier, METAS))
    assert [] == tier.check()
    tier.close()
    tier = DiskTier(tmp_path, 16 << 20, segment_bytes=1 << 20)
    assert ("clean", len(METAS)) == (tier.recovery.source, tier.recovery.num_blocks)
    tier.close()


def test_remote_tier() -> None:
    """With a call under way and the lock taken: the child leaves the client alone."""
    client = MemoryClient()
    tier = RemoteTier(client, name="remote", settings=RemoteSettings(prefix=PREFIX, threads=2))
    store(tier, METAS[:2])
    client.gate.clear()
    tier.submit(store_job(3, METAS[2:]))
    tier.probe(ProbeJob(4, NAMESPACE, tuple(KEYS[:2])))

    def look() -> None:
        calls = list(client.calls)
        assert_closed(tier)
        with pytest.raises(ClosedError):
            tier.probe(ProbeJob(5, NAMESPACE, tuple(KEYS)))
        assert [] == tier.take_probes()
        assert (calls, False) == (client.calls, client.is_closed)

    with tier._lock:
        in_child(look)
    client.gate.set()
    assert {Outcome.OK} == set(wait_for(tier)[0].outcomes)
    assert {Outcome.OK} == set(load(tier, METAS))
    tier.close()


def test_cache_engine(tmp_path: Path) -> None:
    """With blocks on their way to the disk: the child's ``close`` waits for nobody, the parent's writes all of them."""
    disk = {"type": "disk", "path": str(tmp_path), "capacity": "16MiB", "segment": "1MiB"}
    config = Config.from_mapping({"tiers": [{"type": "host", "capacity": "4MiB"}, disk]})
    engine = CacheEngine.open(config, namespace=Namespace(model="test"), block_bytes=5000)
    while engine.is_growing:
        engine.poll()
    plan = engine.begin_store(KEYS, 0)
    engine.commit_store(plan.job_id)
    engine.poll()

    def look() -> None:
        with pytest.raises(ClosedError):
            engine.poll()
        engine.close()

    in_child(look)
    engine.close()
    tier = DiskTier(tmp_path, 16 << 20, segment_bytes=1 << 20)
    assert ("clean", len(KEYS)) == (tier.recovery.source, tier.lookup(KEYS))
    tier.close()
