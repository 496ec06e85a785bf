"""What all queue-like policies share: an order of candidates from which only leaves leave.

The candidates lie in one ordered dict, first to leave first. A block that is reached while it still has a child in the tier
steps aside (*deferred*) and comes back to the very front when its last child has left. So victims are leaves, every
deferral is paid for by an earlier insert or touch (O(1) amortised), and no order of insertion can strand a child.

Because a parent cannot leave before its child, pinning the last block of a prefix keeps the whole prefix.

A parent that is not (or no longer) in the tier while a child is, is kept as a *ghost*: it counts its children and is
revived when the block comes (back).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvtier.types import BlockKey, BlockMeta

QUEUED, PINNED, DEFERRED, GHOST = range(4)


class Node:
    """A block in the forest. ``parent`` is None for the first block of a prompt."""

    __slots__ = ("key", "num_children", "parent", "state")

    def __init__(self, key: BlockKey, state: int) -> None:
        self.key = key
        self.parent: Node | None = None
        self.num_children = 0
        self.state = state


class LeafOrder:
    """Base of the policies whose candidates form one queue. Implements everything but ``touch``."""

    __slots__ = ("_ghosts", "_nodes", "_order")

    def __init__(self) -> None:
        self._nodes: dict[BlockKey, Node] = {}
        self._ghosts: dict[BlockKey, Node] = {}
        self._order: OrderedDict[BlockKey, Node] = OrderedDict()

    def insert(self, block: BlockMeta, now: float) -> None:
        key = block.key
        node = self._ghosts.pop(key, None) if self._ghosts else None
        if node is None:
            node = Node(key, QUEUED)
        else:
            node.state = QUEUED
        if block.parent is not None:
            parent = self._nodes.get(block.parent) or self._ghost(block.parent)
            parent.num_children += 1
            node.parent = parent
        self._nodes[key] = node
        self._order[key] = node

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        raise NotImplementedError

    def remove(self, key: BlockKey) -> None:
        node = self._nodes.get(key)
        if node is None:
            return
        if node.state == QUEUED:
            del self._order[key]
        self._forget(node)
        if node.num_children:
            node.state = GHOST
            self._ghosts[key] = node

    def pin(self, key: BlockKey) -> None:
        node = self._nodes.get(key)
        if node is None or node.state == PINNED:
            return
        if node.state == QUEUED:
            del self._order[key]
        node.state = PINNED

    def unpin(self, key: BlockKey, now: float) -> None:
        node = self._nodes.get(key)
        if node is not None and node.state == PINNED:
            node.state = QUEUED
            self._order[key] = node

    @property
    def num_declined(self) -> int:
        return 0

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        order = self._order
        chosen: list[BlockKey] = []
        while len(chosen) < num_blocks and order:
            key, node = order.popitem(last=False)
            if node.num_children:
                node.state = DEFERRED
                continue
            self._forget(node)
            chosen.append(key)
        return chosen

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, key: object) -> bool:
        return key in self._nodes

    def _ghost(self, key: BlockKey) -> Node:
        node = self._ghosts.get(key)
        if node is None:
            node = self._ghosts[key] = Node(key, GHOST)
        return node

    def _forget(self, node: Node) -> None:
        """Takes a node that is not in the order out of the forest; its parent may become a candidate again."""
        del self._nodes[node.key]
        parent = node.parent
        if parent is None:
            return
        node.parent = None
        parent.num_children -= 1
        if parent.num_children == 0:
            if parent.state == DEFERRED:
                parent.state = QUEUED
                self._order[parent.key] = parent
                self._order.move_to_end(parent.key, last=False)
            elif parent.state == GHOST:
                del self._ghosts[parent.key]
