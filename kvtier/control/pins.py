"""Pins: promises that a prefix stays, counted per holder, with or without a deadline."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

from kvtier.types import BlockKey

_MAX_STALE = 64
"""deadlines of pins that have ended, beside as many as there are pins"""


@dataclass(frozen=True, slots=True)
class Pin:
    """A promise: in each tier named, the block and with it everything before it stays."""

    places: tuple[tuple[int, BlockKey, int], ...]
    """(tier, key of the last block, bytes of a block)"""
    deadline: float | None
    num_reserved: int = 0
    """blocks that count towards the share of users' pins"""


class PinTable:
    """Pins by id. Pure; the planner applies them to the tiers."""

    __slots__ = ("_deadlines", "_ids", "_pins", "num_reserved")

    def __init__(self) -> None:
        self._pins: dict[int, Pin] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._ids = itertools.count(1)
        self.num_reserved = 0
        """blocks that all pins together have reserved"""

    def add(self, pin: Pin) -> int:
        """Registers a pin and returns its id."""
        pin_id = next(self._ids)
        self._pins[pin_id] = pin
        self.num_reserved += pin.num_reserved
        if pin.deadline is not None:
            heapq.heappush(self._deadlines, (pin.deadline, pin_id))
            if len(self._deadlines) > 2 * len(self._pins) + _MAX_STALE:
                self._deadlines = [(each.deadline, number) for number, each in self._pins.items() if each.deadline is not None]
                heapq.heapify(self._deadlines)
        return pin_id

    def pop(self, pin_id: int) -> Pin | None:
        """Ends a pin; None where it has ended already."""
        pin = self._pins.pop(pin_id, None)
        if pin is not None:
            self.num_reserved -= pin.num_reserved
        return pin

    def expired(self, now: float) -> list[Pin]:
        """Ends and returns the pins whose deadline has passed."""
        out: list[Pin] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            pin = self.pop(heapq.heappop(self._deadlines)[1])
            if pin is not None:
                out.append(pin)
        return out

    def __len__(self) -> int:
        return len(self._pins)
