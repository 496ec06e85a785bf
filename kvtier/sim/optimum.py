"""The ceiling of every table: what a cache that knows the future would hit.

Belady's rule with bypass (L. A. Belady, IBM Systems Journal 5(2), 1966) on (next use, depth): of what is cached and what a request has
just computed, those blocks are kept that are used next; of those used next by the same request, the first of its prompt. A block is
used no later than what follows it, so what is kept of a prompt is always a leading part of it.

All blocks of a request that are used next by the same later request lie side by side in it, so the cache is a heap of such segments, and
a replay costs a few steps per request, whatever the number of blocks.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtier.sim.trace import Trace

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True, eq=False)
class Future:
    """Which part of each request is used next by which later request. One serves all capacities."""

    prompt_blocks: NDArray[np.int64]
    """full blocks of the prompt, which can be hits"""
    offsets: NDArray[np.int64]
    """the segments of request i are those from ``offsets[i]`` to before ``offsets[i + 1]``"""
    next_request: NDArray[np.int64]
    sizes: NDArray[np.int64]
    """blocks of the segment"""


def look_ahead(trace: Trace) -> Future:
    """Reads a trace backwards. One pass over all blocks."""
    num = len(trace)
    next_request = np.full(trace.num_unique, _NEVER, np.int64)
    prompt_blocks = np.minimum(_num_blocks(trace), trace.input_tokens // trace.block_tokens)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for index in range(num - 1, -1, -1):
        runs = trace.runs(index)
        after = np.concatenate([next_request[start : start + length] for start, length in runs]) if runs else np.zeros(0, np.int64)
        begins = np.flatnonzero(np.diff(after, prepend=-1))
        sizes = np.diff(begins, append=len(after))
        users = after[begins]
        used = users != _NEVER
        # what a later request has beyond the end of its prompt is computed again there
        ends = np.minimum((begins + sizes)[used], prompt_blocks[users[used]])
        counts = ends - begins[used]
        found.append((users[used][counts > 0], counts[counts > 0]))
        for start, length in runs:
            next_request[start : start + length] = index
    found.reverse()
    offsets = np.concatenate([[0], np.cumsum([len(users) for users, _ in found])]).astype(np.int64)
    empty = [np.zeros(0, np.int64)]
    return Future(
        prompt_blocks, offsets, np.concatenate([users for users, _ in found] + empty), np.concatenate([sizes for _, sizes in found] + empty)
    )


def optimal_hits(future: Future, capacity_blocks: int) -> NDArray[np.int64]:
    """Leading blocks of each prompt that the best cache of that size has. Raises ValueError below one block."""
    if capacity_blocks < 1:
        raise ValueError(f"capacity_blocks is {capacity_blocks}; allowed: at least 1")
    num = len(future.prompt_blocks)
    hits = np.zeros(num, np.int64)
    held = [0] * num
    """blocks that are kept for a later request"""
    furthest: list[int] = []
    """the requests something is kept for, negative: a heap with the latest first; those that have gone by stay until they are met"""
    queued = bytearray(num)
    offsets, users, sizes = future.offsets.tolist(), future.next_request.tolist(), future.sizes.tolist()
    room = capacity_blocks
    for index in range(num):
        hits[index] = held[index]
        room += held[index]
        held[index] = 0
        for place in range(offsets[index], offsets[index + 1]):
            user = users[place]
            held[user] += sizes[place]
            room -= sizes[place]
            if not queued[user]:
                queued[user] = 1
                heapq.heappush(furthest, -user)
        while room < 0:
            user = -furthest[0]
            leaving = min(held[user], -room)
            held[user] -= leaving
            room += leaving
            if not held[user]:
                heapq.heappop(furthest)
                queued[user] = 0
    return hits


def token_hit_rate(trace: Trace, hit_blocks: NDArray[np.int64]) -> float:
    """Tokens of the leading blocks that were found, as a share of all input tokens."""
    return float(hit_blocks.sum() * trace.block_tokens / max(1, trace.input_tokens.sum()))


def ideal_hits(future: Future, trace: Trace) -> NDArray[np.int64]:
    """Leading blocks of each prompt that an endless cache has."""
    return optimal_hits(future, max(1, trace.num_unique))


def _num_blocks(trace: Trace) -> NDArray[np.int64]:
    """Blocks of each request."""
    totals = np.concatenate([[0], np.cumsum(trace.run_lengths)])
    return np.diff(totals[trace.run_offsets])
