"""Whether slots still have the tenants that they were planned for, as a worker sees it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtier.connectors.messages import MoveJob


class Tenancy:
    """The generations of one mapped arena, compared with those of a plan. Without an arena no slot has its tenant."""

    def __init__(self, generations: npt.NDArray[np.uint32] | None, arena_id: str) -> None:
        self._generations = generations
        self._arena_id = arena_id

    def stale_positions(self, job: MoveJob, arena_id: str, blocks_per_slot: int) -> set[int]:
        """Positions whose slot has another tenant than planned, or is in another arena than ``arena_id``."""
        if self._generations is None or arena_id != self._arena_id:
            return set(range(len(job.block_ids)))
        if not job.slots:
            return set()
        slots = np.fromiter(job.slots, dtype=np.int64, count=len(job.slots))
        planned = np.fromiter(job.generations, dtype=np.uint32, count=len(job.slots))
        stale = set(np.flatnonzero(self._generations[slots] != planned).tolist())
        if not stale:
            return set()
        return {position for position in range(len(job.block_ids)) if (job.first_index + position) // blocks_per_slot in stale}
