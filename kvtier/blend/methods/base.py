"""What a selection method is, what it may ask, and the arithmetic that several of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvtier.blend.entries import Context
from kvtier.blend.layout import PromptLayout
from kvtier.blend.ratio import FixedRatio


class Evidence(Protocol):
    """What may be asked about one prompt before its tokens are chosen. Answers cost computation, which counts, and are remembered.

    Scores are fp32, one for each of ``layout.candidates``, in their order.
    """

    layout: PromptLayout
    num_layers: int

    def value_deviation(self, layer: int) -> torch.Tensor:
        """Squared distance between the values kept and those of full prefill in ``layer``. Computes all tokens up to there."""
        ...

    def question_attention(self, layers: range) -> torch.Tensor:
        """How much the question's tokens look at each candidate, mean over these layers and all heads. Computes the question once more."""
        ...

    def contexts(self) -> Sequence[Context]:
        """Of each placement: where its KV was computed."""
        ...


@dataclass(frozen=True)
class Selection:
    """What a method decided."""

    chosen: torch.Tensor
    """a mask over the candidates"""
    shift_weight: float = 0.0
    """by how much of the mean change of a chunk's chosen tokens its other tokens are moved; 0: not at all"""


class SelectionMethod(Protocol):
    """Chooses the tokens that are computed anew. Immutable; must choose every candidate where the ratio is 1, none where it is 0."""

    @property
    def name(self) -> str:
        """Under which requests ask for it."""
        ...

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """The choice for one prompt. Called only where there are candidates."""
        ...


def top(scores: torch.Tensor, number: int) -> torch.Tensor:
    """A mask of the ``number`` highest scores; of equal ones the first."""
    mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    mask[scores.sort(descending=True, stable=True).indices[:number]] = True
    return mask


def share_out(weights: Sequence[float], rooms: Sequence[int], number: int) -> list[int]:
    """Divides ``number`` in proportion to the weights, nobody getting more than its room. All of it, as far as there is room.

    Remainders go to those who are first. Where all weights are zero they count as equal.
    """
    parts = [0] * len(rooms)
    left = min(number, sum(rooms))
    while left:
        open_ = [index for index, room in enumerate(rooms) if parts[index] < room]
        total = sum(weights[index] for index in open_)
        shares = [weights[index] / total if total > 0 else 1 / len(open_) for index in open_]
        for index, part in zip(open_, [math.floor(left * share) for share in shares], strict=True):
            parts[index] += min(part, rooms[index] - parts[index])
        given = sum(parts)
        if given == min(number, sum(rooms)) - left:
            # less than one for everybody: one for each, the weightiest first
            ordered = sorted(zip(shares, open_, strict=True), key=lambda pair: (-pair[0], pair[1]))
            for _, index in ordered[:left]:
                parts[index] += 1
        left = min(number, sum(rooms)) - sum(parts)
    return parts


def chunk_slices(layout: PromptLayout) -> list[tuple[int, slice]]:
    """Of each placement that has candidates: its index, and where they lie among all candidates."""
    slices = []
    first = 0
    for index, placement in enumerate(layout.placements):
        if not placement.is_exact:
            slices.append((index, slice(first, first + placement.num_tokens)))
            first += placement.num_tokens
    return slices


def heads_of_chunks(layout: PromptLayout, numbers: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
    """A mask of the first ``numbers[i]`` candidates of the i-th chunk that has any."""
    mask = torch.zeros(len(layout.candidates), dtype=torch.bool, device=device)
    for (_, part), number in zip(chunk_slices(layout), numbers, strict=True):
        mask[part.start : part.start + number] = True
    return mask
