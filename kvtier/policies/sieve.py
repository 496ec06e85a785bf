"""SIEVE: one queue in the order of arrival and a hand that goes round, sparing what was used since it last came by.

Zhang, Yang, Yue, Vinayak, Rashmi: "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm for Web Caches", NSDI 2024. Here on
a forest: a block with children steps aside and comes back under the hand when the last of them has left.

When to use it: web-like reuse, where popularity is lasting and hits must be cheap.
When not: conversations, whose blocks are used in bursts and then never again: each keeps its place for one more round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.policies.forest import CANDIDATE, DEFERRED
from kvtier.policies.leaf_order import LeafQueues, Queue, QueueNode, steps_aside, unlink
from kvtier.types import BlockKey, BlockMeta


class SIEVEPolicy(LeafQueues):
    """Evicts the first leaf from the hand on that was not used since the hand last passed. ``mark``: 1 if it was."""

    __slots__ = ("_hand", "_queue")

    def __init__(self) -> None:
        super().__init__()
        self._queue = Queue()
        self._hand: QueueNode | None = None
        """None: before the oldest"""

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        nodes = self._nodes
        for key in keys:
            node = nodes.get(key)
            if node is not None:
                node.mark = 1

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        chosen: list[BlockKey] = []
        while len(chosen) < num_blocks and (node := self._hand or self._queue.front) is not None:
            self._hand = self._queue.following(node)
            if steps_aside(node):
                continue
            if node.mark:
                node.mark = 0
            else:
                unlink(node)
                self._forget(node)
                chosen.append(node.key)
        return chosen

    def _came(self, node: QueueNode, now: float) -> None:
        node.mark = 0
        self._queue.append(node)

    def _removed(self, node: QueueNode) -> None:
        if node is self._hand:
            self._hand = self._queue.following(node)
        super()._removed(node)

    def _became_leaf(self, node: QueueNode) -> None:
        if node.state == DEFERRED:
            node.state = CANDIDATE
            self._place_under_hand(node)

    def _came_back(self, node: QueueNode, now: float) -> None:
        if node.next is node:
            self._place_under_hand(node)

    def _place_under_hand(self, node: QueueNode) -> None:
        self._queue.place_before(node, self._hand)
        self._hand = node
