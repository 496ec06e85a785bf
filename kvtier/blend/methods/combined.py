"""kvtier's own combination: what the question looks at, the heads of the chunks, and a push for the rest.

Three parts that mend different things. The question's attention (ProphetKV) finds the tokens that the answer needs. A few first tokens of
every chunk (EPIC) take away the attention that a chunk's beginning draws. And the tokens that are not computed are moved by a part of the
mean change of their chunk's computed ones, since what another context does to a chunk's keys and values is in part common to all its
tokens (the idea of AgentKVShift). Use it with entries computed behind the shared prefix, and chunks of 100 tokens and more: shorter ones
are left unmoved, as the mean of few tokens is no guide. Costs what ProphetKV costs, and the KV serves one question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812 - everybody's name for it

from kvtier.blend.methods.base import Evidence, Selection, chunk_slices, heads_of_chunks, share_out, top
from kvtier.blend.ratio import Ratio


@dataclass(frozen=True)
class Combined:
    """``head_share`` of the tokens for the chunks' heads, the others by the question's attention."""

    head_share: float = 0.2
    smoothing: int = 1
    """tokens around each whose attention counts for it; 1: none but its own"""
    shift_weight: float = 0.5
    name: str = "combined"

    def select(self, evidence: Evidence, ratio: Ratio) -> Selection:
        """Heads first, then attention."""
        scores = evidence.question_attention()
        if self.smoothing > 1 and len(scores):
            scores = F.avg_pool1d(scores[None], self.smoothing, 1, self.smoothing // 2, count_include_pad=False)[0]
        rooms = [part.stop - part.start for _, part in chunk_slices(evidence.layout)]
        number = ratio.num_tokens(scores, len(scores))
        heads = share_out([1.0] * len(rooms), rooms, int(self.head_share * number))
        chosen = heads_of_chunks(evidence.layout, heads, scores.device)
        ranked = scores.masked_fill(chosen, float("inf"))
        return Selection(top(ranked, number), self.shift_weight)
