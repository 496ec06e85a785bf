"""Cache-Craft: more tokens of those chunks whose old surroundings mattered and are gone.

Agarwal and others, "Cache-Craft: Managing Chunk-Caches for Efficient Retrieval-Augmented Generation" (SIGMOD 2025). An entry remembers
how much each of its tokens looked at the chunks before it. The more it did (context impact), and the less of what it looked at lies
before it now, in the old order (prefix overlap), the larger its share of the tokens to compute; inside a chunk those go first that looked
at others most. Use it where entries come from prompts that were served, and sets of chunks recur. For entries computed behind an anchor
alone there is nothing to remember: then it is the first tokens of every chunk, which is EPIC.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kvtier.blend.entries import Context
from kvtier.blend.methods.base import AsksNothing, Evidence, Selection, chunk_slices, share_out, top
from kvtier.blend.ratio import FixedRatio
from kvtier.types import BlockKey


class CacheCraft(AsksNothing):
    """Shares by recompute overhead, tokens by what they looked at."""

    name = "cachecraft"

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """By the entries' contexts; no extra pass."""
        layout, contexts = evidence.layout, evidence.contexts
        slices = chunk_slices(layout)
        rooms = [part.stop - part.start for _, part in slices]
        weights = []
        scores = torch.zeros(sum(rooms))
        for index, part in slices:
            earlier = [placement.chunk.key for placement in layout.placements[:index]]
            first = layout.placements[index].first_token
            context = contexts[index]
            weights.append(context_impact(context) * (1 - prefix_overlap(context, earlier)) * (part.stop - part.start))
            if len(context.token_mass):
                scores[part] = context.token_mass[first:]
        number = ratio.num_tokens(sum(rooms))
        chosen = torch.zeros(sum(rooms), dtype=torch.bool)
        for (_, part), share in zip(slices, share_out(weights, rooms, number), strict=True):
            chosen[part] = top(scores[part], share)
        return Selection(chosen)


def context_impact(context: Context) -> float:
    """From 1/2 (it looked at itself only) to 1 (at others only)."""
    return 1 / (1 + math.exp(-min(sum(context.chunk_mass) / max(context.own_mass, 1e-9), 50.0)))


def prefix_overlap(context: Context, earlier: Sequence[BlockKey]) -> float:
    """Which share of what the chunk looked at lies before it again, less where the order differs: from 0 (nothing) to 1 (all).

    The order counts by the share of pairs that are the wrong way round (Kendall).
    """
    total = sum(context.chunk_mass)
    if total <= 0:
        return 0.0
    place = {key: number for number, key in enumerate(earlier)}
    kept = [(place[key], mass) for key, mass in zip(context.chunk_keys, context.chunk_mass, strict=True) if key in place]
    pairs = [(kept[i][0], kept[j][0]) for i in range(len(kept)) for j in range(i + 1, len(kept))]
    wrong = sum(left > right for left, right in pairs) / len(pairs) if pairs else 0.0
    return sum(mass for _, mass in kept) / total * (1 - wrong)
