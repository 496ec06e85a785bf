"""What the workers have been told to copy or to put together and have not all reported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvtier.connectors.messages import MoveJob, WorkerReport
from kvtier.connectors.requests import Request


@dataclass(slots=True)
class LoadJob:
    """A load on its way. Ends when all workers have reported it, whatever has become of the request."""

    move: MoveJob
    is_async: bool
    first_block: int
    """place of the first slot's block in the request's chain"""
    remaining: int
    failed: set[int] = field(default_factory=set)
    """positions in ``move.block_ids``"""

    def failed_block_ids(self) -> set[int]:
        """Engine blocks that do not hold what the engine believes."""
        return {self.move.block_ids[position] for position in self.failed} | set(self.move.missing)

    def failed_slots(self, blocks_per_slot: int) -> set[int]:
        """Indexes of the slots whose block could not be copied."""
        return {(self.move.first_index + position) // blocks_per_slot for position in self.failed}

    def partial_slots(self, blocks_per_slot: int) -> set[int]:
        """Indexes of the slots of which only a part was copied."""
        end = self.move.first_index + len(self.move.block_ids)
        return ({0} if self.move.first_index else set()) | ({end // blocks_per_slot} if end % blocks_per_slot else set())

    def first_failed_block(self, blocks_per_slot: int) -> int:
        """Place in the chain of the first block that is not in the engine."""
        return self.first_block + min(self.failed_slots(blocks_per_slot), default=len(self.move.slots))


@dataclass(slots=True)
class StoreJob:
    """A store on its way."""

    move: MoveJob
    first_block: int
    """place of the first slot's block in the request's chain"""
    read_block_ids: Sequence[int]
    """all blocks of the request: what its forward pass read"""
    remaining: int
    failed: set[int] = field(default_factory=set)
    is_void: bool = False
    """the bytes are not what the keys say, although the copies succeed"""
    is_detached: bool = False
    """the request has lost the blocks that are read; the worker half waited before they were overwritten"""

    def failed_slots(self, blocks_per_slot: int) -> set[int]:
        """Indexes of the slots that were not filled by every worker."""
        return {position // blocks_per_slot for position in self.failed}


def void_stores(stores: Iterable[StoreJob], bad_block_ids: set[int]) -> list[StoreJob]:
    """Marks the stores whose forward pass may have read ``bad_block_ids``; returns those newly marked.

    The engine computes on before it learns that a load failed, so what the request (and any that shares the block through
    the engine's own prefix cache) has computed behind it is wrong.
    """
    marked = []
    for job in stores:
        if not job.is_void and not bad_block_ids.isdisjoint(job.read_block_ids):
            job.is_void = True
            marked.append(job)
    return marked


@dataclass(slots=True)
class BlendRun:
    """A prompt that the workers put together."""

    request: Request
    load_ids: list[int]
    """leases on its chunks"""
    num_tokens: int
    """taken from chunks"""
    remaining: int
    """workers that have not reported it"""
    is_spread: bool = False
    """over several steps"""
    failed: bool = False
    is_unsure: bool = False
    num_chosen: int = 0
    """those of them that were computed anew"""

    def advance(self, job_id: int, report: WorkerReport) -> None:
        """Workers have reported it. What they computed counts once, as all compute the same tokens."""
        self.remaining -= report.done[job_id]
        self.failed |= job_id in report.failed
        self.is_unsure |= job_id in report.unsure
        self.num_chosen = report.num_chosen.get(job_id, self.num_chosen)
