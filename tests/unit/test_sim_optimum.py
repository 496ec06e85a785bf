"""The offline optimum is what an exhaustive search over all cache decisions finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.sim.optimum import ideal_hits, look_ahead, optimal_hits, token_hit_rate
from kvtier.sim.trace import Trace, TraceBuilder

BLOCK_TOKENS = 4


def trace_of(prompts: list[list[str]], generated: list[int] | None = None) -> Trace:
    """Requests a second apart; ``generated``: so many blocks at the end of each were filled while generating."""
    builder = TraceBuilder(BLOCK_TOKENS)
    for number, blocks in enumerate(prompts):
        num_prompt = len(blocks) - (generated[number] if generated else 0)
        builder.add(float(number), blocks, num_prompt * BLOCK_TOKENS + 1, 1)
    return builder.build("test")


def best_by_search(trace: Trace, capacity: int) -> int:
    """The most leading blocks that any sequence of decisions can hit: after each request any part of what is there may be kept."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for request in trace:
        num_prompt = request.input_tokens // BLOCK_TOKENS
        following: dict[frozenset[int], int] = {}
        for cached, hits in best.items():
            leading = sum(1 for _ in itertools.takewhile(cached.__contains__, request.blocks[:num_prompt]))
            there = sorted(cached.union(request.blocks))
            for size in range(min(capacity, len(there)) + 1):
                for kept in map(frozenset, itertools.combinations(there, size)):
                    following[kept] = max(following.get(kept, 0), hits + leading)
        best = following
    return max(best.values())


paths = st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=3), min_size=1, max_size=6)


@given(paths, st.integers(1, 4), st.data())
def test_nothing_is_better(prompts: list[list[str]], capacity: int, data: st.DataObject) -> None:
    """On tiny traces, also where requests have blocks that they generated, which cannot be hits."""
    generated = [data.draw(st.integers(0, len(prompt) - 1)) for prompt in prompts]
    trace = trace_of(prompts, generated)
    assert best_by_search(trace, capacity) == optimal_hits(look_ahead(trace), capacity).sum()


@given(paths)
def test_an_endless_cache_hits_what_was_seen(prompts: list[list[str]]) -> None:
    """And not a block more."""
    trace = trace_of(prompts)
    seen: set[tuple[str, ...]] = set()
    expected = []
    for prompt in prompts:
        prefixes = [tuple(prompt[: end + 1]) for end in range(len(prompt))]
        expected.append(sum(prefix in seen for prefix in prefixes))
        seen.update(prefixes)
    assert expected == ideal_hits(look_ahead(trace), trace).tolist()


@given(paths, st.integers(1, 6))
def test_more_room_is_never_worse(prompts: list[list[str]], capacity: int) -> None:
    future = look_ahead(trace_of(prompts))
    assert optimal_hits(future, capacity).sum() <= optimal_hits(future, capacity + 1).sum()


def test_a_scan_is_let_pass() -> None:
    """Blocks that are never used again take no room from those that are."""
    trace = trace_of([["a", "b"], ["x"], ["y"], ["z"], ["a", "b"]])
    assert [0, 0, 0, 0, 2] == optimal_hits(look_ahead(trace), 2).tolist()
    assert [0, 0, 0, 0, 1] == optimal_hits(look_ahead(trace), 1).tolist()


def test_token_hit_rate() -> None:
    """Tokens of whole blocks over all tokens, those of the last block that is not full included."""
    trace = trace_of([["a", "b"], ["a", "b"]])
    assert 8 / 18 == token_hit_rate(trace, np.array([0, 2]))


def test_a_cache_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity_blocks is 0; allowed: at least 1"):
        optimal_hits(look_ahead(trace_of([["a"]])), 0)
