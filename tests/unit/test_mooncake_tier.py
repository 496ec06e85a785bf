"""The Mooncake tier against a real master, with memory of a client in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtier.errors import RemoteError
from kvtier.memory.arena import Arena
from kvtier.testing.remote import wait_for_probe
from kvtier.testing.servers import MooncakeMaster
from kvtier.testing.starts import refused_threads
from kvtier.testing.tiers import NAMESPACE, TierContract, load, meta_of, payload_of, store, wait_for
from kvtier.tiers.base import Tier
from kvtier.tiers.remote import Deadline, RemoteSettings, RemoteTier
from kvtier.types import BlockIO, JobKind, Outcome, ProbeJob, TransferJob

pytest.importorskip("kvtier.tiers.mooncake", reason="Mooncake does not load", exc_type=ImportError)
from kvtier.tiers.mooncake import MooncakeAccess, MooncakeClient

MIB = 1 << 20
SEGMENT_BYTES = 64 * MIB
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeMaster]:
    master = MooncakeMaster(tmp_path_factory.mktemp("mooncake")).start()
    yield master
    master.kill()


@pytest.fixture(scope="module")
def member(master: MooncakeMaster) -> Iterator[MooncakeClient]:
    """A client that gives memory to the store. Starting one takes a second or more, so the tests share it."""
    client = MooncakeClient(MooncakeAccess(master=f"127.0.0.1:{master.port}", segment_bytes=SEGMENT_BYTES))
    client.ping(Deadline(60.0))
    yield client
    client.close()


class Shared(MooncakeClient):
    """A client over the store of another one, which it leaves open."""

    def close(self) -> None:
        self._release()


def open_tier(member: MooncakeClient, master: MooncakeMaster, prefix: str, total_timeout_s: float = 20.0) -> RemoteTier:
    """A tier over the shared client."""
    client = Shared(MooncakeAccess(master=f"127.0.0.1:{master.port}"), store=member._store)
    settings = RemoteSettings(prefix=prefix, retries=0, threads=2, total_timeout_s=total_timeout_s)
    return RemoteTier(client, name="mooncake", settings=settings)


def test_no_thread_to_be_had() -> None:
    """A limit on processes is a RemoteError that says so."""
    client = MooncakeClient(MooncakeAccess(master="127.0.0.1:1"))
    with refused_threads("kvtier-mooncake_0"), pytest.raises(RemoteError, match="can't start new thread"):
        client.ping(Deadline(1.0))
    client.close()


class TestContract(TierContract):
    """The contract of every tier."""

    @pytest.fixture(autouse=True)
    def _store(self, member: MooncakeClient, master: MooncakeMaster) -> None:
        self.member, self.master = member, master

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(self.member, self.master, f"{directory.name}-{time.monotonic_ns()}/")


def test_blocks_go_from_the_arena_and_come_to_it(member: MooncakeClient, master: MooncakeMaster, tmp_path: Path) -> None:
    """Another client, with the arena registered once, finds by probing what the first one stored, and reads it into a slot."""
    first = open_tier(member, master, "arena/")
    metas = [meta_of(number, 2 * MIB) for number in range(2)]
    assert (Outcome.OK,) * 2 == store(first, metas)
    arena = Arena.open(str(tmp_path / "arena"), 8 * MIB, huge_pages=False)
    access = MooncakeAccess(master=f"127.0.0.1:{master.port}")
    client = MooncakeClient(access, memory=(arena.address, arena.capacity_bytes))
    second = RemoteTier(client, name="mooncake", settings=RemoteSettings(prefix="arena/", retries=0, total_timeout_s=20.0))
    try:
        keys = tuple(meta.key for meta in [*metas, meta_of(9, 1)])
        assert (2 * MIB,) * 2 == wait_for_probe(second, ProbeJob(1, NAMESPACE, keys)).num_bytes
        views = [arena.view(number * 2 * MIB, 2 * MIB) for number in range(2)]
        second.submit(TransferJob(1, JobKind.LOAD, NAMESPACE, tuple(BlockIO(m, v) for m, v in zip(metas, views, strict=True))))
        (result,) = wait_for(second)
        assert (Outcome.OK,) * 2 == result.outcomes
        assert [payload_of(meta.key, 2 * MIB) for meta in metas] == [bytes(view) for view in views]
        assert [] == second.check()
        del views
    finally:
        second.close()
        first.close()
        arena.unlink()


def test_a_full_store_refuses(member: MooncakeClient, master: MooncakeMaster) -> None:
    """A block larger than the whole store is refused and counted, and what is there is still read."""
    tier = open_tier(member, master, "full/")
    metas = [meta_of(1, 1000)]
    store(tier, metas)
    assert (Outcome.REJECTED,) == store(tier, [meta_of(2, SEGMENT_BYTES + MIB)])
    assert 1 == tier.take_events()["refusals"]
    assert (Outcome.OK,) == load(tier, metas)
    tier.close()


def test_a_frozen_master_costs_a_question_its_deadline(member: MooncakeClient, master: MooncakeMaster) -> None:
    """Questions end by the deadline; the breaker opens; when the master is back, so are hits."""
    tier = open_tier(member, master, "frozen/", total_timeout_s=1.0)
    metas = [meta_of(1, 1000)]
    store(tier, metas)
    master.freeze()
    try:
        start = time.monotonic()
        with pytest.raises(RemoteError) as caught:
            tier._client.sizes(["any"], Deadline(0.5))
        assert "timeouts" == caught.value.event
        for number in range(3):
            assert not wait_for_probe(tier, ProbeJob(number, NAMESPACE, (metas[0].key,))).is_complete
        assert not tier.online
        assert time.monotonic() - start < 20.0
    finally:
        master.thaw()
    wait_until(lambda: tier.online)
    assert (Outcome.OK,) == load(tier, metas)
    tier.close()


def test_no_master() -> None:
    """An error that names it, or a tier that comes in once there is one."""
    client = MooncakeClient(MooncakeAccess(master="127.0.0.1:1"))
    with pytest.raises(RemoteError, match=r"mooncake master 127\.0\.0\.1:1 .*refused"):
        RemoteTier(client, name="mooncake", settings=RemoteSettings(retries=0))
    late = RemoteTier(
        MooncakeClient(MooncakeAccess(master="127.0.0.1:1")), name="mooncake", settings=RemoteSettings(retries=0, must_answer=False)
    )
    assert not late.online
    late.close()


def test_a_master_that_was_killed(tmp_path: Path) -> None:
    """Loads fail; with a new master, which knows of nothing, stores and hits are back without a restart."""
    master = MooncakeMaster(tmp_path).start()
    client = MooncakeClient(MooncakeAccess(master=f"127.0.0.1:{master.port}", segment_bytes=SEGMENT_BYTES))
    tier = RemoteTier(client, name="mooncake", settings=RemoteSettings(retries=0, threads=2, total_timeout_s=20.0))
    try:
        metas = [meta_of(1, 1000)]
        assert (Outcome.OK,) == store(tier, metas)
        master.kill()
        while tier.online:
            load(tier, metas)
        master.start()
        wait_until(lambda: tier.online)
        tier.forget([metas[0].key])
        wait_until(lambda: (Outcome.OK,) == store(tier, metas))
        assert (Outcome.OK,) == load(tier, metas)
    finally:
        tier.close()
        master.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    """Two minutes at most: Mooncake's own time-outs are long."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
