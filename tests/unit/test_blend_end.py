"""A blend behind whose end somebody else goes on: what is computed there, and what is not."""

from __future__ import annotations

import pytest
import torch

from kvtier.blend.blender import Blended, blend
from kvtier.blend.chunks import anchor_of
from kvtier.blend.entries import ChunkEntry, compute_entry, full_prefill
from kvtier.blend.finding import ChunkSpace, Span
from kvtier.blend.layout import lay_out
from kvtier.blend.methods import METHODS
from kvtier.blend.placing import EntrySource
from kvtier.blend.ratio import FixedRatio
from kvtier.blend.steps import finish
from kvtier.hashing import request_root
from tests.unit.blend_system import BLOCK, LAYERS, NAMESPACE, SYSTEM, SmallModel, document

TOKENS = [*SYSTEM, *document(1, 9), *document(2, 8), 1, 2, 3]
SPANS = [Span(5, 14), Span(14, 22)]
"""the first directly behind its anchor, so its KV is exact; the end of a block may lie in either"""


class CountingModel(SmallModel):
    """Counts the tokens that go through the end of a layer."""

    num_finished = 0

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        self.num_finished += len(hidden)
        return super().finish(layer, hidden, attended)


def blended(model: CountingModel, ratio: float, end: int, *, needs_logits: bool) -> Blended:
    """The first tokens of the second chunk are those that are chosen first."""
    root = request_root(NAMESPACE.digest)
    placements = ChunkSpace(root, anchor_of(root, SYSTEM, BLOCK), BLOCK).place(TOKENS, SPANS)
    anchor, _ = full_prefill(model, torch.tensor(SYSTEM))
    entries = [compute_entry(model, at.chunk, torch.tensor(TOKENS[at.start : at.end]), anchor) for at in placements]
    model.num_finished = 0
    layout, source = lay_out(len(TOKENS), 0, placements), EntrySource(entries)
    return finish(blend(model, TOKENS, layout, source, METHODS["epic"](), FixedRatio(ratio), end=end, needs_logits=needs_logits))


@pytest.mark.parametrize(
    ("ratio", "end", "num_chosen", "num_rest"),
    [(0.0, 20, 0, 5), (0.5, 20, 4, 5), (1.0, 20, 6, 5), (1.0, 24, 8, 1), (1.0, 12, 0, 13)],
)
def test_the_rest_is_computed_for_logits_alone(ratio: float, end: int, num_chosen: int, num_rest: int) -> None:
    """All of it where they are wanted, chunks' tokens too; none of it where not, nor what comes out of the last layer. What is counted as
    chosen lies before the end."""
    num_fresh = len(SYSTEM) + max(0, end - SPANS[-1].end)
    for needs_logits in (False, True):
        model = CountingModel()
        made = blended(model, ratio, end, needs_logits=needs_logits)
        num_rows = num_fresh + num_chosen + num_rest * needs_logits
        assert (num_chosen, num_rows * LAYERS) == (made.num_chosen, made.num_token_layers)
        assert num_rows * (LAYERS - 1 + needs_logits) == model.num_finished
        assert needs_logits == (made.logits is not None)


@pytest.mark.parametrize("end", [12, 20, 24])
def test_logits_behind_the_end_are_full_prefills(end: int) -> None:
    """Where every token before it is computed anew or exact; and no token before the end is another one because of them."""
    model = CountingModel()
    kv, rows = full_prefill(model, torch.tensor(TOKENS))
    made, plain = (blended(model, 1.0, end, needs_logits=needs_logits) for needs_logits in (True, False))
    assert made.logits is not None
    torch.testing.assert_close(made.logits, model.logits(rows.hidden[-1:])[0], rtol=0, atol=1e-4)
    for ours in (made, plain):
        torch.testing.assert_close(ours.kv.part(0, end).keys, kv.part(0, end).keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.kv.part(0, end).values, kv.part(0, end).values, rtol=0, atol=1e-4)


def test_lengths_that_differ_are_refused() -> None:
    """Prompt, chunks and prefix are those of the layout, before anything is computed."""
    model = CountingModel()
    root = request_root(NAMESPACE.digest)
    placements = ChunkSpace(root, anchor_of(root, [], BLOCK), BLOCK).place(TOKENS, SPANS)
    layout = lay_out(len(TOKENS), 0, placements)
    kv, _ = full_prefill(model, torch.tensor(TOKENS))
    entries = [ChunkEntry(at.chunk, kv.part(at.start, at.end)) for at in placements]
    model.num_finished = 0
    for tokens, given, prefix, error in (
        (TOKENS[:-1], entries, None, "a prompt of 24 tokens, of the layout 25"),
        (TOKENS, entries[:1], None, "1 chunks, of the layout 2"),
        (TOKENS, entries, kv.part(0, 3), "a prefix of 3 tokens, of the layout 0"),
    ):
        with pytest.raises(ValueError, match=error):
            finish(blend(model, tokens, layout, EntrySource(given), METHODS["epic"](), FixedRatio(0.5), prefix=prefix))
    assert 0 == model.num_finished
