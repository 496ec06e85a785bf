"""A heap of queues: what LRU-2 and GDSF share. Blocks of equal standing wait in one queue, so the heap is small and a block costs O(1)."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from kvtier.policies.leaf_order import LeafQueues, Queue, QueueNode, steps_aside, unlink
from kvtier.types import BlockKey, BlockMeta


class RankedQueue(Queue):
    """A queue with a name by which its rank can be found. ``ranked_at``: its rank in the heap; None: it is not there."""

    __slots__ = ("name", "ranked_at")

    def __init__(self, name: float) -> None:
        super().__init__()
        self.name = name
        self.ranked_at: float | None = None


class RankedQueues(LeafQueues):
    """Base of the policies that evict the first leaf of the queue of lowest rank."""

    __slots__ = ("_heap", "_num_pushed", "_queues")

    def __init__(self) -> None:
        super().__init__()
        self._queues: dict[float, RankedQueue] = {}
        self._num_pushed = 0
        self._heap: list[tuple[float, float, int, RankedQueue]] = []
        """(rank, name, running number, queue); an entry counts only where the queue is ranked at its rank"""

    def _rank_of(self, queue: RankedQueue, front: QueueNode) -> float:
        """The rank of a queue with such a first candidate."""
        raise NotImplementedError

    def _evicted(self, node: QueueNode, rank: float) -> None:
        """A block leaves its queue for good."""

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        chosen: list[BlockKey] = []
        while len(chosen) < num_blocks and (found := self._next_victim()) is not None:
            node, rank = found
            self._evicted(node, rank)
            self._forget(node)
            chosen.append(node.key)
        return chosen

    def _next_victim(self) -> tuple[QueueNode, float] | None:
        heap = self._heap
        while heap:
            rank, _, _, queue = heap[0]
            front = queue.front
            if rank != queue.ranked_at or front is None or self._rank_of(queue, front) != rank:
                heappop(heap)
                if rank == queue.ranked_at:
                    queue.ranked_at = None
                    self._rank(queue)
                continue
            if not steps_aside(front):
                unlink(front)
                return front, rank
        return None

    def _rank(self, queue: RankedQueue) -> None:
        """The queue may have a new first candidate. That its rank has risen is seen when it is asked."""
        front = queue.front
        if front is None:
            return
        rank = self._rank_of(queue, front)
        if queue.ranked_at is None or rank < queue.ranked_at:
            queue.ranked_at = rank
            self._num_pushed += 1
            heappush(self._heap, (rank, queue.name, self._num_pushed, queue))

    def _put(self, node: QueueNode, name: float) -> None:
        """A block that was used, or has come, goes to the back of a queue."""
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = RankedQueue(name)
        before = node.queue
        self._move(node, queue)
        self._drop_if_empty(before)
        self._rank(queue)

    def _drop_if_empty(self, queue: Queue | None) -> None:
        if isinstance(queue, RankedQueue) and not len(queue):
            self._queues.pop(queue.name, None)

    def _forget(self, node: QueueNode) -> None:
        queue = node.queue
        super()._forget(node)
        self._drop_if_empty(queue)

    def _became_leaf(self, node: QueueNode) -> None:
        super()._became_leaf(node)
        if isinstance(node.queue, RankedQueue):
            self._rank(node.queue)

    def _came_back(self, node: QueueNode, now: float) -> None:
        super()._came_back(node, now)
        if isinstance(node.queue, RankedQueue):
            self._rank(node.queue)
