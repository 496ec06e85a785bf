"""The Redis tier against a real Valkey server, on its own and through a proxy that makes faults."""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from kvtier.errors import RemoteError, TierFormatError
from kvtier.testing.fault_proxy import FaultProxy
from kvtier.testing.remote import wait_for_probe
from kvtier.testing.servers import ValkeyServer
from kvtier.testing.tiers import NAMESPACE, TierContract, assert_right_bytes, load, load_job, meta_of, store, store_job, wait_for
from kvtier.tiers.base import Tier
from kvtier.tiers.health import MAX_CONSECUTIVE_FAILURES
from kvtier.tiers.record import pack_text
from kvtier.tiers.redis import RedisClient
from kvtier.tiers.redis.endpoint import RedisAccess
from kvtier.tiers.remote import Deadline, RemoteSettings, RemoteTier
from kvtier.tiers.remote.records import FORMAT_TITLE, HEADER_BYTES, name_of
from kvtier.types import BlockMeta, Outcome, ProbeJob

STALL_S = 0.3
TOTAL_S = 1.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """One server for the tests that do it no harm."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey")).start()
    yield server
    server.kill()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server that may be killed."""
    server = ValkeyServer(tmp_path).start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: ValkeyServer) -> Iterator[FaultProxy]:
    proxy = FaultProxy(("127.0.0.1", server.port))
    yield proxy
    proxy.close()


def open_tier(
    url: str, prefix: str = "test/", *, hedge_after_s: float | None = None, ttl_s: float | None = None, **access: str | None
) -> RemoteTier:
    """A tier with short deadlines and no retries."""
    where = RedisAccess(url=url, connect_timeout_s=STALL_S, stall_timeout_s=STALL_S, **access)  # type: ignore[arg-type]
    settings = RemoteSettings(prefix=prefix, retries=0, threads=3, total_timeout_s=TOTAL_S)
    return RemoteTier(RedisClient(where, ttl_s=ttl_s, hedge_after_s=hedge_after_s), name="redis", settings=settings)


def wait_until(condition: Callable[[], bool]) -> None:
    """Half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class TestContract(TierContract):
    """The contract of every tier, over a Unix socket."""

    @pytest.fixture(autouse=True)
    def _server(self, server: ValkeyServer) -> None:
        self.url = server.unix_url

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(self.url, f"{directory}/")


class TestContractByTcp(TestContract):
    """The same over TCP, with hedged reads that always come too late."""

    @pytest.fixture(autouse=True)
    def _server(self, server: ValkeyServer) -> None:
        self.url = server.tcp_url

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(self.url, f"{directory}/", hedge_after_s=10.0)


def blocks(tier: RemoteTier, count: int = 3, num_bytes: int = MIB) -> list[BlockMeta]:
    """Blocks that the tier has stored."""
    metas = [meta_of(number, num_bytes) for number in range(count)]
    assert (Outcome.OK,) * count == store(tier, metas)
    return metas


def test_large_blocks_and_probes(server: ValkeyServer, tmp_path: Path) -> None:
    """Blocks beyond any socket buffer, in one job, read by another tier that finds them by probing."""
    first, second = open_tier(server.unix_url, f"{tmp_path}/"), open_tier(server.tcp_url, f"{tmp_path}/")
    metas = blocks(first, 3, 9 * MIB + 1)
    keys = tuple(meta.key for meta in [*metas, meta_of(99, 1)])
    assert (9 * MIB + 1,) * 3 == wait_for_probe(second, ProbeJob(1, NAMESPACE, keys)).num_bytes
    assert (Outcome.OK,) * 3 == load(second, metas)
    assert [] == second.check()
    for tier in (first, second):
        tier.close()


def test_misses_between_hits(server: ValkeyServer, tmp_path: Path) -> None:
    """A batch of hits, misses and values of other lengths, small ones, so that replies lie close together."""
    tier = open_tier(server.unix_url, f"{tmp_path}/")
    stored = [meta_of(number, 1 + number) for number in range(0, 60, 2)]
    store(tier, stored)
    asked = [meta_of(number, 1 + number + (number % 6 == 0)) for number in range(60)]
    outcomes = load(tier, asked)
    expected = tuple(Outcome.OK if number % 2 == 0 and number % 6 else Outcome.MISS for number in range(60))
    assert expected == outcomes
    tier.close()


def test_time_to_live_is_the_servers(server: ValkeyServer, tmp_path: Path) -> None:
    """The server drops a block by itself, which is then a miss."""
    tier = open_tier(server.unix_url, f"{tmp_path}/", ttl_s=0.05)
    metas = blocks(tier, 1, 100)
    time.sleep(0.1)
    assert (Outcome.MISS,) == load(tier, metas)
    tier.close()


def test_nothing_is_overwritten(server: ValkeyServer, tmp_path: Path) -> None:
    """A second engine's store leaves the value of the first one."""
    prefix = f"{tmp_path}/"
    first = open_tier(server.unix_url, prefix)
    metas = blocks(first, 1, 100)
    other = BlockMeta(metas[0].key, meta_of(7, 1).key, 100)  # another parent: another header
    second = open_tier(server.unix_url, prefix)
    assert (Outcome.OK,) == store(second, [other])
    assert [] == first.check()
    for tier in (first, second):
        tier.close()


