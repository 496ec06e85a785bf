"""How many tokens are computed anew.

A ratio is a share of the candidates, tokens whose KV may differ from that of full prefill.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kvtier.errors import BlendRefusedError, RefusalReason


@dataclass(frozen=True)
class Ratio:
    """A share of the tokens, rounded up: always ``least``, or from there to ``most``, the more the less sure the model is without.

    Raises:
        BlendRefusedError: these are no shares, or the wrong way round.
    """

    least: float
    most: float | None = None
    """None: always ``least``"""

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:  # false for NaN as well
            raise BlendRefusedError(RefusalReason.RATIO, f"ratio is {self.least}; [0, 1] is allowed")
        if self.most is not None and not self.least <= self.most <= 1:
            raise BlendRefusedError(RefusalReason.RATIO, f"max_ratio is {self.most}; [{self.least}, 1] is allowed, from ratio on")

    def num_tokens(self, num_candidates: int, margin: Callable[[], float]) -> int:
        """How many of the candidates.

        ``margin``: how sure the model is of its next token with chunks as they are, 0 to 1; asked only where it matters. NaN is not sure.
        """
        share = self.least
        if self.most is not None and self.most > self.least:
            sure = margin()
            share = self.most - (self.most - self.least) * (sure if sure > 0 else 0.0)
        return min(num_candidates, math.ceil(share * num_candidates - 1e-9))
