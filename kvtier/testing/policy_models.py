"""The policies once more, as slowly and as plainly as possible: lists that are searched from one end to the other.

Blocks are small numbers with a fixed parent (:func:`~kvtier.testing.policies.parent_of`). A model that agrees with its policy in
every step, and in the order in which everything would leave, is the specification that the policy is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from kvtier.policies.s3fifo import MAX_USES, SMALL_FRACTION

T = TypeVar("T")


def parent_of(position: int) -> int | None:
    """A fixed forest over small numbers: two roots, each number's parent is half of it."""
    return None if position < 2 else position // 2


class NaivePolicy:
    """Lists of blocks in the order in which they leave. A block that was reached too early has no place until it may leave."""

    keeps_places = False
    """whether an unpinned block stays where it was"""

    def __init__(self) -> None:
        self.lists: dict[float, list[int]] = {}
        self.home: dict[int, float] = {}
        """block -> name of its list; the blocks that are here"""
        self.pinned: set[int] = set()
        self.deferred: set[int] = set()
        self.now = 0.0

    # ---- what a policy is made of -------------------------------------------------------------------------------

    def came(self, block: int) -> None:
        """A new block."""
        self.move(block, 0)

    def used(self, block: int) -> None:
        """A block that is here was used."""

    def next_victim(self) -> int | None:
        """Takes a block out of its list."""
        return self.first_leaf(0)

    def evicted(self, block: int) -> None:
        """It leaves."""

    # ---- the protocol -------------------------------------------------------------------------------------------

    def insert(self, block: int, now: float) -> None:
        """As the protocol has it."""
        self.now = now
        self.came(block)

    def put_back(self, blocks: Sequence[int], now: float) -> None:
        """As the protocol has it: nothing is remembered."""
        for block in reversed(blocks):
            self.insert(block, now)

    def expired(self, now: float) -> list[int]:
        """As the protocol has it: nobody knows."""
        return []

    def touch(self, blocks: Sequence[int], now: float) -> None:
        """As the protocol has it."""
        self.now = now
        for block in blocks:
            if block in self.home:
                self.used(block)

    def expect(self, blocks: Sequence[int], seconds: float, now: float) -> None:
        """As the protocol has it: nobody listens."""

    def remove(self, block: int) -> None:
        """As the protocol has it."""
        if block in self.home:
            self.unplace(block)
            self.forget(block)

    def pin(self, block: int) -> None:
        """As the protocol has it."""
        if block in self.home:
            self.pinned.add(block)
            self.deferred.discard(block)

    def unpin(self, block: int, now: float) -> None:
        """As the protocol has it."""
        self.now = now
        if block in self.pinned:
            self.pinned.discard(block)
            self.came_back(block)

    def victims(self, count: int, now: float = 0.0, incoming: Sequence[int] = ()) -> list[int]:
        """As the protocol has it."""
        chosen: list[int] = []
        while len(chosen) < count:
            block = self.next_victim()
            if block is None:
                break
            self.evicted(block)
            self.forget(block)
            chosen.append(block)
        return chosen

    # ---- lists --------------------------------------------------------------------------------------------------

    def came_back(self, block: int) -> None:
        """An unpinned block."""
        if not self.keeps_places:
            self.move(block, self.home[block])
        elif not self.has_place(block):
            self.lists[self.home[block]].insert(0, block)

    def has_child(self, block: int) -> bool:
        """Whether a child of the block is here."""
        return any(parent_of(other) == block for other in self.home)

    def has_place(self, block: int) -> bool:
        """Whether the block stands in its list."""
        return block in self.lists[self.home[block]]

    def unplace(self, block: int) -> None:
        """The block does not stand in its list any more."""
        if block in self.home and self.has_place(block):
            self.lists[self.home[block]].remove(block)

    def move(self, block: int, name: float) -> None:
        """The block goes to the end of a list."""
        self.unplace(block)
        self.deferred.discard(block)
        self.home[block] = name
        self.lists.setdefault(name, []).append(block)

    def size(self, name: float) -> int:
        """Blocks that belong to a list."""
        return sum(1 for home in self.home.values() if home == name)

    def may_leave(self, block: int) -> bool:
        """Whether a block that was reached may leave; else it steps aside."""
        self.unplace(block)
        if block in self.pinned:
            return False
        if self.has_child(block):
            self.deferred.add(block)
            return False
        return True

    def first_leaf(self, name: float) -> int | None:
        """Takes the first block that may leave out of a list."""
        return next((block for block in list(self.lists.get(name, ())) if self.may_leave(block)), None)

    def forget(self, block: int) -> None:
        """The block is gone; its parent may leave again."""
        del self.home[block]
        self.pinned.discard(block)
        self.deferred.discard(block)
        parent = parent_of(block)
        if parent is not None and parent in self.deferred and not self.has_child(parent):
            self.deferred.discard(parent)
            self.return_to_front(parent)

    def return_to_front(self, block: int) -> None:
        """The last child of a deferred block has left."""
        self.lists[self.home[block]].insert(0, block)