def test_wrong_password(tmp_path: Path) -> None:
    """An error that names server and user and no secret; with the right one all is well."""
    server = ValkeyServer(tmp_path, "--requirepass", "right-secret").start()
    try:
        for username in (None, "somebody"):
            with pytest.raises(RemoteError, match=username or "default") as caught:
                open_tier(server.tcp_url, username=username, password="wrong-secret")
            assert "auth_errors" == caught.value.event
            assert str(server.port) in str(caught.value)
            assert "secret" not in str(caught.value)
        with pytest.raises(RemoteError):
            open_tier(server.tcp_url)
        tier = open_tier(server.tcp_url, password="right-secret")
        assert (Outcome.OK,) * 3 == load(tier, blocks(tier))
        assert "secret" not in repr(tier._client._endpoint._access)  # type: ignore[attr-defined]
        tier.close()
    finally:
        server.kill()


def names_of(tier: RemoteTier, metas: list[BlockMeta]) -> list[str]:
    """Of their values in the store."""
    return [name_of(tier.settings.prefix, NAMESPACE, meta.key) for meta in metas]


def test_a_name_that_holds_something_else_costs_one_block(server: ValkeyServer, tmp_path: Path) -> None:
    """A hash where a value should be is a miss, as often as it is met; the blocks beside it come."""
    tier = open_tier(server.unix_url, f"{tmp_path}/")
    metas = blocks(tier, 4, 1000)
    with redis.Redis(unix_socket_path=str(server.socket_path)) as admin:
        admin.delete(names_of(tier, metas)[1])
        admin.hset(names_of(tier, metas)[1], "a", "b")
    for _ in range(MAX_CONSECUTIVE_FAILURES + 1):
        assert (Outcome.OK, Outcome.MISS, Outcome.OK, Outcome.OK) == load(tier, metas)
    other = open_tier(server.unix_url, f"{tmp_path}/")
    found = wait_for_probe(other, ProbeJob(1, NAMESPACE, tuple(meta.key for meta in metas)))
    assert (True, 1) == (found.is_complete, len(found.num_bytes))
    assert tier.online
    assert other.online
    tier.close()
    other.close()


def test_a_user_who_may_not_delete_goes_on_reading(own_server: ValkeyServer) -> None:
    """Values stay, which is counted; the store is as good as before."""
    with redis.Redis(unix_socket_path=str(own_server.socket_path)) as admin:
        admin.execute_command("ACL", "SETUSER", "w", "on", ">p", "~*", "+get", "+set", "+strlen", "+ping", "+client", "+select")
    tier = open_tier(own_server.unix_url, username="w", password="p")
    metas = blocks(tier, 2 * MAX_CONSECUTIVE_FAILURES, 1000)
    seen: Counter[str] = Counter()
    for count, meta in enumerate(metas[1:], start=1):
        tier.remove([meta.key])
        end = time.monotonic() + 30
        while seen["failed_removals"] < count:
            assert time.monotonic() < end
            seen.update(tier.take_events())
            time.sleep(0.005)
    assert len(metas) - 1 == seen["server_errors"]
    assert tier.online
    assert (Outcome.OK,) == load(tier, metas[:1])
    tier.close()


def test_another_format_version(server: ValkeyServer, tmp_path: Path) -> None:
    """A store of another version is refused with both versions named, and left as it is."""
    prefix = f"{tmp_path}/"
    open_tier(server.unix_url, prefix).close()
    with redis.Redis(unix_socket_path=str(server.socket_path)) as admin:
        other = pack_text(FORMAT_TITLE, {"format": "7"})
        admin.set(f"{prefix}format", other)
        with pytest.raises(TierFormatError, match=rf"{server.socket_path}.* of format version 7, this kvtier reads version 1"):
            open_tier(server.unix_url, prefix)
        assert other == admin.get(f"{prefix}format")


def test_out_of_memory(tmp_path: Path) -> None:
    """A full server refuses and is still read."""
    server = ValkeyServer(tmp_path, "--maxmemory", "20mb", "--maxmemory-policy", "noeviction").start()
    try:
        tier = open_tier(server.unix_url)
        metas = blocks(tier, 4)
        outcomes = {store(tier, [meta_of(number, MIB)], number)[0] for number in range(10, 40)}
        assert {Outcome.OK, Outcome.REJECTED} == outcomes
        assert tier.online
        assert tier.take_events()["refusals"] >= 1
        assert (Outcome.OK,) * 4 == load(tier, metas)
        tier.close()
    finally:
        server.kill()


