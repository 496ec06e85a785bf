"""The blends and entries of a worker's steps: whatever goes wrong in one is reported as failed, and the engine computes.

A large one is spread over steps: it is left alone when it has had a step's share, and goes on in the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

from kvtier.connectors.boundary import Boundary
from kvtier.connectors.messages import BlendJob, CaptureJob, EntryJob, WorkerReport
from kvtier.copy.base import RowMover
from kvtier.memory.arena import Arena

T = TypeVar("T")
NO_MODEL = "this worker has no model"

Shares: TypeAlias = Generator[None, int | None, T]
"""work that yields before each step's share, and is told how much that is: so many tokens through all layers; None: all that is left; 0: it
is not to go on. Returns what came of it."""


class LostChunkError(Exception):
    """A chunk's slots have other tenants by now, or never had all of it."""


class UnsureError(Exception):
    """The model is less sure of the first token than the request asks for."""


class Blender(Protocol):
    """Puts prompts together from chunks and computes chunks. Both errors above are expected.

    ``arena``: where the job's slots lie; nothing of it is kept. None: this worker cannot do the job, and the others must not wait for it.
    ``rows``: brings it to the device. While work is left alone nothing reads or writes the arena.
    """

    @property
    def has_left_others(self) -> bool:
        """Whether work was broken off where other ranks compute it too: they wait for this one, for good."""
        ...

    def blend(self, job: BlendJob, arena: Arena | None, rows: RowMover | None) -> Shares[int]:
        """Returns how many tokens of chunks it computed anew. The job's blocks may hold anything before the end."""
        ...

    def store(self, job: EntryJob, arena: Arena | None) -> Shares[int]:
        """Computes a chunk into its slots. Returns how many tokens it has."""
        ...

    def capture(self, job: CaptureJob, arena: Arena | None) -> None:
        """Copies a chunk into its slots. Alone: the other workers wait for nobody."""
        ...

    def prepare(self, rows: RowMover) -> None:
        """Does what takes long and is needed once before blends with ``rows``."""
        ...


@dataclass(slots=True)
class _Work:
    """A job and how far it is."""

    job: BlendJob | EntryJob
    begin: Callable[[], Shares[int]]
    shares: Shares[int] | None = None
    """once it has been begun"""
    may_go_on: bool = True

    def go_on(self, share_tokens: int) -> None:
        """One share of it. Raises what comes of it: StopIteration at its end."""
        if self.shares is None:
            self.shares = self.begin()
            next(self.shares)
        share = share_tokens if self.job.is_spread else None
        self.shares.send(share if self.may_go_on else 0)


