"""Blends one prompt: puts the chunks' KV in place, finds out what the method asks, computes what it chose.

The reference implementation: one prompt at a time, on the device where the model is, any model that implements ``BlendModel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvtier.blend.entries import Context, empty_kv
from kvtier.blend.layout import PromptLayout
from kvtier.blend.mean_shift import MeanShift
from kvtier.blend.methods.base import Asks, Evidence, Selection, SelectionMethod
from kvtier.blend.model import BlendModel, LayerKV, Projected, TokenKV
from kvtier.blend.placing import ChunkSource, PromptKV
from kvtier.blend.prefill import LayerHook, Rows, advance, attention_mask, mean_attention, project, start
from kvtier.blend.ratio import FixedRatio
from kvtier.blend.steps import Steps, finish

MOST_ASKING = 64
"""tokens that nobody has are computed to find out what the question looks at, the last ones"""


@dataclass(frozen=True)
class Outcome:
    """What came of blending a prompt."""

    logits: torch.Tensor | None
    """behind the prompt's last token: ``[vocabulary]``, fp32; ``None`` where nobody needs them"""
    num_chosen: int
    """tokens of chunks that were computed anew"""
    num_token_layers: int
    """layers computed, summed over tokens, what the method asked for included; full prefill: tokens x layers"""


@dataclass(frozen=True)
class Blended(Outcome):
    """A prompt that is ready to be answered."""

    kv: TokenKV
    """of the whole prompt; depends on all of it, so it must never be kept under a prefix's keys"""


class _WholeKV:
    """All of a prompt's KV as tensors, as :class:`~kvtier.blend.placing.KVMemory` says."""

    def __init__(self, model: BlendModel, num_tokens: int, prefix: TokenKV | None, device: torch.device) -> None:
        first = torch.zeros(1, dtype=torch.long, device=device)
        self.kv = empty_kv(model, num_tokens, model.project(0, model.embed(first), first).keys)
        self.num_tokens = num_tokens
        self.row_shape = (self.kv.keys.shape[0], self.kv.keys.shape[1], self.kv.keys.shape[3])
        self.dtype = self.kv.keys.dtype
        if prefix is not None:
            self.kv.keys[:, :, : prefix.num_tokens] = prefix.keys
            self.kv.values[:, :, : prefix.num_tokens] = prefix.values

    def read(self, layer: int, num_tokens: int) -> LayerKV:
        return LayerKV(self.kv.keys[layer][:, :num_tokens], self.kv.values[layer][:, :num_tokens])

    def write(self, layer: int, kv: LayerKV) -> None:
        self.kv.keys[layer], self.kv.values[layer] = kv


@torch.no_grad()
def blend(  # noqa: PLR0913 - by keyword
    model: BlendModel,
    token_ids: Sequence[int],
    layout: PromptLayout,
    source: ChunkSource,
    method: SelectionMethod,
    ratio: FixedRatio,
    *,
    prefix: TokenKV | None = None,
    end: int | None = None,
    needs_logits: bool = True,
) -> Steps[Blended]:
    """:func:`blend_into` memory of its own.

    Args:
        source: the KV of the layout's chunks
        prefix: the KV of the layout's prefix

    Raises:
        BlendRefusedError: the source has another chunk than the layout puts there.
        ValueError: prompt, layout, source and prefix differ in length.
    """
    num_prefix = 0 if prefix is None else prefix.num_tokens
    if num_prefix != layout.num_prefix_tokens:
        raise ValueError(f"a prefix of {num_prefix} tokens, of the layout {layout.num_prefix_tokens}")
    memory = _WholeKV(model, layout.num_tokens, prefix, model.device)
    kv = PromptKV(memory, layout, source, model)
    made = yield from blend_into(kv, model, token_ids, method, ratio, end=end, needs_logits=needs_logits)
    kv.finish()
    return Blended(**vars(made), kv=memory.kv)


