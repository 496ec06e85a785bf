"""A client's connection to the daemon: connecting, frames without an answer, calls with a deadline."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kvtier.errors import DaemonError
from kvtier.io import start_thread
from kvtier.serve import frames
from kvtier.serve.frames import FRAMES_FROM_DAEMON, Inbox, Outbox, ProtocolError
from kvtier.serve.messages import Failed, Frame, FromDaemon, Hello, Matched, Refused, Slots, Status, Stores, Value, Welcome

_LOG = logging.getLogger(__name__)
Reply = Matched | Slots | Stores | Value | Failed


class LinkError(Exception):
    """The connection is of no use any more."""


class LinkTimeoutError(LinkError):
    """The daemon did not answer by the deadline."""


class Link:
    """A connection that was welcomed. One thread; only calls wait, each until its deadline.

    ``on_status`` gets what the daemon says of itself, whenever it comes in.
    """

    def __init__(self, sock: socket.socket, inbox: Inbox[FromDaemon], welcome: Welcome) -> None:
        self.welcome = welcome
        self.on_status: Callable[[Status], None] = lambda _: None
        sock.setblocking(False)
        self._socket = sock
        self._poller = select.poll()
        self._inbox = inbox
        self._outbox = Outbox(sock)
        self._replies: list[Reply] = []

    def tell(self, frame: Frame) -> None:
        """Queues a frame for the next ``flush`` or ``call``. Raises LinkError."""
        try:
            self._outbox.add(frames.encode(frame))
        except ProtocolError as error:
            raise LinkError(str(error)) from error

    def flush(self) -> None:
        """Sends what is queued, as far as it goes. Raises LinkError."""
        if self._outbox:
            try:
                self._outbox.flush()
            except OSError as error:
                raise LinkError(error.strerror or str(error)) from error

    def call(self, frame: Frame, timeout_s: float) -> Reply:
        """Sends a frame and waits for its answer. Raises LinkError; LinkTimeoutError where it does not come in time."""
        self.tell(frame)
        deadline = time.monotonic() + timeout_s
        while True:
            self.flush()
            self.receive(max(0.0, deadline - time.monotonic()))
            if self._replies:
                reply = self._replies.pop(0)
                if reply.call != getattr(frame, "call", None) or self._replies:
                    raise LinkError("an answer to something else")
                return reply
            if time.monotonic() >= deadline:
                raise LinkTimeoutError(f"no answer within {timeout_s:.3f} s")

    def receive(self, timeout_s: float) -> bool:
        """Takes in what has come, waiting up to ``timeout_s`` for something. Returns whether anything came. Raises LinkError."""
        try:
            if timeout_s > 0:
                self._poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._outbox else 0))
                self._poller.poll(1 + int(1000 * timeout_s))
            received = self._socket.recv(frames.RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise LinkError(error.strerror or str(error)) from error
        if not received:
            raise LinkError("the daemon has closed the connection")
        try:
            self._inbox.feed(received)
            for frame in self._inbox.frames():
                self._take(frame)
        except ProtocolError as error:
            raise LinkError(str(error)) from error
        return True

    def finish(self, timeout_s: float) -> None:
        """Sends all that is queued, waiting up to ``timeout_s`` for a daemon that does not read. Raises LinkError."""
        deadline = time.monotonic() + timeout_s
        self.flush()
        while self._outbox and (left_s := deadline - time.monotonic()) > 0:
            self._poller.register(self._socket, select.POLLOUT)
            self._poller.poll(1 + int(1000 * left_s))
            self.flush()

    def wait_for_end(self, stop: socket.socket) -> None:
        """Blocks until the connection ends or ``stop`` can be read, for a thread that has nothing else to do with it."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(stop, select.POLLIN)
        while stop.fileno() not in [fd for fd, _ in poller.poll()]:
            try:
                self.receive(0.0)
            except LinkError:
                return

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._socket.close()

    def _take(self, frame: FromDaemon) -> None:
        if isinstance(frame, Status):
            self.on_status(frame)
        elif isinstance(frame, Refused):
            raise LinkError(frame.message)
        elif isinstance(frame, Welcome):
            raise LinkError("a second Welcome")
        else:
            self._replies.append(frame)


def connect(path: Path, hello: Hello, timeout_s: float) -> Link:
    """Connects and says hello.

    Raises:
        DaemonError: nobody answers there, it is another user's daemon, of another version, or it refuses this engine.
    """
    frames.check_directory(path, make=False)
    deadline = time.monotonic() + timeout_s
    sock: socket.socket | None = None
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        sock.connect(os.fspath(path))
        _, uid = frames.peer_of(sock)
        if uid not in (os.geteuid(), 0):
            raise ProtocolError(f"user {uid} serves there, not this user, {os.geteuid()}")
        sock.sendall(frames.preamble() + frames.encode(hello))
        inbox = Inbox(FRAMES_FROM_DAEMON)
        received = None
        while received is None:
            _receive(sock, inbox, deadline)
            received = inbox.take(frames.PREAMBLE_BYTES)
        frames.check_preamble(received, "engine", "daemon")
        while not (answers := inbox.frames()):
            _receive(sock, inbox, deadline)
        answer = answers[0]
        if isinstance(answer, Refused):
            raise ProtocolError(answer.message)
        if not isinstance(answer, Welcome):
            raise ProtocolError(f"a {type(answer).__name__} instead of a Welcome")
    except (OSError, ProtocolError) as error:
        if sock is not None:
            sock.close()
        reason = "it does not answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
        raise DaemonError(f"the kvtier daemon at {path}: {reason}. Is `kvtier serve` running there?") from error
    return Link(sock, inbox, answer)


def _receive(sock: socket.socket, inbox: Inbox[FromDaemon], deadline: float) -> None:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    sock.settimeout(left_s)
    received = sock.recv(frames.RECEIVE_BYTES)
    if not received:
        raise ProtocolError("it has closed the connection")
    inbox.feed(received)


class Reconnector:
    """Connects in a thread of its own, again and again with a pause, until it has a link. Thread-safe."""

    def __init__(self, attempt: Callable[[], Link], pause_s: float) -> None:
        self._attempt = attempt
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._is_closed = threading.Event()
        self._is_due = False
        """it is to try, and no thread does yet"""

    def start(self) -> None:
        """Begins to try, after a pause. Where the system lets no thread begin, ``take`` does."""
        self._is_due = not self._is_closed.is_set()
        if not self._is_due:
            return
        try:
            start_thread(self._run, "kvtier-reconnect")
        except OSError as error:
            _LOG.warning("kvtier: still without the daemon: %s", error)
        else:
            self._is_due = False

    def take(self) -> Link | None:
        """The new link, once."""
        if self._is_due:
            self.start()
        with self._lock:
            link, self._link = self._link, None
            return link

    def close(self) -> None:
        """Gives up. Idempotent."""
        self._is_closed.set()
        link = self.take()
        if link is not None:
            link.close()

    def _run(self) -> None:
        said = ""
        while not self._is_closed.wait(self._pause_s):
            try:
                link = self._attempt()
            except DaemonError as error:
                if str(error) != said:
                    said = str(error)
                    _LOG.warning("kvtier: still without the daemon: %s", error)
                continue
            except Exception as error:  # noqa: BLE001 - thread boundary: without this thread the daemon would be lost for good
                if repr(error) != said:
                    said = repr(error)
                    _LOG.exception("kvtier: still without the daemon")
                continue
            with self._lock:
                if not self._is_closed.is_set():
                    self._link = link
                    return
            link.close()
