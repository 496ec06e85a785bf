"""What orchestrators say of sessions, turned into what the planner has: pins that end by themselves, and promotions.

A hint is believed within bounds. What it keeps ends by a deadline of at most :data:`MAX_TTL_S` and counts towards a share of host
memory that all hints and pins of users have together; what it brings only takes room as any request would. So a wrong hint costs hits
and nothing else.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.control.estimates import Estimates
from kvtier.control.planner import Planner
from kvtier.control.steps import StepGraph
from kvtier.control.tool_calls import ToolCalls
from kvtier.errors import ControlError, QuotaError, UnknownSessionError
from kvtier.stats import Stats
from kvtier.types import BlockKey

MAX_SESSIONS = 10_000
"""sessions that are remembered; the one that was not used for longest is forgotten"""
MAX_TTL_S = 600.0
"""no hint keeps anything for longer"""
STEP_TTL_S = 60.0
"""for agents that run now or in the next step of a workflow"""
PRIORITY_TTL_S = 60.0
"""for requests of high priority, from their end on"""
SETTLE_S = 5.0
"""for so long blocks that are still being copied to host memory are kept as they arrive"""
MIN_BENEFIT_S = 1.0
"""what computing a session again is taken to cost while nothing was measured"""
EARLY_S = 0.5
"""a prefetch for a time begins so much earlier than its estimate asks for"""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A session's agent has called a tool and will come back with its answer."""

    session: str
    tool: str
    expected_s: float | None = None
    """what the caller expects; None: nothing"""


@dataclass(frozen=True, slots=True)
class NextUse:
    """A session's next request comes in about ``eta_s`` seconds."""

    session: str
    eta_s: float


@dataclass(frozen=True, slots=True)
class SessionOver:
    """A session has ended: nothing is kept for it any more."""

    session: str


@dataclass(frozen=True, slots=True)
class Workflow:
    """Who runs in a workflow of agents, each a session, and who runs after whom. Replaces what was said before of these agents."""

    graph: StepGraph
    running: tuple[str, ...]


Hint = ToolCall | NextUse | SessionOver | Workflow


@dataclass(slots=True)
class _Kept:
    """A prefix that is kept until a deadline. Its last blocks may arrive after the hint: a request ends before its stores do."""

    keys: Sequence[BlockKey]
    deadline: float
    pin_id: int | None = None
    num_blocks: int = 0
    is_over: bool = False


@dataclass(slots=True)
class _Session:
    """What is known of one session."""

    keys: Sequence[BlockKey] = ()
    """of its last request"""
    num_tokens: int = 0
    kept: _Kept | None = None
    tool: str = ""
    called_at: float = 0.0
    due: float = math.inf
    """when its prefetch begins"""


MAX_STALE = 64
"""moments of uses that were announced anew, beside as many as there are sessions"""