@torch.no_grad()
def blend_into(
    kv: PromptKV,
    model: BlendModel,
    token_ids: Sequence[int],
    method: SelectionMethod,
    ratio: FixedRatio,
    *,
    end: int | None = None,
    needs_logits: bool = True,
) -> Steps[Outcome]:
    """Blends a prompt, in steps; :func:`kvtier.blend.steps.finish` does all of them.

    Args:
        kv: the prompt's, with its layout and chunks; still to be finished
        end: the position from which on somebody else computes the prompt: there is no KV of use from there on
        needs_logits: whether the rest behind ``end`` is computed nevertheless, all of it, for the logits

    Raises:
        ValueError: prompt and layout differ in length.
    """
    if len(token_ids) != kv.layout.num_tokens:
        raise ValueError(f"a prompt of {len(token_ids)} tokens, of the layout {kv.layout.num_tokens}")
    layout = _without_foreign_context(kv.layout, kv.contexts)
    end = layout.num_tokens if end is None else end
    reach = layout.num_tokens if needs_logits else end
    prompt = _Prompt(model, torch.as_tensor(token_ids, device=model.device), layout, kv, range(end, reach))
    if len(prompt.candidates):
        evidence = yield from prompt.found_out(method.asks(model.num_layers), Evidence(layout, kv.contexts))
        selection = method.select(evidence, ratio)
    else:
        selection = Selection(prompt.candidates.bool())
    chosen = torch.zeros(layout.num_tokens, dtype=torch.bool, device=model.device)
    chosen[prompt.candidates[selection.chosen.to(model.device)]] = True
    chosen[end:] = False
    rows = yield from prompt.compute(chosen, selection, kv_only=not needs_logits)
    kv.fill()
    logits = model.logits(rows.hidden[-1:])[0] if needs_logits else None
    return Outcome(logits, int(chosen.sum()), prompt.num_token_layers)


def margin(logits: torch.Tensor) -> float:
    """How sure a model is of its next token: by how much the likeliest one's probability exceeds that of the next.

    The measure of Schuster et al., "Confident Adaptive Language Modeling", NeurIPS 2022.

    ``logits``: ``[vocabulary]``. NaN where one of them is.
    """
    first, second = logits.softmax(-1).topk(2).values.tolist()
    return float(first - second)


@torch.no_grad()
def extend(model: BlendModel, kv: TokenKV, token_ids: Sequence[int]) -> tuple[TokenKV, torch.Tensor]:
    """Computes more tokens behind a prompt: its KV with theirs, and the logits behind each of them."""
    first = kv.num_tokens
    device = model.device
    longer = empty_kv(model, first + len(token_ids), kv.keys[0])
    longer.keys[:, :, :first] = kv.keys
    longer.values[:, :, :first] = kv.values
    rows = Rows(torch.arange(first, longer.num_tokens, device=device), model.embed(torch.as_tensor(token_ids, device=device)))
    finish(advance(model, rows, longer, torch.ones(longer.num_tokens, dtype=torch.bool, device=device)))
    return longer, model.logits(rows.hidden)


