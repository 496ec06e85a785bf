"""The Redis tier against servers as they are deployed: TLS, users with few rights, a cluster, a sentinel that moves the primary."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvtier.config import Config, RedisTierConfig
from kvtier.errors import ConfigError, RemoteError
from kvtier.remote_tiers import open_remote
from kvtier.testing.fault_proxy import FaultProxy
from kvtier.testing.remote import wait_for_probe
from kvtier.testing.servers import ValkeyCluster, ValkeySentinel, ValkeyServer
from kvtier.testing.tiers import NAMESPACE, TierContract, load, meta_of, store
from kvtier.tiers.base import Tier
from kvtier.tiers.redis import RedisAccess, RedisClient
from kvtier.tiers.redis.wire import Wire
from kvtier.tiers.remote import Deadline, RemoteTier
from kvtier.types import Outcome, ProbeJob

MIB = 1 << 20


def open_tier(monkeypatch: pytest.MonkeyPatch, **settings: object) -> RemoteTier:
    """As the configuration opens it, with short deadlines; ``password`` is put where the settings say."""
    if "password" in settings:
        monkeypatch.setenv("KVTIER_TEST_PASSWORD", str(settings.pop("password")))
        settings["password_env"] = "KVTIER_TEST_PASSWORD"
    section = {"type": "redis", "stall_timeout": 0.5, "connect_timeout": 0.5, "total_timeout": 2.0, **settings}
    (tier,) = Config.from_mapping({"tiers": [{"type": "host", "capacity": "1MiB"}, section]}).lower
    assert isinstance(tier, RedisTierConfig)
    return open_remote(tier)


def wait_until(condition: Callable[[], bool]) -> None:
    """Half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def make_certificate(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1 that vouches for itself, and a server's context that shows it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kvtier test")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = directory / "public.pem", directory / "private.pem"
    public.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return public, context


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path).start()
    yield server
    server.kill()


