"""The blends and entries of a worker's steps: whatever goes wrong in one is reported as failed, and the engine computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from kvtier.connectors.boundary import Boundary
from kvtier.connectors.messages import BlendJob, EntryJob, WorkerReport
from kvtier.copy.base import PieceReader
from kvtier.memory.arena import Arena


class LostChunkError(Exception):
    """A chunk's slots have other tenants by now, or never had all of it."""


class Blender(Protocol):
    """Puts prompts together from chunks and computes chunks; both are done on return, or raise. LostChunkError is expected.

    ``arena``: where the job's slots lie; nothing of it is kept. ``pieces``: reads it into memory of the device.
    """

    def blend(self, job: BlendJob, arena: Arena, pieces: PieceReader | None) -> tuple[int, int]:
        """Returns how many tokens it took from chunks, and how many of them it computed anew."""
        ...

    def store(self, job: EntryJob, arena: Arena) -> None:
        """Computes a chunk into its slots."""
        ...


class BlendSteps:
    """Carries out what the scheduler half ordered. Without a ``blender``, or for another arena than the one attached, everything fails."""

    def __init__(self, blender: Blender | None, on_error: Callable[[], None]) -> None:
        self._blender = blender
        self.attach(None, "")
        self._boundary = Boundary(on_error=on_error)
        """around the blender, which runs the engine's model and may fail in any way"""

    def attach(self, arena: Arena | None, arena_id: str, pieces: PieceReader | None = None) -> None:
        """Slots are in this arena from now on, which orders call ``arena_id``."""
        self._arena = arena
        self._pieces = pieces
        self._arena_id = arena_id

    def blend(self, jobs: Sequence[BlendJob], failed_block_ids: AbstractSet[int], report: WorkerReport, arena_id: str = "") -> set[int]:
        """Puts prompts together; one whose prefix is among ``failed_block_ids`` fails. Returns the engine blocks that were not filled."""
        unfilled: set[int] = set()
        blender, arena = self._blender, self._arena if arena_id == self._arena_id else None
        for job in jobs:
            is_done = False
            if blender is not None and arena is not None and failed_block_ids.isdisjoint(job.block_ids):
                with self._boundary.at("blend"), contextlib.suppress(LostChunkError):
                    num_tokens, num_chosen = blender.blend(job, arena, self._pieces)
                    report.num_blended_tokens += num_tokens
                    report.num_chosen_tokens += num_chosen
                    is_done = True
            report.done[job.job_id] = 1
            if not is_done:
                report.failed[job.job_id] = {0}
                num_kept = job.first * len(job.block_ids) // job.end
                unfilled.update(job.block_ids[num_kept:])
        return unfilled

    def store(self, jobs: Sequence[EntryJob], report: WorkerReport, arena_id: str = "") -> None:
        """Computes chunks."""
        blender, arena = self._blender, self._arena if arena_id == self._arena_id else None
        for job in jobs:
            is_done = False
            if blender is not None and arena is not None:
                with self._boundary.at("store chunk"), contextlib.suppress(LostChunkError):
                    blender.store(job, arena)
                    is_done = True
            report.done[job.job_id] = 1
            if not is_done:
                report.failed[job.job_id] = {0}
