"""Chunk reuse on a worker: puts prompts together in the engine's blocks, and computes chunks into slots. Knows no engine."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from kvtier.blend.blender import blend_into, margin
from kvtier.blend.entries import layer_steps, prefill_steps
from kvtier.blend.methods import SelectionMethod
from kvtier.blend.model import BlendModel, TokenKV
from kvtier.blend.placing import PromptKV
from kvtier.blend.ratio import FixedRatio
from kvtier.blend.steps import Steps
from kvtier.connectors.blend_memory import KEPT_BYTES, RequestMemory, Room, TokenBlocks, blend_bytes, entry_bytes, room_for
from kvtier.connectors.blend_steps import LostChunkError, Shares, UnsureError
from kvtier.connectors.chunk_rows import STORAGE_OF, ArenaReads, DeviceReads, LayerReads, RowShape, SlotSource
from kvtier.connectors.chunk_writing import ANOTHER_TENANT, EntryLayers, PartOf, are_unchanged, check_slots, fill_slots
from kvtier.connectors.messages import BlendJob, CaptureJob, EntryJob
from kvtier.copy.base import RowMover
from kvtier.copy.cuda_rows import RowPlacement
from kvtier.memory.arena import Arena

T = TypeVar("T")
ANOTHER_RANK = "another rank cannot"
NOT_WANTED = "nobody wants it any more"
ANCHOR_BYTES = 256 << 20
"""of KV of anchors that are remembered"""


@dataclass(frozen=True)
class Ranks:
    """The workers that share the model's heads, and compute each layer together."""

    number: int = 1
    agree: Callable[[bool], bool] = bool
    """whether all of them say yes; every one asks"""


