"""Moves the tokens that are not computed by a part of what computing changed in the others of their chunk.

After the idea of AgentKVShift. The mean is worth as much as the changes agree: it is scaled, per layer and KV head, by the share of their
squared length that the mean holds, which is small where tokens change in different directions. So it is capped where it would do harm.
"""

from __future__ import annotations

import torch

from kvtier.blend.layout import PromptLayout
from kvtier.blend.model import Projected, TokenKV

MIN_CHUNK_TOKENS = 100
"""shorter chunks are left alone"""
MIN_CHOSEN_TOKENS = 4


class MeanShift:
    """The correction of one prompt. A hook of :func:`kvtier.blend.prefill.advance`."""

    def __init__(self, kv: TokenKV, layout: PromptLayout, positions: torch.Tensor, chosen: torch.Tensor, weight: float) -> None:
        """``positions`` are those being computed; ``chosen`` is a mask over the prompt of those among them that belong to chunks."""
        self._kv = kv
        self._weight = weight
        self._chunks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        rows = torch.arange(len(positions), device=positions.device)
        for placement in layout.placements:
            if placement.is_exact or placement.num_tokens < MIN_CHUNK_TOKENS:
                continue
            inside = torch.arange(placement.start, placement.end, device=positions.device)
            computed = inside[chosen[inside]]
            if len(computed) < MIN_CHOSEN_TOKENS or len(computed) == len(inside):
                continue
            wanted = (positions >= placement.start) & (positions < placement.end) & chosen[positions]
            self._chunks.append((rows[wanted], computed, inside[~chosen[inside]]))

    def __call__(self, layer: int, projected: Projected) -> None:
        """Before the layer's new KV is written."""
        for new, old in ((projected.keys, self._kv.keys[layer]), (projected.values, self._kv.values[layer])):
            for rows, computed, others in self._chunks:
                change = (new[:, rows] - old[:, computed]).float()
                mean = change.mean(1, keepdim=True)
                agreement = mean.square().sum(2, keepdim=True) / change.square().sum(2, keepdim=True).mean(1, keepdim=True).clamp(min=1e-12)
                old[:, others] += (self._weight * agreement * mean).to(old.dtype)
