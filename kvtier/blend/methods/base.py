"""What a selection method is, what it may ask, and the arithmetic that several of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kvtier.blend.entries import Context
from kvtier.blend.layout import PromptLayout
from kvtier.blend.ratio import FixedRatio


@dataclass(frozen=True)
class Asks:
    """What a method wants to know of a prompt. All of it costs computation, which counts."""

    attention_layers: range = range(0)
    """the layers of ``question_attention``; the question is computed once more, up to the last of them"""
    deviation_layer: int | None = None
    """the layer of ``value_deviation``; all tokens are computed up to there"""


@dataclass(frozen=True)
class Evidence:
    """What is known of one prompt before its tokens are chosen.

    Scores are fp32, one for each of ``layout.candidates``, in their order; empty where nobody asked.
    """

    layout: PromptLayout
    contexts: Sequence[Context]
    """of each placement: where its KV was computed"""
    question_attention: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """how much the question's tokens look at each candidate, mean over the layers asked for and all heads"""
    value_deviation: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """squared distance between the values kept and those of full prefill in the layer asked for"""


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

    def asks(self, num_layers: int) -> Asks:
        """What it chooses by, in a model of so many layers."""
        ...

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """The choice for one prompt. Called only where there are candidates."""
        ...


class AsksNothing:
    """A method that chooses by where chunks lie, and by what their entries remember."""

    def asks(self, num_layers: int) -> Asks:
        """Nothing."""
        return Asks()


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
