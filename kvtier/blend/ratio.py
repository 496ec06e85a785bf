"""How many tokens are computed anew.

A ratio is a share of the candidates, tokens whose KV may differ from that of full prefill; or of their layers, where a method computes
tokens up to some layer only.
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

    def to_depth(self, num_candidates: int, num_layers: int, end_layer: int, num_whole: int = 0) -> tuple[int, int]:
        """As many tokens as the share pays for where ``num_whole`` of them are computed through all layers and each other one up to
        ``end_layer`` only, and that layer.

        Where it pays for more than all of them, they are computed deeper. Number of tokens and layers are rounded up.
        """
        paid = self.ratio * num_candidates * num_layers - num_whole * num_layers - 1e-6
        num_others = num_candidates - num_whole
        if num_others <= 0:
            return num_candidates, num_layers
        end = min(num_layers, max(end_layer, math.ceil(paid / num_others)))
        return num_whole + min(num_others, max(0, math.ceil(paid / end))), end
