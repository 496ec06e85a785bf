"""The sparse prefill is right: with all tokens it is the model's own prefill, with none it changes nothing."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (  # type: ignore[import-not-found]
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from kvtier.blend import blender
from kvtier.blend.blender import Blended, blend, extend
from kvtier.blend.entries import NO_CONTEXT, capture_entries, full_prefill
from kvtier.blend.finding import Span
from kvtier.blend.layout import PromptLayout, lay_out
from kvtier.blend.methods import METHODS, Asks, Evidence, FullReuse, Selection
from kvtier.blend.placing import EntrySource
from kvtier.blend.ratio import FixedRatio
from kvtier.blend.steps import finish
from kvtier.blend.transformers_models import TransformersModel
from kvtier.errors import BlendRefusedError, RefusalReason
from tests.engine.blend_models import FAMILIES, SIZES, Store, tiny

torch.set_num_threads(1)
NUM_LAYERS = SIZES["num_hidden_layers"]
TOLERANCE = 2e-4
"""logits of the tiny models are up to 30"""


@dataclass(frozen=True)
class Prompt:
    """A prompt in which chunks lie."""

    token_ids: list[int]
    spans: list[Span]
    num_anchor_tokens: int
    num_prefix_tokens: int


def tokens(start: int, number: int) -> list[int]:
    """Tokens that a number stands for."""
    return [(start * 31 + 7 * index + index * index) % SIZES["vocab_size"] for index in range(number)]


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Chunks of random lengths in random order, some twice, with and without gaps, anchor, prefix hit and question."""
    num_anchor = draw(st.sampled_from([0, 0, 1, 5, 12]))
    ids = tokens(1, num_anchor)
    spans = []
    for number in draw(st.lists(st.integers(2, 5), max_size=5)):
        ids += tokens(99, draw(st.sampled_from([0, 0, 3])))
        chunk = tokens(number, 4 * number + 1)
        spans.append(Span(len(ids), len(ids) + len(chunk)))
        ids += chunk
    ids += tokens(77, draw(st.sampled_from([0, 1, 6])))
    if not ids:
        ids = tokens(5, 1)
    return Prompt(ids, spans, num_anchor, draw(st.one_of(st.just(0), st.integers(0, len(ids) - 1))))


def blend_prompt(family: str, prompt: Prompt, method: str, ratio: float) -> tuple[Blended, PromptLayout, Store]:
    """Blends with entries computed behind the anchor, beside a prefix hit."""
    _, model = tiny(family)
    store = Store(model, prompt.token_ids[: prompt.num_anchor_tokens])
    layout = lay_out(len(prompt.token_ids), prompt.num_prefix_tokens, store.space.place(prompt.token_ids, prompt.spans))
    full, _ = full_prefill(model, torch.tensor(prompt.token_ids))
    prefix = full.part(0, prompt.num_prefix_tokens) if prompt.num_prefix_tokens else None
    entries = store.entries(prompt.token_ids, layout)
    made = finish(blend(model, prompt.token_ids, layout, EntrySource(entries), METHODS[method](), FixedRatio(ratio), prefix=prefix))
    return made, layout, store


def models_own(family: str, token_ids: Sequence[int]) -> Any:
    """What transformers computes for the prompt: logits behind the last token, KV by layer."""
    model, _ = tiny(family)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([token_ids]), use_cache=True)
    return output.logits[0, -1].float(), output.past_key_values