def test_killed_and_back(own_server: ValkeyServer) -> None:
    """Loads fail, then are not tried; when the server is back, so are hits, with new blocks."""
    tier = open_tier(own_server.unix_url)
    metas = blocks(tier)
    own_server.kill()
    for job_id in range(MAX_CONSECUTIVE_FAILURES):
        assert {Outcome.FAILED} == set(load(tier, metas, job_id))
    assert not tier.online
    own_server.start()
    wait_until(lambda: tier.online)
    assert {Outcome.MISS} == set(load(tier, metas))  # it kept nothing
    assert (Outcome.OK,) * 3 == load(tier, blocks(tier))
    assert tier.take_events()["connect_errors"] >= MAX_CONSECUTIVE_FAILURES
    tier.close()


def test_frozen_and_back(own_server: ValkeyServer) -> None:
    """A server that is stopped costs each call its deadline at most, then nothing; hits come back by themselves."""
    tier = open_tier(own_server.unix_url)
    metas = blocks(tier)
    own_server.freeze()
    try:
        start = time.monotonic()
        while tier.online:
            assert {Outcome.FAILED} == set(load(tier, metas))
        assert time.monotonic() - start < MAX_CONSECUTIVE_FAILURES * 4 * TOTAL_S
        assert 0 == tier.lookup([metas[0].key])
    finally:
        own_server.thaw()
    wait_until(lambda: tier.online)
    assert (Outcome.OK,) * 3 == load(tier, metas)
    assert tier.take_events()["timeouts"] >= 1
    tier.close()


def test_close_while_frozen(own_server: ValkeyServer) -> None:
    """``close`` ends although nothing answers, and every job has its result."""
    tier = open_tier(own_server.unix_url)
    metas = blocks(tier)
    own_server.freeze()
    try:
        tier.submit(load_job(1, metas))
        tier.close()
    finally:
        own_server.thaw()
    assert [{Outcome.FAILED}] == [set(result.outcomes) for result in tier.poll()]


def test_slow(server: ValkeyServer, proxy: FaultProxy, tmp_path: Path) -> None:
    """At 1 MB/s a block of 4 MiB does not come within the total deadline: FAILED, in time, and at full speed it is there again."""
    tier = open_tier(proxy.url, f"{tmp_path}/")
    metas = blocks(tier, 1, 4 * MIB)
    proxy.bytes_per_s = 1e6
    start = time.monotonic()
    tier.submit(load_job(9, metas))
    (result,) = wait_for(tier)
    assert (Outcome.FAILED,) == result.outcomes
    assert time.monotonic() - start < TOTAL_S + 2 * STALL_S
    assert {"timeouts": 1} == tier.take_events(), result.error
    proxy.heal()
    assert (Outcome.OK,) == load(tier, metas)
    tier.close()


@pytest.mark.parametrize("cut_after_bytes", [1, 7, HEADER_BYTES, MIB, 2 * MIB + 1000])
def test_cut(server: ValkeyServer, proxy: FaultProxy, tmp_path: Path, cut_after_bytes: int) -> None:
    """A connection that ends in the middle: what came whole is OK, the rest FAILED, and the next call works."""
    tier = open_tier(proxy.url, f"{tmp_path}/")
    metas = blocks(tier)
    proxy.cut_after_bytes = cut_after_bytes
    outcomes = load(tier, metas)
    assert Outcome.FAILED in outcomes
    assert set(outcomes) <= {Outcome.OK, Outcome.FAILED}
    proxy.heal()
    wait_until(lambda: tier.online)
    assert (Outcome.OK,) * 3 == load(tier, metas)
    tier.close()


@pytest.mark.parametrize("corrupt_at", [0, 3, 9, 50, 200, MIB, MIB + 139])
def test_corrupt(server: ValkeyServer, proxy: FaultProxy, tmp_path: Path, corrupt_at: int) -> None:
    """A flipped byte anywhere never becomes a block (``load`` compares the bytes of what is OK)."""
    tier = open_tier(proxy.url, f"{tmp_path}/")
    metas = blocks(tier, 1)
    proxy.corrupt_at = corrupt_at
    assert load(tier, metas)[0] is not Outcome.OK
    proxy.heal()
    wait_until(lambda: tier.online)
    store(tier, metas)
    assert (Outcome.OK,) == load(tier, metas)
    tier.close()


