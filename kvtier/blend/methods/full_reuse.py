"""Full reuse: nothing but what no chunk covers is computed.

The fastest and the worst; every chunk is read as though no other were there, apart from the anchor. After Gim and others, "Prompt Cache:
Modular Attention Reuse for Low-Latency Inference" (MLSys 2024). Use it where chunks have nothing to do with each other: few-shot
examples, tool descriptions. Not where an answer joins facts of several chunks.
"""

from __future__ import annotations

import torch

from kvtier.blend.methods.base import AsksNothing, Evidence, Selection
from kvtier.blend.ratio import FixedRatio


class FullReuse(AsksNothing):
    """Chooses nothing, whatever the ratio; all where it is 1, as every method does."""

    name = "none"

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """Nothing, or all."""
        return Selection(torch.full((len(evidence.layout.candidates),), ratio.ratio >= 1))
