"""ARC: two LRU lists, for blocks used once and used again, whose shares adapt to what was evicted too early.

Megiddo, Modha: "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. Here on a forest: a list gives its least recently
used *leaf*.

When to use it: mixed work without a clear pattern; it resists scans and needs no setting.
When not: reuse that comes later than the ghost lists reach (as many keys as the tier has blocks) is invisible to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.policies.leaf_order import GhostList, LeafQueues, Queue, QueueNode
from kvtier.types import BlockKey, BlockMeta


class ARCPolicy(LeafQueues):
    """Evicts from the list of once or of repeatedly used blocks, as the ghosts of both advise.

    ``capacity_blocks``: blocks that the tier holds; None: as many as there are when room is asked for.
    """

    __slots__ = ("_capacity", "_frequent", "_frequent_ghosts", "_is_learning", "_recent", "_recent_ghosts", "_target")

    def __init__(self, capacity_blocks: int | None = None) -> None:
        super().__init__()
        self._is_learning = capacity_blocks is None
        self._capacity = capacity_blocks or 0
        self._recent = Queue()
        self._frequent = Queue()
        self._recent_ghosts = GhostList()
        self._frequent_ghosts = GhostList()
        self._target = 0.0
        """how many blocks the list of once used ones should have"""

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        nodes, frequent = self._nodes, self._frequent
        for key in keys:
            node = nodes.get(key)
            if node is not None:
                self._move(node, frequent)

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        if self._is_learning:
            self._capacity = len(self)
        chosen: list[BlockKey] = []
        while len(chosen) < num_blocks and (node := self._next_victim()) is not None:
            ghosts = self._recent_ghosts if node.queue is self._recent else self._frequent_ghosts
            self._forget(node)
            ghosts.add(node.key)
            chosen.append(node.key)
        self._recent_ghosts.trim(max(0, self._capacity - len(self._recent)))
        self._frequent_ghosts.trim(max(0, 2 * self._capacity - len(self) - len(self._recent_ghosts)))
        return chosen

    def _next_victim(self) -> QueueNode | None:
        if len(self._recent) > self._target:
            return self._recent.take_leaf() or self._frequent.take_leaf()
        return self._frequent.take_leaf() or self._recent.take_leaf()

    def _came(self, node: QueueNode, now: float) -> None:
        recent, frequent = self._recent_ghosts, self._frequent_ghosts
        if node.key in recent:
            self._target = min(float(self._capacity), self._target + max(1.0, len(frequent) / len(recent)))
            recent.pop(node.key)
        elif node.key in frequent:
            self._target = max(0.0, self._target - max(1.0, len(recent) / len(frequent)))
            frequent.pop(node.key)
        else:
            self._recent.append(node)
            return
        self._frequent.append(node)
