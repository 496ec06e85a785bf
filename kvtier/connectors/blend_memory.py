"""Memory of a blend on a worker: the engine's blocks, where a prompt's KV is kept layer by layer, and what it takes beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvtier.blend.blender import MOST_ASKING
from kvtier.blend.layout import PromptLayout
from kvtier.blend.methods.base import Asks
from kvtier.blend.model import BlendModel, LayerKV, TokenKV
from kvtier.blend.prefill import GROUP_ROWS_ELSEWHERE, MOST_MASKED, MOST_WEIGHTS
from kvtier.blend.ratio import FixedRatio
from kvtier.connectors.chunk_rows import LAYERS_AHEAD, RowShape
from kvtier.connectors.chunk_writing import PART_BYTES, kept_layers

KEPT_BYTES = 256 << 20
"""of a prompt's KV that a blend keeps beside the engine's blocks"""
LAYERS_AT_ONCE = 4
"""copies of a layer of the prompt: the one that is worked on, what it is read from, and what is computed of its keys or values"""
COPIES_IN_ORDER = 3
"""of a part of a chunk, while it is put in the order of slots"""
ROWS_AT_ONCE = 6
"""hidden states, queries, keys and values, and what is attended to in parts, joined, and turned around"""
WEIGHT_BYTES = 3 * 4
"""of each weight of attention that is looked at"""


class TokenBlocks(Protocol):
    """The engine's KV memory by tokens. ``block_ids`` of a request: int64, where the model computes."""

    dtype: torch.dtype
    block_tokens: int

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """``(layers, KV heads, head_dim)``"""

    def read(self, layer: int, first: int, end: int, block_ids: torch.Tensor) -> LayerKV:
        """The KV of a request's tokens ``[first, end)`` in one layer, in memory of its own."""
        ...

    def write(self, layer: int, kv: LayerKV, first: int, block_ids: torch.Tensor) -> None:
        """Writes the KV of a prompt's tokens from ``first`` on into its blocks."""
        ...


class RequestMemory:
    """The blocks of one request, as :class:`~kvtier.blend.placing.KVMemory` says.

    Tokens before ``first`` are its prefix, whose blocks others may read, and somebody may be computing: there is KV of the first
    ``num_there`` of them. That of those in between is kept here where it is written, and not in the blocks.
    """

    def __init__(
        self, tokens: TokenBlocks, block_ids: Sequence[int], first: int, end: int, device: torch.device, num_there: int | None = None
    ) -> None:
        self.num_tokens = end
        self.row_shape = tokens.row_shape
        self.dtype = tokens.dtype
        self._tokens = tokens
        self._first = first
        self._num_there = first if num_there is None else num_there
        self._between: dict[int, LayerKV] = {}
        self._block_ids = torch.as_tensor(block_ids, dtype=torch.long, device=device)

    def read(self, layer: int, num_tokens: int) -> LayerKV:
        """As ``KVMemory`` says."""
        kv = self._tokens.read(layer, 0, num_tokens, self._block_ids)
        if layer in self._between:
            for part, between in zip(kv, self._between[layer], strict=True):
                part[:, self._num_there : self._first] = between
        return kv

    def write(self, layer: int, kv: LayerKV) -> None:
        """As ``KVMemory`` says."""
        if self._num_there < self._first:
            self._between[layer] = LayerKV(*(part[:, self._num_there : self._first].clone() for part in kv))
        own = slice(self._first, self.num_tokens)
        self._tokens.write(layer, LayerKV(kv.keys[:, own], kv.values[:, own]), self._first, self._block_ids)

    def part(self, first: int, end: int) -> TokenKV:
        """The KV of tokens ``[first, end)`` in all layers, in memory of its own."""
        layers = [self._tokens.read(layer, first, end, self._block_ids) for layer in range(self.row_shape[0])]
        return TokenKV(*(torch.stack(parts) for parts in zip(*layers, strict=True)))


@dataclass(frozen=True)
class Room:
    """Memory for what is being computed."""

    problem: str
    """why there is none; empty: there is"""
    is_lasting: bool
    """the engine's own steps need none of it"""


def room_for(num_bytes: int, device: torch.device, *, must_last: bool) -> Room:
    """Whether there is memory beside the engine's; ``must_last``: between its steps, too.

    Found out before the ranks agree: one that ran out of it in between would keep the others waiting.
    """
    # What torch keeps for the engine's forward passes may be used in a step, and must be given back behind it.
    is_lasting = not must_last or device.type == "cpu" or torch.cuda.mem_get_info(device)[0] >= num_bytes
    try:
        torch.empty(num_bytes, dtype=torch.uint8, device=device)  # given back to torch, which has it for what follows
    except torch.OutOfMemoryError:
        return Room(f"{num_bytes} bytes do not fit into the device's memory", is_lasting)
    return Room("", is_lasting)


def blend_bytes(
    model: BlendModel, shape: RowShape, layout: PromptLayout, asks: Asks, ratio: FixedRatio, kept_bytes: int, first: int
) -> int:
    """Device memory that blending a prompt takes beside the engine's blocks, at most. ``first``: as in :class:`RequestMemory`."""
    num_tokens, num_reused = layout.num_tokens, sum(at.num_tokens for at in layout.placements)
    num_rows = num_tokens - layout.num_prefix_tokens - num_reused
    num_rows += num_reused if asks.deviation_layer is not None else ratio.num_tokens(num_reused)
    layer_bytes = num_tokens * shape.token_bytes
    slot_bytes = sum(len(at.chunk.block_keys) for at in layout.placements) * shape.layer_bytes
    kept = min(kept_bytes, shape.num_layers * layer_bytes)
    between = (first - layout.num_prefix_tokens) * shape.token_bytes * (shape.num_layers - kept // layer_bytes)
    looked_at = MOST_ASKING * (model.row_size // shape.head_dim) * num_tokens if asks.attention_layers else 0
    return (
        kept
        + between
        + (LAYERS_AHEAD + 1) * slot_bytes
        + LAYERS_AT_ONCE * layer_bytes
        + rows_bytes(model, shape, num_rows, num_tokens)
        + min(looked_at, MOST_WEIGHTS) * WEIGHT_BYTES
    )


def entry_bytes(model: BlendModel, shape: RowShape, num_remembered: int, num_tokens: int, kept_bytes: int) -> int:
    """The same of computing a chunk: ``num_tokens`` with its anchor's, of whose KV that of ``num_remembered`` is there as a whole."""
    layer_bytes = num_tokens * shape.token_bytes
    num_kept = kept_layers(shape, num_tokens, kept_bytes)
    in_slots = -(-num_tokens // shape.block_tokens) * shape.layer_bytes
    return (
        shape.num_layers * num_remembered * shape.token_bytes
        + num_kept * layer_bytes
        + COPIES_IN_ORDER * min(num_kept * in_slots, PART_BYTES)
        + LAYERS_AT_ONCE // 2 * layer_bytes
        + rows_bytes(model, shape, num_tokens, num_tokens)
    )


def rows_bytes(model: BlendModel, shape: RowShape, num_rows: int, num_tokens: int) -> int:
    """Of the rows that are computed, their masks, and the inner values of as many as are computed together."""
    masked = min(num_rows * num_tokens, MOST_MASKED) + GROUP_ROWS_ELSEWHERE * num_tokens
    inner = min(num_rows, model.max_rows) * model.inner_size
    return (num_rows * ROWS_AT_ONCE * model.row_size + inner + masked) * shape.dtype.itemsize
