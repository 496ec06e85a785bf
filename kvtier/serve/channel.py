"""A client's sessions with the daemon, one after the other: when it is asked, how long that may take, and what happens when it is lost."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvtier.config import DaemonConfig
from kvtier.errors import DaemonError
from kvtier.serve import messages
from kvtier.serve.estimates import SharedEstimates
from kvtier.serve.link import Link, LinkError, LinkTimeoutError, Reconnector, Reply, connect
from kvtier.serve.messages import Frame, Status, is_counted_by_engines
from kvtier.serve.remote_verbs import refusal
from kvtier.stats import Stats

_LOG = logging.getLogger(__name__)
STATUS_S = 0.05
"""how often the daemon is asked how it is, where no request waits"""
MAX_EVENTS = 100_000
"""events that nobody takes; the oldest are lost"""
_UNKNOWN = Status(False, True, 0, 0, 0, (), ())
T = TypeVar("T", bound=Reply)


@dataclass(frozen=True, slots=True)
class Attaching:
    """Who attaches to a daemon, and how long it waits."""

    settings: DaemonConfig
    hello: messages.Hello
    num_workers: int = 0
    """workers that must have mapped the arena before anything is copied"""


class Channel:
    """Frames to the daemon, as long as there is one; reconnects by itself. One thread.

    All calls between two ``poll`` wait no longer than ``settings.deadline_s`` together; then the session is given up.

    Raises:
        DaemonError: from the constructor: there is no daemon, or it refuses this engine.
    """

    def __init__(self, attaching: Attaching, stats: Stats, estimates: SharedEstimates) -> None:
        self.settings = attaching.settings
        self.session = 0
        """grows with every session"""
        self.status = _UNKNOWN
        self.events: deque[tuple[bool, str, bytes, bytes | None, int]] = deque(maxlen=MAX_EVENTS)
        self.on_session: Callable[[], None] = lambda: None
        """called when a session begins, before anything else is said in it"""
        self.on_loss: Callable[[], None] = lambda: None
        self._hello = attaching.hello
        self._num_workers = attaching.num_workers
        self._stats = stats
        self._estimates = estimates
        self._calls = itertools.count(1)
        self._poll_due = 0.0
        """until when the answer to a poll must have come; 0: none is under way"""
        self._asked_at = 0.0
        self._told = stats.snapshot()
        self._spent_s = 0.0
        self._reconnector = Reconnector(self._connect, self.settings.reconnect_s)
        self._link: Link | None = self._connect()
        self.welcome = self._link.welcome

    @property
    def is_open(self) -> bool:
        """Whether there is a daemon."""
        return self._link is not None

    @property
    def is_usable(self) -> bool:
        """Whether there is a daemon and all workers have mapped its arena."""
        return self._link is not None and self.status.num_workers >= self._num_workers

    def begin(self) -> None:
        """Begins the session of the link that there is."""
        assert self._link is not None, "there is a link"
        self.session += 1
        self.welcome = self._link.welcome
        self.status = _UNKNOWN
        self._poll_due = self._asked_at = 0.0
        self._link.on_status = self._take_status
        self._stats.add("daemon.sessions")
        self.on_session()
        _LOG.info("kvtier: attached to the daemon at %s", self.settings.socket)

    def tell(self, frame: Frame, *, at_once: bool = False) -> None:
        """Sends a frame without an answer: with the next call or poll, or at once. Without a daemon it goes nowhere."""
        if self._link is None:
            return
        try:
            self._link.tell(frame)
            if at_once:
                self._link.flush()
        except LinkError as error:
            self._lose(error)

    def call(self, make_frame: Callable[[int], Frame], kind: type[T]) -> T | None:
        """The answer to a frame, which is made with the call's number. None: there is none to be had. Raises ControlError."""
        if not self.is_usable:
            self._stats.add("daemon.missed_calls")
            return None
        try:
            return self._reply(make_frame(next(self._calls)), kind)
        except LinkError as error:
            self._lose(error)
        return None

    def ask(self, what: str, make_frame: Callable[[int], Frame]) -> object:
        """The answer to a verb of the control API, which is no part of a step. Raises ControlError, or DaemonError without a daemon."""
        self._spent_s = 0.0
        try:
            if self._link is None:
                raise LinkError("it was lost")
            return self._reply(make_frame(next(self._calls)), messages.Value).value
        except LinkError as error:
            self._lose(error)
            raise DaemonError(f"{what}: the daemon at {self.settings.socket} does not answer: {error}") from error

    def poll(self, timeout_s: float) -> None:
        """Once a step: sends what has gathered, takes in what has come, asks how the daemon is. Begins a session where one can be had."""
        self._spent_s = 0.0
        if self._link is None:
            self._link = self._reconnector.take()
            if self._link is None:
                return
            self.begin()
        try:
            if self._link is not None:
                self._exchange(self._link, timeout_s)
        except LinkError as error:
            self._lose(error)

    def close(self) -> None:
        """Ends the session once all is said, and begins no other. Waits ``settings.deadline_s`` at most. Idempotent."""
        self._reconnector.close()
        if self._link is None:
            return
        try:
            self._link.finish(self.settings.deadline_s)
        except LinkError as error:
            _LOG.info("kvtier: the daemon at %s was not told how the last copies ended: %s", self.settings.socket, error)
        self._link.close()
        self._link = None

    def _connect(self) -> Link:
        return connect(self._path, self._hello, self.settings.attach_timeout_s)

    @property
    def _path(self) -> Path:
        assert self.settings.socket is not None, "whoever attaches has a socket"
        return self.settings.socket

    def _lose(self, error: LinkError) -> None:
        """Ends a session: everything held in it is void."""
        if self._link is None:
            return
        self._link.close()
        self._link = None
        self._stats.add("daemon.timeouts" if isinstance(error, LinkTimeoutError) else "daemon.lost")
        _LOG.warning("kvtier: goes on without the daemon at %s: %s", self.settings.socket, error)
        self.on_loss()
        self._reconnector.start()

    def _reply(self, frame: Frame, kind: type[T]) -> T:
        """Raises LinkError, or the ControlError that the daemon names."""
        assert self._link is not None, "there is a link"
        start = time.monotonic()
        try:
            reply = self._link.call(frame, max(0.0, self.settings.deadline_s - self._spent_s))
        finally:
            self._spent_s += time.monotonic() - start
        if isinstance(reply, messages.Failed):
            raise refusal(reply)
        if not isinstance(reply, kind):
            raise LinkError(f"a {type(reply).__name__} instead of a {kind.__name__}")
        return reply

    def _exchange(self, link: Link, timeout_s: float) -> None:
        link.receive(0.0)
        now = time.monotonic()
        if self._poll_due and now > self._poll_due:
            raise LinkTimeoutError(f"no answer to a poll within {self.settings.deadline_s} s")
        if not self._poll_due and (timeout_s or now - self._asked_at >= STATUS_S or not self.is_usable):
            self._asked_at = now
            wait_s = min(timeout_s, 1.0)
            self._poll_due = now + wait_s + self.settings.deadline_s
            counters = {name: growth for name, growth in self._stats.since(self._told).items() if is_counted_by_engines(name)}
            self._told = self._stats.snapshot()
            steps = tuple(self._estimates.new_steps)
            self._estimates.new_steps.clear()
            link.tell(messages.Poll(wait_s, counters, steps))
        link.flush()
        end = now + timeout_s
        while timeout_s and self._poll_due and (left_s := end - time.monotonic()) > 0:
            link.receive(left_s)
            link.flush()

    def _take_status(self, status: Status) -> None:
        self.status = status
        self._poll_due = 0.0
        self._estimates.take_over(status.transfers)
        self.events.extend(status.events)
