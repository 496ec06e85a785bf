"""Replays a trace through the planner that serves, with a clock of its own.

The model of the engine: a request takes what the tiers have at its arrival (or once its promotions are there), computes the rest and stores
it within the same instant; only transfers to and from the disk take time. The engine has no prefix cache of its own, and no request waits
for another one. So a time to first token is that of a request on an idle engine.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvtier.control.commands import Demote, Promote, Remove
from kvtier.control.planner import Planner
from kvtier.policies import create_policy
from kvtier.sim.model import Machine
from kvtier.sim.serving import Served, Serving
from kvtier.sim.setup import Setup
from kvtier.sim.timed import PolicyTimes
from kvtier.sim.trace import Trace
from kvtier.stats import Stats
from kvtier.types import KEY_BYTES, BlockKey, Outcome

IDLE_TICK_S = 0.25
"""while writes are due later, the planner is asked again after this time"""
PROGRESS_EVERY = 256


@dataclass(slots=True, eq=False)
class Replayed:
    """What happened, request by request, and in all."""

    setup: Setup
    block_bytes: int
    hit_blocks: NDArray[np.int64]
    """leading blocks that were not computed"""
    host_blocks: NDArray[np.int64]
    """those of them that were in host memory when the request came"""
    wait_s: NDArray[np.float64]
    """how long each request waited for promotions"""
    counters: dict[str, int]
    policy_s: float
    """estimated seconds spent in the policies"""
    cpu_s: float
    """seconds of processor time that the replay took"""
    evictions: list[tuple[str, BlockKey]] = field(default_factory=list)
    """(tier, block) in order, where they were asked for"""


@dataclass(slots=True)
class _Link:
    """One direction of the disk: transfers one after the other."""

    bytes_per_s: float
    latency_s: float
    free_at: float = 0.0

    def end_of(self, num_bytes: int, now: float) -> float:
        self.free_at = max(now, self.free_at) + self.latency_s + num_bytes / self.bytes_per_s
        return self.free_at


class Observer(Protocol):
    """Sees the requests of a replay go by and may act on its planner, as an orchestrator's hints do while serving."""

    def began(self, index: int, keys: Sequence[BlockKey], now: float) -> None:
        """Request ``index`` of the trace comes; it has not been looked up."""

    def ended(self, index: int, keys: Sequence[BlockKey], now: float) -> None:
        """It has its blocks, and what it computed is stored."""


