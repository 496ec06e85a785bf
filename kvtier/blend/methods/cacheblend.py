"""CacheBlend: the tokens whose values differ most from full prefill's in an early layer.

Yao and others, "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion" (EuroSys 2025). The layers below the
check layer are computed for all tokens; there the squared distance of the values is compared once, as in the authors' published code,
and only the tokens that deviate most go on. Use it where the question is not known when the chunks are joined, or KV is kept for
several questions. It computes one layer in full, and does not know which tokens the question needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.blend.methods.base import Asks, Evidence, Selection, top
from kvtier.blend.ratio import FixedRatio


@dataclass(frozen=True)
class CacheBlend:
    """The highest deviations at ``check_layer``."""

    check_layer: int = 1
    name: str = "cacheblend"

    def asks(self, num_layers: int) -> Asks:
        """The deviation of values in one layer."""
        return Asks(deviation_layer=min(self.check_layer, num_layers - 1))

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """By deviation alone, across chunks."""
        scores = evidence.value_deviation
        return Selection(top(scores, ratio.num_tokens(len(scores))))
