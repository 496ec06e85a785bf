"""Which blocks are written to a lower tier at all: to spare an SSD's endurance, and its bandwidth for loads.

Most blocks are never used again. Waiting for the second use (as LARC does for SSD caches, Huang et al., MSST 2013) writes only those that
were; the price is one miss for each block that left host memory before. Where policies know what a place yields (an index in uses per
second), a block can be compared with the one it would take the place of: the saving of a use, computing a block less loading it, is the
same for all blocks of a tier and cancels out. A budget of bytes a day bounds what is written whatever happens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvtier.types import BlockKey

DAY_S = 86_400.0
BURST = 24
"""one part in so many of a day's bytes may be written at once"""
MAX_SEEN = 1_000_000
"""blocks that are remembered as used once; the one that was seen first is forgotten"""


class Admission:
    """Decides for one tier. Pure; ``now`` in seconds.

    ``second_use``: blocks must have been used again. ``by_index``: a block must be worth as much as the one that would leave for it.
    """

    def __init__(self, *, second_use: bool = False, by_index: bool = False, daily_bytes: int | None = None) -> None:
        self.by_index = by_index
        self._second_use = second_use
        self._daily_bytes = daily_bytes
        self._seen: OrderedDict[BlockKey, None] = OrderedDict()
        self._left_bytes = 0.0 if daily_bytes is None else daily_bytes / BURST
        self._counted_at: float | None = None

    @classmethod
    def of(cls, admit: str, daily_bytes: int | None) -> Admission | None:
        """By the names in the configuration. None: everything is written."""
        if admit == "all" and daily_bytes is None:
            return None
        return cls(second_use=admit == "second_use", by_index=admit == "index", daily_bytes=daily_bytes)

    def wants(self, key: BlockKey) -> bool:
        """A block came to host memory: whether it may be written."""
        if not self._second_use:
            return True
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return False

    def used(self, keys: Iterable[BlockKey], is_here: Callable[[BlockKey], bool]) -> list[BlockKey]:
        """Blocks were used again: those of them that may be written now. ``is_here``: whether host memory has a block."""
        if self.by_index:
            return [key for key in keys if is_here(key)]
        if not self._seen:
            return []
        found = [key for key in keys if key in self._seen and is_here(key)]
        for key in found:
            del self._seen[key]
        return found

    def num_worth(self, indexes: Sequence[float | None], least: float | None) -> int:
        """How many leading blocks of a run are worth writing: those before the first whose index is below ``least``, that of the block
        which would leave. What is not known (None) is worth it."""
        if least is None:
            return len(indexes)
        return next((place for place, index in enumerate(indexes) if index is not None and index < least), len(indexes))

    def grant(self, num_blocks: int, num_bytes: int, now: float) -> int:
        """How many of so many blocks of a size the budget has room for now; takes their bytes from it."""
        if self._daily_bytes is None:
            return num_blocks
        if self._counted_at is not None:
            gained = (now - self._counted_at) * self._daily_bytes / DAY_S
            self._left_bytes = min(self._daily_bytes / BURST, self._left_bytes + gained)
        self._counted_at = now
        granted = min(num_blocks, int(self._left_bytes // num_bytes))
        self._left_bytes -= granted * num_bytes
        return granted
