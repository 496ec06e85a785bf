"""ProphetKV: the tokens that the question looks at.

"ProphetKV: User-Query-Driven Selective Recomputation for Efficient KV Cache Reuse in Retrieval-Augmented Generation" (2026). The question
is run once over the KV as it was kept; its attention, mean over all layers and heads, says which tokens the answer will need, and those
are computed anew. Use it for short questions over long chunks. It costs the question's tokens twice, and the KV serves that question
only.
"""

from __future__ import annotations

from kvtier.blend.methods.base import Asks, Evidence, Selection, top
from kvtier.blend.ratio import FixedRatio


class ProphetKV:
    """The highest attention of the question, across chunks."""

    name = "prophetkv"

    def asks(self, num_layers: int) -> Asks:
        """The question's attention in all layers."""
        return Asks(attention_layers=range(num_layers))

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """By the question's attention alone."""
        scores = evidence.question_attention
        return Selection(top(scores, ratio.num_tokens(len(scores))))
