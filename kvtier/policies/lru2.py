"""LRU-2: the leaf whose last use but one is the longest ago leaves first; those used once, before all others.

O'Neil, O'Neil, Weikum: "The LRU-K Page Replacement Algorithm for Database Disk Buffering", SIGMOD 1993. Uses at the same moment
count as one (the paper's correlated references), and the last use of as many evicted blocks as the tier holds is remembered.

When to use it: retrieval and shared prompts, where a second use is what tells hot blocks from cold ones.
When not: conversations that pause for longer than the history reaches: each of their turns is a first use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kvtier.policies.leaf_order import GhostList, QueueNode
from kvtier.policies.priority import RankedQueue, RankedQueues
from kvtier.types import BlockKey, BlockMeta

ONCE = -math.inf
"""name of the queue of blocks used once; the others are named by the time of the last use but one"""


class LRU2Policy(RankedQueues):
    """Evicts by the last use but one. ``stamp`` is the time of the last use."""

    __slots__ = ("_ghosts",)

    def __init__(self) -> None:
        super().__init__()
        self._ghosts = GhostList()

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        nodes = self._nodes
        for key in keys:
            node = nodes.get(key)
            if node is not None and node.stamp < now:
                self._put(node, node.stamp)
                node.stamp = now

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        capacity = len(self)
        chosen = super().victims(num_blocks, now, incoming)
        self._ghosts.trim(capacity)
        return chosen

    def _rank_of(self, queue: RankedQueue, front: QueueNode) -> float:
        return queue.name

    def _evicted(self, node: QueueNode, rank: float) -> None:
        self._ghosts.add(node.key, node.stamp)

    def _came(self, node: QueueNode, now: float) -> None:
        last_use = self._ghosts.pop(node.key)
        node.stamp = now
        self._put(node, ONCE if last_use is None else last_use)
