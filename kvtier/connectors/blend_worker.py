"""Chunk reuse on a worker: puts prompts together in the engine's blocks, and computes chunks into slots. Knows no engine.

In its slots a chunk's KV lies as rows, ``[layers, 2, KV heads, tokens of the block, head_dim]``, whatever the engine's own layout is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from kvtier.blend.blender import blend
from kvtier.blend.chunks import Chunk
from kvtier.blend.entries import ChunkEntry, full_prefill
from kvtier.blend.methods import SelectionMethod
from kvtier.blend.model import BlendModel, TokenKV
from kvtier.blend.ratio import FixedRatio
from kvtier.connectors.blend_steps import LostChunkError
from kvtier.connectors.messages import BlendJob, ChunkSlots, EntryJob
from kvtier.memory.arena import Arena
from kvtier.memory.arena_file import PAGE_BYTES

MAX_ANCHORS = 4
"""whose KV is remembered"""


class TokenBlocks(Protocol):
    """The engine's KV memory by tokens."""

    dtype: torch.dtype
    block_tokens: int

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """``(layers, KV heads, head_dim)``"""

    def read(self, num_tokens: int, block_ids: Sequence[int]) -> TokenKV:
        """The KV of the first tokens of a request, in memory of its own."""
        ...

    def write(self, kv: TokenKV, first_token: int, block_ids: Sequence[int]) -> None:
        """Writes the KV of a prompt's tokens from ``first_token`` on into its blocks."""
        ...


class ChunkBlender:
    """Blends and entries of one worker without tensor parallelism. One thread; a call returns when its work is done.

    Raises:
        ValueError: a slot does not hold exactly the rows of ``block_tokens`` tokens.
    """

    def __init__(
        self,
        model: BlendModel,
        tokens: TokenBlocks,
        methods: Mapping[str, Callable[[], SelectionMethod]],
        *,
        block_tokens: int,
        block_bytes: int,
    ) -> None:
        layers, heads, head_dim = tokens.row_shape
        self._shape = (layers, 2, heads, block_tokens, head_dim)
        self._block_tokens = block_tokens
        item_bytes = torch.empty(0, dtype=tokens.dtype).element_size()
        num_bytes = torch.Size(self._shape).numel() * item_bytes
        if num_bytes != block_bytes:
            raise ValueError(f"rows of {block_tokens} tokens have {num_bytes} bytes, a slot has {block_bytes}")
        self._block_bytes = block_bytes
        self._model = model
        self._tokens = tokens
        self._methods = methods
        self._anchors: OrderedDict[bytes, TokenKV] = OrderedDict()

    @torch.inference_mode()
    def blend(self, job: BlendJob, arena: Arena) -> tuple[int, int]:
        """Fills the engine's blocks of the tokens from ``job.first`` to ``job.end``.

        Returns how many tokens came from chunks, and how many of them were computed anew.

        Raises:
            LostChunkError: chunks have gone.
        """
        layout = job.layout
        pairs = zip(layout.placements, job.chunks, strict=True)
        entries = [ChunkEntry(at.chunk, self._read(arena, at.chunk, slots)) for at, slots in pairs]
        prefix = self._tokens.read(layout.num_prefix_tokens, job.block_ids) if layout.num_prefix_tokens else None
        method, ratio = self._methods[job.method](), FixedRatio(job.ratio)
        made = blend(self._model, job.token_ids, layout, entries, method, ratio, prefix=prefix, end=job.end)
        self._tokens.write(made.kv.part(job.first, job.end), job.first, job.block_ids)
        num_tokens = sum(min(at.end, job.end) - max(at.start, job.first) for at in layout.placements if at.start < job.end)
        return num_tokens, made.num_chosen

    @torch.inference_mode()
    def store(self, job: EntryJob, arena: Arena) -> None:
        """Computes a chunk behind its anchor into its slots. Raises LostChunkError where they have got other tenants."""
        anchor = self._anchor(job)
        first = len(job.anchor_ids)
        device = self._model.device
        kv, _ = full_prefill(self._model, torch.tensor((*job.anchor_ids, *job.token_ids), device=device), anchor)
        kv = kv.part(first, first + len(job.token_ids))
        _check(arena, job.slots)
        for position, slot in zip(job.slots.positions, job.slots.slots, strict=True):
            start = position * self._block_tokens
            rows = self._rows(arena, slot)
            part = kv.part(start, min(start + self._block_tokens, kv.num_tokens))
            rows[:, 0, :, : part.num_tokens] = part.keys
            rows[:, 1, :, : part.num_tokens] = part.values
            rows[:, :, :, part.num_tokens :] = 0  # what lay there may be somebody else's
        _check(arena, job.slots)

    def _anchor(self, job: EntryJob) -> TokenKV | None:
        if not job.anchor_ids:
            return None
        kv = self._anchors.pop(job.anchor_key, None)
        if kv is None:
            kv, _ = full_prefill(self._model, torch.tensor(job.anchor_ids, device=self._model.device))
        self._anchors[job.anchor_key] = kv
        while len(self._anchors) > MAX_ANCHORS:
            self._anchors.popitem(last=False)
        return kv

    def _read(self, arena: Arena, chunk: Chunk, slots: ChunkSlots) -> TokenKV:
        if len(slots.slots) != len(chunk.block_keys):
            raise LostChunkError(f"chunk {chunk.key.hex()} has {len(slots.slots)} of {len(chunk.block_keys)} blocks")
        both = torch.cat([self._rows(arena, slot) for slot in slots.slots], 3)[:, :, :, : chunk.num_tokens].to(self._model.device)
        _check(arena, slots)
        return TokenKV(both[:, 0], both[:, 1])

    def _rows(self, arena: Arena, slot: int) -> torch.Tensor:
        """A view of a slot."""
        offset = slot * PAGE_BYTES
        raw = torch.frombuffer(arena.buffer, dtype=torch.uint8, count=self._block_bytes, offset=offset)
        return raw.view(self._tokens.dtype).view(self._shape)


def _check(arena: Arena, slots: ChunkSlots) -> None:
    generations = arena.generations
    if any(int(generations[slot]) != planned for slot, planned in zip(slots.slots, slots.generations, strict=True)):
        raise LostChunkError("a slot has another tenant")
