"""The node daemon: one thread that owns the tiers of a machine and serves the engines that connect to its socket.

All state belongs to this thread; it waits only in ``select``. What a peer sends is checked before it counts, and a peer that breaks
the rules, or does not read, loses its connection; the others do not notice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import math
import os
import selectors
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import kvtier
from kvtier.config import Config
from kvtier.errors import DaemonError, KVTierError
from kvtier.serve import messages
from kvtier.serve.connection import Connection
from kvtier.serve.frames import ProtocolError, check_directory, peer_of
from kvtier.serve.members import Member
from kvtier.serve.node import Node
from kvtier.serve.session import Session

_LOG = logging.getLogger(__name__)
MAX_CONNECTIONS = 1024
HELLO_TIMEOUT_S = 5.0
"""how long a peer may take to say who it is"""
BUSY_S = 0.001
"""how often results of the tiers are asked for while they work"""
IDLE_S = 0.05
TELL_AGAIN_S = 60.0
"""how long a fault that lasts is not told of again"""


class Daemon:
    """The daemon. ``run`` in one thread; ``stop`` from any thread or a signal handler.

    Args:
        config: the tiers; ``config.daemon`` for deadlines
        path: of the socket

    Raises:
        DaemonError: the socket's directory is not this user's alone, another daemon serves there, or something else has the name.
    """

    def __init__(self, config: Config, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._connections: dict[int, Connection] = {}
        self._numbers = itertools.count(1)
        self._members: dict[str, Member] = {}
        self._is_stopping = False
        self._full_until = -math.inf
        """until when nobody is told again that no descriptor is left"""
        check_directory(path, make=True)
        with contextlib.ExitStack() as undo:
            self._lock = _lock(path)
            undo.callback(os.close, self._lock)
            self._listener = undo.enter_context(_listen(path))
            undo.callback(path.unlink, missing_ok=True)
            self._selector = undo.enter_context(selectors.DefaultSelector())
            self._woken, self._waker = map(undo.enter_context, socket.socketpair())
            self._woken.setblocking(False)
            self._selector.register(self._woken, selectors.EVENT_READ)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self.node = Node(config, path, clock=clock)
            undo.pop_all()

    def run(self) -> None:
        """Serves until ``stop``; then writes down what is on its way and closes everything."""
        _LOG.info("kvtier %s serves on %s", kvtier.__version__, self.path)
        try:
            while not self._is_stopping:
                self.turn()
        finally:
            self.close()

    def stop(self) -> None:
        """Makes ``run`` end soon."""
        self._is_stopping = True
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    def turn(self, max_wait_s: float = IDLE_S) -> None:
        """Waits for something to do and does it."""
        cache = self.node.cache
        wait_s = BUSY_S if cache is not None and (cache.busy or cache.is_growing) else max_wait_s
        for key, events in self._selector.select(wait_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._woken:
                self._woken.recv(4096)
            else:
                connection: Connection = key.data
                if events & selectors.EVENT_READ:
                    self._guarded(connection, self._receive)
                if events & selectors.EVENT_WRITE and not connection.is_closed:
                    self._guarded(connection, Connection.flush)
        self.node.poll([one.session for one in self._connections.values() if one.session is not None])
        for connection in list(self._connections.values()):
            self._guarded(connection, self._attend)

    def leftovers(self) -> dict[str, int]:
        """What is open: copies, leases and pins in the books, and connections and engines."""
        books = {} if self.node.cache is None else self.node.cache.leftovers()
        return {**books, "connections": len(self._connections), "engines": len(self._members)}

    def close(self) -> None:
        """Ends all sessions, writes down what is on its way, closes the tiers. Idempotent."""
        if self._lock >= 0:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()  # nobody comes while the last blocks are written down
            self._selector.unregister(self._listener)
            self._listener.close()
            for connection in list(self._connections.values()):
                self._drop(connection, "the daemon ends")
            self.node.close()
            self._selector.close()
            self._woken.close()
            self._waker.close()
            os.close(self._lock)
            self._lock = -1

    # ---- connections --------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # gone again, or no descriptor is free
            if error.errno in (errno.EMFILE, errno.ENFILE):
                if self._clock() > self._full_until:
                    self._full_until = self._clock() + TELL_AGAIN_S
                    _LOG.error("no descriptor is left for another connection; those to come wait")
                time.sleep(BUSY_S)
            return
        pid, uid = peer_of(sock)
        if uid not in (os.geteuid(), 0) or len(self._connections) >= MAX_CONNECTIONS:
            _LOG.warning("refused a connection of process %d of user %d; %d connections are there", pid, uid, len(self._connections))
            sock.close()
            return
        connection = Connection(sock, next(self._numbers), pid, self._clock() + HELLO_TIMEOUT_S)
        self._connections[connection.number] = connection
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _guarded(self, connection: Connection, work: Callable[[Connection], None]) -> None:
        """Does something for a connection. What is wrong with it ends it and nothing else."""
        if connection.is_closed:
            return
        try:
            work(connection)
        except ProtocolError as error:
            with contextlib.suppress(ProtocolError, OSError):
                connection.send(messages.Refused(str(error)))
                connection.flush()
            self._drop(connection, str(error))
        except OSError as error:
            self._drop(connection, error.strerror or str(error))
        except Exception:  # noqa: BLE001 - process boundary: what one peer makes go wrong must not end the others' cache
            _LOG.exception("unexpected error for process %d; its connection is closed", connection.pid)
            if self.node.cache is not None:
                self.node.cache.stats.add("connector.errors")
            self._drop(connection, "an unexpected error")

    def _receive(self, connection: Connection) -> None:
        is_open = connection.receive()
        for frame in connection.frames():
            if connection.session is not None:
                connection.session.handle(frame)
            elif isinstance(frame, messages.Hello) and connection.role == "" and connection.waiting_hello is None:
                self._hello(connection, frame)
            elif isinstance(frame, messages.Mapped) and connection.role == "worker":
                self._members[connection.engine].mapped.add(connection.number)
            else:
                raise ProtocolError(f"a {type(frame).__name__} before Hello, or from a {connection.role}")
        connection.flush()
        if not is_open:
            self._drop(connection, "")

    def _attend(self, connection: Connection) -> None:
        if connection.session is not None:
            connection.session.answer_poll()
        elif connection.waiting_hello is not None:
            self._hello(connection, connection.waiting_hello)
        elif connection.role == "" and self._clock() > connection.hello_until:
            raise ProtocolError("no Hello")
        connection.flush()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.has_output else 0)
        if self._selector.get_key(connection.socket).events != wanted:
            self._selector.modify(connection.socket, wanted, connection)

    def _hello(self, connection: Connection, hello: messages.Hello) -> None:
        connection.waiting_hello = hello if self.node.must_wait(hello) else None
        if connection.waiting_hello is not None:
            return
        try:
            welcome = self.node.welcome(hello)
        except (KVTierError, TypeError) as error:  # TypeError: a namespace with strange fields
            raise ProtocolError(str(error)) from error
        cache, estimates = self.node.require()
        if hello.role == "control":
            connection.session = Session(cache, estimates, None, connection.send, self._clock)
        elif not hello.engine:
            raise ProtocolError("an engine without a name")
        elif hello.role == "worker":
            self._member(hello.engine).workers[connection.number] = hello.launch
        else:
            member = self._member(hello.engine)
            self._make_place(member, hello.instance)
            member.scheduler_came(connection.number, hello.instance, hello.launch)
            connection.session = Session(cache, estimates, member, connection.send, self._clock)
            connection.session.wants_events = hello.wants_events
        connection.role, connection.engine = hello.role, hello.engine
        connection.send(welcome)
        _LOG.info("%s of engine %r attached: process %d", hello.role, hello.engine, connection.pid)

    def _make_place(self, member: Member, instance: str) -> None:
        """An engine that comes back has given up its earlier connection; two engines of one name are refused."""
        other = self._connections.get(member.scheduler)
        if other is None:
            return
        if member.instance != instance:
            raise ProtocolError(
                f"engine {member.name!r} is attached already, by process {other.pid}; give each engine an engine_id of its own"
            )
        self._drop(other, "the engine has come back")
        self._members[member.name] = member

    def _member(self, name: str) -> Member:
        return self._members.setdefault(name, Member(name))

    def _drop(self, connection: Connection, reason: str) -> None:
        """Closes a connection and gives back what it held."""
        if connection.is_closed:
            return
        level = logging.WARNING if reason and connection.role else logging.INFO
        _LOG.log(level, "%s of engine %r detached: process %d %s", connection.role or "stranger", connection.engine, connection.pid, reason)
        self._selector.unregister(connection.socket)
        connection.close()
        del self._connections[connection.number]
        if connection.session is not None:
            connection.session.close()
        member = self._members.get(connection.engine)
        if member is not None and connection.role != "control":
            cache, _ = self.node.require()
            if member.scheduler == connection.number:
                member.scheduler_left(cache)
            member.worker_left(connection.number, cache)
            if member.is_gone:
                del self._members[connection.engine]


def _lock(path: Path) -> int:
    """Makes this the only daemon of the socket."""
    fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 64, 0).decode(errors="replace").strip()
        os.close(fd)
        raise DaemonError(f"another daemon, process {holder}, serves on {path}; stop it or choose another socket") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _listen(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise DaemonError(f"{path} is there and is no socket; remove it or choose another path")
        path.unlink()  # a dead daemon's: the lock is ours
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    except OSError as error:
        listener.close()
        raise DaemonError(f"cannot listen on {path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    listener.listen(128)
    listener.setblocking(False)
    return listener
