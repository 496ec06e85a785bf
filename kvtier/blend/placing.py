"""The KV of a prompt, filled layer by layer: chunks' keys and values are brought to their places when a layer is first needed.

So the layers behind can still be on their way while the first ones are computed. Keys are moved by one fp32 rotation as they are placed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch

from kvtier.blend.chunks import Chunk
from kvtier.blend.entries import ChunkEntry, Context
from kvtier.blend.layout import PromptLayout
from kvtier.blend.model import Rotary, TokenKV
from kvtier.copy.rope import shift_table


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

    def place(self, layer: int, plan: PlacementPlan, target: TokenKV) -> None:
        """Puts the chunks into a layer of the prompt. Asked for once for each layer, in order."""
        ...


class EntrySource:
    """Entries that are in memory as tensors."""

    def __init__(self, entries: Sequence[ChunkEntry]) -> None:
        self._entries = entries
        self.chunks = [entry.chunk for entry in entries]
        self.contexts = [entry.context for entry in entries]
        self.first_rows = [sum(entry.kv.num_tokens for entry in entries[:index]) for index in range(len(entries))]

    def place(self, layer: int, plan: PlacementPlan, target: TokenKV) -> None:
        """As :class:`ChunkSource` says."""
        keys = torch.cat([entry.kv.keys[layer] for entry in self._entries], 1)
        plan.place(keys, torch.cat([entry.kv.values[layer] for entry in self._entries], 1), layer, target)


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

    def place(self, keys: torch.Tensor, values: torch.Tensor, layer: int, target: TokenKV) -> None:
        """Puts rows ``[num_kv_heads, rows, head_dim]`` of a layer into the prompt's."""
        moving, staying = slice(0, self.num_moving), slice(self.num_moving, None)
        target.values[layer].index_copy_(1, self.positions, values.index_select(1, self.rows))
        turned = self.rotary.turn(keys.index_select(1, self.rows[moving]), self._turns_of_tokens)
        target.keys[layer].index_copy_(1, self.positions[moving], turned)
        target.keys[layer].index_copy_(1, self.positions[staying], keys.index_select(1, self.rows[staying]))


class PromptKV:
    """The KV of one prompt under construction.

    Args:
        kv: of the whole prompt, with the prefix in place and zeros elsewhere; filled here
    """

    def __init__(self, kv: TokenKV, layout: PromptLayout, source: ChunkSource, rotary: Rotary) -> None:
        self.kv = kv
        self._source = source
        self._plan = PlacementPlan(layout, source.first_rows, rotary, kv.keys.device)
        self._num_filled = 0

    def fill(self, layer: int) -> None:
        """Returns when the chunks are in place in this layer and those before it, as far as the device's order of work goes."""
        while self._num_filled <= layer:
            if len(self._plan.rows):
                self._source.place(self._num_filled, self._plan, self.kv)
            self._num_filled += 1


def _joined(ranges: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(start, end) for start, end in ranges)]).to(device)
