"""The KV of a prompt, a layer at a time: chunks' keys and values are brought to their places when a layer is first needed.

So the layers behind can still be on their way while the first ones are computed. Keys are moved by one fp32 rotation as they are placed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from kvtier.blend.chunks import Chunk
from kvtier.blend.entries import ChunkEntry, Context
from kvtier.blend.layout import PromptLayout
from kvtier.blend.model import BlendModel, LayerKV, Rotary
from kvtier.copy.rope import shift_table
from kvtier.errors import BlendRefusedError, RefusalReason


class ChunkSource(Protocol):
    """Where the KV of a prompt's chunks comes from: one for each placement of its layout, in its order."""

    @property
    def chunks(self) -> Sequence[Chunk]:
        """Which chunks these are."""
        ...

    @property
    def contexts(self) -> Sequence[Context]:
        """In which context each was computed."""
        ...

    @property
    def first_rows(self) -> Sequence[int]:
        """In which row of a layer each chunk's first token lies; the others follow it."""
        ...

    def place(self, layer: int, plan: PlacementPlan, target: LayerKV) -> None:
        """Puts the chunks into a layer of the prompt. Asked for once for each layer, in order."""
        ...


class EntrySource:
    """Entries that are in memory as tensors."""

    def __init__(self, entries: Sequence[ChunkEntry]) -> None:
        self._entries = entries
        self.chunks = [entry.chunk for entry in entries]
        self.contexts = [entry.context for entry in entries]
        self.first_rows = [sum(entry.kv.num_tokens for entry in entries[:index]) for index in range(len(entries))]

    def place(self, layer: int, plan: PlacementPlan, target: LayerKV) -> None:
        """As :class:`ChunkSource` says."""
        keys = torch.cat([entry.kv.keys[layer] for entry in self._entries], 1)
        plan.place(keys, torch.cat([entry.kv.values[layer] for entry in self._entries], 1), target)


class PlacementPlan:
    """From which rows of a source chunks go to which positions of a prompt, and by how much their keys turn. Tensors on one device.

    Tokens that move come first.
    """

    def __init__(self, layout: PromptLayout, first_rows: Sequence[int], rotary: Rotary, device: torch.device) -> None:
        pairs = list(zip(layout.placements, first_rows, strict=True))
        moving = [pair for pair in pairs if pair[0].shift != 0]
        ordered = [*moving, *(pair for pair in pairs if pair[0].shift == 0)]
        self.rotary = rotary
        self.positions = _joined([(at.start, at.end) for at, _ in ordered], device)
        self.rows = _joined([(first + at.first_token, first + at.chunk.num_tokens) for at, first in ordered], device)
        self.table = torch.from_numpy(shift_table(rotary.frequencies, [at.shift for at, _ in moving])).to(device)
        """cosine and sine of every pair for each chunk that moves: ``[chunks, pairs, 2]``, fp32"""
        lengths = torch.tensor([at.num_tokens for at, _ in moving], dtype=torch.long)
        self.turns = torch.arange(len(moving)).repeat_interleave(lengths).to(device)
        """row of the table for each token that moves"""

    @property
    def num_moving(self) -> int:
        """Tokens that move."""
        return len(self.turns)

    @functools.cached_property
    def _turns_of_tokens(self) -> torch.Tensor:
        return self.table[self.turns]

    def place(self, keys: torch.Tensor, values: torch.Tensor, target: LayerKV) -> None:
        """Puts rows ``[num_kv_heads, rows, head_dim]`` of a layer into the prompt's."""
        moving, staying = slice(0, self.num_moving), slice(self.num_moving, None)
        target.values.index_copy_(1, self.positions, values.index_select(1, self.rows))
        turned = self.rotary.turn(keys.index_select(1, self.rows[moving]), self._turns_of_tokens)
        target.keys.index_copy_(1, self.positions[moving], turned)
        target.keys.index_copy_(1, self.positions[staying], keys.index_select(1, self.rows[staying]))


