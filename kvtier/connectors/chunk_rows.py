"""Reads the KV of chunks out of slots, a layer at a time, onto the device where the model computes.

In its slots a chunk lies as rows, ``[layers, 2, KV heads, tokens of the block, head_dim]``. On a device with copy engines the next layers
are on their way while one is computed; a CPU reads a layer where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kvtier.blend.chunks import Chunk
from kvtier.blend.entries import NO_CONTEXT
from kvtier.blend.model import LayerKV
from kvtier.blend.placing import PlacementPlan
from kvtier.copy.base import CopyEvent, RowMover
from kvtier.copy.cuda_rows import RowPlacement
from kvtier.copy.rope import Storage
from kvtier.memory.arena import Arena
from kvtier.memory.arena_file import PAGE_BYTES

STORAGE_OF: Mapping[torch.dtype, Storage] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LAYERS_AHEAD = 2
"""that are on their way, or have arrived, beside the one that is computed"""


@dataclass(frozen=True)
class RowShape:
    """What a slot holds, of one rank."""

    num_layers: int
    num_heads: int
    block_tokens: int
    head_dim: int
    dtype: torch.dtype
    first_byte: int = 0
    """of this rank's part of a slot"""

    @property
    def of_layer(self) -> tuple[int, int, int, int]:
        """``(2, KV heads, tokens, head_dim)``"""
        return 2, self.num_heads, self.block_tokens, self.head_dim

    @property
    def layer_bytes(self) -> int:
        """Of one layer in a slot."""
        return torch.Size(self.of_layer).numel() * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Of one token in one layer."""
        return self.layer_bytes // self.block_tokens

    @property
    def block_bytes(self) -> int:
        """Of all layers in a slot."""
        return self.num_layers * self.layer_bytes


def slot_view(arena: Arena, shape: RowShape, slot: int) -> torch.Tensor:
    """This rank's part of a slot, where it lies: ``[layers, 2, KV heads, tokens, head_dim]``. Keeps the arena's memory mapped."""
    offset = slot * PAGE_BYTES + shape.first_byte
    raw = torch.frombuffer(arena.buffer, dtype=torch.uint8, count=shape.block_bytes, offset=offset)
    return raw.view(shape.dtype).view(shape.num_layers, *shape.of_layer)


class LayerReads(Protocol):
    """One prompt's slots."""

    def layer(self, index: int) -> torch.Tensor:
        """``[slots, 2, KV heads, tokens, head_dim]`` on the model's device. For every layer in order; the next call may overwrite it.

        After a copy has failed it is whatever lies there: other ranks compute the same layers, and would wait for this one.
        """
        ...

    def rest(self) -> None:
        """Returns when nothing reads the arena until the next call of ``layer``. Raises what a copy raised."""
        ...

    def end(self) -> None:
        """Returns when nothing reads the arena any more. Raises what a copy raised."""
        ...


class ArenaReads:
    """Slots that the CPU reads, for a model anywhere."""

    def __init__(self, arena: Arena, shape: RowShape, slots: Sequence[int], device: torch.device) -> None:
        self._blocks = [slot_view(arena, shape, slot) for slot in slots]
        self._device = device

    def layer(self, index: int) -> torch.Tensor:
        """As :class:`LayerReads` says."""
        return torch.stack([block[index] for block in self._blocks]).to(self._device)

    def rest(self) -> None:
        """As :class:`LayerReads` says."""

    def end(self) -> None:
        """As :class:`LayerReads` says."""
        self._blocks = []


