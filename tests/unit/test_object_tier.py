"""The object tier: in memory, in a folder, and against a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import obstore
import pytest

from kvtier.errors import RemoteError, TierFormatError
from kvtier.testing.fault_proxy import FaultProxy
from kvtier.testing.remote import wait_for_probe
from kvtier.testing.servers import S3Server
from kvtier.testing.starts import refused_threads
from kvtier.testing.tiers import NAMESPACE, TierContract, load, meta_of, store
from kvtier.tiers.base import Tier
from kvtier.tiers.object import ObjectAccess, ObjectClient
from kvtier.tiers.object import client as object_client
from kvtier.tiers.record import pack_text
from kvtier.tiers.remote import Answer, Deadline, Get, Put, RemoteSettings, RemoteTier
from kvtier.tiers.remote.client import DONE
from kvtier.tiers.remote.records import FORMAT_TITLE
from kvtier.types import BlockMeta, Outcome, ProbeJob

MIB = 1 << 20
TOTAL_S = 4.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests."""
    server = S3Server(tmp_path_factory.mktemp("s3")).start()
    yield server
    server.kill()


def open_tier(access: ObjectAccess, prefix: str = "kvtier/", total_timeout_s: float = 20.0) -> RemoteTier:
    """A tier that asks for each block on its own."""
    settings = RemoteSettings(prefix=prefix, retries=0, threads=4, batch_bytes=1, total_timeout_s=total_timeout_s)
    return RemoteTier(ObjectClient(access), name="object", settings=settings)


def s3(endpoint: str) -> ObjectAccess:
    """The server's bucket."""
    return ObjectAccess(url=f"s3://{S3Server.bucket}", endpoint=endpoint, region="us-east-1", access_key="any", secret_key="hidden-secret")


def wait_until(condition: Callable[[], bool]) -> None:
    """Half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_no_thread_to_be_had() -> None:
    """A limit on processes is a RemoteError that says so; nothing is left behind."""
    with refused_threads("kvtier-object-loop"), pytest.raises(RemoteError, match=r"memory:.*can't start new thread"):
        ObjectClient(ObjectAccess(url="memory:///"))
    gc.collect()  # a loop that nobody closed would be complained of


class TestMemory(TierContract):
    """The contract, in memory."""

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(ObjectAccess(url="memory:///"))


class TestFolder(TierContract):
    """The contract, in a folder."""

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(ObjectAccess(url=directory.as_uri()))


class TestS3(TierContract):
    """The contract, in S3."""

    @pytest.fixture(autouse=True)
    def _server(self, server: S3Server) -> None:
        self.endpoint = server.endpoint

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(s3(self.endpoint), f"{directory.name}-{time.monotonic_ns()}/")


def test_two_engines_share_a_bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one stored, in one piece or in parts, the other finds by probing, and loads."""
    monkeypatch.setattr(object_client, "MULTIPART_BYTES", 20 * MIB)
    first, second = open_tier(s3(server.endpoint), "share/"), open_tier(s3(server.endpoint), "share/")
    metas = [meta_of(0, 3 * MIB), meta_of(1, 33 * MIB)]
    assert (Outcome.OK,) * 2 == store(first, metas)
    keys = tuple(meta.key for meta in [*metas, meta_of(5, 1)])
    assert (3 * MIB, 33 * MIB) == wait_for_probe(second, ProbeJob(1, NAMESPACE, keys)).num_bytes
    assert (Outcome.OK,) * 2 == load(second, metas)
    other = BlockMeta(metas[0].key, meta_of(7, 1).key, 3 * MIB)
    third = open_tier(s3(server.endpoint), "share/")
    assert (Outcome.OK,) == store(third, [other])
    assert [] == first.check()  # it was not overwritten
    for tier in (first, second, third):
        tier.close()


