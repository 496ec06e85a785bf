"""The scheduler half that also writes a recording of what it is asked and what becomes of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from kvtier.cache import Cache
from kvtier.config import Config
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.boundary import Boundary
from kvtier.connectors.copying import Copying, DueStore
from kvtier.connectors.messages import MoveJob, RequestOptions, WorkerReport
from kvtier.connectors.requests import ConnectorSettings, Geometry, Lookup, Matched, Request, RequestIdentity
from kvtier.connectors.scheduler import IDLE_WAIT_S, SchedulerHalf
from kvtier.control.commands import BlockEvent
from kvtier.memory.slab import SlabAllocator
from kvtier.recording import Blocks, Recorder
from kvtier.types import StorePlan

_NO_IDENTITY = RequestIdentity()
_NO_OPTIONS = RequestOptions()
_MAX_KEPT_EVENTS = 100_000


def recorder_of(config: Config, geometry: Geometry, block_bytes: int) -> Recorder | None:
    """The recorder that a configuration asks for. A file that cannot be written is a warning and a counter, no error."""
    if config.record.path is None:
        return None
    host, disk = config.host, config.disk
    header = {
        "block_tokens": geometry.block_tokens,
        "engine_block_tokens": geometry.engine_block_tokens,
        "block_bytes": block_bytes,
        "host_blocks": SlabAllocator.of_host(host.capacity_bytes, block_bytes).max_slots(block_bytes),
        "host_policy": config.policy_of(host),
        "host_ttl_s": host.ttl_s,
        "host_ttl_mode": host.ttl_mode,
        "disk_bytes": 0 if disk is None else disk.capacity_bytes,
        "max_pinned_blocks": int(config.connector.max_pinned_fraction * geometry.host_blocks),
        "promote_wait_s": config.connector.promote_wait_s,
    }
    return Recorder(config.record.path, header, max_bytes=config.record.max_bytes)


class RecordingHalf(SchedulerHalf):
    """A scheduler half with a recorder, which it owns. The engine must have been opened with ``events``.

    Lines cost a list each on the engine's thread; numbering blocks, JSON and the file are the recorder's thread's.
    """

    def __init__(  # noqa: PLR0913 - by keyword
        self,
        engine: Cache,
        geometry: Geometry,
        settings: ConnectorSettings,
        *,
        recorder: Recorder,
        keep_events: bool = False,
        stores_are_async: bool = False,
        blend: BlendParts | None = None,
        idle_wait_s: float = IDLE_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
        strict: bool = False,
    ) -> None:
        """``keep_events``: somebody calls ``take_events``. The rest: see :class:`SchedulerHalf`."""
        more: dict[str, Any] = {"stores_are_async": stores_are_async, "blend": blend, "idle_wait_s": idle_wait_s}
        super().__init__(engine, geometry, settings, **more, clock=clock, strict=strict)
        self._recorder = recorder
        self._now = clock
        self._keep_events = keep_events
        self._kept_events: list[BlockEvent] = []
        self._numbers: dict[str, tuple[int, int]] = {}
        """request -> its number and the tokens of its prompt"""
        self._num_named: dict[str, int] = {}
        """request -> its blocks that lines have named"""
        self._next_numbers = itertools.count()
        self._ended: list[tuple[int, list[int]]] = []
        self._num_lost_seen = 0
        self._copying = _RecordedCopying(
            engine,
            geometry,
            self._requests,
            self._boundary,
            async_load=bool(settings.async_load),
            note_store=self._note_store,
            ended=self._ended,
        )

    def add_request(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        num_prompt_tokens: int,
        identity: RequestIdentity = _NO_IDENTITY,
        options: RequestOptions = _NO_OPTIONS,
    ) -> None:
        super().add_request(request_id, token_ids, num_prompt_tokens=num_prompt_tokens, identity=identity, options=options)
        if request_id not in self._numbers:
            self._numbers[request_id] = (next(self._next_numbers), num_prompt_tokens)

    def match(self, request_id: str, num_tokens: int, num_computed_tokens: int) -> Matched:
        request = self._requests.get(request_id)
        before = None if request is None else _answer_of(request)
        matched = super().match(request_id, num_tokens, num_computed_tokens)
        if request is not None and _answer_of(request) != before:
            with self._boundary.at("record"):
                self._note_answer(request, request.lookup)
        return matched

    def allocated(self, request_id: str, block_ids: Sequence[int], num_external_tokens: int) -> None:
        request = self._requests.get(request_id)
        if request is None or (request.is_admitted and not num_external_tokens):
            return
        planned = set(self._copying.loads)
        first = request.num_computed_tokens // self._block_tokens
        was_asked = request.lookup is not None
        super().allocated(request_id, block_ids, num_external_tokens)
        with self._boundary.at("record"):
            if not was_asked:  # the engine had all of it, or loads nothing
                self._note_answer(request, Lookup(first, first, first))
            loads = [job for job_id, job in self._copying.loads.items() if job_id not in planned]
            num_loaded = len(loads[0].move.slots) if loads else 0
            job_id = loads[0].move.job_id if loads else 0
            self._recorder.add("start", self._now(), self._numbers[request_id][0], first, num_loaded, job_id)

    def finish_step(self, report: WorkerReport | None, failed_block_ids: Collection[int] = ()) -> None:
        super().finish_step(report, failed_block_ids)
        with self._boundary.at("record"):
            if self._ended:
                self._recorder.add("end", self._now(), list(self._ended))
                self._ended.clear()
            self._note_events()
            if self._recorder.num_lost > self._num_lost_seen:
                lost = self._recorder.num_lost
                self._engine.stats.add("record.lost_lines", lost - self._num_lost_seen)
                self._num_lost_seen = lost

    def request_finished(self, request_id: str) -> bool:
        request = self._requests.get(request_id)
        is_held = super().request_finished(request_id)
        number = self._numbers.pop(request_id, None)
        self._num_named.pop(request_id, None)
        if request is not None and number is not None:
            with self._boundary.at("record"):
                self._recorder.add("finish", self._now(), number[0], max(0, len(request.token_ids) - number[1]))
        return is_held

    def reset(self) -> bool:
        is_done = super().reset()
        with self._boundary.at("record"):
            self._recorder.add("reset", self._now())
            self._note_events()
        return is_done

    def take_events(self) -> list[BlockEvent]:
        with self._boundary.at("record"):
            self._note_events()
        events, self._kept_events = self._kept_events, []
        return events

    def close(self) -> None:
        super().close()
        self._recorder.close()

    def _note_answer(self, request: Request, lookup: Lookup | None) -> None:
        if lookup is None:
            return
        number, num_prompt_tokens = self._numbers[request.request_id]
        answer: tuple[Any, ...] = (lookup.first_block, lookup.end_block, lookup.num_ready, lookup.num_promised)
        self._recorder.add("ask", self._now(), number, num_prompt_tokens, *answer, *self._new_blocks(request))

    def _note_store(self, request: Request, first: int, end: int, job_id: int) -> None:
        self._recorder.add("store", self._now(), self._numbers[request.request_id][0], first, end, job_id, *self._new_blocks(request))

    def _note_events(self) -> None:
        """Evictions, tier by tier; the events go on to whoever wants them."""
        events = super().take_events()
        if self._keep_events:
            self._kept_events = [*self._kept_events, *events][-_MAX_KEPT_EVENTS:]
        for tier, group in itertools.groupby((event for event in events if not event.stored), key=lambda event: event.tier):
            self._recorder.add("evict", self._now(), tier, Blocks([event.meta.key for event in group]))

    def _new_blocks(self, request: Request) -> tuple[int, Blocks]:
        """The blocks whose keys are known and that no line has named, behind the place of the first."""
        place = self._num_named.get(request.request_id, 0)
        blocks = request.keys(request.num_keys, self._block_tokens)[place:]
        self._num_named[request.request_id] = place + len(blocks)
        return place, Blocks(blocks)


class _RecordedCopying(Copying):
    """Tells of every store that is planned and of every job that has ended."""

    def __init__(
        self,
        engine: Cache,
        geometry: Geometry,
        requests: Mapping[str, Request],
        boundary: Boundary,
        *,
        async_load: bool,
        note_store: Callable[[Request, int, int, int], None],
        ended: list[tuple[int, list[int]]],
    ) -> None:
        super().__init__(engine, geometry, requests, boundary, async_load=async_load)
        self._note_store = note_store
        self._ended = ended

    def _take_plan(self, due: DueStore, plan: StorePlan) -> MoveJob | None:
        move = super()._take_plan(due, plan)
        self._note_store(due.request, due.order.first, len(due.order.keys), 0 if move is None else move.job_id)
        return move

    def advance_load(self, job_id: int, report: WorkerReport) -> None:
        job = self.loads[job_id]
        super().advance_load(job_id, report)
        if job_id not in self.loads and job_id > 0:
            self._ended.append((job_id, sorted(job.failed_slots(self._blocks_per_slot))))

    def advance_store(self, job_id: int, report: WorkerReport) -> None:
        job = self.stores[job_id]
        super().advance_store(job_id, report)
        if job_id not in self.stores:
            self._ended.append((job_id, [0] if job.is_void else sorted(job.failed_slots(self._blocks_per_slot))))


def _answer_of(request: Request) -> tuple[object, ...] | None:
    """What must be the same for a repeated question not to be worth a line."""
    lookup = request.lookup
    if lookup is None:
        return None
    return (id(lookup), lookup.num_ready, lookup.num_promised, lookup.pin_id, lookup.num_pinned, lookup.is_waiting)
