"""One connection that speaks RESP2: commands out of buffers, replies into buffers, within deadlines.

A plain socket is read with the kernel's own timeouts, a payload of many megabytes in one call of the compiled core, with the interpreter
lock released once: a loader thread beside a busy engine loop waits for that lock each time it must have it back. The core takes the
checksum of each piece before the next one comes, while it lies in the cache.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
import struct
from collections.abc import Sequence

from kvtier._fallback import CHECKSUM_LEAST, rest_of
from kvtier._native import receive
from kvtier.errors import RemoteError
from kvtier.tiers.remote.deadline import Deadline

_LINE_BYTES = 64
"""read at once where a line is expected; what comes behind it in there is copied to where it belongs"""
_MAX_LINE_BYTES = 1 << 12
"""fewer than the digits that Python takes for a number"""
_DRAIN_BYTES = 1 << 16
_TLS_PIECE_BYTES = 1 << 20
"""sent at once: a TLS socket's time-out is for all that it is given, not for the time without a byte"""
_SMALLEST_TIMEOUT_S = 0.001


class Wire:
    """A connected socket. One thread at a time; ``abort`` from any. Methods raise RemoteError; after that the wire is of no use."""

    def __init__(self, sock: socket.socket, address: str, stall_timeout_s: float) -> None:
        """Takes the socket as it is after the handshake: no reply may be under way."""
        self._socket = sock
        self._address = address
        self._stall_timeout_s = stall_timeout_s
        self._is_plain = not isinstance(sock, ssl.SSLSocket)
        self._ahead = memoryview(b"")
        self._line = memoryview(bytearray(_LINE_BYTES))
        self._end = memoryview(bytearray(2))
        if self._is_plain:
            sock.settimeout(None)

    def fileno(self) -> int:
        """For ``poll``."""
        return self._socket.fileno()

    def has_data(self, timeout_s: float) -> bool:
        """Whether a reply begins within a time."""
        return bool(self._ahead) or bool(_with_data([self], timeout_s))

    def first_of(self, other: Wire, deadline: Deadline) -> Wire:
        """This wire or another one, whichever begins to answer first."""
        ready = _with_data([self, other], min(self._stall_timeout_s, deadline.remaining_s()))
        if not ready:
            raise self._failure(TimeoutError())
        return ready[0]

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        """Sends all of the buffers, one behind the other."""
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while views:
            self._set_timeout(socket.SO_SNDTIMEO, deadline)
            try:
                count = self._socket.sendmsg(views) if self._is_plain else self._socket.send(views[0][:_TLS_PIECE_BYTES])
            except OSError as error:
                raise self._failure(error) from error
            views = rest_of(views, count)

    def read_line(self, deadline: Deadline) -> bytes:
        """The next line, without its end."""
        text = b""
        while len(text) < _MAX_LINE_BYTES:
            if not self._ahead:
                self._ahead = self._line[: self._receive([self._line], deadline, whole=False)]
            piece = bytes(self._ahead)
            end = (text + piece).find(b"\r\n")
            if end >= 0:
                self._ahead = self._ahead[end + 2 - len(text) :]
                return (text + piece)[:end]
            text += piece
            self._ahead = self._ahead[:0]
        raise self.garbage("a line without end")

    def read_into(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        """Fills the views, one behind the other, and takes the line end behind them."""
        open_views = [view for view in (*views, self._end) if view]
        while self._ahead:
            count = min(len(self._ahead), len(open_views[0]))
            open_views[0][:count] = self._ahead[:count]
            self._ahead = self._ahead[count:]
            open_views = rest_of(open_views, count)
            if not open_views:
                break
        while open_views:
            open_views = rest_of(open_views, self._receive(open_views, deadline, whole=True))
        self._check_end()

    def read_value(self, header: memoryview, payload: memoryview, deadline: Deadline) -> bytes | None:
        """Like ``read_into`` for these two. Returns the payload's xxh3-128 where it was taken on the way, else None."""
        num_ahead = len(self._ahead)
        if not self._is_plain or num_ahead > len(header) or len(payload) < CHECKSUM_LEAST:
            self.read_into([header, payload], deadline)
            return None
        header[:num_ahead] = self._ahead
        self._ahead = self._ahead[:0]
        stall_us, total_us = (round(seconds * 1e6) for seconds in (self._stall_timeout_s, deadline.remaining_s()))
        try:
            checksum: bytes | None = receive(self.fileno(), [header[num_ahead:], payload, self._end], 1, stall_us, total_us)
        except TimeoutError as error:
            raise self._late() from error
        except OSError as error:
            raise self._failure(error) from error
        if checksum is None:
            raise self._closed()
        self._check_end()
        return checksum

    def drain(self, num_bytes: int, deadline: Deadline) -> None:
        """Skips a value of this length."""
        scratch = memoryview(bytearray(min(num_bytes, _DRAIN_BYTES)))
        while num_bytes > len(scratch):
            taken = min(len(self._ahead), len(scratch))
            if taken:
                self._ahead = self._ahead[taken:]
            else:
                taken = self._receive([scratch], deadline, whole=False)
            num_bytes -= taken
        self.read_into([scratch[:num_bytes]], deadline)

    def abort(self) -> None:
        """Makes running and later calls fail at once. Thread-safe."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is over already

    def garbage(self, what: str) -> RemoteError:
        """The error for bytes that are no RESP."""
        return RemoteError("protocol_errors", f"{self._address}: answered with {what}")

    def _receive(self, views: Sequence[memoryview], deadline: Deadline, *, whole: bool) -> int:
        self._set_timeout(socket.SO_RCVTIMEO, deadline)
        try:
            if self._is_plain:
                count = self._socket.recvmsg_into(views, 0, socket.MSG_WAITALL if whole else 0)[0]
            else:
                count = self._socket.recv_into(views[0])
        except OSError as error:
            raise self._failure(error) from error
        if not count:
            raise self._closed()
        return count

    def _check_end(self) -> None:
        if bytes(self._end) != b"\r\n":
            raise self.garbage("a value without end")

    def _set_timeout(self, option: int, deadline: Deadline) -> None:
        remaining_s = deadline.remaining_s()
        if not remaining_s:
            raise self._late()
        timeout_s = max(min(self._stall_timeout_s, remaining_s), _SMALLEST_TIMEOUT_S)
        if self._is_plain:
            seconds = int(timeout_s)
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, int((timeout_s - seconds) * 1e6)))
        else:
            self._socket.settimeout(timeout_s)

    def _late(self) -> RemoteError:
        return RemoteError("timeouts", f"{self._address}: not done within the total deadline", may_pass=False)

    def _closed(self) -> RemoteError:
        return RemoteError("connect_errors", f"{self._address}: closed the connection")

    def _failure(self, error: OSError) -> RemoteError:
        if isinstance(error, (BlockingIOError, TimeoutError)):
            return RemoteError("timeouts", f"{self._address}: no byte moved for {self._stall_timeout_s:g} s")
        return RemoteError("connect_errors", f"{self._address}: {error.strerror or error}")


def command(*arguments: bytes) -> bytes:
    """A command as RESP."""
    return b"*%d\r\n" % len(arguments) + b"".join(b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments)


def _with_data(wires: Sequence[Wire], timeout_s: float) -> list[Wire]:
    """Those with something to read, once there is one. Any descriptor may be asked about, unlike with ``select``."""
    poller = select.poll()
    for wire in wires:
        poller.register(wire, select.POLLIN)
    ready = {fd for fd, _ in poller.poll(math.ceil(1000 * timeout_s))}
    return [wire for wire in wires if wire.fileno() in ready]
