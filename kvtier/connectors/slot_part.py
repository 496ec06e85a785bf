"""Where one rank's bytes lie in a slot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlotPart:
    """One rank's part of every slot. Raises ValueError where the rank is not one of the workers."""

    rank: int
    """0 <= rank < num_workers; parts lie in the order of the ranks"""
    num_workers: int
    engine_block_bytes: int
    """of one engine block on this rank"""
    blocks_per_slot: int = 1
    """engine blocks in one kvtier block"""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_workers:
            raise ValueError(f"rank {self.rank} is not one of {self.num_workers} workers")

    def offset_of(self, index: int) -> int:
        """Where the part's ``index``-th engine block begins in a slot."""
        return (self.rank * self.blocks_per_slot + index) * self.engine_block_bytes
