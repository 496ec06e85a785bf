"""Writes the KV of chunks into slots, some blocks and some layers at a time; none of it is read before all of it is there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it

from kvtier.blend.model import LayerKV, TokenKV
from kvtier.connectors.blend_steps import LostChunkError
from kvtier.connectors.chunk_rows import RowShape, slot_view
from kvtier.connectors.messages import ChunkSlots
from kvtier.memory.arena import Arena

ANOTHER_TENANT = "a slot has another tenant"
PART_BYTES = 64 << 20
"""of a chunk, and a few times as many while they are put in order, that are copied into slots at once"""

PartOf: TypeAlias = Callable[[int, int], TokenKV]
"""the KV of tokens ``[first, end)``, in memory of its own; layers as the occasion has it"""


def fill_slots(arena: Arena, shape: RowShape, slots: ChunkSlots, num_tokens: int, part: PartOf, first_layer: int = 0) -> None:
    """Copies layers of a chunk into its slots, from ``first_layer`` on, some blocks of it after the others.

    Raises LostChunkError where slots have other tenants; then what was written is of no use.
    """
    check_slots(arena, slots)
    size = shape.block_tokens
    at_once = max(1, PART_BYTES // shape.block_bytes)
    for number, group in itertools.groupby(zip(slots.positions, slots.slots, strict=True), lambda pair: pair[0] // at_once):
        first = number * at_once
        blocks = _blocks_of(part(first * size, min((first + at_once) * size, num_tokens)), size)
        layers = slice(first_layer, first_layer + blocks.shape[1])
        for position, slot in group:
            slot_view(arena, shape, slot)[layers].copy_(blocks[position - first])
    check_slots(arena, slots)


def _blocks_of(kv: TokenKV, block_tokens: int) -> torch.Tensor:
    """KV as slots hold it: ``[blocks, layers, 2, KV heads, tokens, head_dim]``, where the model computes.

    Zeros behind the last token: what lay there may be somebody else's.
    """
    both = torch.stack((kv.keys, kv.values), 1)
    padded = F.pad(both, (0, 0, 0, -kv.num_tokens % block_tokens))
    blocks: torch.Tensor = padded.unflatten(3, (-1, block_tokens)).movedim(3, 0)
    return blocks


def check_slots(arena: Arena, *parts: ChunkSlots) -> None:
    """Raises LostChunkError where slots have other tenants than when the job was made."""
    if not are_unchanged(arena, *parts):
        raise LostChunkError(ANOTHER_TENANT)


def are_unchanged(arena: Arena, *parts: ChunkSlots) -> bool:
    """Whether slots have the tenants that they had when the job was made."""
    generations = arena.generations
    return all(int(generations[slot]) == planned for slots in parts for slot, planned in zip(slots.slots, slots.generations, strict=True))


class EntryLayers:
    """The KV of a chunk and of what lies before it while they are computed, as :class:`kvtier.blend.prefill.KVLayers` says.

    Each layer is opened once, in order. Those that are done stay until there are so many bytes of them, and are handed on together.

    Args:
        num_tokens: all of them
        prefix: KV of the first ones, if it is there
        kept_bytes: layers of so many bytes stay here, and one at least
        hand_on: told of the first of some layers, and how to get their KV
    """

    def __init__(
        self,
        shape: RowShape,
        num_tokens: int,
        prefix: TokenKV | None,
        *,
        device: torch.device,
        kept_bytes: int,
        hand_on: Callable[[int, PartOf], None],
    ) -> None:
        self._size = (shape.num_heads, num_tokens, shape.head_dim)
        self._dtype = shape.dtype
        self._device = device
        self._prefix = prefix
        self._most = kept_layers(shape, num_tokens, kept_bytes)
        self._hand_on = hand_on
        self._num_handed_on = 0
        self._done: list[LayerKV] = []

    @contextlib.contextmanager
    def opened(self, layer: int) -> Iterator[LayerKV]:
        """As ``KVLayers`` says."""
        kv = LayerKV(*(torch.zeros(self._size, dtype=self._dtype, device=self._device) for _ in range(2)))
        if self._prefix is not None:
            kv.keys[:, : self._prefix.num_tokens] = self._prefix.keys[layer]
            kv.values[:, : self._prefix.num_tokens] = self._prefix.values[layer]
        yield kv
        self._done.append(kv)
        if len(self._done) >= self._most:
            self.finish()

    def finish(self) -> None:
        """Hands on what is still here."""
        layers, self._done = self._done, []

        def part(first: int, end: int) -> TokenKV:
            return TokenKV(*(torch.stack([each[:, first:end] for each in of_all]) for of_all in zip(*layers, strict=True)))

        if layers:
            self._hand_on(self._num_handed_on, part)
            self._num_handed_on += len(layers)


def kept_layers(shape: RowShape, num_tokens: int, kept_bytes: int) -> int:
    """How many layers of so many tokens are kept before they are handed on."""
    return min(max(1, kept_bytes // (num_tokens * shape.token_bytes)), shape.num_layers)
