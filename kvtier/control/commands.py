"""What the planner wants done: plans as data. Whoever drives the planner carries them out and reports back.

The serving engine runs them on tiers; the simulator on a fake clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.types import BlockKey, BlockMeta


@dataclass(frozen=True, slots=True)
class Demote:
    """Copy blocks from host slots to a lower tier; report by ``Planner.demoted``."""

    job_id: int
    tier: int
    blocks: tuple[BlockMeta, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Promote:
    """Copy blocks from a lower tier into host slots; report by ``Planner.promoted``."""

    job_id: int
    tier: int
    blocks: tuple[BlockMeta, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Remove:
    """Forget blocks in a lower tier, before any later command to it."""

    tier: int
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """Stop counting on blocks in a tier that others share; they stay there."""

    tier: int
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask a shared tier for the leading run of ``keys``; report by ``Planner.probed``."""

    job_id: int
    tier: int
    keys: tuple[BlockKey, ...]


Command = Demote | Promote | Remove | Forget | Probe


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """A block became readable in a tier (``stored``) or stopped being so."""

    stored: bool
    tier: str
    meta: BlockMeta
