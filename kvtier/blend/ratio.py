"""How many tokens are computed anew: a fixed share of those that a chunk gave, or as many as a request needs.

A share is of the candidates: tokens whose KV may differ from that of full prefill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from kvtier.errors import BlendRefusedError, RefusalReason


class Ratio(Protocol):
    """Says how many tokens to compute."""

    def num_tokens(self, scores: torch.Tensor | None, num_candidates: int) -> int:
        """How many of the candidates. ``scores`` are what the method thinks each is worth; ``None``: it does not score."""
        ...


@dataclass(frozen=True)
class FixedRatio:
    """Always the same share, rounded up."""

    ratio: float

    def __post_init__(self) -> None:
        check_ratio("ratio", self.ratio)

    def num_tokens(self, scores: torch.Tensor | None, num_candidates: int) -> int:
        """The share of the candidates."""
        return min(num_candidates, math.ceil(self.ratio * num_candidates - 1e-9))


@dataclass(frozen=True)
class AdaptiveRatio:
    """As many tokens as hold ``mass`` of all scores, within bounds: few where a few matter, many where the worth is spread.

    Where a method does not score, the minimum.
    """

    mass: float
    minimum: float = 0.0
    maximum: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mass", "minimum", "maximum"):
            check_ratio(name, getattr(self, name))
        if self.minimum > self.maximum:
            raise BlendRefusedError(RefusalReason.RATIO, f"minimum is {self.minimum}; at most the maximum, {self.maximum}, is allowed")

    def num_tokens(self, scores: torch.Tensor | None, num_candidates: int) -> int:
        """The smallest number whose scores, largest first, hold the mass."""
        bounds = (FixedRatio(self.minimum).num_tokens(None, num_candidates), FixedRatio(self.maximum).num_tokens(None, num_candidates))
        if scores is None or num_candidates == 0:
            return bounds[0]
        ordered = scores.double().clamp(min=0).sort(descending=True).values.cumsum(0)
        needed = int((ordered < self.mass * ordered[-1]).sum()) + 1 if self.mass > 0 else 0
        return max(bounds[0], min(bounds[1], needed))


def check_ratio(name: str, value: float) -> None:
    """Raises BlendRefusedError where the value is not a share."""
    if not 0 <= value <= 1:  # false for NaN as well
        raise BlendRefusedError(RefusalReason.RATIO, f"{name} is {value}; [0, 1] is allowed")


AUTO_RATIO = AdaptiveRatio(mass=0.6, minimum=0.05, maximum=0.3)
"""what ``ratio: auto`` means"""
