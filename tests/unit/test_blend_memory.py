"""What blending takes of a device's memory beside the engine's blocks: a few layers of the prompt, however many the model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvtier.blend.blender import blend_into
from kvtier.blend.chunks import anchor_of
from kvtier.blend.entries import full_prefill
from kvtier.blend.finding import ChunkSpace, Span
from kvtier.blend.layout import PromptLayout, lay_out
from kvtier.blend.methods import METHODS
from kvtier.blend.model import LayerKV, Projected, Rotary, TokenKV
from kvtier.blend.placing import PromptKV
from kvtier.blend.ratio import FixedRatio
from kvtier.blend.steps import finish
from kvtier.connectors import blend_worker, chunk_writing
from kvtier.connectors.blend_memory import RequestMemory, Room, blend_bytes, entry_bytes, room_for
from kvtier.connectors.blend_steps import LostChunkError
from kvtier.connectors.blend_worker import ChunkBlender
from kvtier.connectors.chunk_rows import LAYERS_AHEAD, RowShape, SlotSource, slot_view
from kvtier.connectors.chunk_writing import fill_slots
from kvtier.connectors.messages import CaptureJob, ChunkSlots, EntryJob, WorkerReport
from kvtier.copy.rope import plain_frequencies
from kvtier.hashing import request_root
from kvtier.memory.arena import Arena
from tests.unit.blend_system import BLOCK, BLOCK_BYTES, DIM, LAYERS, NAMESPACE, TOKEN_BYTES, System, begun_blend, document

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 8, 4, 64, 512
BLOCK_TOKENS = 16


class WideModel:
    """Rows and KV of a size beside which positions count little; nothing happens in its layers but attention."""

    max_rows = 64
    row_size = inner_size = HIDDEN
    scale = HEAD_DIM**-0.5
    rotary = Rotary(plain_frequencies(10_000.0, HEAD_DIM), "neox")
    device = torch.device("cpu")

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        chance = torch.Generator().manual_seed(3)
        self._embedding = torch.randn(64, HIDDEN, generator=chance)
        self._weight = torch.randn(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, generator=chance) / HIDDEN

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._embedding[token_ids]

    def project(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> Projected:
        parts = (hidden @ self._weight).view(len(hidden), -1, HEAD_DIM).transpose(0, 1)
        return Projected(parts[:HEADS], parts[HEADS : HEADS + KV_HEADS], parts[HEADS + KV_HEADS :])

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return hidden + attended

    def mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self._embedding.T


class Blocks:
    """An engine's, of one prompt."""

    dtype = torch.float32
    block_tokens = BLOCK_TOKENS

    def __init__(self, num_layers: int, num_tokens: int) -> None:
        self.row_shape = (num_layers, KV_HEADS, HEAD_DIM)
        self._kv = torch.zeros(num_layers, 2, KV_HEADS, num_tokens, HEAD_DIM)
        self.written: set[int] = set()

    def read(self, layer: int, first: int, end: int, block_ids: torch.Tensor) -> LayerKV:
        return LayerKV(*self._kv[layer, :, :, first:end].clone())

    def write(self, layer: int, kv: LayerKV, first: int, block_ids: torch.Tensor) -> None:
        self.written.add(layer)
        for target, part in zip(self._kv[layer], kv, strict=True):
            target[:, first : first + part.shape[1]] = part


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors at once that were made while it is on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        for each in tree_leaves(out):
            storage = each.untyped_storage() if isinstance(each, torch.Tensor) else None
            if storage is not None and storage._cdata not in given and storage._cdata not in self._live:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self._live.values()))
        return out


class Ring:
    """Chunks as they come to a device, with nothing in them."""

    def __init__(self, layout: PromptLayout, shape: RowShape) -> None:
        num_slots = sum(len(at.chunk.block_keys) for at in layout.placements)
        self._places = torch.zeros(min(shape.num_layers, LAYERS_AHEAD + 1), num_slots, *shape.of_layer)

    def layer(self, index: int) -> torch.Tensor:
        return self._places[index % len(self._places)]

    def rest(self) -> None:
        pass

    end = rest


