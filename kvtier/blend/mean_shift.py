"""Moves the tokens that are not computed by a part of what computing changed in the others of their chunk.

After the idea of AgentKVShift. The mean is worth as much as the changes agree: it is scaled, per layer and KV head, by the share of their
squared length that the mean holds, which is small where tokens change in different directions. So it is capped where it would do harm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.blend.layout import Placement, PromptLayout
from kvtier.blend.model import LayerKV, Projected

MIN_CHUNK_TOKENS = 100
"""shorter chunks are left alone"""
MIN_CHOSEN_TOKENS = 4


class MeanShift:
    """The correction of one prompt. A hook of :func:`kvtier.blend.prefill.advance`."""

    def __init__(self, layout: PromptLayout, positions: torch.Tensor, chosen: torch.Tensor, weight: float) -> None:
        """``positions`` are those being computed; ``chosen`` is a mask over the prompt of those among them that belong to chunks."""
        self._weight = weight
        found = [parts for at in layout.placements if (parts := _divide(at, positions, chosen)) is not None]
        self._is_empty = not found
        if found:
            rows, computed, others = zip(*found, strict=True)
            self._rows, self._computed, self._others = torch.cat(rows), torch.cat(computed), torch.cat(others)
            self._chunk_of_other = _numbers(others)
            member = torch.arange(len(found), device=positions.device)[:, None] == _numbers(computed)[None, :]
            self._member, self._counts = member.float(), member.sum(1, keepdim=True)
            """``[chunks, computed tokens]`` and how many there are: values of tokens become means of chunks by one product"""

    def __call__(self, _: int, projected: Projected, kv: LayerKV) -> None:
        """Before the layer's new KV is written."""
        if self._is_empty:
            return
        for new, old in ((projected.keys, kv.keys), (projected.values, kv.values)):
            change = (new[:, self._rows] - old[:, self._computed]).float()
            mean = self._member @ change / self._counts
            power = self._member @ change.square().sum(2, keepdim=True) / self._counts
            agreement = mean.square().sum(2, keepdim=True) / power.clamp(min=1e-12)
            old[:, self._others] += (self._weight * agreement * mean).to(old.dtype)[:, self._chunk_of_other]


def _divide(at: Placement, positions: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Of a chunk: which of the rows are its own, the positions of these, and its other positions. None where there is nothing to do."""
    if at.is_exact or at.num_tokens < MIN_CHUNK_TOKENS:
        return None
    inside = torch.arange(at.start, at.end, device=positions.device)
    computed, others = inside[chosen[inside]], inside[~chosen[inside]]
    if len(computed) < MIN_CHOSEN_TOKENS or not len(others):
        return None
    rows = torch.arange(len(positions), device=positions.device)
    return rows[(positions >= at.start) & (positions < at.end) & chosen[positions]], computed, others


def _numbers(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each element of the joined parts: which part it is of."""
    device = parts[0].device
    return torch.arange(len(parts), device=device).repeat_interleave(torch.tensor([len(part) for part in parts], device=device))