class _Prompt:
    """One prompt's state while it is blended."""

    def __init__(self, model: BlendModel, token_ids: torch.Tensor, layout: PromptLayout, kv: PromptKV, rest: range) -> None:
        """``rest``: what is computed only for what comes out of it; behind it nothing is."""
        self.layout = layout
        self.num_token_layers = 0
        self._model = model
        self._tokens = token_ids
        self._kv = kv
        device = token_ids.device
        self.candidates = torch.tensor(layout.candidates, dtype=torch.long, device=device)
        self._fresh = torch.zeros(layout.num_tokens, dtype=torch.bool, device=device)
        self._fresh[torch.tensor(layout.fresh, dtype=torch.long, device=device)] = True
        self._writable = self._fresh.clone()
        self._writable[self.candidates] = True
        self._fresh[-1] = True
        """computed in any case: the last one for its logits, even where its KV is known"""
        self._wanted = torch.ones(layout.num_tokens, dtype=torch.bool, device=device)
        self._wanted[rest.stop :] = False
        self._fresh[rest.start : rest.stop] = True
        self._begun: Rows | None = None

    def _advance(self, rows: Rows, end_layer: int | None = None, hook: LayerHook | None = None, *, kv_only: bool = False) -> Steps[None]:
        end = self._model.num_layers if end_layer is None else end_layer
        self.num_token_layers += len(rows.positions) * (end - rows.next_layer)
        return advance(self._model, rows, self._kv, self._writable, end_layer=end, hook=hook, kv_only=kv_only)

    def compute(self, chosen: torch.Tensor, selection: Selection, *, kv_only: bool) -> Steps[Rows]:
        """Computes what was chosen, and all that nobody has. The rows that were computed."""
        rows = self._rows_of(chosen)
        if not len(rows.positions):
            return rows
        shift = MeanShift(self.layout, rows.positions, chosen, selection.shift_weight) if selection.shift_weight else None
        yield from self._advance(rows, hook=shift, kv_only=kv_only)
        return rows

    def _rows_of(self, chosen: torch.Tensor) -> Rows:
        """The rows of what was chosen and all that nobody has, from the layer on that was reached for all."""
        wanted = (chosen | self._fresh) & self._wanted
        if self._begun is not None:
            return self._begun.narrow(wanted)
        return start(self._model, self._tokens, wanted.nonzero()[:, 0])

    def found_out(self, asks: Asks, evidence: Evidence) -> Steps[Evidence]:
        """The evidence with what a method asks."""
        if asks.attention_layers:
            attention = yield from self._question_attention(asks.attention_layers)
            evidence = replace(evidence, question_attention=attention)
        if asks.deviation_layer is not None:
            deviation = yield from self._value_deviation(asks.deviation_layer)
            evidence = replace(evidence, value_deviation=deviation)
        return evidence

    def _value_deviation(self, layer: int) -> Steps[torch.Tensor]:
        known = self._fresh & self._wanted
        known[self.candidates] = True
        self._begun = start(self._model, self._tokens, known.nonzero()[:, 0])
        yield from self._advance(self._begun, end_layer=layer)
        is_candidate = torch.isin(self._begun.positions, self.candidates)
        values = project(self._model, layer, self._begun.hidden[is_candidate], self._begun.positions[is_candidate]).values
        with self._kv.opened(layer) as kv:
            difference = (values - kv.values[:, self.candidates]).float()
        return self._model.mean_over_ranks(difference.square().sum((0, 2)))

    def _question_attention(self, layers: range) -> Steps[torch.Tensor]:
        """Of many tokens that nobody has only the last ones ask, as if the others were not there: they are computed once more for it."""
        model, layout = self._model, self.layout
        fresh = self._fresh.nonzero()[:, 0]
        num_absent = max(0, len(fresh) - MOST_ASKING)
        rows = start(model, self._tokens, fresh[num_absent:])
        asks = rows.positions >= layout.question[0]
        mask = attention_mask(rows.positions[asks], layout.num_tokens)
        if num_absent:
            rows.absent = torch.zeros(layout.num_tokens, dtype=torch.bool, device=fresh.device)
            rows.absent[fresh[:num_absent]] = True
            mask &= ~rows.absent
        total = torch.zeros(layout.num_tokens, device=self._tokens.device)

        def look(layer: int, projected: Projected, kv: LayerKV) -> None:
            if layer not in layers:
                return
            keys = kv.keys.clone()
            keys[:, rows.positions] = projected.keys
            total.add_(mean_attention(projected.queries[:, asks], keys, mask, model.scale) / len(layers))

        yield from self._advance(rows, layers.stop, look, kv_only=True)
        return model.mean_over_ranks(total[self.candidates])


def _without_foreign_context(layout: PromptLayout, contexts: Sequence[Context]) -> PromptLayout:
    """A chunk whose KV was computed behind other chunks is nowhere exact, also not directly behind its anchor."""
    pairs = zip(layout.placements, contexts, strict=True)
    placements = tuple(replace(at, is_exact=at.is_exact and not context.chunk_keys) for at, context in pairs)
    return replace(layout, placements=placements)
