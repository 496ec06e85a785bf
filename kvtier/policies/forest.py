"""What all policies share: the forest of blocks, who is a candidate, and who left it with children still here.

Victims are leaves when they are taken. Because a parent cannot leave before its child, pinning the last block of a prefix keeps the
whole prefix. A parent that is not (or no longer) in the tier while a child is, is kept as a *ghost parent*: it counts its children and is
revived when the block comes (back).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Self, TypeVar

from kvtier.types import BlockKey, BlockMeta

CANDIDATE, PINNED, DEFERRED, GHOST = range(4)
"""may be chosen; may not, by ``pin``; stepped aside until its last child has left; a ghost parent"""


class Node:
    """A block in the forest. ``parent`` is None for the first block of a prompt."""

    __slots__ = ("key", "num_children", "parent", "state")

    parent: Self | None

    def __init__(self, key: BlockKey) -> None:
        self.key = key
        self.parent = None
        self.num_children = 0
        self.state = GHOST


N = TypeVar("N", bound=Node)


class Forest(Generic[N]):
    """Keeps the nodes. A policy says what becomes of one that comes, is taken out, comes back, or has lost its last child.

    Implements all of :class:`~kvtier.policies.base.EvictionPolicy` but ``touch`` and ``victims``.
    """

    __slots__ = ("_ghost_parents", "_make_node", "_nodes")

    def __init__(self, make_node: Callable[[BlockKey], N]) -> None:
        self._make_node = make_node
        self._nodes: dict[BlockKey, N] = {}
        self._ghost_parents: dict[BlockKey, N] = {}

    # ---- what a policy adds -------------------------------------------------------------------------------------

    def _came(self, node: N, now: float) -> None:
        """A new block, in state CANDIDATE. Its children may be here already, its parent need not be."""
        raise NotImplementedError

    def _removed(self, node: N) -> None:
        """A block is about to be forgotten without having been chosen."""
        raise NotImplementedError

    def _came_back(self, node: N, now: float) -> None:
        """A pinned block is a candidate again."""
        raise NotImplementedError

    def _became_leaf(self, node: N) -> None:
        """The last child of a block has left. Its state is CANDIDATE, PINNED or DEFERRED."""
        raise NotImplementedError

    # ---- the protocol -------------------------------------------------------------------------------------------

    @property
    def num_declined(self) -> int:
        return 0

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        raise NotImplementedError

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        raise NotImplementedError

    def index_of(self, key: BlockKey | None, now: float) -> float | None:
        """Does not know."""
        return None

    def expired(self, now: float) -> list[BlockKey]:
        """Knows none."""
        return []

    def expect(self, keys: Sequence[BlockKey], seconds: float, now: float) -> None:
        """Does not listen."""

    def insert(self, block: BlockMeta, now: float) -> None:
        key, parent_key = block.key, block.parent
        node = self._ghost_parents.pop(key, None) if self._ghost_parents else None
        if node is None:
            node = self._make_node(key)
        if parent_key is not None:
            parent = self._nodes.get(parent_key)
            if parent is None:
                parent = self._ghost_parents.get(parent_key)
                if parent is None:
                    parent = self._ghost_parents[parent_key] = self._make_node(parent_key)
            parent.num_children += 1
            node.parent = parent
        node.state = CANDIDATE
        self._nodes[key] = node
        self._came(node, now)

    def put_back(self, blocks: Sequence[BlockMeta], now: float) -> None:
        for block in reversed(blocks):
            self.insert(block, now)

    def remove(self, key: BlockKey) -> None:
        node = self._nodes.get(key)
        if node is None:
            return
        self._removed(node)
        self._forget(node)
        if node.num_children:
            node.state = GHOST
            self._ghost_parents[key] = node

    def pin(self, key: BlockKey) -> None:
        node = self._nodes.get(key)
        if node is not None and node.state != PINNED:
            node.state = PINNED

    def unpin(self, key: BlockKey, now: float) -> None:
        node = self._nodes.get(key)
        if node is not None and node.state == PINNED:
            node.state = CANDIDATE
            self._came_back(node, now)

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, key: object) -> bool:
        return key in self._nodes

    # ---- inside -------------------------------------------------------------------------------------------------

    def _forget(self, node: N) -> None:
        """Takes a node out of the forest; its parent may become a leaf."""
        del self._nodes[node.key]
        parent = node.parent
        if parent is None:
            return
        node.parent = None
        parent.num_children -= 1
        if parent.num_children == 0:
            if parent.state == GHOST:
                del self._ghost_parents[parent.key]
            else:
                self._became_leaf(parent)