class ChunkBlender:
    """Blends and entries of one worker. One thread.

    Workers that share the model's heads make the same calls in the same order, and compute together: before they begin, and whenever they
    go on, they agree that all of them can, since one that gave up alone would keep the others waiting for good. Copies that fail in
    between are told there. What else fails in between (the model itself) leaves the others alone: ``has_left_others``.

    Args:
        part_offset: of this rank's part of a slot, in bytes
        ranks: those that share the model's heads

    Raises:
        ValueError: a slot does not hold exactly the rows of ``block_tokens`` tokens, or keys do not turn in all of their dimensions.
    """

    kept_bytes = KEPT_BYTES
    """of the KV of a prompt under construction; the rest is in the engine's blocks already"""

    def __init__(
        self,
        model: BlendModel,
        tokens: TokenBlocks,
        methods: Mapping[str, Callable[[], SelectionMethod]],
        *,
        block_tokens: int,
        block_bytes: int,
        part_offset: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        layers, heads, head_dim = tokens.row_shape
        self._ranks = ranks or Ranks()
        self._is_amid = False
        """whether the ranks compute together, and are not going to ask each other before they have done a share"""
        self._shape = RowShape(layers, heads, block_tokens, head_dim, tokens.dtype, part_offset)
        if self._shape.block_bytes != block_bytes:
            raise ValueError(f"rows of {block_tokens} tokens have {self._shape.block_bytes} bytes, a slot has {block_bytes}")
        num_turned = 2 * len(model.rotary.frequencies)
        if num_turned != head_dim:
            raise ValueError(f"keys turn in {num_turned} of {head_dim} dimensions; all are allowed")
        self._model = model
        self._tokens = tokens
        self._methods = methods
        self._anchors: OrderedDict[bytes, TokenKV] = OrderedDict()

    @property
    def has_left_others(self) -> bool:
        """As :class:`~kvtier.connectors.blend_steps.Blender` says."""
        return self._is_amid and self._ranks.number > 1

    def prepare(self, rows: RowMover) -> None:
        """Has the kernel compiled that chunks of this shape need: not inside a step."""
        nothing = RowPlacement(0, 0, 0, 0, 0, 0, self._shape.num_heads, self._shape.head_dim // 2, 0, 0, 0)
        rows.place_rows(nothing, pairs=self._model.rotary.pairs, storage=STORAGE_OF[self._shape.dtype])

    @torch.inference_mode()
    def blend(self, job: BlendJob, arena: Arena | None, rows: RowMover | None = None) -> Shares[int]:
        """Fills the engine's blocks of the tokens from ``job.first`` to ``job.end``. What is there before the end is of no use.

        Returns how many tokens of chunks were computed anew.

        Raises:
            LostChunkError: chunks have gone, or it is not to go on, here or on another rank.
            UnsureError: the first token's margin is less than the job asks for.
        """
        share = yield
        room = room_for(self.bytes_for(job), self._model.device, must_last=share is not None)
        problem = "there is no arena, or no prefix" if arena is None else _problem(arena, job) or room.problem
        problem = NOT_WANTED if share == 0 else problem
        if not self._ranks.agree(not problem) or arena is None:
            raise LostChunkError(problem or ANOTHER_RANK)
        share = self._bounded(share, room)
        self._is_amid = True
        return (yield from self._blended(job, arena, rows, share))

    def bytes_for(self, job: BlendJob) -> int:
        """Device memory that a blend takes beside the engine's blocks, at most."""
        asks = self._methods[job.recompute.method]().asks(self._model.num_layers)
        return blend_bytes(self._model, self._shape, job.layout, asks, FixedRatio(job.recompute.ratio), self.kept_bytes, job.first)

    @torch.inference_mode()
    def store(self, job: EntryJob, arena: Arena | None) -> Shares[int]:
        """Computes a chunk behind its anchor into its slots. Returns how many tokens it has.

        Raises:
            LostChunkError: slots have other tenants, or some rank cannot begin or go on.
        """
        share = yield
        room = room_for(self.bytes_for_entry(job), self._model.device, must_last=share is not None)
        problem = "there is no arena" if arena is None else room.problem
        problem = NOT_WANTED if share == 0 else problem
        if not self._ranks.agree(not problem) or arena is None:
            raise LostChunkError(problem or ANOTHER_RANK)
        share = self._bounded(share, room)
        self._is_amid = True
        failure = yield from self._shared_out(self._entry_steps(job, arena), share)
        if failure is not None:
            raise failure
        return len(job.token_ids)

    def bytes_for_entry(self, job: EntryJob) -> int:
        """Device memory that computing a chunk takes, at most."""
        num_anchor = len(job.anchor_ids)
        num_remembered = num_anchor if self._is_rememberable(num_anchor) else 0
        return entry_bytes(self._model, self._shape, num_remembered, num_anchor + len(job.token_ids), self.kept_bytes)

    @torch.inference_mode()
    def capture(self, job: CaptureJob, arena: Arena | None) -> None:
        """Copies a chunk out of the engine's blocks into its slots, its keys turned back to where its anchor ends.

        Raises:
            LostChunkError: slots have other tenants, or there is no arena.
        """
        if arena is None:
            raise LostChunkError("there is no arena")
        memory = RequestMemory(self._tokens, job.block_ids, job.first, job.end, self._model.device)

        def turned_back(first: int, end: int) -> TokenKV:
            kv = memory.part(job.first + first, job.first + end)
            return TokenKV(self._model.rotary.move(kv.keys, -job.shift), kv.values)

        fill_slots(arena, self._shape, job.slots, job.end - job.first, turned_back)

    def _shared_out(self, steps: Steps[T], share: int | None, rest: Callable[[], None] = lambda: None) -> Shares[T]:
        """Leaves off where it has done its share, after ``rest``; None: never.

        What fails in ``rest`` on this rank alone is raised when all are asked whether to go on: the others would ask in vain.
        """
        num_done = 0
        while True:
            try:
                num_done += next(steps)
            except StopIteration as end:
                self._is_amid = False
                result: T = end.value
                return result
            if share is not None and num_done >= share * self._shape.num_layers:
                num_done = 0
                self._is_amid = False
                failure = _failure_of(rest)
                share = yield
                if not self._ranks.agree(failure is None and share != 0):
                    raise failure or LostChunkError(ANOTHER_RANK if share else NOT_WANTED)
                self._is_amid = True

    def _bounded(self, share: int | None, room: Room) -> int | None:
        """The first share of a job. Where a rank has no room to keep it over steps, all of it."""
        return share if share is not None and self._ranks.agree(room.is_lasting) else None

    def _blended(self, job: BlendJob, arena: Arena, rows: RowMover | None, share: int | None) -> Shares[int]:
        model, layout, min_margin = self._model, job.layout, job.recompute.min_margin
        method, ratio = self._methods[job.recompute.method](), FixedRatio(job.recompute.ratio)
        memory = RequestMemory(self._tokens, job.block_ids, job.first, job.end, model.device, job.layout.num_prefix_tokens)
        is_checked = min_margin > 0
        with self.reading(job, arena, rows) as reads:
            source = SlotSource([at.chunk for at in layout.placements], reads, self._shape, rows)
            kv = PromptKV(memory, layout, source, model, self.kept_bytes)
            steps = blend_into(kv, model, job.token_ids, method, ratio, end=job.end, needs_logits=is_checked)
            made = yield from self._shared_out(steps, share, reads.rest)
        check_slots(arena, *job.chunks)  # what was read while a slot changed hands may be anything
        if made.logits is not None and not margin(made.logits) >= min_margin:  # NaN is not sure of anything
            raise UnsureError
        kv.finish()
        return made.num_chosen

    @contextlib.contextmanager
    def reading(self, job: BlendJob, arena: Arena, rows: RowMover | None) -> Iterator[LayerReads]:
        """The job's slots, layer by layer. Nothing reads them any more when the block is left."""
        slots = [slot for chunk in job.chunks for slot in chunk.slots]
        device = self._model.device
        reads = ArenaReads(arena, self._shape, slots, device) if rows is None else DeviceReads(rows, self._shape, slots, device)
        try:
            yield reads
        finally:
            reads.end()

    def _entry_steps(self, job: EntryJob, arena: Arena) -> Steps[Exception | None]:
        """Of a chunk's KV, which goes into its slots. Returns why not all of it is there: other ranks compute the same layers, and would
        wait for this one if it were raised between them."""
        device, num_anchor = self._model.device, len(job.anchor_ids)
        anchor = yield from self._anchor(job)
        failure: Exception | None = None

        def to_slots(first_layer: int, part: PartOf) -> None:
            nonlocal failure

            def behind_anchor(first: int, end: int) -> TokenKV:
                return part(num_anchor + first, num_anchor + end)

            if failure is None:
                failure = _failure_of(lambda: fill_slots(arena, self._shape, job.slots, len(job.token_ids), behind_anchor, first_layer))

        tokens = torch.tensor((*job.anchor_ids, *job.token_ids), device=device)
        layers = EntryLayers(self._shape, len(tokens), anchor, device=device, kept_bytes=self.kept_bytes, hand_on=to_slots)
        yield from layer_steps(self._model, tokens, layers, 0 if anchor is None else anchor.num_tokens)
        layers.finish()
        return failure

    def _is_rememberable(self, num_tokens: int) -> bool:
        """Whether the KV of an anchor of so many tokens is computed by itself and kept for other chunks, or with each of them."""
        return num_tokens * self._shape.num_layers * self._shape.token_bytes <= ANCHOR_BYTES

    def _anchor(self, job: EntryJob) -> Steps[TokenKV | None]:
        """The KV of a job's anchor, where that is to be remembered."""
        if not job.anchor_ids or not self._is_rememberable(len(job.anchor_ids)):
            return None
        kv = self._anchors.pop(job.anchor_key, None)
        if kv is None:
            kv, _ = yield from prefill_steps(self._model, torch.tensor(job.anchor_ids, device=self._model.device))
        self._anchors[job.anchor_key] = kv
        while not self._is_rememberable(sum(each.num_tokens for each in self._anchors.values())):
            self._anchors.popitem(last=False)
        return kv


def _failure_of(work: Callable[[], None]) -> Exception | None:
    """What copies raise, where they do."""
    try:
        work()
    except (RuntimeError, LostChunkError) as error:
        return error
    return None


def _problem(arena: Arena, job: BlendJob) -> str:
    """Why a job's chunks cannot be used; empty: they can."""
    for at, slots in zip(job.layout.placements, job.chunks, strict=True):
        if len(slots.slots) != len(at.chunk.block_keys):
            return f"chunk {at.chunk.key.hex()} has {len(slots.slots)} of {len(at.chunk.block_keys)} blocks"
    return "" if are_unchanged(arena, *job.chunks) else ANOTHER_TENANT
