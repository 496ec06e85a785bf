"""The servers that ``kvtier bench remote`` measures against, and the barest way to move bytes to and from each."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier.testing.servers import MooncakeMaster, S3Server, ValkeyServer
from kvtier.tiers.redis import RedisAccess, RedisClient
from kvtier.tiers.redis.wire import command
from kvtier.tiers.remote import Deadline, RemoteClient

if TYPE_CHECKING:
    from kvtier.tiers.mooncake import MooncakeClient
    from kvtier.tiers.object import ObjectAccess

STORES = ("redis-unix", "redis-tcp", "mooncake", "s3")

_SEGMENT_BYTES = 2 << 30
_REPLY_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Store:
    """A server and how to use it, by the tier's client and raw."""

    name: str
    kind: str
    open_client: Callable[[tuple[int, int]], RemoteClient]
    """given the address and length of the memory that its blocks lie in"""
    raw_put: Callable[[str, memoryview], None]
    raw_get: Callable[[str, memoryview], None]
    raw_delete: Callable[[Sequence[str]], None]
    """of names that may not be there; returns once the server is done with it, and with what others have deleted"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """settings of the tier"""
    peer_url: str = ""
    """for a peer; empty: it has no way there"""


def start_stores(stack: contextlib.ExitStack, directory: Path, names: Sequence[str]) -> Iterator[Store]:
    """The stores of these names, each started when it is its turn."""
    for name in names:
        folder = directory / name
        folder.mkdir()
        if name == "mooncake":
            yield _mooncake(stack, folder)
        else:
            yield _s3(stack, folder) if name == "s3" else _redis(stack, folder, name)


def _redis(stack: contextlib.ExitStack, folder: Path, name: str) -> Store:
    server = ValkeyServer(folder).start()
    stack.callback(server.kill)
    place: Any = str(server.socket_path) if name == "redis-unix" else ("127.0.0.1", server.port)
    url = server.unix_url if name == "redis-unix" else server.tcp_url
    raw = _RawRedis(place)
    stack.callback(raw.close)
    access = RedisAccess(url=url, stall_timeout_s=30.0)
    peer_url = "" if name == "redis-unix" else f"resp://127.0.0.1:{server.port}"
    return Store(name, "redis", lambda _: RedisClient(access), raw.put, raw.get, raw.delete, peer_url=peer_url)


def _s3(stack: contextlib.ExitStack, folder: Path) -> Store:
    from kvtier.tiers.object import ObjectAccess, ObjectClient  # noqa: PLC0415 - each store's client is an extra of its own

    server = S3Server(folder, names_buckets=True).start()
    stack.callback(server.kill)
    access = ObjectAccess(
        url=f"s3://{server.bucket}",
        endpoint=server.endpoint,
        region="us-east-1",
        access_key="any",
        secret_key="any",
        request_timeout_s=60.0,
    )
    raw = _RawObjects(access)
    options = {"threads": 8, "batch_bytes": 1}
    peer_url = f"s3://{server.bucket_by_host}"
    return Store("s3", "object", lambda _: ObjectClient(access), raw.put, raw.get, raw.delete, options, peer_url)


def _mooncake(stack: contextlib.ExitStack, folder: Path) -> Store:
    """A master, and a member that gives memory, in this process; the tier and the raw transfers use a client of their own each."""
    from kvtier.tiers.mooncake import MooncakeAccess, MooncakeClient  # noqa: PLC0415 - as above

    master = MooncakeMaster(folder).start()
    stack.callback(master.kill)
    place = master.url.partition("//")[2]
    member = MooncakeClient(MooncakeAccess(master=place, segment_bytes=_SEGMENT_BYTES))
    stack.callback(member.close)
    member.ping(Deadline(60.0))
    raw = _RawMooncake(MooncakeClient(MooncakeAccess(master=place)))
    stack.callback(raw.close)

    def open_client(memory: tuple[int, int]) -> RemoteClient:
        raw.register(memory)
        return MooncakeClient(MooncakeAccess(master=place), memory=memory)

    return Store("mooncake", "mooncake", open_client, raw.put, raw.get, raw.delete)


class _RawMooncake:
    """Mooncake's own put and get, on memory that is registered once."""

    def __init__(self, client: MooncakeClient) -> None:
        self._client = client
        self._client.ping(Deadline(60.0))
        self._store = self._client._store
        self._registered = 0

    def register(self, memory: tuple[int, int]) -> None:
        """Where all buffers lie from now on."""
        if self._registered:
            self._store.unregister_buffer(self._registered)
        self._registered = memory[0]
        assert self._store.register_buffer(*memory) == 0

    def put(self, name: str, buffer: memoryview) -> None:
        statuses = self._store.batch_put_from([name], [self._address(buffer)], [len(buffer)])
        assert [0] == statuses, statuses

    def get(self, name: str, buffer: memoryview) -> None:
        assert [len(buffer)] == self._store.batch_get_into([name], [self._address(buffer)], [len(buffer)])

    def delete(self, names: Sequence[str]) -> None:
        self._store.batch_remove(list(names), True)

    def close(self) -> None:
        """Leaves the store."""
        self._client.close()

    @staticmethod
    def _address(buffer: memoryview) -> int:
        return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


