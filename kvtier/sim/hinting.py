"""Hints in a replay: what an orchestrator would have said, made from what the trace knows of the future.

After each request its agent says when its next one comes (``next_use``), or that it has called a tool (``tool_call``), whose duration the
cache learns as while serving. A trace names sessions at most, and a session may have several agents; so a request belongs to the
agent of its session whose last prompt it has most in common with, if that is at least half of it. A share of the hints can be made wrong:
they say the time of another request of the trace, drawn at random, and are given even where nothing follows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from kvtier.control.estimates import MIN_SAMPLES, Estimates
from kvtier.control.hints import Hint, Hints, NextUse, ToolCall
from kvtier.control.planner import Planner
from kvtier.errors import QuotaError
from kvtier.sim.model import Machine
from kvtier.sim.setup import Setup
from kvtier.sim.trace import NO_SESSION, Trace
from kvtier.stats import Stats
from kvtier.types import BlockKey

HintKind = Literal["off", "tool_call", "next_use"]
HINT_KINDS: tuple[HintKind, ...] = ("off", "tool_call", "next_use")
_SEED = 7
_MAX_CONTEXT = 1 << 22


class Agents:
    """Who makes each request of a trace, and when each makes its next one. Read-only once made."""

    def __init__(self, trace: Trace) -> None:
        self.names: list[str] = []
        """empty: of nobody"""
        last_by_session: dict[int, list[tuple[str, list[int]]]] = {}
        for index, session in enumerate(trace.session.tolist()):
            if session == NO_SESSION:
                self.names.append("")
                continue
            blocks = [block for start, length in trace.runs(index) for block in range(start, start + length)]
            agents = last_by_session.setdefault(session, [])
            shared, place = max(((num_common(last, blocks), place) for place, (_, last) in enumerate(agents)), default=(0, -1))
            if place < 0 or 2 * shared < len(agents[place][1]):
                place = len(agents)
                agents.append((f"{session}.{place}", blocks))
            agents[place] = (agents[place][0], blocks)
            self.names.append(agents[place][0])
        self.next_s: list[float | None] = [None] * len(trace)
        """seconds from each request to the next one of its agent"""
        upcoming: dict[str, float] = {}
        arrivals = trace.time_s.tolist()
        for index in range(len(trace) - 1, -1, -1):
            name = self.names[index]
            if name in upcoming:
                self.next_s[index] = upcoming[name] - arrivals[index]
            upcoming[name] = arrivals[index]


class Hinting:
    """Gives the hints of one replay: its observer. Use it once.

    Args:
        agents: of the trace
        kind: which hints
        wrong: share of them that is wrong, from 0 to 1
    """

    def __init__(self, trace: Trace, agents: Agents, kind: HintKind, *, wrong: float = 0.0) -> None:
        self._trace = trace
        self._agents = agents
        self._kind = kind
        random = np.random.default_rng(_SEED)
        self._is_wrong = random.random(len(trace)) < wrong
        known = np.array([seconds for seconds in agents.next_s if seconds is not None] or [0.0])
        self._wrong_s = random.choice(known, len(trace)).tolist()
        self._hints: Hints | None = None
        self.stats = Stats()
        """what became of the hints"""

    def attach(self, planner: Planner, machine: Machine, setup: Setup) -> None:
        """Begins to act on a planner."""
        capacity = setup.host.capacity_blocks
        self._hints = Hints(
            planner, _estimates_of(machine), self.stats, max_blocks=int(setup.max_kept_fraction * capacity), capacity_blocks=capacity
        )

    def began(self, index: int, keys: Sequence[BlockKey], now: float) -> None:
        """As :class:`~kvtier.sim.replay.Observer` has it."""
        if self._hints is not None and self._agents.names[index]:
            self._hints.tick(now)
            self._hints.began(self._agents.names[index], now)

    def ended(self, index: int, keys: Sequence[BlockKey], now: float) -> None:
        """As :class:`~kvtier.sim.replay.Observer` has it."""
        name = self._agents.names[index]
        if self._hints is None or not name:
            return
        self._hints.ended(name, keys, int(self._trace.input_tokens[index]), now)
        is_wrong = self._is_wrong[index]
        seconds = self._wrong_s[index] if is_wrong else self._agents.next_s[index]
        if seconds is None:
            return
        hint: Hint = NextUse(name, seconds) if self._kind == "next_use" else ToolCall(name, "tool", seconds)
        with contextlib.suppress(QuotaError):  # counted; the orchestrator would be told
            self._hints.take(hint, now)


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading numbers are equal; whatever follows a different one is different."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _estimates_of(machine: Machine) -> Estimates:
    """What serving would have learned of the machine's speed."""
    estimates = Estimates()
    context = 1
    while context <= _MAX_CONTEXT:
        seconds = context / machine.prefill_tokens_per_s * (1 + context / machine.double_cost_context)
        for _ in range(MIN_SAMPLES):
            estimates.computed(context, context, seconds)
        context *= 2
    return estimates
