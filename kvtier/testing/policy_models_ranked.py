"""Naive models of the policies that rank queues: LRU-2 and GDSF."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvtier.policies.gdsf import default_cost
from kvtier.testing.policy_models import NaivePolicy, last, parent_of


class NaiveLRU2(NaivePolicy):
    """LRU-2: the lists are named by the last use but one."""

    def __init__(self) -> None:
        super().__init__()
        self.last_use: dict[int, float] = {}
        self.ghosts: list[tuple[int, float]] = []

    def came(self, block: int) -> None:
        self.last_use[block] = self.now
        self.move(block, dict(self.ghosts).get(block, -math.inf))
        self.ghosts = [ghost for ghost in self.ghosts if ghost[0] != block]

    def used(self, block: int) -> None:
        if self.last_use[block] < self.now:
            self.move(block, self.last_use[block])
            self.last_use[block] = self.now

    def next_victim(self) -> int | None:
        return next((found for name in sorted(self.lists) if (found := self.first_leaf(name)) is not None), None)

    def evicted(self, block: int) -> None:
        self.ghosts.append((block, self.last_use[block]))

    def victims(self, count: int, now: float = 0.0, incoming: Sequence[int] = ()) -> list[int]:
        capacity = len(self.home)
        chosen = super().victims(count, now)
        self.ghosts = last(self.ghosts, capacity)
        return chosen


class NaiveGDSF(NaivePolicy):
    """GDSF: the lists are named by uses times cost. A block's depth is that at its first valuation."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[int, int] = {}
        self.stamps: dict[int, float] = {}
        self.depths: dict[int, int] = {}
        self.fresh: list[int] = []
        self.age = 0.0

    def came(self, block: int) -> None:
        self.uses[block] = 1
        self.depths.pop(block, None)
        self.home[block] = math.nan
        self.lists.setdefault(math.nan, [])
        self.fresh.append(block)

    def settle(self) -> None:
        """New blocks get their value, as all calls but ``insert``, ``pin`` and ``unpin`` begin."""
        fresh, self.fresh = self.fresh, []
        for block in fresh:
            self.value(block)

    def value(self, block: int) -> None:
        """Puts a block where its uses, its cost and the aging say."""
        mantissa, exponent = math.frexp(self.uses[block] * default_cost(self.depth(block)))
        self.stamps[block] = self.age
        self.move(block, math.ldexp(round(mantissa * 16), exponent - 4))

    def depth(self, block: int) -> int:
        """Blocks before it; one that is not here counts, those before it do not."""
        if block not in self.depths:
            parent = parent_of(block)
            self.depths[block] = 0 if parent is None else 1 + (self.depth(parent) if parent in self.home else 0)
        return self.depths[block]

    def used(self, block: int) -> None:
        self.uses[block] += 1
        self.value(block)

    def touch(self, blocks: Sequence[int], now: float) -> None:
        self.settle()
        super().touch(blocks, now)

    def remove(self, block: int) -> None:
        self.settle()
        super().remove(block)

    def victims(self, count: int, now: float = 0.0, incoming: Sequence[int] = ()) -> list[int]:
        self.settle()
        return super().victims(count, now)

    def came_back(self, block: int) -> None:
        self.stamps[block] = self.age
        if block not in self.fresh:
            super().came_back(block)

    def next_victim(self) -> int | None:
        while True:
            fronts = [(self.stamps[blocks[0]] + name, name) for name, blocks in self.lists.items() if blocks]
            if not fronts:
                return None
            rank, name = min(fronts)
            block = self.lists[name][0]
            if self.may_leave(block):
                self.age = max(self.age, rank)
                return block