class DeviceReads:
    """Slots that are copied to the device ahead of the computation, by a ring of layers there. Where a copy fails no other is begun."""

    def __init__(self, rows: RowMover, shape: RowShape, slots: Sequence[int], device: torch.device) -> None:
        self._mover = rows
        self._shape = shape
        self._offsets = np.array(slots, np.int64) * PAGE_BYTES + shape.first_byte
        num_places = min(shape.num_layers, LAYERS_AHEAD + 1)
        self._ring = torch.empty((num_places, len(slots), *shape.of_layer), dtype=shape.dtype, device=device)
        self._events: list[CopyEvent] = []
        self._failure: RuntimeError | None = None
        for _ in range(num_places):
            self._submit()

    def layer(self, index: int) -> torch.Tensor:
        """As :class:`LayerReads` says."""
        if index and len(self._events) < self._shape.num_layers:
            self._submit()  # over the layer before, whose last reader has been submitted
        if self._failure is None:
            try:
                self._events[index].order_compute()
            except RuntimeError as error:
                self._failure = error
        return self._ring[index % len(self._ring)]

    def rest(self) -> None:
        """As :class:`LayerReads` says."""
        if self._events:
            self._events[-1].wait()
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """As :class:`LayerReads` says."""
        self.rest()

    def _submit(self) -> None:
        if self._failure is not None:
            return
        layer = len(self._events)
        place = self._ring[layer % len(self._ring)]
        to = place.data_ptr() + np.arange(len(self._offsets), dtype=np.uint64) * np.uint64(self._shape.layer_bytes)
        offsets = self._offsets + layer * self._shape.layer_bytes
        try:
            self._events.append(self._mover.read_pieces(to, offsets, self._shape.layer_bytes))
        except RuntimeError as error:
            self._failure = error


class SlotSource:
    """Chunks in slots, as :class:`kvtier.blend.placing.ChunkSource` wants them.

    Args:
        rows: puts them into place on a device; None: torch does
    """

    def __init__(self, chunks: Sequence[Chunk], reads: LayerReads, shape: RowShape, rows: RowMover | None = None) -> None:
        self.chunks = chunks
        self.contexts = [NO_CONTEXT] * len(chunks)
        sizes = [len(chunk.block_keys) * shape.block_tokens for chunk in chunks]
        self.first_rows = [sum(sizes[:index]) for index in range(len(chunks))]
        self._reads = reads
        self._shape = shape
        self._mover = rows
        self._tokens: torch.Tensor | None = None

    def place(self, layer: int, plan: PlacementPlan, target: LayerKV) -> None:
        """As ``ChunkSource`` says."""
        blocks = self._reads.layer(layer)
        if self._mover is None:
            both = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)
            plan.place(both[0], both[1], target)
            return
        if self._tokens is None:
            self._tokens = row_tokens_of(plan, self._shape)
        self._mover.place_rows(self._placement(blocks, plan, target), pairs=plan.rotary.pairs, storage=STORAGE_OF[self._shape.dtype])

    def _placement(self, blocks: torch.Tensor, plan: PlacementPlan, target: LayerKV) -> RowPlacement:
        assert self._tokens is not None
        item_bytes = blocks.element_size()
        keys, values = target
        return RowPlacement(
            source=blocks.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            tokens=self._tokens.data_ptr(),
            cos_sin=plan.table.data_ptr(),
            num_tokens=len(self._tokens),
            num_heads=blocks.shape[2],
            num_pairs=blocks.shape[4] // 2,
            value_offset=blocks.stride(1) * item_bytes,
            source_head_stride=blocks.stride(2) * item_bytes,
            target_head_stride=keys.stride(0) * item_bytes,
        )


def row_tokens_of(plan: PlacementPlan, shape: RowShape) -> torch.Tensor:
    """The table of :class:`~kvtier.copy.cuda_rows.RowPlacement` for rows that lie in blocks of slots: ``[tokens, 3]``."""
    token_bytes = shape.head_dim * shape.dtype.itemsize
    block, token = plan.rows // shape.block_tokens, plan.rows % shape.block_tokens
    turns = torch.full_like(plan.rows, -1)
    turns[: plan.num_moving] = plan.turns
    return torch.stack((block * shape.layer_bytes + token * token_bytes, plan.positions * token_bytes, turns), 1).contiguous()
