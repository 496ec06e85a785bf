"""Values in a Mooncake Store: header and payload gathered from, and scattered to, registered memory in one batch."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

from mooncake.store import MooncakeDistributedStore

from kvtier.errors import RemoteError
from kvtier.tiers.mooncake.lane import Lane
from kvtier.tiers.remote import Answer, Deadline, Get, Put, Reply
from kvtier.tiers.remote.client import ABSENT, DONE, OTHER_SIZE

NO_METADATA_SERVER = "P2PHANDSHAKE"
_NOT_FOUND, _EXISTS = -704, -705
_WRONG_SIZE = (-600, -800)
"""of a read; also of other mistakes, so the length is asked for"""
_NO_ROOM = (-200, -1010)
_HEADER_ROOM_BYTES = 1 << 16
_MAX_CALLS = 64
"""that move blocks at once over RDMA; there are no more threads that make them"""
_MAX_WAITING_CALLS = 8
"""questions that were given up and have not come back"""
_T = TypeVar("_T")
_Place = tuple[int, int]
"""address and length"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeAccess:
    """Where the master is, and what this process contributes."""

    master: str
    """``host:port``"""
    local_host: str = "127.0.0.1"
    """address of this machine for the others"""
    metadata: str = NO_METADATA_SERVER
    """address of a metadata server; the default: none, the processes ask each other"""
    protocol: str = "tcp"
    devices: str = ""
    """of RDMA"""
    segment_bytes: int = 0
    """memory that this process gives to the store; its blocks are gone with the process"""
    connect_timeout_s: float = 1.0
    buffer_bytes: int = 16 << 20
    """memory of the client for what is not registered"""

    @property
    def address(self) -> str:
        """For messages."""
        return f"mooncake master {self.master} ({self.protocol})"