class Hints:
    """Sessions and what is done for them. Pure; one thread, the planner's. ``max_blocks``: the share of users' pins."""

    def __init__(self, planner: Planner, estimates: Estimates, stats: Stats, *, max_blocks: int, capacity_blocks: int) -> None:
        self._planner = planner
        self._estimates = estimates
        self._stats = stats
        self.max_blocks = max_blocks
        self._capacity_blocks = max(1, capacity_blocks)
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._due: list[tuple[float, str]] = []
        self._settling: deque[tuple[float, _Kept]] = deque()
        """(until when, what is kept and was not all there)"""
        self.tool_calls = ToolCalls()

    def began(self, name: str, now: float) -> None:
        """A session has a request again: a tool call has ended, and what was kept for the request is its own to use."""
        session = self._sessions.get(name)
        if session is None:
            return
        if session.tool:
            self.tool_calls.observe(session.tool, now - session.called_at)
            session.tool = ""
        self._release(session, now)

    def ended(self, name: str, keys: Sequence[BlockKey], num_tokens: int, now: float) -> None:
        """A session's request has ended; ``keys`` are its blocks, ``num_tokens`` its tokens. Makes the session known."""
        session = self._sessions.setdefault(name, _Session())
        self._sessions.move_to_end(name)
        session.keys, session.num_tokens = keys, num_tokens
        while len(self._sessions) > MAX_SESSIONS:
            self._release(self._sessions.popitem(last=False)[1], now)

    def keep(self, keys: Sequence[BlockKey], now: float) -> None:
        """Keeps the blocks of a request of high priority for :data:`PRIORITY_TTL_S`, as far as the share allows; else counts it."""
        self._reserve(_Kept(keys, now + PRIORITY_TTL_S), now)

    def take(self, hint: Hint, now: float) -> None:
        """Acts on a hint.

        Raises:
            UnknownSessionError: no request has named the session.
            QuotaError: what is to be kept does not fit into the share.
        """
        self._stats.add("hint.taken")
        match hint:
            case ToolCall():
                self._tool_call(hint, now)
            case NextUse():
                self._next_use(hint.session, now + hint.eta_s, now)
            case SessionOver():
                self._release(self._known(hint.session), now)
                del self._sessions[hint.session]
            case Workflow():
                self._workflow(hint, now)

    def tick(self, now: float) -> None:
        """Starts the prefetches that are due, and keeps what has arrived. Call it once per engine step."""
        for _ in range(len(self._settling)):
            until, kept = self._settling.popleft()
            if kept.is_over or now >= until:
                continue
            if self._planner.match(kept.keys).ready_blocks > kept.num_blocks:
                self._reserve(kept, now, until)
            else:
                self._settling.append((until, kept))
        while self._due and self._due[0][0] <= now:
            due, name = heapq.heappop(self._due)
            session = self._sessions.get(name)
            if session is not None and session.due == due:
                session.due = math.inf
                self._stats.add("hint.prefetches")
                self._planner.promote(session.keys, now)

    @property
    def num_sessions(self) -> int:
        """Sessions that are known."""
        return len(self._sessions)

    def _tool_call(self, hint: ToolCall, now: float) -> None:
        session = self._known(hint.session)
        session.tool, session.called_at = hint.tool, now
        expected_s = self.tool_calls.typical_s(hint.tool) if hint.expected_s is None else hint.expected_s
        if expected_s is not None:
            self._planner.expect(session.keys, expected_s, now)
        benefit_s = self._estimates.compute_s(0, session.num_tokens) or MIN_BENEFIT_S
        share = max(1, len(session.keys)) / self._capacity_blocks
        ttl_s = self.tool_calls.best_ttl(hint.tool, benefit_s, share, hint.expected_s)
        if ttl_s > 0:
            self._keep(hint.session, session, ttl_s, now)
        else:
            self._release(session, now)

    def _next_use(self, name: str, at: float, now: float) -> None:
        """Keeps what is in host memory where that is worth it, and brings the rest in time."""
        session = self._known(name)
        self._planner.expect(session.keys, at - now, now)
        share = max(1, len(session.keys)) / self._capacity_blocks
        benefit_s = self._estimates.compute_s(0, session.num_tokens) or MIN_BENEFIT_S
        load_s = (benefit_s if benefit_s < at - now else 0.0) + EARLY_S
        session.due = max(now, at - load_s)
        heapq.heappush(self._due, (session.due, name))
        if len(self._due) > 2 * len(self._sessions) + MAX_STALE:
            self._due = [(each.due, other) for other, each in self._sessions.items() if each.due < math.inf]
            heapq.heapify(self._due)
        if share * (at - now) < benefit_s:
            self._keep(name, session, 1.5 * (at - now) + EARLY_S, now)
        else:
            self._release(session, now)

    def _workflow(self, hint: Workflow, now: float) -> None:
        steps = hint.graph.steps(hint.running)
        soon = {agent for agent, number in steps.items() if number <= 1 and agent in self._sessions}
        for agent in hint.graph.agents() - soon:
            if agent in self._sessions:
                self._release(self._sessions[agent], now)
        for agent in sorted(soon, key=lambda agent: (steps[agent], agent)):
            session = self._sessions[agent]
            self._planner.promote(session.keys, now)
            self._stats.add("hint.prefetches")
            with contextlib.suppress(QuotaError):  # counted; the others may still fit
                self._keep(agent, session, STEP_TTL_S, now)

    def _keep(self, name: str, session: _Session, ttl_s: float, now: float) -> None:
        self._release(session, now)
        session.kept = _Kept(session.keys, now + min(ttl_s, MAX_TTL_S))
        if not self._reserve(session.kept, now):
            raise QuotaError(
                f"session {name!r}: {len(session.keys)} blocks beside {self._planner.reserved_blocks} that are kept already; "
                f"allowed: {self.max_blocks} in all"
            )

    def _reserve(self, kept: _Kept, now: float, until: float | None = None) -> bool:
        """Pins what is there of a prefix, and waits for what is not. False, and counted, where the share has no room for it."""
        if kept.pin_id is not None:
            self._planner.unpin(kept.pin_id, now)
        kept.pin_id, kept.num_blocks = self._planner.reserve(kept.keys, kept.deadline, self.max_blocks)
        if kept.pin_id is None:
            kept.is_over = True
            self._stats.add("hint.refused")
        elif kept.num_blocks < len(kept.keys):
            self._settling.append((min(kept.deadline, now + SETTLE_S) if until is None else until, kept))
        return kept.pin_id is not None

    def _release(self, session: _Session, now: float) -> None:
        kept, session.kept = session.kept, None
        if kept is not None:
            kept.is_over = True
            if kept.pin_id is not None:
                self._planner.unpin(kept.pin_id, now)

    def _known(self, name: str) -> _Session:
        session = self._sessions.get(name)
        if session is None:
            self._stats.add("hint.unknown_sessions")
            raise UnknownSessionError(f"session is {name!r}, which no request has named; {len(self._sessions)} sessions are known")
        return session


def check_hint(hint: Hint) -> None:
    """Raises ControlError for names that are empty and times that cannot be."""
    seconds = {"expected_s": hint.expected_s} if isinstance(hint, ToolCall) else {"eta_s": hint.eta_s} if isinstance(hint, NextUse) else {}
    for name, value in seconds.items():
        if value is not None and not 0 <= value < math.inf:
            raise ControlError(f"{name} is {value}; allowed: seconds, 0 or more and finite")
    if isinstance(hint, ToolCall) and not hint.tool:
        raise ControlError("tool is empty; allowed: the tool's name")
    if isinstance(hint, Workflow) and (strangers := set(hint.running) - hint.graph.agents()):
        raise ControlError(f"running names {', '.join(sorted(strangers))}; allowed: agents of the graph")
