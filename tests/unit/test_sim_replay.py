"""The replay: what it hits, what it must not hit, and that the planner comes out of it healthy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.policies import POLICIES
from kvtier.sim.model import Machine
from kvtier.sim.optimum import ideal_hits, look_ahead, optimal_hits
from kvtier.sim.replay import Replay, Replayed, times_to_first_token, usable_blocks
from kvtier.sim.setup import Setup, TierSetup
from kvtier.sim.trace import Trace, TraceBuilder
from kvtier.types import BlockKey

BLOCK_TOKENS = 32
MACHINE = Machine(kv_bytes_per_token=1024)


def trace_of(prompts: list[str], *, every_s: float = 1.0) -> Trace:
    """A letter is a block; all requests have some tokens more."""
    builder = TraceBuilder(BLOCK_TOKENS)
    for number, blocks in enumerate(prompts):
        builder.add(every_s * number, list(blocks), len(blocks) * BLOCK_TOKENS + 5, 1)
    return builder.build("test")


def replay(trace: Trace, setup: Setup, machine: Machine = MACHINE, *, record_evictions: bool = False) -> Replayed:
    run = Replay(trace, setup, machine, record_evictions=record_evictions)
    replayed = run.run()
    assert [] == run.check()
    return replayed


def host(capacity_blocks: int, policy: str = "lru", **more: object) -> Setup:
    return dataclasses.replace(Setup(TierSetup(capacity_blocks, policy)), **more)  # type: ignore[arg-type]


prompts = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=12)


@given(prompts)
def test_an_endless_cache(requests: list[str]) -> None:
    """hits every block that was seen before."""
    trace = trace_of(requests)
    assert ideal_hits(look_ahead(trace), trace).tolist() == replay(trace, host(1000)).hit_blocks.tolist()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(requests=prompts, capacity=st.integers(1, 8))
def test_nothing_beats_the_optimum(policy: str, requests: list[str], capacity: int) -> None:
    trace = trace_of(requests)
    assert replay(trace, host(capacity, policy)).hit_blocks.sum() <= optimal_hits(look_ahead(trace), capacity).sum()


def test_lru_lets_the_tail_of_the_oldest_go() -> None:
    """By hand: three slots, and a prompt of two that pushes out the tail of the one before it."""
    replayed = replay(trace_of(["ab", "xy", "a", "xy"]), host(3), record_evictions=True)
    assert [0, 0, 1, 2] == replayed.hit_blocks.tolist()
    assert [("host", (1).to_bytes(16, "little"))] == replayed.evictions
    assert 1 == replayed.counters["host.evicted_blocks"]


def test_the_last_token_is_computed() -> None:
    """Where a prompt ends with a block, that block is of use only if the engine's own blocks are smaller."""
    assert [0, 0, 1, 1, 2] == [usable_blocks(tokens, 32, 32) for tokens in (31, 32, 33, 64, 65)]
    assert [0, 1, 1, 2, 2] == [usable_blocks(tokens, 32, 16) for tokens in (31, 32, 33, 64, 65)]
    assert 0 == usable_blocks(0, 32, 16)


def test_generated_blocks_are_stored_if_wanted() -> None:
    """And hit by the request that goes on from them."""
    builder = TraceBuilder(BLOCK_TOKENS)
    builder.add(0, ["a", "b"], BLOCK_TOKENS + 4, 40)
    builder.add(9, ["a", "b"], 2 * BLOCK_TOKENS + 4, 1)
    trace = builder.build("t")
    assert [0, 2] == replay(trace, host(9)).hit_blocks.tolist()
    assert [0, 1] == replay(trace, host(9, store_decode_blocks=False)).hit_blocks.tolist()


@given(prompts, st.integers(1, 6), st.sampled_from(["through", "back", "on_evict"]))
def test_a_disk_that_is_fast_enough(requests: list[str], capacity: int, write: str) -> None:
    """Host memory as small as a request, all else on disk: hits as with an endless cache, but for what a pin may not hold."""
    trace = trace_of(requests, every_s=60.0)
    setup = Setup(TierSetup(capacity + 5), TierSetup(1000), write, max_pinned_fraction=1.0)
    replayed = replay(trace, setup)
    ideal = ideal_hits(look_ahead(trace), trace)
    # with on_evict there may be no slot until the disk has what was in it
    assert ideal.tolist() == replayed.hit_blocks.tolist() or (write == "on_evict" and (replayed.hit_blocks <= ideal).all())
    assert (replayed.host_blocks <= replayed.hit_blocks).all()