class MooncakeClient:
    """Implements :class:`~kvtier.tiers.remote.client.RemoteClient`.

    Mooncake's calls know no deadline and cannot be ended: with a master that does not answer they last until its own time-outs (seconds to
    half a minute). Questions are given up by their deadline all the same; a read or write holds its thread and its buffers until it comes
    back, so that nothing touches memory that belongs to somebody else by then.
    """

    max_value_bytes: int | None = None

    def __init__(self, access: MooncakeAccess, *, memory: _Place | None = None, store: Any = None) -> None:
        """Does not connect; ``ping`` does. ``memory``: what most payloads lie in. ``store``: one that is connected, not a new one."""
        self.address = access.address
        self._access = access
        self._store = store
        self._lock = threading.Lock()
        self._is_aborted = False
        self._lane = Lane(1 if access.protocol == "tcp" else _MAX_CALLS)
        self._num_waiting = 0
        self._questions = ThreadPoolExecutor(_MAX_WAITING_CALLS, "kvtier-mooncake")
        self._memory = memory
        self._registered: list[_Place] = []
        """memory that stays registered: host memory, and what headers pass through"""
        self._header_rooms: list[bytearray] = []
        self._connecting = threading.Lock()

    def ping(self, deadline: Deadline) -> None:
        if self._store is None:
            self._ask(self._connect, deadline)
        self.sizes(["kvtier-ping"], deadline)

    def put(self, items: Sequence[Put], deadline: Deadline) -> Iterator[Reply]:
        views = [item.payload if not item.payload.readonly else memoryview(bytearray(item.payload)) for item in items]
        with contextlib.ExitStack() as stack:
            self._begin_move(stack, deadline, is_read=False)
            headers = self._room_for_headers(stack, sum(len(item.header) for item in items))
            headers[:] = b"".join(item.header for item in items)
            places = self._places(stack, headers, [len(item.header) for item in items], views)
            names = [item.name for item in items]
            statuses = self._store.batch_put_from_multi_buffers(names, *_columns(places))
        return iter([self._put_reply(status) for status in statuses])

    def get_into(self, items: Sequence[Get], deadline: Deadline) -> Iterator[Reply]:
        lengths = [len(item.header) for item in items]
        names = [item.name for item in items]
        with contextlib.ExitStack() as stack:
            self._begin_move(stack, deadline, is_read=True)
            headers = self._room_for_headers(stack, sum(lengths))
            places = self._places(stack, headers, lengths, [item.payload for item in items])
            statuses = self._store.batch_get_into_multi_buffers(names, *_columns(places))
            start = 0
            for item in items:
                item.header[:] = headers[start : start + len(item.header)]
                start += len(item.header)
        return iter([self._get_reply(item, status, deadline) for item, status in zip(items, statuses, strict=True)])

    def sizes(self, names: Sequence[str], deadline: Deadline) -> list[int | None]:
        def ask() -> list[int]:
            there = self._store.batch_is_exist(list(names))
            return [self._store.get_size(name) if is_there == 1 else is_there for name, is_there in zip(names, there, strict=True)]

        found = self._ask(ask, deadline)
        for size in found:
            if size < 0 and size != _NOT_FOUND:
                self._check(size, "asking")
        return [size if size > 0 else None for size in found]

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        # By force: a lease of a reader would keep a damaged value. Readers verify what they read.
        for status in self._ask(lambda: self._store.batch_remove(list(names), True), deadline):
            if status not in (0, _NOT_FOUND):
                self._check(status, "deleting")

    def take_events(self) -> dict[str, int]:
        return {}

    def abort(self) -> None:
        self._is_aborted = True
        self._lane.close()

    def close(self) -> None:
        self.abort()
        self._release()
        if self._store is not None:
            self._store.close()

    def _release(self) -> None:
        """Takes back what the store was given."""
        self._questions.shutdown(wait=True)
        for address, _ in self._registered:
            self._store.unregister_buffer(address)
        self._registered.clear()

    def _begin(self, deadline: Deadline) -> None:
        if self._is_aborted:
            raise RemoteError("connect_errors", f"{self.address}: the tier is closing", may_pass=False)
        if deadline.is_over:
            raise self._too_late()

    def _too_late(self) -> RemoteError:
        return RemoteError("timeouts", f"{self.address}: not done within the total deadline", may_pass=False)

    def _begin_move(self, stack: contextlib.ExitStack, deadline: Deadline, *, is_read: bool) -> None:
        """A call that moves blocks begins, and lasts as long as the stack is open."""
        is_in = stack.enter_context(self._lane.place(deadline, is_read=is_read))
        self._begin(deadline)
        if not is_in:
            raise self._too_late()

    def _connect(self) -> None:
        """Joins the store, which may take some seconds; Mooncake itself tries for a minute and more where nobody listens."""
        with self._connecting:
            if self._store is not None:
                return
            access = self._access
            host, _, port = access.master.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), access.connect_timeout_s).close()
            except (OSError, UnicodeError) as error:  # UnicodeError: a host that can be none
                raise RemoteError("connect_errors", f"{self.address}: {getattr(error, 'strerror', None) or error}") from error
            store = MooncakeDistributedStore()
            given = (access.segment_bytes, access.buffer_bytes)
            self._check(store.setup(access.local_host, access.metadata, *given, access.protocol, access.devices, access.master), "joining")
            if self._memory is not None:
                self._check(store.register_buffer(*self._memory), "registering host memory")
                self._registered.append(self._memory)
            self._store = store

    def _ask(self, question: Callable[[], _T], deadline: Deadline) -> _T:
        """The answer to something that touches no buffer, or RemoteError by the deadline."""
        self._begin(deadline)
        with self._lock:
            if self._num_waiting >= _MAX_WAITING_CALLS:
                raise RemoteError("timeouts", f"{self.address}: {_MAX_WAITING_CALLS} calls have not come back", may_pass=False)
            self._num_waiting += 1
        try:
            future = self._questions.submit(question)
        except RuntimeError as error:  # the system lets no thread begin
            self._came_back()
            raise RemoteError("connect_errors", f"{self.address}: {error}") from error
        future.add_done_callback(lambda _: self._came_back())
        try:
            return future.result(deadline.remaining_s())
        except FutureTimeoutError as error:
            raise self._too_late() from error

    def _came_back(self) -> None:
        with self._lock:
            self._num_waiting -= 1

    def _room_for_headers(self, stack: contextlib.ExitStack, num_bytes: int) -> memoryview:
        """Memory that is registered already, for as long as the stack is open; more than is kept is registered for this call."""
        if num_bytes > _HEADER_ROOM_BYTES:
            return memoryview(bytearray(num_bytes))
        with self._lock:
            room = self._header_rooms.pop() if self._header_rooms else bytearray()
        if not room:
            room = bytearray(_HEADER_ROOM_BYTES)
            place = ctypes.addressof((ctypes.c_char * len(room)).from_buffer(room)), len(room)
            self._check(self._store.register_buffer(*place), "registering memory")
            self._registered.append(place)
        stack.callback(self._header_rooms.append, room)
        return memoryview(room)[:num_bytes]

    def _places(
        self, stack: contextlib.ExitStack, headers: memoryview, lengths: Sequence[int], payloads: Sequence[memoryview]
    ) -> list[list[_Place]]:
        """Where header and payload of each item lie, all of it registered for as long as the stack is open."""
        position = self._register(stack, headers) if headers else 0
        places = []
        for length, payload in zip(lengths, payloads, strict=True):
            parts = [(position, length), (self._register(stack, payload), len(payload)) if payload else (0, 0)]
            places.append([part for part in parts if part[1]])
            position += length
        return places

    def _register(self, stack: contextlib.ExitStack, view: memoryview) -> int:
        """The address of some bytes; what lies outside of the memory that is registered for good is registered for a while."""
        anchor = (ctypes.c_char * len(view)).from_buffer(view)
        address = ctypes.addressof(anchor)
        if not any(start <= address and address + len(view) <= start + length for start, length in self._registered):
            self._check(self._store.register_buffer(address, len(view)), "registering memory")
            stack.callback(lambda: (anchor, self._store.unregister_buffer(address)))
        else:
            stack.callback(lambda: anchor)
        return address

    def _put_reply(self, status: int) -> Reply:
        if status in (0, _EXISTS):
            return DONE
        if status in _NO_ROOM:
            return Reply(Answer.REFUSED, f"{self.address}: no room (error {status})")
        self._check(status, "writing")
        return DONE

    def _get_reply(self, item: Get, status: int, deadline: Deadline) -> Reply:
        num_bytes = len(item.header) + len(item.payload)
        if status == num_bytes:
            return DONE
        if status == _NOT_FOUND:
            return ABSENT
        if status >= 0 or status in _WRONG_SIZE:
            (size,) = self.sizes([item.name], deadline)
            if size is None:
                return ABSENT
            if size != num_bytes:
                return OTHER_SIZE
        self._check(min(status, -1), "reading")
        return ABSENT

    def _check(self, status: int, what: str) -> None:
        """Raises RemoteError for an error of Mooncake's."""
        if status >= 0:
            return
        event = "timeouts" if status == -901 else "connect_errors" if -1000 < status <= -900 else "server_errors"
        raise RemoteError(event, f"{self.address}: {what} failed (Mooncake's error {status})")


def _columns(places: Sequence[Sequence[_Place]]) -> tuple[list[list[int]], list[list[int]]]:
    """Addresses and lengths, item by item."""
    return [[address for address, _ in item] for item in places], [[length for _, length in item] for item in places]