@pytest.mark.parametrize("family", FAMILIES)
def test_full_prefill_is_the_models(family: str) -> None:
    """KV and logits are those that transformers computes."""
    ids = tokens(3, 60)
    logits, cache = models_own(family, ids)
    _, model = tiny(family)
    kv, rows = full_prefill(model, torch.tensor(ids))
    torch.testing.assert_close(model.logits(rows.hidden[-1:])[0], logits, rtol=0, atol=TOLERANCE)
    for layer, expected in enumerate(cache.layers):
        torch.testing.assert_close(kv.keys[layer], expected.keys[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(kv.values[layer], expected.values[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12)
@given(prompt=prompts())
def test_all_tokens_are_full_prefill(family: str, method: str, prompt: Prompt) -> None:
    """With ratio 1 every method gives the model's own logits and next token, for every layout."""
    blended, layout, _ = blend_prompt(family, prompt, method, 1.0)
    logits, cache = models_own(family, prompt.token_ids)
    assert len(layout.candidates) == blended.num_chosen
    torch.testing.assert_close(blended.logits, logits, rtol=0, atol=TOLERANCE)
    assert blended.logits is not None
    assert logits.argmax() == blended.logits.argmax()
    torch.testing.assert_close(blended.kv.keys[-1], cache.layers[-1].keys[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_context_to_miss_reuse_is_exact(family: str) -> None:
    """One chunk where it was computed: with ratio 0 its KV stays bit for bit, and the logits are full prefill's."""
    for num_anchor, num_question in ((0, 5), (9, 5), (0, 0), (9, 0)):
        ids = tokens(1, num_anchor + 40 + num_question)
        prompt = Prompt(ids, [Span(num_anchor, num_anchor + 40)], num_anchor, 0)
        blended, layout, store = blend_prompt(family, prompt, "none", 0.0)
        entry = store.entries(ids, layout)[0]
        part = blended.kv.part(num_anchor, num_anchor + 40)
        assert torch.equal(entry.kv.keys, part.keys)
        assert torch.equal(entry.kv.values, part.values)
        torch.testing.assert_close(blended.logits, models_own(family, ids)[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_moved_keys_are_those_of_their_place(family: str) -> None:
    """A chunk behind other tokens: in layer 0, where no context counts, its keys and values are full prefill's."""
    ids = tokens(1, 400)
    prompt = Prompt(ids, [Span(333, 390)], 0, 0)
    blended, _, _ = blend_prompt(family, prompt, "none", 0.0)
    _, cache = models_own(family, ids)
    torch.testing.assert_close(blended.kv.keys[0], cache.layers[0].keys[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(blended.kv.values[0], cache.layers[0].values[0], rtol=0, atol=TOLERANCE)
    assert not torch.allclose(blended.kv.keys[2], cache.layers[2].keys[0], rtol=0, atol=0.01)


@settings(max_examples=40)
@given(prompt=prompts(), ratio=st.floats(0, 1), method=st.sampled_from(sorted(METHODS)))
def test_any_ratio_computes_what_it_says(prompt: Prompt, ratio: float, method: str) -> None:
    """As many tokens as the ratio says are computed anew, with ``none`` none; the prefix and exact chunks keep their bits."""
    blended, layout, store = blend_prompt("llama", prompt, method, ratio)
    number = math.ceil((int(ratio) if method == "none" else ratio) * len(layout.candidates) - 1e-9)
    assert number == blended.num_chosen
    assert blended.logits is not None
    assert bool(blended.logits.isfinite().all())
    for placement, entry in zip(layout.placements, store.entries(prompt.token_ids, layout), strict=True):
        if placement.is_exact:
            kept = entry.kv.part(placement.first_token, placement.chunk.num_tokens)
            assert torch.equal(kept.values, blended.kv.part(placement.start, placement.end).values)


def test_what_combined_chooses_is_computed_in_every_layer() -> None:
    """A third of the tokens, and the question; behind the first layer no bit of those is left, and the others stay as they were."""
    ids = [*tokens(2, 40), *tokens(3, 40), *tokens(77, 6)]
    prompt = Prompt(ids, [Span(0, 40), Span(40, 80)], 0, 0)
    blended, layout, store = blend_prompt("llama", prompt, "combined", 1 / 3)
    assert [*range(40, 80)] == layout.candidates
    assert 14 == blended.num_chosen
    kept = store.entries(ids, layout)[1].kv
    changed = [(blended.kv.values[layer][:, 40:80] != kept.values[layer]).any(2).any(0).tolist() for layer in range(NUM_LAYERS)]
    assert 14 == sum(changed[1])
    assert changed[1] == changed[NUM_LAYERS - 1]
    assert bool(blended.kv.values[NUM_LAYERS - 1][:, 80:].any(2).all())


@dataclass
class Asking:
    """Asks for the question's attention in some layers, and chooses nothing."""

    layers: range
    name: str = "asking"
    answer: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def asks(self, num_layers: int) -> Asks:
        """What it was told to."""
        return Asks(attention_layers=self.layers)

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """Nothing."""
        self.answer = evidence.question_attention
        return Selection(torch.zeros(len(evidence.layout.candidates), dtype=torch.bool))


def test_attention_is_that_of_the_layers_asked_for() -> None:
    """The mean over some layers and that over the others make up the mean over all; a layer alone is not the others'."""
    _, model = tiny("llama")
    ids = [*tokens(2, 40), *tokens(3, 40), *tokens(77, 6)]
    store = Store(model, [])
    layout = lay_out(len(ids), 0, store.space.place(ids, [Span(0, 40), Span(40, 80)]))
    methods = [Asking(layers) for layers in (range(NUM_LAYERS), range(1), range(1, NUM_LAYERS))]
    for asking in methods:
        finish(blend(model, ids, layout, EntrySource(store.entries(ids, layout)), asking, FixedRatio(0.5)))
    every, first, others = (asking.answer for asking in methods)
    torch.testing.assert_close(NUM_LAYERS * every, first + (NUM_LAYERS - 1) * others)
    assert not torch.allclose(first, others, rtol=0.1)
    assert all(0 < float(asking.answer.sum()) < 1 for asking in methods), "what is left to 1 goes to other tokens"


def asked_by(ids: list[int], spans: list[Span]) -> tuple[torch.Tensor, int]:
    """What the question of a prompt looks at in all layers, and how many token-layers finding that out took."""
    _, model = tiny("llama")
    store = Store(model, [])
    layout = lay_out(len(ids), 0, store.space.place(ids, spans))
    method, entries = Asking(range(NUM_LAYERS)), store.entries(ids, layout)
    made = finish(blend(model, ids, layout, EntrySource(entries), method, FixedRatio(0.5)))
    return method.answer, made.num_token_layers - NUM_LAYERS * len(layout.fresh)


def looked_at(ids: list[int], spans: list[Span], num_asking: int) -> torch.Tensor:
    """What the last tokens look at in the second chunk, where there is nothing but the chunks and these: computed by hand."""
    _, model = tiny("llama")
    kv = blend_prompt("llama", Prompt(ids, spans, 0, 0), "none", 0.0)[0].kv
    there = [place for span in spans for place in range(span.start, span.end)]
    positions = torch.arange(len(ids) - num_asking, len(ids))
    hidden, total = model.embed(torch.tensor(ids)[positions]), torch.zeros(len(there))
    unseen = torch.cat((torch.zeros(num_asking, len(there)), torch.full((num_asking, num_asking), -torch.inf).triu(1)), 1)
    with torch.no_grad():
        for layer in range(NUM_LAYERS):
            projected = model.project(layer, hidden, positions)
            keys, values = (
                torch.cat((old[layer][:, there], new), 1).repeat_interleave(2, 0)
                for old, new in ((kv.keys, projected.keys), (kv.values, projected.values))
            )
            weights = (projected.queries @ keys.mT * model.scale + unseen).softmax(-1)
            total += weights.mean((0, 1))[: len(there)] / NUM_LAYERS
            hidden = model.finish(layer, hidden, (weights @ values).transpose(0, 1).flatten(1))
    return total[spans[0].end - spans[0].start :]


def test_of_many_tokens_only_the_last_ones_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are not computed for it, and it is as if they were not there."""
    monkeypatch.setattr(blender, "MOST_ASKING", 8)
    spans = [Span(0, 40), Span(50, 90)]
    ids = [*tokens(2, 40), *tokens(9, 10), *tokens(3, 40), *tokens(77, 30)]
    expected, num_token_layers = asked_by(ids, spans)
    assert 8 * NUM_LAYERS == num_token_layers
    different = []
    for place in (45, *range(90, 120)):
        changed, _ = asked_by([*ids[:place], (ids[place] + 1) % SIZES["vocab_size"], *ids[place + 1 :]], spans)
        different += [] if torch.equal(expected, changed) else [place]
    assert [*range(112, 120)] == different
    torch.testing.assert_close(expected, looked_at(ids, spans, 8))
    monkeypatch.setattr(blender, "MOST_ASKING", 40)
    every, num_token_layers = asked_by(ids, spans)
    assert 40 * NUM_LAYERS == num_token_layers
    assert not torch.allclose(expected, every, rtol=0.01)


@pytest.mark.parametrize("method", ["combined", "prophetkv"])
@settings(max_examples=12)
@given(prompt=prompts(), most=st.integers(1, 4))
def test_whoever_asks_all_tokens_are_full_prefill(method: str, prompt: Prompt, most: int) -> None:
    """Ratio 1 again, where most of the question does not ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blender, "MOST_ASKING", most)
        blended, layout, _ = blend_prompt("llama", prompt, method, 1.0)
        fewer, _, _ = blend_prompt("llama", prompt, method, 0.4)
    assert len(layout.candidates) == blended.num_chosen
    torch.testing.assert_close(blended.logits, models_own("llama", prompt.token_ids)[0], rtol=0, atol=TOLERANCE)
    assert math.ceil(0.4 * len(layout.candidates) - 1e-9) == fewer.num_chosen


def test_a_last_token_that_a_chunk_has_is_computed_to_the_end() -> None:
    """Its logits are wanted, so no layer of it is left out, whether it was chosen or not."""
    ids = [*tokens(2, 40), *tokens(3, 40)]
    prompt = Prompt(ids, [Span(0, 40), Span(40, 80)], 0, 0)
    for method, ratio, heads in (("combined", 0.0, []), ("epic", 0.1, [0, 1, 2, 3])):
        blended, layout, store = blend_prompt("llama", prompt, method, ratio)
        kept = store.entries(ids, layout)[1].kv
        assert [*heads, 39] == (blended.kv.values[2][:, 40:80] != kept.values[2]).any(2).any(0).nonzero()[:, 0].tolist()


def test_more_tokens_come_nearer() -> None:
    """For every method that computes any the KV of a prompt of four chunks is nearer to full prefill's with most tokens than with few."""
    ids = [token for number in (2, 3, 4, 5) for token in tokens(number, 30)] + tokens(77, 6)
    prompt = Prompt(ids, [Span(30 * number, 30 * number + 30) for number in range(4)], 0, 0)
    _, model = tiny("llama")
    full, _ = full_prefill(model, torch.tensor(ids))
    for method in METHODS.keys() - {"none"}:
        distances = [
            (blend_prompt("llama", prompt, method, ratio)[0].kv.values - full.values).square().sum().item() for ratio in (0.05, 0.9)
        ]
        assert distances[0] > distances[1] > 0, method


def test_answers_go_on_behind_a_blended_prompt() -> None:
    """Tokens computed behind a prompt of ratio 1 have the logits that the model gives them."""
    ids = tokens(3, 50)
    prompt = Prompt(ids, [Span(4, 20), Span(20, 41)], 0, 0)
    blended, _, _ = blend_prompt("qwen3", prompt, "epic", 1.0)
    more = tokens(8, 6)
    kv, logits = extend(tiny("qwen3")[1], blended.kv, more)
    assert 56 == kv.num_tokens
    torch.testing.assert_close(logits[-1], models_own("qwen3", ids + more)[0], rtol=0, atol=TOLERANCE)


def test_entries_taken_from_a_prompt_fit_it_again() -> None:
    """Captured in full prefill and put back in the same order, chunks need nothing computed, and know what they looked at."""
    _, model = tiny("llama")
    ids = tokens(1, 6) + tokens(2, 40) + tokens(3, 40) + tokens(77, 5)
    store = Store(model, ids[:6])
    layout = lay_out(len(ids), 0, store.space.place(ids, [Span(6, 46), Span(46, 86)]))
    entries = capture_entries(model, ids, layout)
    blended = finish(blend(model, ids, layout, EntrySource(entries), FullReuse(), FixedRatio(0.0)))
    torch.testing.assert_close(blended.logits, models_own("llama", ids)[0], rtol=0, atol=TOLERANCE)
    first, second = (entry.context for entry in entries)
    assert () == first.chunk_keys
    assert (layout.placements[0].chunk.key,) == second.chunk_keys
    assert second.chunk_mass[0] > 1
    for entry, plain in zip(entries, capture_entries(model, ids, layout, with_context=False), strict=True):
        assert NO_CONTEXT is plain.context
        assert torch.equal(entry.kv.keys, plain.kv.keys)
        assert torch.equal(entry.kv.values, plain.kv.values)
    # what is missing to 1 for each token is its attention to the anchor
    assert 40 > second.chunk_mass[0] + second.own_mass > 20
    torch.testing.assert_close(second.token_mass.sum().item(), second.chunk_mass[0], rtol=1e-4, atol=0)


def test_an_entry_from_behind_other_chunks_is_nowhere_exact() -> None:
    """Directly behind its anchor, too, it is computed anew where the ratio says so."""
    _, model = tiny("llama")
    anchor, first, second = tokens(1, 6), tokens(2, 20), tokens(3, 20)
    store = Store(model, anchor)
    served = [*anchor, *first, *second, 5]
    entry = capture_entries(model, served, lay_out(47, 0, store.space.place(served, [Span(6, 26), Span(26, 46)])))[1]
    ids = [*anchor, *second, 5]
    layout = lay_out(27, 0, store.space.place(ids, [Span(6, 26)]))
    assert layout.placements[0].is_exact
    blended = finish(blend(model, ids, layout, EntrySource([entry]), FullReuse(), FixedRatio(1.0)))
    assert 20 == blended.num_chosen
    torch.testing.assert_close(blended.logits, models_own("llama", ids)[0], rtol=0, atol=TOLERANCE)


def test_an_entry_of_another_chunk_is_refused() -> None:
    """KV of other tokens never gets into a prompt."""
    _, model = tiny("llama")
    store = Store(model, [])
    ids = tokens(2, 40)
    layout = lay_out(40, 0, store.space.place(ids, [Span(3, 20)]))
    others = store.entries(ids, lay_out(40, 0, store.space.place(ids, [Span(4, 21)])))
    with pytest.raises(BlendRefusedError, match="the KV of chunk") as caught:
        finish(blend(model, ids, layout, EntrySource(others), FullReuse(), FixedRatio(0.0)))
    assert RefusalReason.TOKENS_DIFFER == caught.value.reason


def refused(model: Any) -> str:
    with pytest.raises(BlendRefusedError) as caught:
        TransformersModel(model)
    assert RefusalReason.MODEL == caught.value.reason
    return str(caught.value)


def test_models_whose_kv_cannot_be_moved_are_refused_by_name() -> None:
    """Learned positions, sliding windows, frequencies that follow the length."""
    assert "'gpt2': its positions are learned" in refused(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
    assert "sliding window of 16 tokens" in refused(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    assert "rope_type 'dynamic'" in refused(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dynamic)))

    class Other:
        config = Gemma2Config()

    assert "'gemma2': some of its layers keep a sliding window" in refused(Other())


def test_frequencies_that_are_not_the_models_are_refused() -> None:
    """A model whose buffer says something else than its configuration is not believed."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.rotary_emb.inv_freq *= 1.01
    assert "turns by other frequencies" in refused(model)


@functools.cache
def trained() -> Any:
    """SmolLM2 in fp32."""
    return AutoModelForCausalLM.from_pretrained(os.environ["KVTIER_TEST_MODEL"], dtype=torch.float32).eval()


@pytest.mark.skipif(not Path(os.environ.get("KVTIER_TEST_MODEL", "none")).is_dir(), reason="needs the model (KVTIER_TEST_MODEL)")
@pytest.mark.parametrize("method", METHODS)
def test_all_tokens_are_full_prefill_in_smollm2(method: str) -> None:
    """The same for a trained model: logits within rounding, the same next token, two chunks in another order than they were computed."""
    loaded = trained()
    model = TransformersModel(loaded)
    ids = [1 + (number * number * 17 + 5 * number) % 40_000 for number in range(150)]
    store = Store(model, ids[:16])
    layout = lay_out(len(ids), 0, store.space.place(ids, [Span(16, 60), Span(60, 90), Span(95, 140)]))
    blended = finish(blend(model, ids, layout, EntrySource(store.entries(ids, layout)), METHODS[method](), FixedRatio(1.0)))
    with torch.no_grad():
        expected = loaded(input_ids=torch.tensor([ids])).logits[0, -1].float()
    torch.testing.assert_close(blended.logits, expected, rtol=0, atol=2e-3)
    assert blended.logits is not None
    assert expected.argmax() == blended.logits.argmax()
