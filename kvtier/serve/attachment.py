"""A worker's side of the daemon: maps its arena, lets go of it when the daemon is lost, and maps the next one, all in the background."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from kvtier.config import DaemonConfig
from kvtier.errors import ArenaError, DaemonError
from kvtier.io import start_thread
from kvtier.memory.arena import Arena
from kvtier.serve import messages
from kvtier.serve.link import Link, LinkError, connect

_LOG = logging.getLogger(__name__)
RELEASE_S = 0.01
"""how often a worker that is in the middle of a step is asked to let go of a lost arena"""
LONGEST_PAUSE_S = 60.0
"""between two attempts of which the first failed for a reason that nobody foresaw"""

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class ArenaUser(Protocol[T_contra]):
    """Who copies to and from an arena that may be replaced."""

    def attach(self, arena: Arena, arena_id: str, prepared: T_contra) -> None:
        """From now on slots are in this arena. There was none before."""

    def detach(self) -> None:
        """Ends all copies and lets go of the arena."""


class ServedArena(Generic[T]):
    """A daemon's arena in one worker. ``enter`` and ``leave`` enclose each step of the worker, on its thread.

    The connection lasts as long as the mapping: the daemon takes its end as the promise that this worker copies no more.

    Args:
        settings: the ``daemon`` section
        hello: who the worker is
        user: gets an arena at the beginning of a step; loses it there too, or between two steps
        prepare: makes what the user needs for an arena, in the background
        release: lets go of what ``prepare`` made, in the background, after the user and before the arena is unmapped

    Raises OSError where the system lets no thread begin.
    """

    def __init__(
        self,
        settings: DaemonConfig,
        hello: messages.Hello,
        user: ArenaUser[T],
        prepare: Callable[[Arena], T],
        *,
        release: Callable[[T], None],
    ) -> None:
        self._settings = settings
        self._hello = hello
        self._user = user
        self._prepare = prepare
        self._dispose = release
        self._lock = threading.Lock()
        self._ready: tuple[Arena, str, T] | None = None
        """mapped, and not given to the user yet"""
        self._is_attached = False
        self._is_mapped = False
        """the daemon's memory is mapped, given to the user or not"""
        self._is_lost = False
        self._is_in_step = False
        self._is_closed = threading.Event()
        self._stop, self._stopped = socket.socketpair()
        """written to by ``close``, read by the thread while it waits for the daemon's end"""
        self._thread = start_thread(self._run, "kvtier-arena")

    def enter(self) -> None:
        """A step begins: the user gets the arena that there is, and loses one that is lost. Idempotent in a step."""
        with self._lock:
            self._is_in_step = True
            if self._is_lost:
                self._release()
            elif self._ready is not None:
                self._user.attach(*self._ready)
                self._ready, self._is_attached = None, True

    def leave(self) -> None:
        """A step has ended: the user may lose its arena until the next one begins."""
        with self._lock:
            self._is_in_step = False

    def close(self) -> None:
        """Lets go of the arena, and then of the daemon, which would give the slots away at once. Idempotent."""
        self._is_closed.set()
        with self._lock:
            self._is_in_step = False
            is_mapped = self._is_mapped
        self._stop.close()
        if is_mapped:  # else the thread is about to end, or waits for a daemon that does not answer
            self._thread.join(self._settings.attach_timeout_s)

    def _release(self) -> None:
        self._ready = None
        if self._is_attached:
            self._user.detach()
            self._is_attached = False
        self._is_lost = False

    def _run(self) -> None:
        with self._stopped:
            self._attach_again_and_again()

    def _attach_again_and_again(self) -> None:
        said = ""
        while not self._is_closed.is_set():
            pause_s = self._settings.reconnect_s
            try:
                self._attach_once()
            except (DaemonError, ArenaError, LinkError) as error:
                if str(error) != said:
                    said = str(error)
                    _LOG.info("kvtier: no arena yet: %s", error)
            except Exception as error:  # noqa: BLE001 - thread boundary: without this thread there would be no arena ever again
                pause_s = LONGEST_PAUSE_S if repr(error) == said else pause_s
                said = repr(error)
                _LOG.exception("kvtier: no arena yet")
            self._is_closed.wait(pause_s)

    def _attach_once(self) -> None:
        """Maps the daemon's arena and keeps it until the daemon is lost and the user has let go of it."""
        path = self._settings.socket
        assert path is not None, "whoever attaches has a socket"
        link = connect(path, self._hello, self._settings.attach_timeout_s)
        try:
            arena = self._map(link.welcome)
            try:
                if arena.created:  # the daemon died meanwhile
                    arena.unlink()
                    raise LinkError("the daemon is gone")
                arena.while_waiting = lambda: self._look_at(link)  # who prepares it may wait until the daemon has reserved all of it
                arena.prefault()
                prepared = self._prepare(arena)
                with self._lock:
                    self._ready = arena, link.welcome.arena_id, prepared
                try:
                    link.tell(messages.Mapped())
                    link.flush()
                    link.wait_for_end(self._stopped)
                finally:
                    self._wait_for_release()  # whatever has happened: the user may have the arena
                    self._dispose(prepared)
            finally:
                arena.close()
                self._is_mapped = False
        finally:
            link.close()

    def _map(self, welcome: messages.Welcome) -> Arena:
        with self._lock:
            if self._is_closed.is_set():
                raise LinkError("this worker is closed")
            self._is_mapped = True
        try:
            return Arena.open(welcome.arena_path, welcome.arena_bytes, huge_pages=True)
        except ArenaError:
            self._is_mapped = False
            raise

    def _look_at(self, link: Link) -> None:
        """Raises LinkError where the daemon has ended or nobody wants its memory any more."""
        link.receive(0.0)
        if self._is_closed.is_set():
            raise LinkError("this worker is closed")

    def _wait_for_release(self) -> None:
        """Until the user has let go: before that neither may the arena be unmapped nor the daemon hear of an end."""
        with self._lock:
            self._is_lost = True
        is_said = False
        while True:
            try:
                with self._lock:
                    if not self._is_in_step and self._is_lost:
                        self._release()
                    if not self._is_lost:
                        return
            except Exception:  # noqa: BLE001 - thread boundary: the copies may be running on
                if not is_said:
                    _LOG.exception("kvtier: the worker does not let go of the daemon's memory")
                is_said = True
            time.sleep(RELEASE_S)