class Replay:
    """One run of a trace through one setup. Use it once; one thread.

    Args:
        trace: the workload
        setup: the tiers
        machine: speeds, for what takes time
        engine_block_tokens: tokens of the engine's blocks; a prompt's last token is always computed, so that many are at most lost
        record_evictions: fill ``Replayed.evictions``
        observer: told of every request
    """

    def __init__(
        self,
        trace: Trace,
        setup: Setup,
        machine: Machine,
        *,
        engine_block_tokens: int = 16,
        record_evictions: bool = False,
        observer: Observer | None = None,
    ) -> None:
        self._trace = trace
        self._observer = observer
        self._setup = setup
        self._engine_block_tokens = engine_block_tokens
        self._record_evictions = record_evictions
        self._block_bytes = trace.block_tokens * machine.kv_bytes_per_token
        self._stats = Stats()
        self._times = PolicyTimes()
        self._planner = setup.planner(
            self._block_bytes, self._stats, make_policy=lambda name: self._times.wrap(create_policy(name)), events=record_evictions
        )
        self._serving = Serving(
            self._planner,
            lambda: self._planner.draining_blocks(self._block_bytes),
            self._run_commands,
            max_pinned_blocks=int(setup.max_pinned_fraction * setup.host.capacity_blocks),
            promote_wait_s=setup.promote_wait_s,
            block_bytes=self._block_bytes,
        )
        self._read = _Link(machine.disk_read_bytes_per_s, machine.disk_latency_s)
        self._write = _Link(machine.disk_write_bytes_per_s, machine.disk_latency_s)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        self._has_tick = False
        self._keys = [BlockKey(number.to_bytes(KEY_BYTES, "little")) for number in range(trace.num_unique)]
        # plain lists: reading a number out of numpy costs as much as deciding about a block
        self._input_tokens: list[int] = trace.input_tokens.tolist()
        self._arrivals: list[float] = trace.time_s.tolist()
        self._run_offsets: list[int] = trace.run_offsets.tolist()
        self._run_starts: list[int] = trace.run_starts.tolist()
        self._run_lengths: list[int] = trace.run_lengths.tolist()
        num = len(trace)
        self._out = Replayed(setup, self._block_bytes, np.zeros(num, np.int64), np.zeros(num, np.int64), np.zeros(num), {}, 0.0, 0.0)

    def run(self, progress: Callable[[int], None] = lambda _done: None) -> Replayed:
        """Replays everything. ``progress`` is told how many requests are done, now and then."""
        start = time.process_time()
        for index, now in enumerate(self._arrivals):
            self._run_until(now)
            self._now = now
            self._times.next_request()
            self._serving.tick(now)
            self._arrive(index, now)
            if self._record_evictions:
                self._note_evictions()
            if index % PROGRESS_EVERY == 0:
                progress(index)
        self._run_until(np.inf)
        self._note_evictions()
        progress(len(self._arrivals))
        self._out.counters = self._stats.snapshot()
        self._out.policy_s = self._times.total_s
        self._out.cpu_s = time.process_time() - start
        return self._out

    @property
    def planner(self) -> Planner:
        """The planner that is driven."""
        return self._planner

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Calls ``event`` when the clock gets to ``when``."""
        heapq.heappush(self._events, (when, next(self._ids), event))

    def check(self) -> list[str]:
        """Broken promises of the planner in words, and what is still open; empty = healthy."""
        return self._planner.check() + [f"{count} {what} left" for what, count in self._planner.leftovers().items() if count]

    def _arrive(self, index: int, now: float) -> None:
        keys: list[BlockKey] = []
        for run in range(self._run_offsets[index], self._run_offsets[index + 1]):
            start = self._run_starts[run]
            keys += self._keys[start : start + self._run_lengths[run]]
        limit = usable_blocks(self._input_tokens[index], self._trace.block_tokens, self._engine_block_tokens)
        if self._observer is not None:
            self._observer.began(index, keys, now)
        request = Served(index, keys, min(limit, len(keys)))
        self._serving.look(request, now)
        if not request.is_waiting:
            self._start(request, now)
        elif request.deadline is not None:
            self.at(request.deadline, lambda: None)

    def _start(self, request: Served, now: float) -> None:
        index = request.index
        load = self._serving.admit(request, now)
        self._out.hit_blocks[index] = 0 if load is None else len(load.slots)
        self._out.host_blocks[index] = min(request.num_found_ready, request.num_ready)
        self._out.wait_s[index] = now - self._arrivals[index]
        end = len(request.keys)
        if not self._setup.store_decode_blocks:
            end = min(end, self._input_tokens[index] // self._trace.block_tokens)
        if end > request.store_from:
            self._serving.store(request, end, now)
        self._serving.end_step(now)
        if self._observer is not None:
            self._observer.ended(index, request.keys, now)

    # ---- what takes time ----------------------------------------------------------------------------------------

    def _run_until(self, until: float) -> None:
        self._keep_ticking(until)
        while self._events and self._events[0][0] <= until:
            now, _, event = heapq.heappop(self._events)
            self._now = now
            event()
            self._serving.tick(now)
            self._ask_again(now)
            self._keep_ticking(until)

    def _keep_ticking(self, until: float) -> None:
        if until < np.inf and not self._has_tick and self._planner.has_work:
            self.at(self._now + IDLE_TICK_S, self._idle_tick)
            self._has_tick = True

    def _ask_again(self, now: float) -> None:
        for request in list(self._serving.waiting.values()):
            self._serving.look_again(request, now)
            if not request.is_waiting:
                self._start(request, now)

    def _idle_tick(self) -> None:
        self._has_tick = False

    def _run_commands(self) -> None:
        for command in self._planner.take_commands():
            if isinstance(command, Remove):
                continue
            assert isinstance(command, (Promote, Demote)), "no tier of a simulation is shared"
            num_bytes = len(command.blocks) * self._block_bytes
            if isinstance(command, Promote):
                self.at(self._read.end_of(num_bytes, self._now), self._promoted(command))
            else:
                self.at(self._write.end_of(num_bytes, self._now), self._demoted(command))

    def _promoted(self, command: Promote) -> Callable[[], None]:
        return lambda: self._planner.promoted(command.job_id, [Outcome.OK] * len(command.blocks), self._now)

    def _demoted(self, command: Demote) -> Callable[[], None]:
        return lambda: self._planner.demoted(command.job_id, [Outcome.OK] * len(command.blocks), (), self._now)

    def _note_evictions(self) -> None:
        self._out.evictions += [(event.tier, event.meta.key) for event in self._planner.take_events() if not event.stored]


def usable_blocks(input_tokens: int, block_tokens: int, engine_block_tokens: int) -> int:
    """Leading blocks of a prompt that can be hits, given that at least its last token is computed."""
    num_usable = (input_tokens - 1) // engine_block_tokens * engine_block_tokens
    return max(0, min(-(-num_usable // block_tokens), input_tokens // block_tokens))


def times_to_first_token(
    trace: Trace, machine: Machine, hit_blocks: Sequence[int] | NDArray[Any], wait_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Estimated seconds to the first token of each request, on an idle engine."""
    inputs = trace.input_tokens.astype(np.float64)
    hits = np.minimum(np.asarray(hit_blocks) * trace.block_tokens, np.maximum(0, inputs - 1))
    prefill = (inputs - hits) / machine.prefill_tokens_per_s * (1 + (inputs + hits) / (2 * machine.double_cost_context))
    times: NDArray[np.float64] = machine.overhead_s + wait_s + hits * machine.kv_bytes_per_token / machine.host_bytes_per_s + prefill
    return times