def test_a_disk_takes_its_time() -> None:
    """A promotion makes the request wait, and one that would take too long is given up."""
    trace = trace_of(["ab", "xy", "ab"], every_s=10.0)
    setup = Setup(TierSetup(2), TierSetup(10), max_pinned_fraction=1.0)
    num_bytes = 2 * BLOCK_TOKENS * MACHINE.kv_bytes_per_token
    slow = dataclasses.replace(MACHINE, disk_read_bytes_per_s=float(num_bytes), disk_latency_s=0.0)
    replayed = replay(trace, setup, slow)
    assert ([0, 0, 2], [0, 0, 0], [0, 0, 1.0]) == (replayed.hit_blocks.tolist(), replayed.host_blocks.tolist(), replayed.wait_s.tolist())
    assert (2, 4) == (replayed.counters["disk.loaded_blocks"], replayed.counters["disk.stored_blocks"])
    slower = dataclasses.replace(slow, disk_read_bytes_per_s=num_bytes / 5)
    replayed = replay(trace, setup, slower)
    assert ([0, 0, 0], [0, 0, 2.0]) == (replayed.hit_blocks.tolist(), replayed.wait_s.tolist())


def test_time_to_live() -> None:
    """A block that has expired is no hit."""
    trace = trace_of(["ab", "ab", "ab"], every_s=10.0)
    assert [0, 2, 2] == replay(trace, Setup(TierSetup(9, ttl_s=15))).hit_blocks.tolist()
    assert [0, 2, 0] == replay(trace, Setup(TierSetup(9, ttl_s=15, ttl_mode="fixed"))).hit_blocks.tolist()
    assert [0, 0, 0] == replay(trace, Setup(TierSetup(9, ttl_s=5))).hit_blocks.tolist()


def test_an_observer_may_act_on_the_planner() -> None:
    """A pin that it sets keeps a prefix from eviction, until an event that it asked for ends it."""

    class Keeper:
        replay: Replay
        seen: list[tuple[str, int, float]]

        def began(self, index: int, keys: Sequence[BlockKey], now: float) -> None:
            self.seen.append(("began", index, now))

        def ended(self, index: int, keys: Sequence[BlockKey], now: float) -> None:
            self.seen.append(("ended", index, now))
            if index == 0:
                planner = self.replay.planner
                pin = planner.pin(keys, None)
                self.replay.at(3.5, lambda: planner.unpin(pin, 3.5))

    keeper = Keeper()
    keeper.seen = []
    trace = trace_of(["ab", "vw", "xy", "ab", "vw", "xy", "ab"])
    keeper.replay = Replay(trace, host(3), MACHINE, observer=keeper)
    assert [0, 0, 0, 2, 0, 0, 0] == keeper.replay.run().hit_blocks.tolist()
    assert [0, 0, 0, 0, 0, 0, 0] == replay(trace, host(3)).hit_blocks.tolist()
    assert [("began", 0, 0.0), ("ended", 0, 0.0), ("began", 1, 1.0)] == keeper.seen[:3]


def test_a_tier_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="the disk tier holds 0 blocks of 32768 bytes; allowed: at least 1"):
        Replay(trace_of(["a"]), Setup(TierSetup(1), TierSetup(0)), MACHINE)


def test_time_to_first_token() -> None:
    """Waiting, loading and computing add up."""
    trace = trace_of(["abcd"])
    machine = Machine(1000, prefill_tokens_per_s=100, double_cost_context=100, overhead_s=0.5, host_bytes_per_s=64_000)
    replayed = replay(trace, host(9), machine)
    whole, part = (float(times_to_first_token(trace, machine, [hits], replayed.wait_s)[0]) for hits in (0, 2))
    assert 0.5 + 1.33 * (1 + 133 / 200) == pytest.approx(whole)
    assert 0.5 + 1.0 + 0.69 * (1 + (64 + 133) / 200) == pytest.approx(part)


def test_impossible_machines_are_refused() -> None:
    with pytest.raises(ValueError, match="host_bytes_per_s is 0; allowed: more than 0"):
        Machine(host_bytes_per_s=0)
