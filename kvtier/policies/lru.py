"""Suffix-first LRU: the least recently used leaf leaves first.

Idea: plain LRU (every operating-systems text), on a forest. A prefix is worth more than its continuation, since every
continuation needs it; so the tail of a prompt is touched first and leaves first.  On real traces that order alone is worth up to
24 % of the hit rate over LRU in prompt order.

When to use it: tiers that hold a fifth of the working set and more, where nothing is much better; and as the floor of a comparison.
When not: scans of never repeated prompts larger than the tier flush it; below about 1 % of the working set scan-resistant policies win.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvtier.policies.fifo import FIFOPolicy
from kvtier.policies.leaf_order import QueueNode
from kvtier.types import BlockKey


class LRUPolicy(FIFOPolicy):
    """Evicts the least recently used leaf: a FIFO whose blocks go to the back when they are used."""

    __slots__ = ()

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        nodes, queue = self._nodes, self._queue
        for key in keys:
            node = nodes.get(key)
            if node is not None:
                self._move(node, queue)

    def _came_back(self, node: QueueNode, now: float) -> None:
        self._move(node, self._queue)