def test_tls(server: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks pass through TLS; a certificate that nobody vouches for is refused, by name and without a block sent."""
    certificate, context = make_certificate(tmp_path)
    proxy = FaultProxy(server.socket_path, context)
    url = proxy.url.replace("redis://", "rediss://")
    try:
        tier = open_tier(monkeypatch, url=url, ca_file=str(certificate))
        metas = [meta_of(0, 3 * MIB), meta_of(1, 100)]
        assert (Outcome.OK,) * 2 == store(tier, metas)
        assert (Outcome.OK,) * 2 == load(tier, metas)
        proxy.bytes_per_s = 10.0 * MIB
        assert (Outcome.OK,) == store(tier, [meta_of(2, 12 * MIB)])  # longer than stall_timeout, and never without a byte for as long
        proxy.heal()
        proxy.cut_after_bytes = MIB
        assert Outcome.OK is not load(tier, metas[:1])[0]
        proxy.heal()
        wait_until(lambda: tier.online)
        assert (Outcome.OK,) * 2 == load(tier, metas)
        tier.close()
        with pytest.raises(RemoteError, match=f"127.0.0.1:{proxy.port}.*(?i:certificate)"):
            open_tier(monkeypatch, url=url)
        with pytest.raises(RemoteError, match=str(proxy.port)):
            open_tier(monkeypatch, url=proxy.url)  # no TLS where TLS is spoken
    finally:
        proxy.close()


def test_tls_that_takes_long_ends_by_the_deadline(tmp_path: Path) -> None:
    """Bytes that go out all the time, but too slowly."""
    certificate, context = make_certificate(tmp_path)
    left, right = socket.socketpair()

    def read_all() -> None:
        with contextlib.suppress(OSError), context.wrap_socket(right, server_side=True) as sock:
            while sock.recv(MIB):
                pass

    reader = threading.Thread(target=read_all)
    reader.start()
    ticks = itertools.count()
    with ssl.create_default_context(cafile=certificate).wrap_socket(left, server_hostname="127.0.0.1") as sock:
        wire = Wire(sock, "here", 60.0)
        with pytest.raises(RemoteError, match="not done within the total deadline"):
            wire.send([bytes(8 * MIB)], Deadline(4.0, clock=lambda: float(next(ticks))))
        wire.abort()
    reader.join()


def test_a_user_with_few_rights(server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs are all that is needed; a user that may only read is still served, and what it stores is refused and counted."""
    with redis.Redis(unix_socket_path=str(server.socket_path)) as admin:
        rights = ["~kvtier/*", "+get", "+strlen", "+ping"]
        admin.execute_command("ACL", "SETUSER", "writer", "on", ">pass-w", *rights, "+set", "+unlink")
        admin.execute_command("ACL", "SETUSER", "reader", "on", ">pass-r", *rights)
    writer = open_tier(monkeypatch, url=server.tcp_url, username="writer", password="pass-w")
    metas = [meta_of(number, 1000) for number in range(3)]
    assert (Outcome.OK,) * 3 == store(writer, metas)
    writer.remove([metas[2].key])
    reader = open_tier(monkeypatch, url=server.tcp_url, username="reader", password="pass-r")
    wait_until(lambda: len(wait_for_probe(reader, ProbeJob(1, NAMESPACE, tuple(meta.key for meta in metas))).num_bytes) == 2)
    assert (Outcome.OK, Outcome.OK, Outcome.MISS) == load(reader, metas)
    assert (Outcome.REJECTED,) == store(reader, [meta_of(9, 100)])
    assert reader.take_events()["refusals"] >= 1
    assert reader.online
    with pytest.raises(RemoteError, match=r"user reader\).*does not let"):
        open_tier(monkeypatch, url=server.tcp_url, username="reader", password="wrong")
    for tier in (writer, reader):
        tier.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three servers."""
    cluster = ValkeyCluster(tmp_path_factory.mktemp("cluster")).start()
    yield cluster
    cluster.kill()


class TestCluster(TierContract):
    """The contract of every tier, over three servers that keep a third of the blocks each."""

    @pytest.fixture(autouse=True)
    def _cluster(self, cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = cluster.nodes[0].tcp_url
        self.monkeypatch = monkeypatch

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(self.monkeypatch, url=self.url, cluster=True, prefix=f"{directory.name}/")


def test_a_cluster_spreads_blocks(cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each server has some; probes and batches go to all; with one server gone nothing wrong comes back, and with it again hits do."""
    tier = open_tier(monkeypatch, url=cluster.nodes[0].tcp_url, cluster=True, prefix="spread/", retries=0)
    metas = [meta_of(number, 5000) for number in range(40)]
    assert {Outcome.OK} == set(store(tier, metas))
    other = open_tier(monkeypatch, url=cluster.nodes[1].tcp_url, cluster=True, prefix="spread/", retries=0)
    assert 40 == len(wait_for_probe(other, ProbeJob(1, NAMESPACE, tuple(meta.key for meta in metas))).num_bytes)
    for node in cluster.nodes:
        with redis.Redis(port=node.port) as client:
            assert 5 < len(list(client.scan_iter("spread/*"))) < 30
    cluster.nodes[2].freeze()
    try:
        assert Outcome.OK is not load(other, metas, 5)[0] or Outcome.FAILED in load(other, metas, 6)
    finally:
        cluster.nodes[2].thaw()
    wait_until(lambda: other.online and {Outcome.OK} == set(load(other, metas, 7)))
    for each in (tier, other):
        each.close()


def test_the_rights_that_more_than_one_server_and_database_take(
    server: ValkeyServer, cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of docs, and without them an error that names the user."""
    rights = ["on", ">pass", "~kvtier/*", "+get", "+set", "+strlen", "+unlink", "+ping"]
    for node in (server, *cluster.nodes):
        node.command("ACL", "SETUSER", "few", *rights)
        node.command("ACL", "SETUSER", "enough", *rights, "+select", "+cluster|slots", "+command")
    in_database = {"url": f"{server.unix_url}?db=3", "password": "pass"}
    in_cluster = {"url": cluster.nodes[0].tcp_url, "cluster": True, "password": "pass"}
    for settings in (in_database, in_cluster):
        with pytest.raises(RemoteError, match=r"user few\)"):
            open_tier(monkeypatch, **settings, username="few")
        tier = open_tier(monkeypatch, **settings, username="enough")
        metas = [meta_of(number, 100) for number in range(9)]
        assert {Outcome.OK} == set(store(tier, metas)) == set(load(tier, metas))
        tier.close()


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At start an error that names address, user and cause, or a start without it, until it comes; when all of it dies, it goes offline."""
    cluster = ValkeyCluster(tmp_path)
    settings = {"url": cluster.nodes[0].tcp_url, "cluster": True, "prefix": "gone/", "retries": 0}
    with pytest.raises(RemoteError, match=rf"127.0.0.1:{cluster.nodes[0].port}/0 \(user default\).*cannot be connected"):
        open_tier(monkeypatch, **settings)
    tier = open_tier(monkeypatch, **settings, required=False)
    assert not tier.online
    try:
        cluster.start()
        wait_until(lambda: tier.online)
        metas = [meta_of(number, 1000) for number in range(20)]
        assert {Outcome.OK} == set(store(tier, metas))
        cluster.kill()
        for _ in range(5):
            assert {Outcome.FAILED} == set(load(tier, metas))
        assert not tier.online
        assert 3 <= tier.take_events()["connect_errors"]
        tier.close()
    finally:
        cluster.kill()


def test_a_plain_server_is_no_cluster(server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at start, with the address."""
    with pytest.raises(RemoteError, match=f"{server.port}.*Cluster mode is not enabled"):
        open_tier(monkeypatch, url=server.tcp_url, cluster=True)


def test_a_replica_that_took_over_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary of the cluster dies, also the one that the address names: hits and stores are back, by its replica, without a restart."""
    replica_folder = tmp_path / "replica"
    replica_folder.mkdir()
    cluster = ValkeyCluster(tmp_path).start()
    replica = cluster.add_replica(replica_folder, 0)
    try:
        tier = open_tier(monkeypatch, url=cluster.nodes[0].tcp_url, cluster=True, retries=0)
        metas = [meta_of(number, 1000) for number in range(20)]
        assert {Outcome.OK} == set(store(tier, metas))
        with redis.Redis(port=cluster.nodes[0].port) as client:
            wait_until(lambda: all(one["lag"] == 0 for one in client.info("replication").values() if isinstance(one, dict)))
        cluster.nodes[0].kill()
        replica.command("CLUSTER", "FAILOVER", "TAKEOVER")
        wait_until(lambda: tier.online and {Outcome.OK} == set(load(tier, metas)))
        wait_until(lambda: tier.online and {Outcome.OK} == set(store(tier, [meta_of(number, 500) for number in range(30, 40)])))
        tier.close()
    finally:
        replica.kill()
        cluster.kill()


def test_every_server_of_a_cluster_is_hedged(cluster: ValkeyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch asks again whichever server is late, not only the one that has its first block."""
    tier = open_tier(monkeypatch, url=cluster.nodes[0].tcp_url, cluster=True, prefix="hedged/", retries=0, hedge_after=0.05)
    metas = [meta_of(number, 1000) for number in range(40)]
    assert {Outcome.OK} == set(store(tier, metas))
    for node in cluster.nodes:
        node.freeze()
        try:
            assert Outcome.FAILED in load(tier, metas)
        finally:
            node.thaw()
        assert 1 <= tier.take_events()["hedged_reads"]
        wait_until(lambda: tier.online and {Outcome.OK} == set(load(tier, metas)))
        tier.take_events()
    tier.close()


def test_a_sentinel_names_a_new_primary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary dies; its replica takes over, and hits and stores are back without a restart. Takes as long as a sentinel takes."""
    folders = [tmp_path / name for name in ("primary", "replica", "sentinel")]
    for folder in folders:
        folder.mkdir()
    primary = ValkeyServer(folders[0]).start()
    replica = ValkeyServer(folders[1], "--replicaof", f"127.0.0.1 {primary.port}", "--repl-diskless-sync-delay", "0").start()
    sentinel = ValkeySentinel(folders[2], primary.port).start()
    try:
        tier = open_tier(monkeypatch, url=sentinel.url, sentinel="primary", retries=0)
        metas = [meta_of(number, 1000) for number in range(3)]
        assert (Outcome.OK,) * 3 == store(tier, metas)
        with redis.Redis(port=primary.port) as client:
            client.set("last", 1)  # WAIT is for what its own connection wrote, and this is behind all else
            wait_until(lambda: client.execute_command("WAIT", 1, 1000) == 1)
        with redis.Redis(port=sentinel.port) as client:
            wait_until(lambda: len(client.sentinel_slaves("primary")) == 1)
        primary.kill()
        wait_until(lambda: tier.online and (Outcome.OK,) * 3 == load(tier, metas))
        wait_until(lambda: tier.online and (Outcome.OK,) == store(tier, [meta_of(7, 500)]))
        tier.close()
    finally:
        for server in (sentinel, replica, primary):
            server.kill()


def test_sentinels_at_addresses_of_ipv6() -> None:
    """Their brackets are no part of the address."""
    client = RedisClient(RedisAccess(url="redis://[::1]:5000,b:6000/0", sentinel="primary"))
    pool = client._endpoint.pool_for("any", Deadline(5.0))
    places = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    assert [("::1", 5000), ("b", 6000)] == [(place["host"], place["port"]) for place in places]
    client.close()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"sentinel": "primary", "cluster": True, "url": "redis://a:1/0"}, "sentinel.*cluster is true"),
        ({"sentinel": "primary", "url": "redis://a/0"}, "sentinel.*names no sentinels"),
    ],
)
def test_sentinels_that_make_no_sense(settings: dict[str, object], problem: str) -> None:
    """Said with the field."""
    with pytest.raises(ConfigError, match=problem):
        Config.from_mapping({"tiers": [{"type": "host", "capacity": "1MiB"}, {"type": "redis", **settings}]})
