"""What the queue-like policies share: queues of candidates from which only leaves leave.

A block that is reached at the front of its queue while it still has a child in the tier steps aside (*deferred*) and comes back to the very
front when its last child has left. So victims are leaves, every deferral is paid for by an earlier insert or touch (O(1)
amortised), and no order of insertion can strand a child.
"""

from __future__ import annotations

from collections import OrderedDict

from kvtier.policies.forest import CANDIDATE, DEFERRED, Forest, Node
from kvtier.types import BlockKey


class QueueNode(Node):
    """A block with its place in a queue. What ``mark``, ``stamp`` and ``depth`` say is up to the policy."""

    __slots__ = ("depth", "mark", "next", "prev", "queue", "stamp")

    def __init__(self, key: BlockKey) -> None:
        super().__init__(key)
        self.queue: Queue | None = None
        self.prev: QueueNode = self
        self.next: QueueNode = self
        self.mark = 0
        self.stamp = 0.0
        self.depth = -1


class Queue:
    """Candidates in the order in which they leave, a linked list.

    A block belongs to its queue also while it is pinned or deferred, without a place in it. ``len`` counts those too.
    """

    __slots__ = ("_end", "_size")

    def __init__(self) -> None:
        self._end = QueueNode(BlockKey(b""))
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def front(self) -> QueueNode | None:
        """The first candidate."""
        node = self._end.next
        return None if node is self._end else node

    def following(self, node: QueueNode) -> QueueNode | None:
        """The candidate behind ``node``."""
        following = node.next
        return None if following is self._end else following

    def own(self, node: QueueNode) -> None:
        """The node belongs to this queue from now on; it has no place in any."""
        if node.queue is not self:
            if node.queue is not None:
                node.queue._size -= 1
            node.queue = self
            self._size += 1

    def disown(self, node: QueueNode) -> None:
        """The node, one of this queue without a place in it, belongs to none."""
        node.queue = None
        self._size -= 1

    def place_before(self, node: QueueNode, other: QueueNode | None) -> None:
        """Gives a node that belongs here a place before ``other``; None: at the back."""
        after = self._end if other is None else other
        before = after.prev
        node.prev = before
        node.next = after
        before.next = after.prev = node

    def append(self, node: QueueNode) -> None:
        """A node without a place comes to the back of this queue."""
        self.own(node)
        end = self._end
        before = end.prev
        node.prev = before
        node.next = end
        before.next = end.prev = node

    def take_leaf(self) -> QueueNode | None:
        """Takes the first leaf out of its place. Those with children before it step aside."""
        end = self._end
        node = end.next
        while node is not end:
            unlink(node)
            if not node.num_children:
                return node
            node.state = DEFERRED
            node = end.next
        return None


def unlink(node: QueueNode) -> None:
    """Takes a node out of its place; it still belongs to its queue."""
    before, after = node.prev, node.next
    before.next = after
    after.prev = before


class LeafQueues(Forest[QueueNode]):
    """Base of the policies whose candidates stand in queues."""

    __slots__ = ()

    def _new_node(self, key: BlockKey) -> QueueNode:
        return QueueNode(key)

    def _took_out(self, node: QueueNode) -> None:
        if node.state == CANDIDATE:
            unlink(node)

    def _forget(self, node: QueueNode) -> None:
        if node.queue is not None:
            node.queue.disown(node)
        super()._forget(node)

    def _became_leaf(self, node: QueueNode) -> None:
        queue = node.queue
        if node.state == DEFERRED and queue is not None:
            node.state = CANDIDATE
            queue.place_before(node, queue.front)

    def _move(self, node: QueueNode, queue: Queue) -> None:
        """A used block goes to the back of a queue; a pinned one will when it is unpinned."""
        if node.state == CANDIDATE:
            unlink(node)
        elif node.state == DEFERRED:
            node.state = CANDIDATE
        else:
            queue.own(node)
            return
        queue.append(node)

    def _came_back(self, node: QueueNode, now: float) -> None:
        assert node.queue is not None, "a block that is known belongs to a queue"
        node.queue.append(node)


class GhostList:
    """Keys of blocks that have left, the first to leave first, with a number each."""

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: OrderedDict[BlockKey, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def add(self, key: BlockKey, number: float = 0.0) -> None:
        """The key of a block that leaves now."""
        self._keys[key] = number

    def pop(self, key: BlockKey) -> float | None:
        """Forgets a key; its number, or None for an absent one."""
        return self._keys.pop(key, None)

    def trim(self, size: int) -> None:
        """Forgets the oldest keys until no more than ``size`` are left."""
        keys = self._keys
        while len(keys) > size:
            keys.popitem(last=False)
