"""Eviction policies keep their contract, and the order of their naive models."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import invariant

from kvtier.policies import (
    POLICIES,
    ARCPolicy,
    FIFOPolicy,
    GDSFPolicy,
    HazardPolicy,
    LRU2Policy,
    LRUPolicy,
    S3FIFOPolicy,
    SIEVEPolicy,
    create_policy,
)
from kvtier.testing.policies import PolicyMachine, key_of, meta_of
from kvtier.testing.policy_models import NaiveARC, NaiveFIFO, NaiveLRU, NaiveS3FIFO, NaiveSIEVE, parent_of
from kvtier.testing.policy_models_hazard import NaiveHazard
from kvtier.testing.policy_models_ranked import NaiveGDSF, NaiveLRU2
from kvtier.types import KEY_BYTES, BlockKey


class FIFOMachine(PolicyMachine):
    make = FIFOPolicy
    model = NaiveFIFO


class LRUMachine(PolicyMachine):
    make = LRUPolicy
    model = NaiveLRU


class ARCMachine(PolicyMachine):
    make = ARCPolicy
    model = NaiveARC


class LRU2Machine(PolicyMachine):
    make = LRU2Policy
    model = NaiveLRU2


class S3FIFOMachine(PolicyMachine):
    make = S3FIFOPolicy
    model = NaiveS3FIFO


class SIEVEMachine(PolicyMachine):
    make = SIEVEPolicy
    model = NaiveSIEVE


class GDSFMachine(PolicyMachine):
    make = GDSFPolicy
    model = NaiveGDSF


class HazardMachine(PolicyMachine):
    make = HazardPolicy
    model = NaiveHazard
    has_admission = True

    @invariant()
    def order_is_that_of_the_model(self) -> None:
        """All that decides is the same: segments and their leaves, whose block is whose, what is remembered, what was learned."""
        assert isinstance(self.policy, HazardPolicy)
        assert isinstance(self.naive, NaiveHazard)
        assert self.naive.state() == state_of(self.policy)


def state_of(policy: HazardPolicy) -> dict[str, object]:
    """As :meth:`NaiveHazard.state`."""

    def number(key: BlockKey) -> int:
        return int.from_bytes(key, "little")

    runs = policy._forest.runs
    assert all(key in run.keys for key, run in runs.items())
    return {
        "segments": {
            each.id: (each.time_s, each.class_id, each.num_uses, each.num_turns, each.gap_s, each.num_blocks, each.num_alive)
            for each in policy._log._ring.values()
        },
        "leaves": {each.id: [number(run.keys[-1]) for run in each.leaves] for each in policy._log._ring.values()},
        "blocks": {number(key): (run.segment.id, run.had_child or run.keys[-1] != key) for key, run in runs.items()},
        "pieces": {
            number(first): (
                [number(BlockKey(piece.data[at : at + KEY_BYTES])) for at in range(0, len(piece.data), KEY_BYTES)],
                piece.segment.id,
                piece.had_child,
            )
            for first, piece in policy._ghosts._pieces.items()
        },
        "announced": {number(key): (segment.id, had_child) for key, (segment, had_child) in policy._announced.items()},
        "fresh": [number(block.key) for block in policy._fresh],
        "learned": {class_id: (seen.hits, seen.risk) for class_id, seen in policy._model._seen.items()},
        "table": policy._model._table,
    }


TestFIFO = FIFOMachine.TestCase
TestLRU = LRUMachine.TestCase
TestARC = ARCMachine.TestCase
TestLRU2 = LRU2Machine.TestCase
TestS3FIFO = S3FIFOMachine.TestCase
TestSIEVE = SIEVEMachine.TestCase
TestGDSF = GDSFMachine.TestCase
TestHazard = HazardMachine.TestCase


def naive_victim(order: list[int]) -> int | None:
    """The oldest block without a child, by looking at all of them."""
    parents = {parent_of(position) for position in order}
    return next((position for position in order if position not in parents), None)


@given(st.lists(st.tuples(st.sampled_from(["use", "use", "evict"]), st.integers(0, 31)), max_size=80))
def test_lru_evicts_the_oldest_leaf(steps: list[tuple[str, int]]) -> None:
    """Each victim is the least recently used of the blocks that have no child."""
    policy = LRUPolicy()
    order: list[int] = []
    for step, position in steps:
        if step == "evict":
            expected = naive_victim(order)
            assert ([] if expected is None else [key_of(expected)]) == policy.victims(1, 0.0)
            if expected is not None:
                order.remove(expected)
        elif position in order:
            policy.touch([key_of(position)], 0.0)
            order.remove(position)
            order.append(position)
        else:
            policy.insert(meta_of(position), 0.0)
            order.append(position)


def test_the_tail_of_a_prompt_leaves_first() -> None:
    """Of one request, inserted tail first, the last block is the first victim; the older request leaves before it."""
    policy = LRUPolicy()
    old, new = [1, 2, 4, 8], [3, 6, 12]
    for position in reversed(old):
        policy.insert(meta_of(position), 0.0)
    for position in reversed(new):
        policy.insert(meta_of(position), 1.0)

    assert [key_of(p) for p in (8, 4, 2, 12, 6, 3, 1)] == policy.victims(9, 2.0)


def test_fifo_is_not_moved_by_use() -> None:
    """The first to come is the first to leave, however often it is used."""
    policy = FIFOPolicy()
    for position in (16, 17, 18):
        policy.insert(meta_of(position), 0.0)
    policy.touch([key_of(16)], 1.0)

    assert [key_of(16)] == policy.victims(1, 2.0)


def test_pinning_the_tip_keeps_the_prefix() -> None:
    """A pinned block keeps everything before it; once unpinned it can leave."""
    policy = LRUPolicy()
    for position in (2, 4, 8, 9):
        policy.insert(meta_of(position), 0.0)
    policy.pin(key_of(8))

    assert [key_of(9)] == policy.victims(4, 1.0)
    policy.unpin(key_of(8), 2.0)
    assert [key_of(8), key_of(4), key_of(2)] == policy.victims(4, 3.0)


def test_an_unknown_policy_is_named() -> None:
    """The message names the value and what is allowed."""
    with pytest.raises(ValueError, match="'mru' is not one of arc, default, fifo"):
        create_policy("mru")
    assert ["arc", "default", "fifo", "gdsf", "hazard", "lru", "lru2", "s3fifo", "sieve"] == sorted(POLICIES)
