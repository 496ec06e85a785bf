"""How frames travel over a Unix socket: a preamble that names the version, then length-prefixed msgpack; and who may listen where."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from kvtier.errors import DaemonError
from kvtier.serve.messages import PROTOCOL, Frame, FromDaemon, FromEngine

MAX_FRAME_BYTES = 16 << 20
"""more than the longest prompt's keys"""
MAX_QUEUED_BYTES = 64 << 20
"""bytes that may wait for a peer that does not read"""
RECEIVE_BYTES = 1 << 18
_MAGIC = b"KVTIER\0\0"
_PREAMBLE = struct.Struct("<8sI")
PREAMBLE_BYTES = _PREAMBLE.size
_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("iII")

T = TypeVar("T")
FRAMES_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
FRAMES_FROM_DAEMON: msgspec.msgpack.Decoder[FromDaemon] = msgspec.msgpack.Decoder(FromDaemon)
_encoder = msgspec.msgpack.Encoder()


class ProtocolError(Exception):
    """The peer said something that makes no sense; its connection must be closed."""


def preamble() -> bytes:
    """What both sides say first, in every version."""
    return _PREAMBLE.pack(_MAGIC, PROTOCOL)


def check_preamble(received: bytes, us: str, them: str) -> None:
    """Raises ProtocolError where the peer is something else or speaks another version; names both."""
    magic, version = _PREAMBLE.unpack(received)
    if magic != _MAGIC:
        raise ProtocolError(f"the {them} does not speak kvtier's protocol")
    if version != PROTOCOL:
        raise ProtocolError(f"the {them} speaks version {version} of the protocol, this {us} version {PROTOCOL}; use one version of kvtier")


def encode(frame: Frame) -> bytes:
    """A frame with its length before it."""
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


class Inbox(Generic[T]):
    """Bytes that have come, and the frames among them. Not thread-safe."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._bytes = bytearray()

    def feed(self, received: bytes) -> None:
        """Takes bytes in."""
        self._bytes += received

    def take(self, num_bytes: int) -> bytes | None:
        """The next bytes, once so many are there."""
        if len(self._bytes) < num_bytes:
            return None
        taken = bytes(self._bytes[:num_bytes])
        del self._bytes[:num_bytes]
        return taken

    def frames(self) -> list[T]:
        """All whole frames. Raises ProtocolError at the first that is too long or makes no sense."""
        found: list[T] = []
        at = 0
        while len(self._bytes) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes, at)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length} bytes; allowed: {MAX_FRAME_BYTES}")
            end = at + _LENGTH.size + length
            if len(self._bytes) < end:
                break
            try:
                found.append(self._decoder.decode(memoryview(self._bytes)[at + _LENGTH.size : end]))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise ProtocolError(f"a frame makes no sense: {error}") from error
            at = end
        del self._bytes[:at]
        return found


class Outbox:
    """Bytes that are to go out. Never blocks. Not thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._waiting = bytearray()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, data: bytes) -> None:
        """Queues bytes. Raises ProtocolError where the peer has not read for so long that too many wait."""
        if len(self._waiting) + len(data) > MAX_QUEUED_BYTES:
            raise ProtocolError(f"the peer does not read: {len(self._waiting)} bytes wait for it")
        self._waiting += data

    def flush(self) -> None:
        """Sends as much as goes. Raises OSError where the connection is broken."""
        while self._waiting:
            try:
                num_sent = self._socket.send(self._waiting, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            del self._waiting[:num_sent]


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process id (0: in a namespace of its own) and user id of whoever is at the other end."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def check_directory(path: Path, *, make: bool) -> None:
    """Raises DaemonError where the socket's directory is not this user's alone. ``make``: makes one that is missing."""
    directory = path.parent
    try:
        if make:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.stat(directory)
    except OSError as error:
        raise DaemonError(f"the directory {directory} of the daemon's socket: {error.strerror}") from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise DaemonError(
            f"the directory {directory} of the daemon's socket has mode {stat.S_IMODE(status.st_mode):o} and owner {status.st_uid}; "
            f"allowed: 700 and {os.geteuid()}, this user"
        )
    if len(os.fsencode(path)) > 107:
        raise DaemonError(f"the daemon's socket {path} has a path of {len(os.fsencode(path))} bytes; allowed: 107")