def prompt(lengths: list[int], num_new: int) -> tuple[list[int], PromptLayout]:
    """Chunks with a token between each two, and a question."""
    root = request_root(NAMESPACE.digest)
    tokens = [1]
    spans = []
    for number, length in enumerate(lengths):
        spans.append(Span(len(tokens), len(tokens) + length))
        tokens += [*document(number, length), 2]
    tokens += [3] * num_new
    return tokens, lay_out(len(tokens), 0, ChunkSpace(root, anchor_of(root, [], BLOCK_TOKENS), BLOCK_TOKENS).place(tokens, spans))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(100, 700), min_size=1, max_size=4),
    num_new=st.integers(0, 300),
    method=st.sampled_from(sorted(METHODS)),
    ratio=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    num_layers=st.sampled_from([2, 8, 20]),
    num_kept=st.sampled_from([0, 3]),
    needs_logits=st.booleans(),
    between=st.sampled_from([0, 0, 0.9]),
)
def test_a_blend_takes_what_was_asked_for(
    lengths: list[int], num_new: int, method: str, ratio: float, num_layers: int, num_kept: int, needs_logits: bool, between: float
) -> None:
    """At most, and no less than half of it, about: asking for too much would leave prompts to the engine that could be blended.

    Also where it makes the KV of the first tokens, a share ``between``, for its own use: somebody else fills their blocks.
    """
    model = WideModel(num_layers)
    tokens, layout = prompt(lengths, num_new)
    shape = RowShape(num_layers, KV_HEADS, BLOCK_TOKENS, HEAD_DIM, torch.float32)
    kept_bytes = num_kept * len(tokens) * shape.token_bytes
    chosen, size = METHODS[method](), FixedRatio(ratio)
    num_between = int(between * len(tokens))
    asked = blend_bytes(model, shape, layout, chosen.asks(num_layers), size, kept_bytes, num_between)
    blocks = Blocks(num_layers, len(tokens) - 1)
    memory = RequestMemory(blocks, [], num_between, len(tokens) - 1, model.device, layout.num_prefix_tokens)
    with torch.inference_mode(), LiveBytes() as live:
        source = SlotSource([at.chunk for at in layout.placements], Ring(layout, shape), shape)
        kv = PromptKV(memory, layout, source, model, kept_bytes)
        finish(blend_into(kv, model, tokens, chosen, size, end=len(tokens) - 1, needs_logits=needs_logits))
        assert num_layers - min(num_kept, num_layers) == len(blocks.written)
        kv.finish()
    assert num_layers == len(blocks.written)
    assert 0.45 * asked < live.most <= asked


def test_it_does_not_grow_with_the_model() -> None:
    """Long prompts need a few layers, not all of them, whoever computes how much."""
    shapes = [RowShape(num_layers, KV_HEADS, BLOCK_TOKENS, HEAD_DIM, torch.float32) for num_layers in (4, 40)]
    for method in METHODS.values():
        needed = []
        for shape in shapes:
            model = WideModel(shape.num_layers)
            _, layout = prompt([1000], 5)
            needed.append(blend_bytes(model, shape, layout, method().asks(shape.num_layers), FixedRatio(0.15), 0, 0))
        assert needed[0] == needed[1]


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("num_kept", [0, 4, 30])
@pytest.mark.parametrize(("num_anchor", "num_tokens"), [(0, 50), (0, 600), (90, 500), (500, 90)])
def test_a_chunk_takes_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_anchor: int, num_tokens: int, num_kept: int, remembers: bool
) -> None:
    """Computed behind its anchor, whose KV is kept for the next one or not."""
    model, shape = WideModel(30), RowShape(30, KV_HEADS, BLOCK_TOKENS, HEAD_DIM, torch.float32)
    monkeypatch.setattr(blend_worker, "ANCHOR_BYTES", num_anchor * 30 * shape.token_bytes if remembers else 0)
    blender = ChunkBlender(model, Blocks(30, 1), METHODS, block_tokens=BLOCK_TOKENS, block_bytes=shape.block_bytes)
    blender.kept_bytes = num_kept * (num_anchor + num_tokens) * shape.token_bytes
    num_slots = -(-num_tokens // BLOCK_TOKENS)
    arena = Arena.open(str(tmp_path / "arena"), num_slots * shape.block_bytes, huge_pages=False)
    numbers = range(0, num_slots * shape.block_bytes // 4096, shape.block_bytes // 4096)
    slots = ChunkSlots(tuple(range(num_slots)), tuple(numbers), tuple(arena.bump(number) for number in numbers))
    job = EntryJob(1, b"chunk", b"anchor", tuple(document(1, num_anchor)), tuple(document(2, num_tokens)), slots)
    asked = blender.bytes_for_entry(job)
    with LiveBytes() as live:
        finish(blender.store(job, arena))
    assert 0.45 * asked < live.most <= asked
    full = full_prefill(model, torch.tensor((*job.anchor_ids, *job.token_ids)))[0].part(num_anchor, num_anchor + num_tokens)
    found = torch.cat([slot_view(arena, shape, number) for number in numbers], 3)[:, :, :, :num_tokens]
    assert torch.allclose(full.keys, found[:, 0], atol=1e-4)
    assert torch.allclose(full.values, found[:, 1], atol=1e-4)
    arena.close()


def test_neither_does_that_of_a_chunk() -> None:
    """Of which no more than some layers are there at once."""
    shapes = [RowShape(num_layers, KV_HEADS, BLOCK_TOKENS, HEAD_DIM, torch.float32) for num_layers in (4, 40)]
    few, many = (entry_bytes(WideModel(shape.num_layers), shape, 0, 1000, 3 * 1000 * shape.token_bytes) for shape in shapes)
    assert few == many


@pytest.mark.parametrize("num_remembered", [0, 1, 2])
def test_anchors_are_remembered_as_far_as_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_remembered: int) -> None:
    """Those used last; the others are computed again."""
    system = System(tmp_path)
    anchors = [document(10 + number, 6) for number in range(3)]
    monkeypatch.setattr(blend_worker, "ANCHOR_BYTES", num_remembered * 6 * LAYERS * TOKEN_BYTES)
    computed = [stored(system, number, anchors[number]) - BLOCK for number in (0, 1, 2, 2, 1, 2)]
    assert [6, 6, 6, *{0: [6, 6, 6], 1: [0, 6, 6], 2: [0, 0, 0]}[num_remembered]] == computed
    system.close()


def stored(system: System, number: int, anchor: list[int]) -> int:
    """A chunk behind an anchor; how many tokens were computed for it."""
    before = system.model.num_embedded
    slots = ChunkSlots((0,), (number,), (system.arena.bump(number),))
    job = EntryJob(number, b"chunk", bytes(anchor), tuple(anchor), (1,) * BLOCK, slots)
    finish(system.blender.store(job, system.arena))
    return system.model.num_embedded - before


@pytest.mark.parametrize("positions", [(0, 1, 2, 3, 4), (1, 4), (3,)])
@pytest.mark.parametrize("at_once", [0, 1, 2, 3, 9])
def test_chunks_are_copied_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: tuple[int, ...], at_once: int) -> None:
    """Those of its blocks that are wanted, as many at once as memory is given, one at least. Zeros behind the last token."""
    monkeypatch.setattr(chunk_writing, "PART_BYTES", at_once * BLOCK_BYTES)
    system = System(tmp_path)
    tokens = document(1, 30)
    full = system.full(tokens)
    block_ids = system.blocks(len(tokens))
    system.memory.put(full, 0, block_ids)
    slots = ChunkSlots(positions, positions, tuple(system.arena.bump(slot) for slot in positions))
    system.blender.capture(CaptureJob(1, 6, 24, 2, tuple(block_ids), slots), system.arena)
    keys, values = system.model.rotary.move(full.keys, -2), full.values
    shape = RowShape(LAYERS, 1, BLOCK, DIM, torch.float32)
    for position in positions:
        at = slice(6 + position * BLOCK, min(6 + (position + 1) * BLOCK, 24))
        found = slot_view(system.arena, shape, position)
        for index, part in enumerate((keys, values)):
            assert torch.equal(part[:, :, at], found[:, index, :, : at.stop - at.start])
        assert not found[:, :, :, at.stop - at.start :].any()
    system.close()


