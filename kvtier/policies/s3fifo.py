"""S3-FIFO: a small queue that new blocks must survive by being used, a main queue with second chances, and a ghost queue.

Yang, Zhang, Qiu, Yue, Vinayak: "FIFO queues are all you need for cache eviction", SOSP 2023. Here on a forest: only leaves leave.

When to use it: many blocks that are used once (retrieval, batch jobs), tiers far smaller than the working set.
When not: conversations; a block must be used twice while it is in the small queue, a tenth of the tier, or it goes before its
second turn comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.policies.leaf_order import GhostList, LeafQueues, Queue, QueueNode
from kvtier.types import BlockKey, BlockMeta

SMALL_FRACTION = 0.1
MAX_USES = 3


class S3FIFOPolicy(LeafQueues):
    """Evicts from the small queue while it is over its share, else from the main one. ``mark`` counts uses.

    ``capacity_blocks``: blocks that the tier holds; None: as many as there are when room is asked for.
    """

    __slots__ = ("_capacity", "_ghosts", "_is_learning", "_main", "_small")

    def __init__(self, capacity_blocks: int | None = None) -> None:
        super().__init__()
        self._is_learning = capacity_blocks is None
        self._capacity = capacity_blocks or 0
        self._small = Queue()
        self._main = Queue()
        self._ghosts = GhostList()

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        nodes = self._nodes
        for key in keys:
            node = nodes.get(key)
            if node is not None and node.mark < MAX_USES:
                node.mark += 1

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        if self._is_learning:
            self._capacity = len(self)
        chosen: list[BlockKey] = []
        while len(chosen) < num_blocks and (node := self._next_victim()) is not None:
            if node.queue is self._small:
                self._ghosts.add(node.key)
            self._forget(node)
            chosen.append(node.key)
        self._ghosts.trim(self._capacity - int(self._capacity * SMALL_FRACTION))
        return chosen

    def _next_victim(self) -> QueueNode | None:
        small, main = self._small, self._main
        while True:
            is_small_first = len(small) >= self._capacity * SMALL_FRACTION
            first, second = (small, main) if is_small_first else (main, small)
            node = first.take_leaf() or second.take_leaf()
            if node is None:
                return None
            if node.queue is small and node.mark > 1:
                node.mark = 0
            elif node.queue is main and node.mark > 0:
                node.mark -= 1
            else:
                return node
            main.append(node)

    def _came(self, node: QueueNode, now: float) -> None:
        node.mark = 0
        queue = self._small if self._ghosts.pop(node.key) is None else self._main
        queue.append(node)

    def _came_back(self, node: QueueNode, now: float) -> None:
        self._came_back_in_place(node)
