"""A model of 8B's shape and prompts of chunks on a device: the work and the clocks of ``kvtier bench gpu-chunks``."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch

from kvtier.bench.report import Record, record
from kvtier.blend.chunks import anchor_of
from kvtier.blend.finding import ChunkSpace, Span
from kvtier.blend.layout import Placement, PromptLayout, lay_out
from kvtier.blend.methods import METHODS
from kvtier.blend.model import LayerKV, TokenKV
from kvtier.blend.prefill import CausalGroups, Rows, advance, attend, start
from kvtier.blend.steps import finish
from kvtier.blend.transformers_models import TransformersModel
from kvtier.connectors.blend_worker import ChunkBlender
from kvtier.connectors.messages import BlendJob, CaptureJob, ChunkSlots, EntryJob, Recompute
from kvtier.copy.base import RowMover
from kvtier.copy.cuda_copier import ArenaPlace
from kvtier.copy.device import Device, cuda_copier
from kvtier.copy.pinning import pin_arena, unpin
from kvtier.layout import KVLayout, Segment
from kvtier.memory.arena import Arena
from kvtier.memory.arena_file import PAGE_BYTES

ROOT = b"bench gpu-chunks"
BLOCK_TOKENS = 64
SYSTEM_TOKENS = 64
QUESTION_TOKENS = 64
RATIO = 0.15
LIMIT = 1 / 3
GROUP_ROWS = (64, 256, 1024)
TOLERANCE = 0.5
"""of the logits' spread: by more than this ratio 1 may not differ from full prefill. Rounding in bf16 is a tenth of it"""


class _Memory:
    """KV of one prompt in the device's memory, in place of the engine's blocks."""

    def __init__(self, kv: TokenKV) -> None:
        self.kv = kv
        self.block_tokens = BLOCK_TOKENS
        self.dtype = kv.keys.dtype

    @property
    def row_shape(self) -> tuple[int, int, int]:
        layers, heads, _, head_dim = self.kv.keys.shape
        return layers, heads, head_dim

    def read(self, layer: int, first: int, end: int, block_ids: torch.Tensor) -> LayerKV:
        return LayerKV(self.kv.keys[layer][:, first:end].clone(), self.kv.values[layer][:, first:end].clone())

    def write(self, layer: int, kv: LayerKV, first: int, block_ids: torch.Tensor) -> None:
        end = first + kv.keys.shape[1]
        self.kv.keys[layer][:, first:end], self.kv.values[layer][:, first:end] = kv


