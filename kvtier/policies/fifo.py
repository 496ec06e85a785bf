"""FIFO: the leaf that came first leaves first, used or not.

When to use it: content whose value only falls with age (a news feed), or as the baseline of a comparison.
When not: nearly everywhere else; it forgets what is used most as readily as what is never used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.policies.leaf_order import LeafQueues, Queue, QueueNode
from kvtier.types import BlockKey, BlockMeta


class FIFOPolicy(LeafQueues):
    """Evicts the leaf that was inserted first."""

    __slots__ = ("_queue",)

    def __init__(self) -> None:
        super().__init__()
        self._queue = Queue()

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        """Does nothing: use does not delay leaving."""

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        chosen: list[BlockKey] = []
        while len(chosen) < num_blocks and (node := self._queue.take_leaf()) is not None:
            self._forget(node)
            chosen.append(node.key)
        return chosen

    def _came(self, node: QueueNode, now: float) -> None:
        self._queue.append(node)

    def _came_back(self, node: QueueNode, now: float) -> None:
        self._came_back_in_place(node)
