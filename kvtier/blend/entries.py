"""A chunk's KV as it is kept: computed behind its anchor, or taken from a longer prompt together with what it looked at there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtier.blend.chunks import Chunk
from kvtier.blend.layout import PromptLayout
from kvtier.blend.model import BlendModel, LayerKV, Projected, TokenKV
from kvtier.blend.prefill import KVLayers, Rows, advance, attention_mask, attention_weights, start
from kvtier.blend.steps import Steps, finish
from kvtier.types import BlockKey


@dataclass(frozen=True)
class Context:
    """Which chunks lay before a chunk when its KV was computed, and how much it looked at them. Mean over layers and heads."""

    chunk_keys: tuple[BlockKey, ...]
    """in their order"""
    chunk_mass: tuple[float, ...]
    """attention of all tokens of this chunk to each of them, summed over tokens"""
    own_mass: float
    """attention to the chunk itself, summed over tokens"""
    token_mass: torch.Tensor
    """of each token of the chunk: attention to all earlier chunks"""


NO_CONTEXT = Context((), (), 1.0, torch.zeros(0))


@dataclass(frozen=True)
class ChunkEntry:
    """A chunk's KV. Keys are rotated for positions from the anchor's end on, wherever it was computed."""

    chunk: Chunk
    kv: TokenKV
    context: Context = NO_CONTEXT


def empty_kv(model: BlendModel, num_tokens: int, like: torch.Tensor) -> TokenKV:
    """Zeroed KV for so many tokens, of the type, the place and the heads of one layer's keys ``[num_kv_heads, ..., head_dim]``."""
    shape = (model.num_layers, like.shape[0], num_tokens, like.shape[-1])
    return TokenKV(like.new_zeros(shape), like.new_zeros(shape))


def full_prefill(model: BlendModel, token_ids: torch.Tensor, prefix: TokenKV | None = None) -> tuple[TokenKV, Rows]:
    """KV of all tokens, and the rows behind the last layer. ``prefix``: KV of the first tokens, which are not computed again."""
    return finish(prefill_steps(model, token_ids, prefix))


@torch.no_grad()
def prefill_steps(model: BlendModel, token_ids: torch.Tensor, prefix: TokenKV | None = None) -> Steps[tuple[TokenKV, Rows]]:
    """As :func:`full_prefill`, in steps."""
    first = 0 if prefix is None else prefix.num_tokens
    rows = start(model, token_ids, torch.arange(first, len(token_ids), device=token_ids.device))
    like = model.project(0, rows.hidden[:1], rows.positions[:1]).keys
    kv = empty_kv(model, len(token_ids), like)
    if prefix is not None:
        kv.keys[:, :, :first] = prefix.keys
        kv.values[:, :, :first] = prefix.values
    yield from _advance_all(model, rows, kv)
    return kv, rows


@torch.no_grad()
def layer_steps(model: BlendModel, token_ids: torch.Tensor, kv: KVLayers, first: int) -> Steps[None]:
    """Computes the KV of all tokens from ``first`` on, in steps. ``kv`` has that of those before it, and may let go of a layer behind it.

    Nobody needs what comes out of the last layer.
    """
    rows = start(model, token_ids, torch.arange(first, len(token_ids), device=token_ids.device))
    yield from _advance_all(model, rows, kv, kv_only=True)


def _advance_all(model: BlendModel, rows: Rows, kv: KVLayers, *, kv_only: bool = False) -> Steps[None]:
    """All rows in all layers; their KV is written."""
    end = int(rows.positions[-1]) + 1 if len(rows.positions) else 0
    yield from advance(model, rows, kv, torch.ones(end, dtype=torch.bool, device=rows.positions.device), kv_only=kv_only)


@torch.no_grad()
def compute_entry(model: BlendModel, chunk: Chunk, token_ids: torch.Tensor, anchor_kv: TokenKV | None) -> ChunkEntry:
    """The entry of a chunk computed behind its anchor, whose KV is given. ``token_ids``: the chunk's.

    Raises:
        ValueError: the lengths are not those of the chunk and its anchor.
    """
    num_anchor = 0 if anchor_kv is None else anchor_kv.num_tokens
    if (num_anchor, len(token_ids)) != (chunk.anchor.num_tokens, chunk.num_tokens):
        text = f"{num_anchor} tokens of anchor and {len(token_ids)} of chunk, not {chunk.anchor.num_tokens} and {chunk.num_tokens}"
        raise ValueError(text)
    padded = torch.cat((token_ids.new_zeros(num_anchor), token_ids))
    kv, _ = full_prefill(model, padded, anchor_kv)
    return ChunkEntry(chunk, kv.part(num_anchor, len(padded)).clone())


@torch.no_grad()
def capture_entries(model: BlendModel, token_ids: Sequence[int], layout: PromptLayout, *, with_context: bool = True) -> list[ChunkEntry]:
    """The chunks of a prompt as full prefill computes them there, with what each looked at. For Cache-Craft.

    Keys are moved to where the anchor ends, so such an entry is used like any other. Without ``with_context`` nobody remembers what was
    looked at, which takes less time.
    """
    tokens = torch.as_tensor(token_ids, device=model.device)
    positions = torch.arange(len(tokens), device=model.device)
    rows = start(model, tokens, positions)
    kv = empty_kv(model, len(tokens), model.project(0, rows.hidden[:1], positions[:1]).keys)
    looked = _Looked(model, layout) if with_context else None
    finish(advance(model, rows, kv, torch.ones(len(tokens), dtype=torch.bool, device=model.device), hook=looked))
    entries = []
    for index, placement in enumerate(layout.placements):
        part = kv.part(placement.start, placement.end).clone()
        context = NO_CONTEXT if looked is None else looked.context(index)
        entries.append(ChunkEntry(placement.chunk, TokenKV(model.rotary.move(part.keys, -placement.shift), part.values), context))
    return entries


class _Looked:
    """What the chunks of a prompt look at while it is computed. A hook of :func:`kvtier.blend.prefill.advance`."""

    def __init__(self, model: BlendModel, layout: PromptLayout) -> None:
        self._model = model
        self._placements = layout.placements
        self._mask = attention_mask(torch.arange(layout.num_tokens, device=model.device), layout.num_tokens)
        self._total = torch.zeros(layout.num_tokens, len(layout.placements), device=model.device)

    def __call__(self, _: int, projected: Projected, _kv: LayerKV) -> None:
        """Before the layer's KV is written."""
        weights = attention_weights(projected.queries, projected.keys, self._mask, self._model.scale)
        for index, placement in enumerate(self._placements):
            self._total[:, index] += weights[:, placement.start : placement.end].sum(1) / self._model.num_layers

    def context(self, index: int) -> Context:
        """Of one of the chunks."""
        mass = self._total[self._placements[index].start : self._placements[index].end]
        keys = tuple(earlier.chunk.key for earlier in self._placements[:index])
        return Context(keys, tuple(mass[:, :index].sum(0).tolist()), float(mass[:, index].sum()), mass[:, :index].sum(1).cpu())
