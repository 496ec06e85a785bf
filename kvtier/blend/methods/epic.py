"""EPIC (LegoLink): the first tokens of every chunk.

Hu and others, "EPIC: Efficient Position-Independent Caching for Serving Large Language Models" (ICML 2025). The first tokens of a chunk
that was computed alone draw attention that belongs to the beginning of the prompt; computed anew they lose it. Needs no scores and no
extra pass, and its tokens are contiguous: the cheapest method, good for loading and computing in one go. It cannot mend what lies deep in
a chunk, and has less to mend where chunks were computed behind a shared prefix.
"""

from __future__ import annotations

from kvtier.blend.methods.base import AsksNothing, Evidence, Selection, chunk_slices, heads_of_chunks, share_out
from kvtier.blend.ratio import FixedRatio


class Epic(AsksNothing):
    """The same number of tokens of every chunk; what a short one cannot use goes to the others."""

    name = "epic"

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """The heads of the chunks."""
        rooms = [part.stop - part.start for _, part in chunk_slices(evidence.layout)]
        numbers = share_out([1.0] * len(rooms), rooms, ratio.num_tokens(sum(rooms)))
        return Selection(heads_of_chunks(evidence.layout, numbers))
