"""How many tokens are computed anew.

A ratio is a share of the candidates, tokens whose KV may differ from that of full prefill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvtier.errors import BlendRefusedError, RefusalReason


@dataclass(frozen=True)
class FixedRatio:
    """Always the same share, rounded up. Raises BlendRefusedError where it is none."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:  # false for NaN as well
            raise BlendRefusedError(RefusalReason.RATIO, f"ratio is {self.ratio}; [0, 1] is allowed")

    def num_tokens(self, num_candidates: int) -> int:
        """The share of the candidates."""
        return min(num_candidates, math.ceil(self.ratio * num_candidates - 1e-9))