@pytest.mark.parametrize("kind", ["memory", "folder", "s3"])
def test_large_objects_are_read_by_ranges(kind: str, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte lands where it belongs, at lengths around those of ranges; one of another length is told from one that is not there."""
    monkeypatch.setattr(object_client, "RANGE_BYTES", 1000)
    access = {"memory": ObjectAccess(url="memory:///"), "folder": ObjectAccess(url=tmp_path.as_uri()), "s3": s3(server.endpoint)}[kind]
    client = ObjectClient(access)

    def get(name: str, num_bytes: int) -> tuple[Answer, bytes]:
        header, payload = memoryview(bytearray(128)), memoryview(bytearray(num_bytes - 128))
        (reply,) = client.get_into([Get(name, header, payload)], Deadline(30.0))
        return reply.answer, bytes(header) + bytes(payload)

    for num_bytes in (129, 999, 1000, 1999, 2000, 2001, 3000, 3128):
        value = random.Random(num_bytes).randbytes(num_bytes)
        (reply,) = client.put([Put(f"ranges/{num_bytes}", value[:128], memoryview(value)[128:])], Deadline(30.0))
        assert reply.answer is Answer.DONE
        assert (Answer.DONE, value) == get(f"ranges/{num_bytes}", num_bytes)
        for other in (num_bytes - 1, num_bytes + 1, num_bytes + 1000, 5000):
            assert get(f"ranges/{num_bytes}", other)[0] is Answer.OTHER_SIZE
    assert get("ranges/none", 2500)[0] is Answer.ABSENT
    client.close()


def test_slow_cut_and_back(server: S3Server) -> None:
    """At 1 MB/s, with cut and with refused connections, loads fail in time; hits come back."""
    proxy = FaultProxy(("127.0.0.1", int(server.endpoint.rpartition(":")[2])))
    tier = open_tier(s3(f"http://127.0.0.1:{proxy.port}"), "slow/", TOTAL_S)
    metas = [meta_of(0, 8 * MIB)]
    try:
        assert (Outcome.OK,) == store(tier, metas)
        proxy.bytes_per_s = 1e6
        start = time.monotonic()
        assert (Outcome.FAILED,) == load(tier, metas)
        assert time.monotonic() - start < 2 * TOTAL_S
        proxy.heal()
        proxy.cut_after_bytes = MIB
        assert (Outcome.FAILED,) == load(tier, metas)
        proxy.heal()
        proxy.is_refusing = True
        assert (Outcome.FAILED,) == load(tier, metas)
        assert not tier.online
        proxy.heal()
        wait_until(lambda: tier.online)
        assert (Outcome.OK,) == load(tier, metas)
        assert tier.take_events()["timeouts"] >= 1
    finally:
        tier.close()
        proxy.close()


def test_a_long_prompt_is_asked_for_in_parts(server: S3Server) -> None:
    """Many names at once get an answer each, in order."""
    client = ObjectClient(s3(server.endpoint))
    store = s3(server.endpoint).open()
    for number in range(0, 150, 7):
        obstore.put(store, f"long/{number}", bytes(number + 1))
    expected = [None if number % 7 else number + 1 for number in range(150)]
    assert expected == client.sizes([f"long/{number}" for number in range(150)], Deadline(30.0))
    client.close()


def test_a_bucket_of_another_format_version(server: S3Server) -> None:
    """Refused with both versions named."""
    store = s3(server.endpoint).open()
    obstore.put(store, "other/format", pack_text(FORMAT_TITLE, {"format": "7"}))
    with pytest.raises(TierFormatError, match=r"s3://kvtier.* of format version 7, this kvtier reads version 1"):
        open_tier(s3(server.endpoint), "other/")
    obstore.put(store, "empty/format", b"")
    with pytest.raises(TierFormatError, match=r"empty/format in the store at s3://kvtier.* is not kvtier's"):
        open_tier(s3(server.endpoint), "empty/")


def test_nothing_is_left_of_requests_that_were_given_up(server: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    """Closing right after a time-out ends them too; asyncio complains of those that it finds later."""
    proxy = FaultProxy(("127.0.0.1", int(server.endpoint.rpartition(":")[2])))
    proxy.is_half_open = True
    client = ObjectClient(s3(f"http://127.0.0.1:{proxy.port}"))
    with pytest.raises(RemoteError, match="total deadline"):
        client.sizes([f"given-up/{number}" for number in range(20)], Deadline(0.2))
    client.close()
    del client
    gc.collect()
    assert [] == caplog.messages
    proxy.close()


def test_few_deletions_are_under_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a connection."""
    num_running, most = 0, 0
    delete = obstore.delete_async

    async def counted(bucket: object, name: str) -> None:
        nonlocal num_running, most
        num_running += 1
        most = max(most, num_running)
        await asyncio.sleep(0.001)
        await delete(bucket, name)  # type: ignore[arg-type]
        num_running -= 1

    monkeypatch.setattr(obstore, "delete_async", counted)
    client = ObjectClient(ObjectAccess(url="memory://"))
    names = [f"name-{number}" for number in range(300)]
    assert {DONE} == {reply for name in names for reply in client.put([Put(name, b"", memoryview(b"x"))], Deadline(TOTAL_S))}
    client.delete([*names, "absent"], Deadline(TOTAL_S))
    assert [None] * 300 == client.sizes(names, Deadline(TOTAL_S))
    assert 1 < most <= 64
    client.close()


def answer_without_end(connection: socket.socket, num_bytes: int, sent: list[int]) -> None:
    """Says that it sends the range that was asked for, of a value of that length, and then sends bytes without end. Counts them."""
    with connection, contextlib.suppress(OSError):
        span = connection.recv(1 << 16).decode().lower().partition("range: bytes=")[2].split("\r\n")[0]
        lines = [
            "HTTP/1.1 206 Partial Content",
            f"Content-Range: bytes {span}/{num_bytes}",
            f"Content-Length: {1 << 36}",
            'ETag: "x"',
            "Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT",
        ]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        while True:
            sent.append(connection.send(bytes(MIB)))


def test_a_body_without_end_is_not_kept() -> None:
    """Of each range no more is read than was asked for, and the block is none of that length."""
    sent: list[int] = []
    num_bytes = 2 * object_client.RANGE_BYTES

    def serve() -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            threading.Thread(target=answer_without_end, args=(connection, num_bytes, sent), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        client = ObjectClient(s3(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        value = memoryview(bytearray(num_bytes))
        (reply,) = client.get_into([Get("name", value[:128], value[128:])], Deadline(TOTAL_S))
        client.close()
    assert Answer.OTHER_SIZE is reply.answer
    assert 0 < sum(sent) < 10 * num_bytes


def test_a_server_that_is_not_there() -> None:
    """An error that names the bucket, the address and the key, and no secret."""
    with pytest.raises(RemoteError, match=r"s3://kvtier at http://127.0.0.1:1 \(access key any\)") as caught:
        open_tier(s3("http://127.0.0.1:1"))
    assert "hidden" not in str(caught.value)
    assert "hidden" not in repr(s3("http://127.0.0.1:1"))
