"""GDSF: the leaf of the smallest (uses x cost of computing it again) leaves first, aged by what has left before.

Cherkasova: "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP 1998; rounded values and one queue per
value as in Ghandeharizadeh et al.: "CAMP: A Cost Adaptive Multi-Queue Eviction Policy for Key-Value Stores", Middleware 2014.
Blocks have one size, so it is left out. The cost of a block grows with its place in the prompt, because each token attends to all
before it.

When to use it: long prompts whose recomputation hurts more than that of short ones, and lasting popularity.
When not: to raise the hit rate as such; it trades hits on short prompts for hits on deep blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from kvtier.policies.leaf_order import QueueNode
from kvtier.policies.priority import RankedQueue, RankedQueues
from kvtier.types import BlockKey, BlockMeta

DEPTH_OF_DOUBLE_COST = 512
"""at so many blocks attention costs as much as everything else: 32,768 tokens in blocks of 64, for a model of 8 billion parameters"""
_BITS = 4


def default_cost(depth: int) -> float:
    """The cost of computing the block at a depth (0: the first of a prompt), in units of the first one's."""
    return 1.0 + depth / DEPTH_OF_DOUBLE_COST


class GDSFPolicy(RankedQueues):
    """Evicts the smallest value. ``mark`` counts uses, ``stamp`` is what the aging stood at when the block was used last.

    ``cost``: depth of a block -> cost of computing it again, above 0; measured where it is known.
    """

    __slots__ = ("_age", "_cost", "_fresh")

    def __init__(self, cost: Callable[[int], float] = default_cost) -> None:
        super().__init__()
        self._cost = cost
        self._age = 0.0
        self._fresh: list[QueueNode] = []
        """blocks that came since; their depth is known when the blocks before them are here"""

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        self._settle()
        nodes = self._nodes
        for key in keys:
            node = nodes.get(key)
            if node is not None:
                node.mark += 1
                self._value(node)

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        self._settle()
        return super().victims(num_blocks, now, incoming)

    def remove(self, key: BlockKey) -> None:
        self._settle()
        super().remove(key)

    def _rank_of(self, queue: RankedQueue, front: QueueNode) -> float:
        return front.stamp + queue.name

    def _removed(self, node: QueueNode) -> None:
        node.depth = 0
        super()._removed(node)

    def _evicted(self, node: QueueNode, rank: float) -> None:
        self._age = max(self._age, rank)

    def _came(self, node: QueueNode, now: float) -> None:
        node.mark = 1
        node.depth = -1
        self._fresh.append(node)

    def _came_back(self, node: QueueNode, now: float) -> None:
        node.stamp = self._age
        super()._came_back(node, now)

    def _settle(self) -> None:
        fresh, self._fresh = self._fresh, []
        for node in fresh:
            self._value(node)

    def _value(self, node: QueueNode) -> None:
        """Puts a block where its uses, its cost and the aging say."""
        node.stamp = self._age
        self._put(node, _rounded(node.mark * self._cost(_depth_of(node))))


def _depth_of(node: QueueNode) -> int:
    """How many blocks are before it, as far as they are here."""
    path: list[QueueNode] = []
    at: QueueNode | None = node
    while at is not None and at.depth < 0:
        path.append(at)
        at = at.parent
    depth = -1 if at is None else at.depth
    for each in reversed(path):
        depth += 1
        each.depth = depth
    return node.depth


def _rounded(value: float) -> float:
    """The value with few significant bits, so that there are few different ones."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * (1 << _BITS)), exponent - _BITS)