class KVMemory(Protocol):
    """Where the KV of a prompt's first tokens is kept: that of its prefix at first, that of all of them in the end."""

    num_tokens: int
    row_shape: tuple[int, int, int]
    """``(layers, KV heads, head_dim)``"""
    dtype: torch.dtype

    def read(self, layer: int, num_tokens: int) -> LayerKV:
        """The KV of so many of them in one layer, in memory of its own or a view; for reading."""
        ...

    def write(self, layer: int, kv: LayerKV) -> None:
        """Keeps a layer of all of them but the prefix, which stays as it is. ``kv`` is of the whole prompt."""
        ...


class PromptKV:
    """The KV of one prompt under construction: one layer at a time, those before it kept where they will be needed.

    Args:
        memory: has the KV of the layout's prefix. Gets all of it in the end, and before it what does not stay here
        source: the KV of the layout's chunks
        kept_bytes: layers of so many bytes stay here

    Raises:
        BlendRefusedError: the source has another chunk than the layout puts there.
        ValueError: layout and source differ in length.
    """

    def __init__(self, memory: KVMemory, layout: PromptLayout, source: ChunkSource, model: BlendModel, kept_bytes: int = 0) -> None:
        _check(layout, source)
        self.layout = layout
        self.contexts = source.contexts
        """of the chunks"""
        self._memory = memory
        self._source = source
        self._plan = PlacementPlan(layout, source.first_rows, model.rotary, model.device)
        self._num_placed = 0
        self._kept: dict[int, LayerKV] = {}
        self._most_kept = kept_bytes // _layer_bytes(memory, layout.num_tokens)

    @contextlib.contextmanager
    def opened(self, layer: int) -> Iterator[LayerKV]:
        """As :class:`kvtier.blend.prefill.KVLayers` says. For the first time they are opened in their order.

        The chunks are in place as far as the device's order of work goes.
        """
        kv = self._kept.pop(layer, None) or self._begun(layer)
        yield kv
        if len(self._kept) < self._most_kept:
            self._kept[layer] = kv
        else:
            self._memory.write(layer, kv)

    def fill(self) -> None:
        """Puts the chunks into place in the layers that nobody has opened."""
        for layer in range(self._num_placed, self._memory.row_shape[0]):
            with self.opened(layer):
                pass

    def finish(self) -> None:
        """Puts into the memory what is still here."""
        while self._kept:
            self._memory.write(*self._kept.popitem())

    def _begun(self, layer: int) -> LayerKV:
        is_placed = layer < self._num_placed
        kv = self._read(layer, self._memory.num_tokens if is_placed else self.layout.num_prefix_tokens)
        if not is_placed:
            if len(self._plan.rows):
                self._source.place(layer, self._plan, kv)
            self._num_placed += 1
        return kv

    def _read(self, layer: int, num_tokens: int) -> LayerKV:
        """A layer of the prompt with its first tokens in place and zeros elsewhere."""
        _, num_heads, head_dim = self._memory.row_shape
        size = (num_heads, self.layout.num_tokens, head_dim)
        kv = LayerKV(*(torch.zeros(size, dtype=self._memory.dtype, device=self._plan.rows.device) for _ in range(2)))
        if num_tokens:
            for part, known in zip(kv, self._memory.read(layer, num_tokens), strict=True):
                part[:, :num_tokens] = known
        return kv


def _check(layout: PromptLayout, source: ChunkSource) -> None:
    if len(source.chunks) != len(layout.placements):
        raise ValueError(f"{len(source.chunks)} chunks, of the layout {len(layout.placements)}")
    for placement, chunk in zip(layout.placements, source.chunks, strict=True):
        if chunk != placement.chunk:
            text = f"the KV of chunk {chunk.key.hex()} for token {placement.start}, where chunk {placement.chunk.key.hex()} lies"
            raise BlendRefusedError(RefusalReason.TOKENS_DIFFER, text)


def _layer_bytes(memory: KVMemory, num_tokens: int) -> int:
    """Of so many tokens' keys and values in one layer."""
    _, num_heads, head_dim = memory.row_shape
    return 2 * num_heads * head_dim * memory.dtype.itemsize * num_tokens


def _joined(ranges: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(start, end) for start, end in ranges)]).to(device)
