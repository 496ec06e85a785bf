"""FIFO: the leaf that came first leaves first, used or not.

When to use it: content whose value only falls with age (a news feed), or as the baseline of a comparison.
When not: nearly everywhere else; it forgets what is used most as readily as what is never used.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvtier.policies.leaf_order import LeafOrder
from kvtier.types import BlockKey


class FIFOPolicy(LeafOrder):
    """Evicts the leaf that was inserted first."""

    __slots__ = ()

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        """Does nothing: use does not delay leaving."""
