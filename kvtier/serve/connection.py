"""One connection of a peer, as the daemon sees it: bytes in, frames out, and who it is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvtier.serve import frames
from kvtier.serve.frames import FRAMES_FROM_ENGINE, Inbox, Outbox
from kvtier.serve.messages import Frame, Hello

if TYPE_CHECKING:
    from kvtier.serve.session import Session


class Connection:
    """A peer's socket, which it owns, and what is known of the peer. Never blocks. One thread."""

    def __init__(self, sock: socket.socket, number: int, pid: int, hello_until: float) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.number = number
        self.pid = pid
        """0: the peer lives in a namespace of its own"""
        self.hello_until = hello_until
        self.role = ""
        """empty before its Hello"""
        self.engine = ""
        self.session: Session | None = None
        self.waiting_hello: Hello | None = None
        """not answered yet"""
        self.is_closed = False
        self._inbox = Inbox(FRAMES_FROM_ENGINE)
        self._outbox = Outbox(sock)
        self._has_preamble = False
        self._outbox.add(frames.preamble())

    @property
    def has_output(self) -> bool:
        """Whether bytes wait for the peer to read."""
        return bool(self._outbox)

    def receive(self) -> bool:
        """Reads what has come. False: the peer has closed. Raises OSError."""
        try:
            received = self.socket.recv(frames.RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return True
        self._inbox.feed(received)
        return bool(received)

    def frames(self) -> Iterator[Frame]:
        """The whole frames among what was read. Raises ProtocolError."""
        if not self._has_preamble:
            received = self._inbox.take(frames.PREAMBLE_BYTES)
            if received is None:
                return
            frames.check_preamble(received, "daemon", "engine")
            self._has_preamble = True
        yield from self._inbox.frames()

    def send(self, frame: Frame) -> None:
        """Queues a frame. Raises ProtocolError where the peer does not read."""
        self._outbox.add(frames.encode(frame))

    def flush(self) -> None:
        """Sends what goes. Raises OSError."""
        self._outbox.flush()

    def close(self) -> None:
        """Closes the socket. Idempotent."""
        self.is_closed = True
        self.socket.close()