@pytest.mark.parametrize(
    "garbage",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 100_000, b"$99999999999999\r\n", b"$-7\r\n", b"$\r\n", b"$" + b"9" * 5000 + b"\r\n"],
)
def test_garbage(server: ValkeyServer, proxy: FaultProxy, tmp_path: Path, garbage: bytes) -> None:
    """Whatever comes back instead of an answer: FAILED or MISS in time, never a block; afterwards hits are back."""
    tier = open_tier(proxy.url, f"{tmp_path}/")
    metas = blocks(tier)
    proxy.garbage = garbage
    assert set(load(tier, metas)) <= {Outcome.FAILED, Outcome.MISS}
    assert tier.take_events().keys() & {"protocol_errors", "timeouts"}
    proxy.heal()
    wait_until(lambda: tier.online)
    store(tier, metas)
    assert (Outcome.OK,) * 3 == load(tier, metas)
    tier.close()


def test_half_open(server: ValkeyServer, proxy: FaultProxy, tmp_path: Path) -> None:
    """Connections that stay and carry nothing: each call ends by its deadlines; the breaker opens; hits come back."""
    tier = open_tier(proxy.url, f"{tmp_path}/")
    metas = blocks(tier)
    proxy.is_half_open = True
    while tier.online:
        assert {Outcome.FAILED} == set(load(tier, metas))
    proxy.heal()
    wait_until(lambda: tier.online)
    assert (Outcome.OK,) * 3 == load(tier, metas)
    assert 1 <= tier.offline_count
    tier.close()


def test_hedged_read(server: ValkeyServer, proxy: FaultProxy, tmp_path: Path) -> None:
    """A read whose connection hangs is answered on a second one."""
    tier = open_tier(proxy.url, f"{tmp_path}/", hedge_after_s=0.02)
    metas = blocks(tier, 2, 1000)
    assert (Outcome.OK,) * 2 == load(tier, metas)
    proxy.delay_s = 0.06
    assert (Outcome.OK,) * 2 == load(tier, metas)
    proxy.heal()
    assert tier.take_events()["hedged_reads"] >= 1
    job = load_job(5, metas)
    tier.submit(job)
    (result,) = wait_for(tier)
    assert_right_bytes(job, result)
    assert (Outcome.OK,) * 2 == result.outcomes
    tier.close()


def test_a_hedge_that_gets_no_connection_harms_nothing(own_server: ValkeyServer) -> None:
    """The first connection still answers; a server that answers on neither is silent for ``stall_timeout``, as without hedging."""
    proxy = FaultProxy(("127.0.0.1", own_server.port))
    tier = open_tier(proxy.url, hedge_after_s=0.02)
    metas = blocks(tier, 2, 1000)
    assert (Outcome.OK,) * 2 == load(tier, metas)
    proxy.delay_s = 0.06
    with redis.Redis(port=own_server.port) as admin:
        admin.config_set("maxclients", 1)
        assert (Outcome.OK,) * 2 == load(tier, metas)
        assert 1 == tier.take_events()["hedged_reads"]
        admin.config_set("maxclients", 100)
    proxy.heal()
    own_server.freeze()
    tier.submit(load_job(5, metas))
    (result,) = wait_for(tier)
    own_server.thaw()
    assert "no byte moved for 0.3 s" in (result.error or "")
    tier.close()
    proxy.close()


def test_hedged_reads_beside_many_open_files(server: ValkeyServer, tmp_path: Path) -> None:
    """An engine may have more than the 1024 descriptors that ``select`` can ask about."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, limits[1]), limits[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        tier = open_tier(server.unix_url, f"{tmp_path}/", hedge_after_s=10.0)
        metas = blocks(tier, 2, 1000)
        assert (Outcome.OK,) * 2 == load(tier, metas)
        tier.close()
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_abort_ends_a_call_that_is_connecting(server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets its connection just then sends nothing on it."""
    client = RedisClient(RedisAccess(url=server.tcp_url))
    connect = redis.ConnectionPool.get_connection

    def late(pool: redis.ConnectionPool) -> object:
        connection = connect(pool)
        client.abort()
        return connection

    monkeypatch.setattr(redis.ConnectionPool, "get_connection", late)
    with pytest.raises(RemoteError, match="the tier is closing"):
        client.sizes(["test/x"], Deadline(5.0))
    client.close()


def test_a_value_on_its_way_is_not_torn(server: ValkeyServer, proxy: FaultProxy, tmp_path: Path) -> None:
    """A store that is cut off leaves no half value."""
    tier = open_tier(proxy.url, f"{tmp_path}/")
    blocks(tier, 1, 100)
    proxy.is_refusing = True
    tier.submit(store_job(1, [meta_of(5, 8 * MIB)]))
    (result,) = wait_for(tier)
    assert (Outcome.FAILED,) == result.outcomes
    proxy.heal()
    direct = open_tier(server.unix_url, f"{tmp_path}/")
    assert (None,) == tuple(direct._client.sizes([name_of(f"{tmp_path}/", NAMESPACE, meta_of(5, 1).key)], Deadline(5.0)))
    for each in (tier, direct):
        each.close()
