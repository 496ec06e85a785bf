"""kvtier's own combination: what the question looks at where it counts, what depends on the context, and a push for the rest.

Three parts that mend different things. The question's attention (ProphetKV) finds the tokens that the answer needs; it is asked in those
layers only in which stale KV changes answers. Tokens that looked at other chunks most when their KV was computed (Cache-Craft) are those
that another context changes most; where the entries do not remember it, the first tokens of every chunk stand in (EPIC). And the tokens
that are not computed are moved by a part of the mean change of their chunk's computed ones, since what another context does to a chunk's
keys and values is in part common to all its tokens (the idea of AgentKVShift). Use it with entries that were computed behind some other
document, and chunks of 100 tokens and more: shorter ones are left unmoved, as the mean of few tokens is no guide. Costs what ProphetKV
costs, and the KV serves one question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtier.blend.methods.base import Asks, Evidence, Selection, chunk_slices, heads_of_chunks, share_out, top
from kvtier.blend.ratio import FixedRatio


@dataclass(frozen=True)
class Combined:
    """``context_share`` of what the ratio pays for goes to what depends on the context, the rest by the question's attention."""

    context_share: float = 0.15
    shift_weight: float = 0.5
    telling_layers: tuple[float, float] = (0.4, 0.8)
    """from where to where, as shares of the model's depth, the layers lie whose KV has to be right; ``kvtier bench blend --layers``"""
    name: str = "combined"

    def asks(self, num_layers: int) -> Asks:
        """The question's attention in the telling layers."""
        first, last = (round(share * num_layers) for share in self.telling_layers)
        last = max(1, last)
        return Asks(attention_layers=range(min(first, last - 1), last))

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """Context first, then attention."""
        scores = evidence.question_attention
        number = ratio.num_tokens(len(scores))
        dependent = _dependent(evidence, int(self.context_share * number)).to(scores.device)
        return Selection(top(scores.masked_fill(dependent, float("inf")), number), self.shift_weight)


def _dependent(evidence: Evidence, number: int) -> torch.Tensor:
    """A mask of the tokens that looked at other chunks most; where nobody remembers, of the chunks' heads."""
    slices = chunk_slices(evidence.layout)
    contexts = evidence.contexts
    mass = torch.zeros(len(evidence.layout.candidates))
    for index, part in slices:
        if len(contexts[index].token_mass):
            mass[part] = contexts[index].token_mass[evidence.layout.placements[index].first_token :]
    if mass.any():
        return top(mass, number)
    rooms = [part.stop - part.start for _, part in slices]
    return heads_of_chunks(evidence.layout, share_out([1.0] * len(rooms), rooms, number))
