"""Blends one prompt: puts the chunks' KV in place, finds out what the method asks, computes what it chose.

The reference implementation: one prompt at a time, on the device where the model is, any model that implements ``BlendModel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvtier.blend.entries import empty_kv
from kvtier.blend.layout import PromptLayout
from kvtier.blend.mean_shift import MeanShift
from kvtier.blend.methods.base import Asks, Evidence, Selection, SelectionMethod
from kvtier.blend.model import BlendModel, Projected, TokenKV
from kvtier.blend.placing import ChunkSource, PromptKV
from kvtier.blend.prefill import LayerHook, Rows, advance, attention_mask, mean_attention, start
from kvtier.blend.ratio import FixedRatio
from kvtier.blend.steps import Steps, finish
from kvtier.errors import BlendRefusedError, RefusalReason

MOST_ASKING = 64
"""tokens that nobody has are computed to find out what the question looks at, the last ones"""


@dataclass(frozen=True)
class Blended:
    """A prompt that is ready to be answered."""

    kv: TokenKV
    """of the whole prompt; depends on all of it, so it must never be kept under a prefix's keys"""
    logits: torch.Tensor | None
    """behind the prompt's last token: ``[vocabulary]``, fp32; ``None`` where nobody needs them"""
    num_chosen: int
    """tokens of chunks that were computed anew"""
    num_token_layers: int
    """layers computed, summed over tokens, what the method asked for included; full prefill: tokens x layers"""


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
    """Blends a prompt, in steps; :func:`kvtier.blend.steps.finish` does all of them.

    Args:
        source: the KV of the layout's chunks
        prefix: the KV of the layout's prefix
        end: the position from which on somebody else computes the prompt: there is no KV of use from there on
        needs_logits: whether the rest behind ``end`` is computed nevertheless, all of it, for the logits

    Raises:
        BlendRefusedError: the source has another chunk than the layout puts there.
        ValueError: prompt, layout, source and prefix differ in length.
    """
    _check(token_ids, layout, source, prefix)
    layout = _without_foreign_context(layout, source)
    end = layout.num_tokens if end is None else end
    reach = layout.num_tokens if needs_logits else end
    prompt = _Prompt(model, torch.as_tensor(token_ids, device=model.device), layout, source, prefix, range(end, reach))
    if len(prompt.candidates):
        evidence = yield from prompt.found_out(method.asks(model.num_layers))
        selection = method.select(evidence, ratio)
    else:
        selection = Selection(prompt.candidates.bool())
    chosen = torch.zeros(layout.num_tokens, dtype=torch.bool, device=model.device)
    chosen[prompt.candidates[selection.chosen.to(model.device)]] = True
    chosen[end:] = False
    rows = yield from prompt.compute(chosen, selection, kv_only=not needs_logits)
    prompt.fill(model.num_layers - 1)
    logits = model.logits(rows.hidden[-1:])[0] if needs_logits else None
    return Blended(prompt.kv, logits, int(chosen.sum()), prompt.num_token_layers)


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

    def __init__(
        self,
        model: BlendModel,
        token_ids: torch.Tensor,
        layout: PromptLayout,
        source: ChunkSource,
        prefix: TokenKV | None,
        rest: range,
    ) -> None:
        """``rest``: what is computed only for what comes out of it; behind it nothing is."""
        self.layout = layout
        self.num_token_layers = 0
        self._model = model
        self._tokens = token_ids
        self._source = source
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
        first = model.project(0, model.embed(token_ids[:1]), torch.zeros(1, dtype=torch.long, device=device))
        self.kv = empty_kv(model, layout.num_tokens, first.keys)
        if prefix is not None:
            self.kv.keys[:, :, : prefix.num_tokens] = prefix.keys
            self.kv.values[:, :, : prefix.num_tokens] = prefix.values
        self.fill = PromptKV(self.kv, layout, source, model.rotary).fill
        self._begun: Rows | None = None

    def _advance(self, rows: Rows, end_layer: int | None = None, hook: LayerHook | None = None, *, kv_only: bool = False) -> Steps[None]:
        end = self._model.num_layers if end_layer is None else end_layer
        self.num_token_layers += len(rows.positions) * (end - rows.next_layer)
        return advance(self._model, rows, self.kv, self._writable, end_layer=end, hook=self._filling(hook), kv_only=kv_only)

    def _filling(self, hook: LayerHook | None) -> LayerHook:
        """A hook that puts the chunks in place in a layer before ``hook`` sees it; the rows' projections need none of them."""

        def fill(layer: int, projected: Projected) -> None:
            self.fill(layer)
            if hook is not None:
                hook(layer, projected)

        return fill

    def compute(self, chosen: torch.Tensor, selection: Selection, *, kv_only: bool) -> Steps[Rows]:
        """Computes what was chosen, and all that nobody has. The rows that were computed."""
        rows = self._rows_of(chosen)
        if not len(rows.positions):
            return rows
        hook = None
        if selection.shift_weight:
            hook = MeanShift(self.kv, self.layout, rows.positions, chosen, selection.shift_weight)
        yield from self._advance(rows, hook=hook, kv_only=kv_only)
        return rows

    def _rows_of(self, chosen: torch.Tensor) -> Rows:
        """The rows of what was chosen and all that nobody has, from the layer on that was reached for all."""
        wanted = (chosen | self._fresh) & self._wanted
        if self._begun is not None:
            return self._begun.narrow(wanted)
        return start(self._model, self._tokens, wanted.nonzero()[:, 0])

    def found_out(self, asks: Asks) -> Steps[Evidence]:
        """What a method asks."""
        evidence = Evidence(self.layout, self._source.contexts)
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
        self.fill(layer)
        is_candidate = torch.isin(self._begun.positions, self.candidates)
        projected = self._model.project(layer, self._begun.hidden[is_candidate], self._begun.positions[is_candidate])
        difference = (projected.values - self.kv.values[layer][:, self.candidates]).float()
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

        def look(layer: int, projected: Projected) -> None:
            if layer not in layers:
                return
            keys = self.kv.keys[layer].clone()
            keys[:, rows.positions] = projected.keys
            total.add_(mean_attention(projected.queries[:, asks], keys, mask, model.scale) / len(layers))

        yield from self._advance(rows, layers.stop, look, kv_only=True)
        return model.mean_over_ranks(total[self.candidates])


def _without_foreign_context(layout: PromptLayout, source: ChunkSource) -> PromptLayout:
    """A chunk whose KV was computed behind other chunks is nowhere exact, also not directly behind its anchor."""
    pairs = zip(layout.placements, source.contexts, strict=True)
    placements = tuple(replace(at, is_exact=at.is_exact and not context.chunk_keys) for at, context in pairs)
    return replace(layout, placements=placements)


def _check(token_ids: Sequence[int], layout: PromptLayout, source: ChunkSource, prefix: TokenKV | None) -> None:
    num_prefix = 0 if prefix is None else prefix.num_tokens
    given = (len(token_ids), len(source.chunks), num_prefix)
    wanted = (layout.num_tokens, len(layout.placements), layout.num_prefix_tokens)
    if given != wanted:
        raise ValueError(f"tokens, chunks and prefix tokens are {given}, of the layout {wanted}")
    for placement, chunk in zip(layout.placements, source.chunks, strict=True):
        if chunk != placement.chunk:
            text = f"the KV of chunk {chunk.key.hex()} for token {placement.start}, where chunk {placement.chunk.key.hex()} lies"
            raise BlendRefusedError(RefusalReason.TOKENS_DIFFER, text)
