"""The contract of eviction policies as a Hypothesis state machine: subclass it, name the policy, run it.

::

    class MyMachine(PolicyMachine):
        make = MyPolicy
        model = MyNaivePolicy  # optional

    TestMyPolicy = MyMachine.TestCase
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.policies.base import EvictionPolicy
from kvtier.testing.policy_models import NaivePolicy, parent_of
from kvtier.types import BlockKey, BlockMeta

_POSITIONS = st.integers(0, 31)


def key_of(position: int) -> BlockKey:
    """A key for a small number."""
    return BlockKey(position.to_bytes(16, "little"))


def meta_of(position: int) -> BlockMeta:
    """The block of a small number."""
    parent = parent_of(position)
    return BlockMeta(key_of(position), None if parent is None else key_of(parent), 1)


def path_to(position: int) -> Sequence[int]:
    """The blocks of the prompt that ends with a block."""
    parent = parent_of(position)
    return [position] if parent is None else [*path_to(parent), position]


class PolicyMachine(RuleBasedStateMachine):
    """Any sequence of calls keeps the promises of :class:`~kvtier.policies.base.EvictionPolicy`."""

    make: Callable[[], EvictionPolicy]
    model: Callable[[], NaivePolicy] | None = None
    has_admission = False

    def __init__(self) -> None:
        super().__init__()
        self.policy = type(self).make()
        self.present: set[int] = set()
        self.pinned: set[int] = set()
        self.now = 0.0
        make_model = type(self).model
        self.naive = None if make_model is None else make_model()

    def children(self, position: int) -> set[int]:
        """The present children of a block."""
        return {child for child in self.present if parent_of(child) == position}

    @rule(position=_POSITIONS)
    def insert(self, position: int) -> None:
        if position in self.present:
            return
        self.now += 1.0
        self.policy.insert(meta_of(position), self.now)
        if self.naive is not None:
            self.naive.insert(position, self.now)
        self.present.add(position)

    @rule(tip=_POSITIONS)
    def store(self, tip: int) -> None:
        """What is missing of a prompt comes at once, its tail first."""
        self.now += 1.0
        for position in reversed(path_to(tip)):
            if position not in self.present:
                self.policy.insert(meta_of(position), self.now)
                if self.naive is not None:
                    self.naive.insert(position, self.now)
                self.present.add(position)

    @rule(tip=_POSITIONS)
    def put_back(self, tip: int) -> None:
        """Blocks in a row that are not here come without being used."""
        self.now += 1.0
        behind = itertools.dropwhile(self.present.__contains__, path_to(tip))
        run = list(itertools.takewhile(lambda position: position not in self.present, behind))
        if run:
            self.policy.put_back([meta_of(position) for position in run], self.now)
            if self.naive is not None:
                self.naive.put_back(run, self.now)
            self.present.update(run)

    @rule(tip=_POSITIONS, seconds=st.floats(0.0, 100.0))
    def use(self, tip: int, seconds: float) -> None:
        """A prompt is used, its tail first."""
        self.now += seconds
        self.touch(list(reversed(path_to(tip))))

    @rule(tip=_POSITIONS, seconds=st.floats(0.0, 1000.0))
    def expect(self, tip: int, seconds: float) -> None:
        """Somebody says when a prompt comes back."""
        path = list(reversed(path_to(tip)))
        self.policy.expect([key_of(position) for position in path], seconds, self.now)
        if self.naive is not None:
            self.naive.expect(path, seconds, self.now)

    @rule(positions=st.lists(_POSITIONS, max_size=5))
    def touch(self, positions: list[int]) -> None:
        self.now += 1.0
        self.policy.touch([key_of(position) for position in positions], self.now)
        if self.naive is not None:
            self.naive.touch(positions, self.now)

    @rule(position=_POSITIONS)
    def remove(self, position: int) -> None:
        self.policy.remove(key_of(position))
        if self.naive is not None:
            self.naive.remove(position)
        self.present.discard(position)
        self.pinned.discard(position)

    @rule(position=_POSITIONS)
    def pin(self, position: int) -> None:
        if position in self.present:
            self.policy.pin(key_of(position))
            if self.naive is not None:
                self.naive.pin(position)
            self.pinned.add(position)

    @rule(position=_POSITIONS)
    def unpin(self, position: int) -> None:
        self.now += 1.0
        self.policy.unpin(key_of(position), self.now)
        if self.naive is not None:
            self.naive.unpin(position, self.now)
        self.pinned.discard(position)

    @rule(count=st.integers(0, 6), tip=_POSITIONS | st.none())
    def evict(self, count: int, tip: int | None) -> None:
        """Victims are unpinned leaves when taken; fewer come only where no candidate is left, or what comes is worth less."""
        incoming = [] if tip is None else [meta_of(position) for position in path_to(tip) if position not in self.present][:count]
        declined_before = self.policy.num_declined
        victims = [int.from_bytes(key, "little") for key in self.policy.victims(count, self.now, incoming)]
        num_declined = self.policy.num_declined - declined_before
        assert len(victims) <= count
        for victim in victims:
            assert victim in self.present
            assert victim not in self.pinned
            assert self.children(victim) == set()
            self.present.discard(victim)
        candidates = [p for p in self.present - self.pinned if not self.children(p)]
        if num_declined:
            assert self.has_admission
            assert candidates
            assert len(victims) < len(incoming)
            assert count == len(victims) + num_declined
        elif len(victims) < count:
            assert candidates == []
        if self.naive is not None:
            assert victims == self.naive.victims(count, self.now, [int.from_bytes(block.key, "little") for block in incoming])

    @rule(seconds=st.floats(0.0, 50_000.0))
    def expire(self, seconds: float) -> None:
        """What is past its time to live leaves; leaves first, and nothing that is pinned."""
        self.now += seconds
        gone = [int.from_bytes(key, "little") for key in self.policy.expired(self.now)]
        for position in gone:
            assert position in self.present - self.pinned
            assert self.children(position) == set()
            self.present.discard(position)
        if self.naive is not None:
            assert self.naive.expired(self.now) == gone

    @precondition(lambda self: not self.pinned)
    @rule()
    def evict_everything(self) -> None:
        """Without pins everything can leave."""
        victims = self.policy.victims(1000, self.now)
        assert len(self.present) == len(victims)
        if self.naive is not None:
            assert [key_of(block) for block in self.naive.victims(1000, self.now)] == victims
        self.present.clear()

    @invariant()
    def knows_what_is_there(self) -> None:
        assert len(self.present) == len(self.policy)
        assert all(key_of(position) in self.policy for position in self.present)

    @invariant()
    def order_is_that_of_the_model(self) -> None:
        """Everything that may leave would leave in the same order. Override it where copies cost too much."""
        if self.naive is not None:
            expected = copy.deepcopy(self.naive).victims(1000, self.now)
            assert [key_of(block) for block in expected] == copy.deepcopy(self.policy).victims(1000, self.now)
