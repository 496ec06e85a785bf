"""The blends and entries of a worker's steps: whatever goes wrong in one is reported as failed, and the engine computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from kvtier.connectors.boundary import Boundary
from kvtier.connectors.messages import BlendJob, CaptureJob, EntryJob, WorkerReport
from kvtier.copy.base import RowMover
from kvtier.memory.arena import Arena


class LostChunkError(Exception):
    """A chunk's slots have other tenants by now, or never had all of it."""


class UnsureError(Exception):
    """The model is less sure of the first token than the request asks for."""


class Blender(Protocol):
    """Puts prompts together from chunks and computes chunks; both are done on return, or raise. Both errors above are expected.

    ``arena``: where the job's slots lie; nothing of it is kept. None: this worker cannot do the job, and the others must not wait for it.
    ``rows``: brings it to the device.
    """

    def blend(self, job: BlendJob, arena: Arena | None, rows: RowMover | None) -> int:
        """Returns how many tokens of chunks it computed anew."""
        ...

    def store(self, job: EntryJob, arena: Arena | None) -> None:
        """Computes a chunk into its slots."""
        ...

    def capture(self, job: CaptureJob, arena: Arena | None) -> None:
        """Copies a chunk into its slots. Alone: the other workers wait for nobody."""
        ...

    def prepare(self, rows: RowMover) -> None:
        """Does what takes long and is needed once before blends with ``rows``."""
        ...


class BlendSteps:
    """Carries out what the scheduler half ordered. Without a ``blender``, or for another arena than the one attached, everything fails."""

    def __init__(self, blender: Blender | None, on_error: Callable[[], None]) -> None:
        self._blender = blender
        self._boundary = Boundary(on_error=on_error)
        """around the blender, which runs the engine's model and may fail in any way"""
        self.attach(None, "")

    def attach(self, arena: Arena | None, arena_id: str, rows: RowMover | None = None) -> None:
        """Slots are in this arena from now on, which orders call ``arena_id``."""
        self._arena = arena
        self._rows = rows
        self._arena_id = arena_id
        if rows is not None and self._blender is not None:
            with self._boundary.at("prepare blends"):
                self._blender.prepare(rows)

    def blend(self, jobs: Sequence[BlendJob], failed_block_ids: AbstractSet[int], report: WorkerReport, arena_id: str = "") -> set[int]:
        """Puts prompts together; one whose prefix is among ``failed_block_ids`` fails. Returns the engine blocks that were not filled."""
        unfilled: set[int] = set()
        blender, arena = self._blender, self._arena if arena_id == self._arena_id else None
        for job in jobs:
            is_done = False
            if blender is not None:
                with self._boundary.at("blend"), contextlib.suppress(LostChunkError), _noting(job, report):
                    has_prefix = failed_block_ids.isdisjoint(job.block_ids)
                    report.num_chosen[job.job_id] = blender.blend(job, arena if has_prefix else None, self._rows)
                    is_done = True
            report.done[job.job_id] = 1
            if not is_done:
                if job.job_id not in report.unsure:
                    report.failed[job.job_id] = {0}
                num_kept = job.first * len(job.block_ids) // job.end
                unfilled.update(job.block_ids[num_kept:])
        return unfilled

    def store(self, captures: Sequence[CaptureJob], entries: Sequence[EntryJob], report: WorkerReport, arena_id: str = "") -> None:
        """Copies chunks out of the blocks of requests, and computes others."""
        blender, arena = self._blender, self._arena if arena_id == self._arena_id else None
        jobs: tuple[CaptureJob | EntryJob, ...] = (*captures, *entries)
        for job in jobs:
            is_done = False
            if blender is not None:
                with self._boundary.at("store chunk"), contextlib.suppress(LostChunkError):
                    if isinstance(job, CaptureJob):
                        blender.capture(job, arena)
                    else:
                        blender.store(job, arena)
                    is_done = True
            report.done[job.job_id] = 1
            if not is_done:
                report.failed[job.job_id] = {0}


@contextlib.contextmanager
def _noting(job: BlendJob, report: WorkerReport) -> Iterator[None]:
    """Tells the scheduler half that the model was not sure enough."""
    try:
        yield
    except UnsureError:
        report.unsure.add(job.job_id)
