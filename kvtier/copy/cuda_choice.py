"""Which way of copying is the fastest for a direction and a piece size: measured figures, and the choice. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

Direction = Literal["load", "store"]
"""load: host memory to the device; store: the other way"""

DIRECTIONS: tuple[Direction, ...] = ("load", "store")

NEARLY = 0.97
"""a way this close to the fastest is as good, and then the one that leaves the multiprocessors alone is taken"""

UNMEASURED_DMA_BYTES = 32 << 10
"""from this piece size on, batched DMA is the choice where nothing was measured"""


class Way(Enum):
    """The ways, the one that asks the least of the device first."""

    DMA = "dma"
    """the copy engines, one batch for all pieces"""
    BULK = "bulk"
    """a kernel of few small blocks drives the bulk copy engine, straight between host memory and the pages"""
    STAGED = "staged"
    """a kernel gathers or scatters, the copy engines move large runs to or from a staging buffer"""
    DIRECT = "direct"
    """a kernel reads and writes both sides itself; the one way between pages and a pool on the device"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure. ``is_right``: the bytes arrived where they should."""

    direction: Direction
    way: Way
    piece_bytes: int
    bytes_per_s: float
    is_right: bool = True


@dataclass(frozen=True, slots=True)
class CopyTable:
    """What was measured on this device, and what follows from it."""

    measured: tuple[Measured, ...] = ()
    refused: Mapping[Way, str] = field(default_factory=dict)
    """ways that this device or layout cannot go -> why"""

    def choose(self, direction: Direction, piece_bytes: float, *, forced: Way | None = None) -> Way:
        """The way for pieces of this size.

        Args:
            forced: taken without asking what was measured, unless it is refused

        Raises:
            ValueError: no way is left, or the forced one is refused or was wrong when it was measured; says why.
        """
        if forced is not None:
            if forced in self.refused:
                raise ValueError(f"copying by {forced.value} was asked for, but {self.refused[forced]}")
            if forced in self._wrong(direction):
                raise ValueError(
                    f"copying by {forced.value} was asked for, but it failed or moved wrong bytes when it was tried ({direction})"
                )
            return forced
        usable = self._usable(direction)
        if not usable:
            raise ValueError(f"no way to {direction}: {self.refused}")
        rates = {way: rate for way in usable if (rate := self.rate(direction, way, piece_bytes)) is not None}
        if not rates:
            return _unmeasured(usable, piece_bytes)
        best = max(rates.values())
        return next(way for way in Way if rates.get(way, 0.0) >= NEARLY * best)

    def rate(self, direction: Direction, way: Way, piece_bytes: float) -> float | None:
        """Bytes per second to expect: between the measured sizes on a line over the size's logarithm, outside as at the nearest."""
        points = sorted((it.piece_bytes, it.bytes_per_s) for it in self.measured if it.direction == direction and it.way is way)
        if not points:
            return None
        if piece_bytes <= points[0][0]:
            return points[0][1]
        for (left, left_rate), (right, right_rate) in itertools.pairwise(points):
            if piece_bytes <= right:
                share = math.log(piece_bytes / left) / math.log(right / left)
                return left_rate + share * (right_rate - left_rate)
        return points[-1][1]

    def _usable(self, direction: Direction) -> list[Way]:
        wrong = self._wrong(direction)
        return [way for way in Way if way not in self.refused and way not in wrong]

    def _wrong(self, direction: Direction) -> set[Way]:
        return {it.way for it in self.measured if it.direction == direction and not it.is_right}

    def lines(self) -> list[str]:
        """The table for people: a row for each direction and size, the chosen way marked."""
        found = []
        for direction in DIRECTIONS:
            for size in sorted({it.piece_bytes for it in self.measured if it.direction == direction}):
                figures = [it for it in self.measured if (it.direction, it.piece_bytes) == (direction, size)]
                chosen = self.choose(direction, size) if self._usable(direction) else None
                cells = [_cell(it, is_chosen=it.way is chosen) for it in figures]
                found.append(f"{direction:<5} {size:>9,} B  " + "  ".join(cells))
        return found + [f"not {way.value}: {why}" for way, why in self.refused.items()]


def _cell(figure: Measured, *, is_chosen: bool) -> str:
    text = f"{figure.way.value} {figure.bytes_per_s / 1e9:.1f} GB/s" + ("" if figure.is_right else " WRONG")
    return f"[{text}]" if is_chosen else text


def _unmeasured(usable: Collection[Way], piece_bytes: float) -> Way:
    order: Iterable[Way] = (Way.DMA, Way.BULK, Way.STAGED) if piece_bytes >= UNMEASURED_DMA_BYTES else (Way.BULK, Way.STAGED, Way.DMA)
    order = (*order, Way.DIRECT)
    return next(way for way in order if way in usable)
