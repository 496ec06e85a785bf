"""The contract of eviction policies as a Hypothesis state machine: subclass it, name the policy, run it.

::

    class MyMachine(PolicyMachine):
        make = MyPolicy

    TestMyPolicy = MyMachine.TestCase
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.policies.base import EvictionPolicy
from kvtier.types import BlockKey, BlockMeta

_POSITIONS = st.integers(0, 31)


def key_of(position: int) -> BlockKey:
    """A key for a small number."""
    return BlockKey(position.to_bytes(16, "little"))


def parent_of(position: int) -> int | None:
    """A fixed forest over small numbers: two roots, each number's parent is half of it."""
    return None if position < 2 else position // 2


class PolicyMachine(RuleBasedStateMachine):
    """Any sequence of calls keeps the promises of :class:`~kvtier.policies.base.EvictionPolicy`."""

    make: Callable[[], EvictionPolicy]

    def __init__(self) -> None:
        super().__init__()
        self.policy = type(self).make()
        self.present: set[int] = set()
        self.pinned: set[int] = set()
        self.now = 0.0

    def children(self, position: int) -> set[int]:
        """The present children of a block."""
        return {child for child in self.present if parent_of(child) == position}

    @rule(position=_POSITIONS)
    def insert(self, position: int) -> None:
        if position in self.present:
            return
        self.now += 1.0
        parent = parent_of(position)
        self.policy.insert(BlockMeta(key_of(position), None if parent is None else key_of(parent), 1), self.now)
        self.present.add(position)

    @rule(positions=st.lists(_POSITIONS, max_size=5))
    def touch(self, positions: list[int]) -> None:
        self.now += 1.0
        self.policy.touch([key_of(position) for position in positions], self.now)

    @rule(position=_POSITIONS)
    def remove(self, position: int) -> None:
        self.policy.remove(key_of(position))
        self.present.discard(position)
        self.pinned.discard(position)

    @rule(position=_POSITIONS)
    def pin(self, position: int) -> None:
        if position in self.present:
            self.policy.pin(key_of(position))
            self.pinned.add(position)

    @rule(position=_POSITIONS)
    def unpin(self, position: int) -> None:
        self.now += 1.0
        self.policy.unpin(key_of(position), self.now)
        self.pinned.discard(position)

    @rule(count=st.integers(0, 6))
    def evict(self, count: int) -> None:
        """Victims are unpinned leaves when taken, and fewer come only where no candidate is left."""
        victims = [int.from_bytes(key, "little") for key in self.policy.victims(count, self.now)]
        assert len(victims) <= count
        for victim in victims:
            assert victim in self.present
            assert victim not in self.pinned
            assert self.children(victim) == set()
            self.present.discard(victim)
        if len(victims) < count:
            assert [p for p in self.present - self.pinned if not self.children(p)] == []

    @precondition(lambda self: not self.pinned)
    @rule()
    def evict_everything(self) -> None:
        """Without pins everything can leave."""
        assert len(self.present) == len(self.policy.victims(1000, self.now))
        self.present.clear()

    @invariant()
    def knows_what_is_there(self) -> None:
        assert len(self.present) == len(self.policy)
        assert all(key_of(position) in self.policy for position in self.present)