class _RawRedis:
    """A socket for each thread, GET and SET and nothing else."""

    def __init__(self, place: Any) -> None:
        self._place = place
        self._local = threading.local()
        self._sockets: list[socket.socket] = []

    def put(self, name: str, buffer: memoryview) -> None:
        begin = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name.encode(), len(buffer))
        sock = self._socket()
        num_sent = sock.sendmsg([begin, buffer, b"\r\n"])
        if num_sent < len(begin) + len(buffer) + 2:
            sock.sendall(buffer[max(0, num_sent - len(begin)) :])
            sock.sendall(b"\r\n"[max(0, num_sent - len(begin) - len(buffer)) :])
        assert sock.recv(5, socket.MSG_WAITALL) == b"+OK\r\n"

    def get(self, name: str, buffer: memoryview) -> None:
        sock = self._socket()
        sock.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name.encode()))
        line = bytearray(len(b"$%d\r\n" % len(buffer)))
        end = bytearray(2)
        count = len(line) + len(buffer) + len(end)
        assert count == sock.recvmsg_into([line, buffer, end], 0, socket.MSG_WAITALL)[0]

    def delete(self, names: Sequence[str]) -> None:
        sock = self._socket()
        sock.sendall(command(b"DEL", *(name.encode() for name in names)))
        assert sock.recv(_REPLY_BYTES).startswith(b":")
        while b"lazyfree_pending_objects:0\r\n" not in self._memory_info(sock):
            time.sleep(0.001)

    def close(self) -> None:
        """Closes the sockets of all threads."""
        for sock in self._sockets:
            sock.close()

    @staticmethod
    def _memory_info(sock: socket.socket) -> bytes:
        sock.sendall(command(b"INFO", b"memory"))
        reply = sock.recv(_REPLY_BYTES)
        while len(reply) < reply.index(b"\r\n") + int(reply[1 : reply.index(b"\r\n")]) + 4:
            reply += sock.recv(_REPLY_BYTES)
        return reply

    def _socket(self) -> socket.socket:
        if not hasattr(self._local, "socket"):
            self._local.socket = socket.socket(socket.AF_UNIX if isinstance(self._place, str) else socket.AF_INET)
            self._local.socket.connect(self._place)
            self._sockets.append(self._local.socket)
        found: socket.socket = self._local.socket
        return found


class _RawObjects:
    """obstore's own put and get, and the copy out of its memory."""

    def __init__(self, access: ObjectAccess) -> None:
        self._store = access.open()

    def put(self, name: str, buffer: memoryview) -> None:
        self._store.put(name, bytes(buffer), use_multipart=False)

    def get(self, name: str, buffer: memoryview) -> None:
        buffer[:] = memoryview(self._store.get(name).bytes())

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._store.delete(name)
