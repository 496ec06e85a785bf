"""Full reuse: nothing but what no chunk covers is computed.

The fastest and the worst; every chunk is read as though no other were there, apart from the anchor. After Gim and others, "Prompt Cache:
Modular Attention Reuse for Low-Latency Inference" (MLSys 2024). Use it where chunks have nothing to do with each other: few-shot
examples, tool descriptions. Not where an answer joins facts of several chunks.
"""

from __future__ import annotations

import torch

from kvtier.blend.methods.base import Evidence, Selection
from kvtier.blend.ratio import FixedRatio


class FullReuse:
    """Chooses what the ratio asks for from the beginning, which with its own ratio of 0 is nothing."""

    name = "none"

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """The first candidates."""
        chosen = torch.zeros(len(evidence.layout.candidates), dtype=torch.bool)
        chosen[: ratio.num_tokens(len(chosen))] = True
        return Selection(chosen)