class ChunksOnDevice:
    """One model, its chunks in host memory, and the figures. Closes what it opened.

    Args:
        shape: the sizes of a Llama's configuration
        directory: where host memory gets its file: for a CUDA device one of a file system in memory, as others may not be pinned

    Raises:
        RuntimeError: a CUDA device does not take host memory.
    """

    def __init__(self, device: torch.device, shape: Mapping[str, Any], num_tokens: int, chunk_tokens: int, directory: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._device = device
        self._num_tokens = num_tokens
        self._lm = _random_model(shape, device)
        self._model = TransformersModel(self._lm)
        config = self._lm.config
        size = (config.num_hidden_layers, config.num_key_value_heads, num_tokens, self._lm.model.layers[0].self_attn.head_dim)
        dtype = self._lm.dtype
        self.memory = _Memory(TokenKV(*(torch.zeros(size, dtype=dtype, device=device) for _ in range(2))))
        self._chance = random.Random(1)
        self._system = self._tokens(SYSTEM_TOKENS)
        num_chunks = (num_tokens - SYSTEM_TOKENS - QUESTION_TOKENS) // chunk_tokens
        self._documents = [self._tokens(chunk_tokens) for _ in range(num_chunks)]
        self._space = ChunkSpace(ROOT, anchor_of(ROOT, self._system, BLOCK_TOKENS), BLOCK_TOKENS)
        layers, heads, head_dim = self.memory.row_shape
        block_bytes = layers * 2 * heads * BLOCK_TOKENS * head_dim * dtype.itemsize
        self._blender = ChunkBlender(self._model, self.memory, METHODS, block_tokens=BLOCK_TOKENS, block_bytes=block_bytes)
        self._block_pages = -(-block_bytes // PAGE_BYTES)
        blocks = num_chunks * -(-chunk_tokens // BLOCK_TOKENS)
        arena = Arena.open(str(directory / "arena"), blocks * self._block_pages * PAGE_BYTES, huge_pages=False)
        self._arena = self._stack.enter_context(arena)
        arena.prefault()
        arena.wait_prefaulted(600.0)
        self.rows = _open_rows(arena, device, self._stack) if device.type == "cuda" else None
        self._slots = self._store()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """Raises RuntimeError where ratio 1 is not full prefill, ratio 0 is not the chunks as they were stored, or what is copied out of a
        prompt is not what is there."""
        ids, layout = self.prompt()
        self.blended(ids, layout, "none", 0.0)
        for at in layout.placements:
            kept = self._kept(at.chunk.key, at.num_tokens)
            here = self.memory.kv.part(at.start, at.end)
            keys = self._model.rotary.move(kept.keys, at.shift)
            if not (torch.equal(keys, here.keys) and torch.equal(kept.values, here.values)):
                raise RuntimeError(f"the chunk at token {at.start} is not what was stored")
            self._copy(at)
            copied = self._kept(at.chunk.key, at.num_tokens)
            if not (torch.equal(self._model.rotary.move(here.keys, -at.shift), copied.keys) and torch.equal(here.values, copied.values)):
                raise RuntimeError(f"what is copied of the chunk at token {at.start} is not what is there")
        expected, found = self._full(ids), self.blended(ids, layout, "epic", 1.0)
        self.difference = float((expected - found).abs().max() / expected.std())
        if not self.difference < TOLERANCE:
            raise RuntimeError(f"with ratio 1 the logits differ from full prefill's by {self.difference:.3f} of their spread")

    def first_tokens(self, rounds: int) -> Iterator[Record]:
        """Every method by turns with full prefill on the same prompts, which are in ever new orders."""
        cases = ["computed", "none", *(name for name in ("epic", "cacheblend", "prophetkv", "combined"))]
        times: dict[str, list[float]] = {case: [] for case in cases}
        for number in range(rounds + 1):
            ids, layout = self.prompt()
            for name, seconds in times.items():
                elapsed = self._timed(self._case(name, ids, layout))
                if number:  # the first round compiles and warms
                    seconds.append(elapsed)
        params: dict[str, object] = {"tokens": self._num_tokens, "copies": "ahead" if self.rows else "by the CPU"}
        yield Record("difference at ratio 1, of the logits' spread", params, self.difference, "ratio", 0.0, TOLERANCE, None)
        computed = times.pop("computed")
        yield record("time to first token, computed", params, computed, "ms")
        for name, seconds in times.items():
            more = {**params, "ratio": 0.0 if name == "none" else RATIO}
            yield record(f"time to first token, {name}", more, seconds, "ms")
            share = statistics.median(seconds) / statistics.median(computed)
            yield Record(f"of computing, {name}", more, share, "ratio", 0.0, LIMIT, share / LIMIT)

    def taken(self) -> Iterator[Record]:
        """What a blend takes of a CUDA device's memory beside the engine's blocks, and as its limit what the worker asks for."""
        device = self._device
        for name in ("combined", "cacheblend"):
            job = self._job(*self.prompt(), name, RATIO)
            before = torch.cuda.memory_allocated(device)
            shares = self._blender.blend(job, self._arena, self.rows)
            next(shares)
            shares.send(1)  # it has asked for the memory, and given it back
            torch.cuda.reset_peak_memory_stats(device)
            finish(shares)
            taken = (torch.cuda.max_memory_allocated(device) - before) / 1e9
            limit = self._blender.bytes_for(job) / 1e9
            yield Record(f"device memory of a blend, {name}", {"tokens": self._num_tokens}, taken, "GB", 0.0, limit, taken / limit)

    def loading(self, rounds: int) -> Record:
        """The chunks to the device and nothing else."""
        ids, layout = self.prompt()
        job = self._job(ids, layout, "none", 0.0)
        seconds = []
        for _ in range(rounds + 1):
            with self._blender.reading(job, self._arena, self.rows) as reads:
                seconds.append(self._timed(lambda reads=reads: [reads.layer(index) for index in range(self._model.num_layers)]))  # type: ignore[misc]
        num_bytes = sum(len(chunk.slots) for chunk in job.chunks) * self._block_pages * PAGE_BYTES
        return record("chunks to the device", {"tokens": self._num_tokens, "bytes": num_bytes}, seconds[1:], "ms")

    def storing(self, rounds: int) -> Record:
        """The chunks of a prompt out of the engine's memory, as those of served prompts are copied."""
        _, layout = self.prompt()

        def copy_all() -> None:
            for at in layout.placements:
                self._copy(at)

        seconds = [self._timed(copy_all) for _ in range(rounds + 1)]
        num_bytes = sum(len(self._slots[at.chunk.key].slots) for at in layout.placements) * self._block_pages * PAGE_BYTES
        return record("chunks out of a prompt", {"tokens": self._num_tokens, "bytes": num_bytes}, seconds[1:], "ms")

    def _copy(self, at: Placement) -> None:
        block_ids = tuple(range(-(-at.end // BLOCK_TOKENS)))
        self._blender.capture(CaptureJob(1, at.start, at.end, at.shift, block_ids, self._slots[at.chunk.key]), self._arena)

    def attention(self, rounds: int) -> Iterator[Record]:
        """Of the rows that 15 % are, over a whole prompt, in one layer, by how many rows are taken together."""
        heads, head_dim = self._lm.config.num_attention_heads, self.memory.row_shape[2]
        positions = torch.arange(0, self._num_tokens, max(1, round(1 / RATIO)), device=self._device)
        queries = torch.randn(heads, len(positions), head_dim, dtype=self.memory.dtype, device=self._device)
        keys, values = self.memory.kv.keys[0], self.memory.kv.values[0]
        for group_rows in GROUP_ROWS:
            groups = CausalGroups(positions, queries.dtype, group_rows)
            work = [
                self._timed(lambda groups=groups: attend(queries, keys, values, groups, self._model.scale))  # type: ignore[misc]
                for _ in range(rounds + 1)
            ]
            params = {"rows": len(positions), "tokens": self._num_tokens, "rows together": group_rows}
            yield record("attention of chosen rows, one layer", params, work[1:], "ms")

    # ---- prompts ------------------------------------------------------------------------------------------------

    def _tokens(self, number: int) -> list[int]:
        return [self._chance.randrange(self._lm.config.vocab_size) for _ in range(number)]

    def prompt(self) -> tuple[list[int], PromptLayout]:
        """All documents in a new order behind the system prompt, and a question that fills the prompt up."""
        self._chance.shuffle(self._documents)
        ids = list(self._system)
        spans = []
        for document in self._documents:
            spans.append(Span(len(ids), len(ids) + len(document)))
            ids += document
        ids += self._tokens(self._num_tokens - len(ids))
        return ids, lay_out(len(ids), 0, self._space.place(ids, spans))

    def _store(self) -> dict[bytes, ChunkSlots]:
        """Every chunk into slots of its own."""
        found: dict[bytes, ChunkSlots] = {}
        page = 0
        for number, document in enumerate(self._documents):
            chunk = self._space.chunk(document)
            count = len(chunk.block_keys)
            slots = tuple(page + index * self._block_pages for index in range(count))
            page += count * self._block_pages
            found[chunk.key] = ChunkSlots(tuple(range(count)), slots, tuple(self._arena.bump(slot) for slot in slots))
            job = EntryJob(number, chunk.key, b"anchor", tuple(self._system), tuple(document), found[chunk.key])
            finish(self._blender.store(job, self._arena))
        return found

    def _kept(self, key: bytes, num_tokens: int) -> TokenKV:
        """A chunk as its slots hold it."""
        layers, heads, head_dim = self.memory.row_shape
        shape = (layers, 2, heads, BLOCK_TOKENS, head_dim)
        num_bytes = torch.Size(shape).numel() * self.memory.dtype.itemsize
        raw = [bytearray(self._arena.view(slot * PAGE_BYTES, num_bytes)) for slot in self._slots[key].slots]
        both = torch.cat([torch.frombuffer(block, dtype=self.memory.dtype).view(shape) for block in raw], 3)[:, :, :, :num_tokens]
        return TokenKV(both[:, 0].to(self._device), both[:, 1].to(self._device))

    # ---- one case -----------------------------------------------------------------------------------------------

    def _case(self, name: str, ids: list[int], layout: PromptLayout) -> Callable[[], object]:
        if name == "computed":
            return lambda: self._full(ids)
        return lambda: self.blended(ids, layout, name, 0.0 if name == "none" else RATIO)

    def _full(self, ids: list[int]) -> torch.Tensor:
        """The logits behind the last token, by the model's own forward pass, which also keeps KV."""
        tokens = torch.tensor([ids], device=self._device)
        logits: torch.Tensor = self._lm(tokens, use_cache=True, logits_to_keep=1).logits[0, -1].float()
        return logits

    def blended(
        self, ids: list[int], layout: PromptLayout, method: str, ratio: float, between: Callable[[], int] | None = None
    ) -> torch.Tensor:
        """The same from chunks: the blend of a worker, and the question computed behind it.

        ``between``: called before each share of the blend, and says how many tokens it has; None: it is all done at once.
        """
        job = self._job(ids, layout, method, ratio)
        shares = self._blender.blend(job, self._arena, self.rows)
        if between is None:
            finish(shares)
        else:
            next(shares)
            with contextlib.suppress(StopIteration):
                while True:
                    shares.send(between())
        tokens = torch.tensor(ids, device=self._device)
        rows: Rows = start(self._model, tokens, torch.arange(job.end, len(ids), device=self._device))
        finish(advance(self._model, rows, self.memory.kv, torch.ones(len(ids), dtype=torch.bool, device=self._device)))
        return self._model.logits(rows.hidden[-1:])[0]

    def _job(self, ids: list[int], layout: PromptLayout, method: str, ratio: float) -> BlendJob:
        end = layout.placements[-1].end
        chunks = tuple(self._slots[at.chunk.key] for at in layout.placements)
        return BlendJob(1, "bench", tuple(ids), layout, chunks, 0, end, Recompute(method, ratio), tuple(range(-(-end // BLOCK_TOKENS))))

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _open_rows(arena: Arena, device: torch.device, stack: contextlib.ExitStack) -> RowMover | None:
    """What brings chunks to a CUDA device; None without CuPy. ``stack`` lets go of what it takes.

    Raises:
        RuntimeError: the arena cannot be pinned. Copies from memory that is not would be other figures, and other copies to test.
    """
    number = device.index or 0
    pinned_bytes = pin_arena(arena, number)
    if not pinned_bytes:
        raise RuntimeError(f"CUDA did not take {arena.path} as pinned memory: is it in a file system in memory, such as /dev/shm?")
    stack.callback(unpin, arena.address, number)
    page = torch.zeros(PAGE_BYTES, dtype=torch.uint8, device=device)
    layout = KVLayout((Segment(page.data_ptr(), PAGE_BYTES, PAGE_BYTES),), 1)
    on_device = Device(number, lambda: int(torch.cuda.current_stream(number).cuda_stream))
    copier = cuda_copier(layout, on_device, ArenaPlace(arena.address, pinned_bytes))
    if copier is not None:
        stack.callback(copier.close)
    return copier


def _random_model(shape: Mapping[str, Any], device: torch.device) -> Any:
    """A Llama of this shape, in bf16, made on the device."""
    import transformers  # type: ignore[import-not-found]  # noqa: PLC0415 - only for this benchmark

    torch.manual_seed(1)
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=False, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
