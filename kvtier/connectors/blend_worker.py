"""Chunk reuse on a worker: puts prompts together in the engine's blocks, and computes chunks into slots. Knows no engine."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it

from kvtier.blend.blender import Blended, blend
from kvtier.blend.entries import full_prefill
from kvtier.blend.methods import SelectionMethod
from kvtier.blend.model import BlendModel, TokenKV
from kvtier.blend.ratio import FixedRatio
from kvtier.connectors.blend_steps import LostChunkError
from kvtier.connectors.chunk_rows import ArenaReads, DeviceReads, LayerReads, RowShape, SlotSource
from kvtier.connectors.messages import BlendJob, ChunkSlots, EntryJob
from kvtier.copy.base import PieceReader
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
        self._shape = RowShape(layers, heads, block_tokens, head_dim, tokens.dtype)
        if self._shape.block_bytes != block_bytes:
            raise ValueError(f"rows of {block_tokens} tokens have {self._shape.block_bytes} bytes, a slot has {block_bytes}")
        self._model = model
        self._tokens = tokens
        self._methods = methods
        self._anchors: OrderedDict[bytes, TokenKV] = OrderedDict()

    @torch.inference_mode()
    def blend(self, job: BlendJob, arena: Arena, pieces: PieceReader | None = None) -> tuple[int, int]:
        """Fills the engine's blocks of the tokens from ``job.first`` to ``job.end``.

        Returns how many tokens came from chunks, and how many of them were computed anew.

        Raises:
            LostChunkError: chunks have gone.
        """
        made = self._blended(job, arena, pieces)
        self._tokens.write(made.kv.part(job.first, job.end), job.first, job.block_ids)
        placements = job.layout.placements
        num_tokens = sum(min(at.end, job.end) - max(at.start, job.first) for at in placements if at.start < job.end)
        return num_tokens, made.num_chosen

    @torch.inference_mode()
    def store(self, job: EntryJob, arena: Arena) -> None:
        """Computes a chunk behind its anchor into its slots. Raises LostChunkError where they have got other tenants."""
        anchor = self._anchor(job)
        first = len(job.anchor_ids)
        tokens = torch.tensor((*job.anchor_ids, *job.token_ids), device=self._model.device)
        kv, _ = full_prefill(self._model, tokens, anchor)
        blocks = self._blocks_of(kv.part(first, kv.num_tokens))
        _check(arena, job.slots)
        for position, slot in zip(job.slots.positions, job.slots.slots, strict=True):
            self._slot(arena, slot).copy_(blocks[position])
        _check(arena, job.slots)

    def _blended(self, job: BlendJob, arena: Arena, pieces: PieceReader | None) -> Blended:
        layout = job.layout
        for at, slots in zip(layout.placements, job.chunks, strict=True):
            if len(slots.slots) != len(at.chunk.block_keys):
                raise LostChunkError(f"chunk {at.chunk.key.hex()} has {len(slots.slots)} of {len(at.chunk.block_keys)} blocks")
        _check(arena, *job.chunks)
        prefix = self._tokens.read(layout.num_prefix_tokens, job.block_ids) if layout.num_prefix_tokens else None
        method, ratio = self._methods[job.method](), FixedRatio(job.ratio)
        with self.reading(job, arena, pieces) as reads:
            source = SlotSource([at.chunk for at in layout.placements], reads, self._shape.block_tokens)
            made = blend(self._model, job.token_ids, layout, source, method, ratio, prefix=prefix, end=job.end)
        _check(arena, *job.chunks)  # what was read while a slot changed hands may be anything
        return made

    @contextlib.contextmanager
    def reading(self, job: BlendJob, arena: Arena, pieces: PieceReader | None) -> Iterator[LayerReads]:
        """The job's slots, layer by layer. Nothing reads them any more when the block is left."""
        slots = [slot for chunk in job.chunks for slot in chunk.slots]
        device = self._model.device
        reads = ArenaReads(arena, self._shape, slots, device) if pieces is None else DeviceReads(pieces, self._shape, slots, device)
        try:
            yield reads
        finally:
            reads.end()

    def _blocks_of(self, kv: TokenKV) -> torch.Tensor:
        """A chunk's KV as its slots hold it, in host memory: ``[blocks, layers, 2, KV heads, tokens, head_dim]``.

        Zeros behind the last token: what lay there may be somebody else's.
        """
        block_tokens = self._shape.block_tokens
        both = torch.stack((kv.keys, kv.values), 1)
        padded = F.pad(both, (0, 0, 0, -kv.num_tokens % block_tokens))
        blocks: torch.Tensor = padded.unflatten(3, (-1, block_tokens)).movedim(3, 0).to("cpu")
        return blocks

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

    def _slot(self, arena: Arena, slot: int) -> torch.Tensor:
        """A view of a slot."""
        offset = slot * PAGE_BYTES
        raw = torch.frombuffer(arena.buffer, dtype=torch.uint8, count=self._shape.block_bytes, offset=offset)
        return raw.view(self._shape.dtype).view(self._shape.num_layers, *self._shape.of_layer)


def _check(arena: Arena, *parts: ChunkSlots) -> None:
    generations = arena.generations
    for slots in parts:
        if any(int(generations[slot]) != planned for slot, planned in zip(slots.slots, slots.generations, strict=True)):
            raise LostChunkError("a slot has another tenant")