class NaiveFIFO(NaivePolicy):
    """FIFO."""

    keeps_places = True


class NaiveLRU(NaivePolicy):
    """LRU."""

    def used(self, block: int) -> None:
        self.move(block, 0)


class NaiveARC(NaivePolicy):
    """ARC: list 1 was used once, list 2 again."""

    def __init__(self) -> None:
        super().__init__()
        self.ghosts: dict[float, list[int]] = {1: [], 2: []}
        self.target = 0.0
        self.capacity = 0

    def came(self, block: int) -> None:
        once, again = self.ghosts[1], self.ghosts[2]
        if block in once:
            self.target = min(float(self.capacity), self.target + max(1.0, len(again) / len(once)))
            once.remove(block)
        elif block in again:
            self.target = max(0.0, self.target - max(1.0, len(once) / len(again)))
            again.remove(block)
        else:
            self.move(block, 1)
            return
        self.move(block, 2)

    def used(self, block: int) -> None:
        self.move(block, 2)

    def next_victim(self) -> int | None:
        first, second = (1, 2) if self.size(1) > self.target else (2, 1)
        found = self.first_leaf(first)
        return self.first_leaf(second) if found is None else found

    def evicted(self, block: int) -> None:
        self.ghosts[self.home[block]].append(block)

    def victims(self, count: int, now: float = 0.0, incoming: Sequence[int] = ()) -> list[int]:
        self.capacity = len(self.home)
        chosen = super().victims(count, now)
        self.ghosts[1] = last(self.ghosts[1], self.capacity - self.size(1))
        self.ghosts[2] = last(self.ghosts[2], 2 * self.capacity - len(self.home) - len(self.ghosts[1]))
        return chosen


class NaiveS3FIFO(NaivePolicy):
    """S3-FIFO: list 1 is the small queue, list 2 the main one."""

    keeps_places = True

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[int, int] = {}
        self.ghosts: list[int] = []
        self.capacity = 0

    def came(self, block: int) -> None:
        self.uses[block] = 0
        self.move(block, 2 if block in self.ghosts else 1)
        self.ghosts = [other for other in self.ghosts if other != block]

    def used(self, block: int) -> None:
        self.uses[block] = min(MAX_USES, self.uses[block] + 1)

    def next_victim(self) -> int | None:
        while True:
            first, second = (1, 2) if self.size(1) >= self.capacity * SMALL_FRACTION else (2, 1)
            block = self.first_leaf(first)
            if block is None:
                block = self.first_leaf(second)
            if block is None:
                return None
            if self.home[block] == 1 and self.uses[block] > 1:
                self.uses[block] = 0
            elif self.home[block] == 2 and self.uses[block] > 0:
                self.uses[block] -= 1
            else:
                return block
            self.move(block, 2)

    def evicted(self, block: int) -> None:
        if self.home[block] == 1:
            self.ghosts.append(block)

    def victims(self, count: int, now: float = 0.0, incoming: Sequence[int] = ()) -> list[int]:
        self.capacity = len(self.home)
        chosen = super().victims(count, now)
        self.ghosts = last(self.ghosts, self.capacity - int(self.capacity * SMALL_FRACTION))
        return chosen


class NaiveSIEVE(NaivePolicy):
    """SIEVE: ``hand`` is the block to be looked at next; None: the first."""

    def __init__(self) -> None:
        super().__init__()
        self.lists[0] = []
        self.used_since: set[int] = set()
        self.hand: int | None = None

    def came(self, block: int) -> None:
        self.used_since.discard(block)
        self.move(block, 0)

    def used(self, block: int) -> None:
        self.used_since.add(block)

    def unplace(self, block: int) -> None:
        if block == self.hand:
            self.advance()
        super().unplace(block)

    def advance(self) -> None:
        """The hand moves on by one block."""
        place = self.lists[0].index(self.hand) + 1 if self.hand in self.lists[0] else 1
        self.hand = self.lists[0][place] if place < len(self.lists[0]) else None

    def next_victim(self) -> int | None:
        while self.lists[0]:
            block = self.lists[0][0] if self.hand is None else self.hand
            self.hand = block
            if block not in self.pinned and not self.has_child(block) and block in self.used_since:
                self.used_since.discard(block)
                self.advance()
            elif self.may_leave(block):
                return block
        return None

    def return_to_front(self, block: int) -> None:
        place = len(self.lists[0]) if self.hand is None else self.lists[0].index(self.hand)
        self.lists[0].insert(place, block)
        self.hand = block

    def came_back(self, block: int) -> None:
        if not self.has_place(block):
            self.return_to_front(block)


def last(items: list[T], count: int) -> list[T]:
    """The last so many items."""
    return items[max(0, len(items) - max(0, count)) :]
