"""A job that a worker has begun."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtier.connectors.messages import MoveJob
from kvtier.copy.base import CopyEvent


@dataclass(slots=True)
class RunningCopy:
    """A job that was started. ``positions`` of its blocks are being copied; the others have failed already."""

    job: MoveJob
    positions: list[int]
    event: CopyEvent | None
    failed: set[int] = field(default_factory=set)
    arena_id: str = ""
    started: float | None = None
    """of a load that is copied as a whole, and not beside computing: when"""
