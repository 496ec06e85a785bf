"""What the planner remembers of copies under way."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kvtier.control.index import Entry
from kvtier.control.pins import Pin
from kvtier.types import BlockKey, BlockMeta


@dataclass(frozen=True, slots=True)
class StoreInFlight:
    """Copies from the engine into slots. ``anchor`` keeps the block before them."""

    entries: tuple[Entry, ...]
    blocks: tuple[BlockMeta, ...]
    """what the entries say of themselves"""
    anchor: Pin
    is_cancelled: bool = False
    """its blocks were forgotten meanwhile: what arrives is not used"""


@dataclass(frozen=True, slots=True)
class PromotionPlan:
    """Copies from a lower tier into slots."""

    tier: int
    entries: tuple[Entry, ...]
    is_cancelled: bool = False
    """its blocks were forgotten meanwhile: what arrives is not used"""


@dataclass(frozen=True, slots=True)
class DemotionPlan:
    """Copies from slots to a lower tier. The slots are leased, so their blocks may leave host memory meanwhile."""

    tier: int
    entries: tuple[Entry, ...]
    slots: tuple[int, ...]
    unwanted: frozenset[BlockKey] = frozenset()
    """to be removed again when they have arrived"""
    is_unwanted_everywhere: bool = False
    """also from a tier that others share"""


@dataclass(frozen=True, slots=True)
class LoadInFlight:
    """Blocks being copied to the engine, the slots they were in when the load began, and where they are in the device pool."""

    entries: tuple[Entry, ...]
    slots: tuple[int, ...]
    device_slots: tuple[int, ...] = ()
    device_ready: tuple[bool, ...] = ()

    def num_from_host(self, failed: Collection[int]) -> int:
        """How many were copied from host memory, and did not fail."""
        ready = self.device_ready or (False,) * len(self.entries)
        return sum(not is_ready and position not in failed for position, is_ready in enumerate(ready))