@pytest.mark.parametrize("when", ["before", "amid"])
def test_slots_of_others_are_not_written(tmp_path: Path, when: str) -> None:
    """And a slot that changes hands while a chunk is copied fails it."""
    system = System(tmp_path)
    slots = ChunkSlots((0,), (5,), (system.arena.bump(5),))
    shape = RowShape(LAYERS, 1, BLOCK, DIM, torch.float32)
    found = slot_view(system.arena, shape, 5)
    found.fill_(7)

    def part(first: int, end: int) -> TokenKV:
        system.arena.bump(5)
        return system.full(document(1, BLOCK)).part(first, end)

    if when == "before":
        system.arena.bump(5)
    with pytest.raises(LostChunkError):
        fill_slots(system.arena, shape, slots, BLOCK, part)
    assert (when == "before") == bool((found == 7).all())
    system.close()


def test_what_lasts_between_steps_is_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what torch keeps for the engine. Inside of a step nobody asks how much is free."""
    device = torch.device("cuda")
    asked: list[torch.device] = []

    def free(of: torch.device) -> tuple[int, int]:
        asked.append(of)
        return 100, 1000

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert [True, False] == [room_for(num_bytes, device, must_last=True).is_lasting for num_bytes in (100, 101)]
    assert [device] * 2 == asked
    assert room_for(101, device, must_last=False).is_lasting
    assert room_for(101, torch.device("cpu"), must_last=True).is_lasting
    assert 2 == len(asked)


@pytest.mark.parametrize("share", [None, 5, 0])
def test_only_what_is_spread_must_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int | None) -> None:
    """Blends, and chunks that are computed."""
    system = System(tmp_path)
    message, _ = begun_blend(system, num_computed_tokens=0)
    asked: list[bool] = []

    def no_room(_bytes: int, _device: torch.device, *, must_last: bool) -> Room:
        asked.append(must_last)
        return Room("none", is_lasting=False)

    monkeypatch.setattr(blend_worker, "room_for", no_room)
    entry = EntryJob(1, b"chunk", b"", (), (1,) * BLOCK, ChunkSlots((0,), (0,), (system.arena.bump(0),)))
    for shares in (system.blender.blend(message.blends[0], system.arena), system.blender.store(entry, system.arena)):
        next(shares)
        with pytest.raises(LostChunkError):
            shares.send(share)
    assert [share is not None] * 2 == asked
    system.finish(message, WorkerReport({message.blends[0].job_id: 1}))
    system.half.request_finished("second")
    system.close()
