"""What the queue-like policies share: queues of candidates from which only leaves leave.

A block that is reached at the front of its queue while it still has a child in the tier steps aside (*deferred*) and comes back to the very
front when its last child has left. So victims are leaves, every deferral is paid for by an earlier insert or touch (O(1)
amortised), and no order of insertion can strand a child. A pinned block keeps its place, and steps aside until it is unpinned when it
is reached.
"""

from __future__ import annotations

from collections import OrderedDict

from kvtier.policies.forest import CANDIDATE, DEFERRED, GHOST, PINNED, Forest, Node
from kvtier.types import BlockKey


class QueueNode(Node):
    """A block with its place in a queue. What ``mark``, ``stamp`` and ``depth`` say is up to the policy."""

    __slots__ = ("depth", "mark", "next", "prev", "queue", "stamp")

    def __init__(self, key: BlockKey) -> None:  # what Node does too; a call for each block costs a fifth of an insert
        self.key = key
        self.parent = None
        self.num_children = 0
        self.state = GHOST
        self.queue: Queue | None = None
        self.prev: QueueNode = self
        self.next: QueueNode = self
        self.mark = 0
        self.stamp = 0.0
        self.depth = -1


class Queue:
    """Candidates in the order in which they leave, a linked list.

    A block belongs to its queue also while it has stepped aside and has no place in it. ``len`` counts those too.
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
        """A node without a place comes to the back of this queue, its own from now on."""
        self.own(node)
        end = self._end
        before = end.prev
        node.prev = before
        node.next = end
        before.next = end.prev = node

    def take_leaf(self) -> QueueNode | None:
        """Takes the first leaf that may leave out of its place. Those before it step aside."""
        end = self._end
        node = end.next
        while node is not end:
            if not steps_aside(node):
                unlink(node)
                return node
            node = end.next
        return None


def unlink(node: QueueNode) -> None:
    """Takes a node out of its place, if it has one; it still belongs to its queue."""
    before, after = node.prev, node.next
    before.next = after
    after.prev = before
    node.prev = node.next = node


def steps_aside(node: QueueNode) -> bool:
    """Whether a node that was reached may not leave yet; then it has lost its place."""
    if node.state == PINNED:
        unlink(node)
        return True
    if node.num_children:
        unlink(node)
        node.state = DEFERRED
        return True
    return False


class LeafQueues(Forest[QueueNode]):
    """Base of the policies whose candidates stand in queues."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(QueueNode)

    def _removed(self, node: QueueNode) -> None:
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
        """A used block goes to the back of a queue."""
        unlink(node)
        if node.state == DEFERRED:
            node.state = CANDIDATE
        queue.append(node)

    def _came_back(self, node: QueueNode, now: float) -> None:
        """As just used: to the back of its queue."""
        if node.queue is not None:
            self._move(node, node.queue)

    def _came_back_in_place(self, node: QueueNode) -> None:
        """For policies to which use is not a matter of place: an unpinned block that was reached meanwhile is the first to leave."""
        if node.next is node and node.queue is not None:
            node.queue.place_before(node, node.queue.front)


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