class BlendSteps:
    """Carries out what the scheduler half ordered. Without a ``blender``, or for another arena than the one attached, everything fails."""

    def __init__(self, blender: Blender | None, on_error: Callable[[], None]) -> None:
        self._blender = blender
        self._boundary = Boundary(on_error=on_error, is_fatal=lambda: blender is not None and blender.has_left_others)
        """around the blender, which runs the engine's model and may fail in any way. Where it leaves other ranks alone the engine has to
        end: they would wait for good, or take what this rank computes next for what they wait for."""
        self._blends: list[_Work] = []
        """spread over steps, and left alone"""
        self._entries: list[_Work] = []
        """the same"""
        self._received: set[str] = set()
        self.attach(None, "")

    def attach(self, arena: Arena | None, arena_id: str, rows: RowMover | None = None) -> None:
        """Slots are in this arena from now on, which orders call ``arena_id``. What was begun with another one fails in the next step."""
        for work in (*self._blends, *self._entries):
            work.may_go_on = False
        self._arena = arena
        self._rows = rows
        self._arena_id = arena_id
        if rows is not None and self._blender is not None:
            with self._boundary.at("prepare blends"):
                self._blender.prepare(rows)

    @property
    def has_blends(self) -> bool:
        """Whether blends of earlier steps are to go on."""
        return bool(self._blends)

    def blend(
        self,
        jobs: Sequence[BlendJob],
        failed_block_ids: AbstractSet[int],
        report: WorkerReport,
        arena_id: str = "",
        abandoned: Collection[int] = (),
        share_tokens: int = 0,
    ) -> set[int]:
        """Puts prompts together, after those that are left of earlier steps; one whose prefix is among ``failed_block_ids`` fails, and
        so do those that are ``abandoned``. Returns the engine blocks that were not filled.
        """
        unfilled: set[int] = set()
        works, self._blends = self._blends, []
        arena = self._arena_of(arena_id)
        for job in jobs:
            has_prefix = failed_block_ids.isdisjoint(job.block_ids)
            works.append(_Work(job, partial(self._begin_blend, job, arena if has_prefix else None)))
        for work in works:
            work.may_go_on = work.may_go_on and work.job.job_id not in abandoned
            if not self._is_over("blend", work, report, share_tokens):
                self._blends.append(work)
            elif isinstance(work.job, BlendJob):
                unfilled.update(self._end_blend(work.job, report))
        return unfilled

    def _end_blend(self, job: BlendJob, report: WorkerReport) -> Sequence[int]:
        """The engine blocks that were not filled."""
        if job.is_async:
            self._received.add(job.request_id)
        return () if job.job_id in report.num_chosen else job.block_ids[job.first * len(job.block_ids) // job.end :]

    def take_received(self) -> set[str]:
        """Requests whose asynchronous blends have ended since the last call."""
        received, self._received = self._received, set()
        return received

    def store(
        self,
        captures: Sequence[CaptureJob],
        entries: Sequence[EntryJob],
        report: WorkerReport,
        arena_id: str = "",
        share_tokens: int = 0,
    ) -> None:
        """Copies chunks out of the blocks of requests, and computes others, but not while a blend goes on."""
        blender, arena = self._blender, self._arena_of(arena_id)
        for job in captures:
            is_done = False
            if blender is not None:
                with self._boundary.at("store chunk"), contextlib.suppress(LostChunkError):
                    blender.capture(job, arena)
                    is_done = True
            _tell_end(report, job.job_id, is_failed=not is_done)
        self._entries += [_Work(job, partial(self._begin_entry, job, arena)) for job in entries]
        if not self._blends:
            self._entries = [work for work in self._entries if not self._is_over("store chunk", work, report, share_tokens)]

    def _begin_blend(self, job: BlendJob, arena: Arena | None) -> Shares[int]:
        if self._blender is None:
            raise LostChunkError(NO_MODEL)
        return self._blender.blend(job, arena, self._rows)

    def _begin_entry(self, job: EntryJob, arena: Arena | None) -> Shares[int]:
        if self._blender is None:
            raise LostChunkError(NO_MODEL)
        return self._blender.store(job, arena)

    def _arena_of(self, arena_id: str) -> Arena | None:
        return self._arena if arena_id == self._arena_id else None

    def _is_over(self, place: str, work: _Work, report: WorkerReport, share_tokens: int) -> bool:
        """Does a step's share of it, if there is one, and reports it where it has ended."""
        job, is_done = work.job, False
        if job.is_spread and work.may_go_on and not share_tokens:
            return False
        with self._boundary.at(place), contextlib.suppress(LostChunkError), _noting(job, report):
            try:
                work.go_on(share_tokens)
            except StopIteration as end:
                is_done = True
                if isinstance(job, BlendJob):
                    report.num_chosen[job.job_id] = end.value
            else:
                return False
        _tell_end(report, job.job_id, is_failed=not is_done and job.job_id not in report.unsure)
        return True


def _tell_end(report: WorkerReport, job_id: int, *, is_failed: bool) -> None:
    report.done[job_id] = 1
    if is_failed:
        report.failed[job_id] = {0}


@contextlib.contextmanager
def _noting(job: BlendJob | EntryJob, report: WorkerReport) -> Iterator[None]:
    """Tells the scheduler half that the model was not sure enough."""
    try:
        yield
    except UnsureError:
        report.unsure.add(job.job_id)
