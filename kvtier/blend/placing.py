"""The KV of a prompt, filled layer by layer: chunks' keys and values are brought to their places when a layer is first needed.

So the layers behind can still be on their way while the first ones are computed. Keys are moved by one fp32 rotation as they are placed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from kvtier.blend.chunks import Chunk
from kvtier.blend.entries import ChunkEntry, Context
from kvtier.blend.layout import Placement, PromptLayout
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

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[num_kv_heads, rows, head_dim]`` of a layer, on the model's device.

        Asked for once for each layer, in order. What is returned may be overwritten at the next call, or later in the order of
        the work submitted to the device.
        """
        ...


class EntrySource:
    """Entries that are in memory as tensors."""

    def __init__(self, entries: Sequence[ChunkEntry]) -> None:
        self._entries = entries
        self.chunks = [entry.chunk for entry in entries]
        self.contexts = [entry.context for entry in entries]
        self.first_rows = [sum(entry.kv.num_tokens for entry in entries[:index]) for index in range(len(entries))]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As :class:`ChunkSource` says."""
        keys = torch.cat([entry.kv.keys[index] for entry in self._entries], 1)
        return keys, torch.cat([entry.kv.values[index] for entry in self._entries], 1)


class PromptKV:
    """The KV of one prompt under construction.

    Args:
        kv: of the whole prompt, with the prefix in place and zeros elsewhere; filled here
    """

    def __init__(self, kv: TokenKV, layout: PromptLayout, source: ChunkSource, rotary: Rotary) -> None:
        self.kv = kv
        self._source = source
        self._rotary = rotary
        self._num_filled = 0
        pairs = list(zip(layout.placements, source.first_rows, strict=True))
        device = kv.keys.device
        self._stay = _Route([pair for pair in pairs if pair[0].shift == 0], device)
        moving = [pair for pair in pairs if pair[0].shift != 0]
        self._move = _Route(moving, device)
        self._all = _Route(pairs, device)
        table = torch.from_numpy(shift_table(rotary.frequencies, [at.shift for at, _ in moving]))
        lengths = torch.tensor([at.num_tokens for at, _ in moving], dtype=torch.long)
        self._turns = table.repeat_interleave(lengths, 0).to(device)
        """of each moving token: cosine and sine of every pair"""

    def fill(self, layer: int) -> None:
        """Returns when the chunks are in place in this layer and those before it, as far as the device's order of work goes."""
        while self._num_filled <= layer:
            if len(self._all.rows):
                self._place(self._num_filled)
            self._num_filled += 1

    def _place(self, layer: int) -> None:
        keys, values = self._source.layer(layer)
        self.kv.values[layer].index_copy_(1, self._all.positions, values.index_select(1, self._all.rows))
        target = self.kv.keys[layer]
        target.index_copy_(1, self._stay.positions, keys.index_select(1, self._stay.rows))
        target.index_copy_(1, self._move.positions, self._rotary.turn(keys.index_select(1, self._move.rows), self._turns))


class _Route:
    """From which rows of a source to which positions of the prompt."""

    def __init__(self, pairs: Sequence[tuple[Placement, int]], device: torch.device) -> None:
        self.positions = _joined([(at.start, at.end) for at, _ in pairs], device)
        self.rows = _joined([(first + at.first_token, first + at.chunk.num_tokens) for at, first in pairs], device)


def _joined(ranges: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(start, end) for start, end in ranges)]).to(device)
