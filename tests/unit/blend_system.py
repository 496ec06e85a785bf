"""Both halves of chunk reuse over a real cache and a small model, without an engine: what the tests of it share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvtier.blend.chunks import Chunk
from kvtier.blend.entries import full_prefill
from kvtier.blend.methods import METHODS
from kvtier.blend.model import LayerKV, Projected, Rotary, TokenKV
from kvtier.config import BlendConfig, Config
from kvtier.connectors.blend_steps import BlendSteps
from kvtier.connectors.blend_worker import ChunkBlender
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.chunk_rows import slot_view
from kvtier.connectors.messages import RequestOptions, ScheduledRequest, StepMessage, WorkerReport
from kvtier.connectors.requests import DefaultSettings, Geometry
from kvtier.connectors.scheduler import SchedulerHalf
from kvtier.copy.rope import plain_frequencies
from kvtier.engine import CacheEngine
from kvtier.hashing import Namespace
from kvtier.memory.arena import Arena

torch.set_num_threads(1)
NAMESPACE = Namespace(model="blend")
BLOCK, LAYERS, DIM = 4, 2, 8
TOKEN_BYTES = 2 * DIM * 4
"""of one layer"""
BLOCK_BYTES = LAYERS * BLOCK * TOKEN_BYTES
HOST_BLOCKS = 64
CAN_BLEND = WorkerReport(attached=1, blenders=1)
SYSTEM = [5, 6, 7, 8, 9]


class SmallModel:
    """Two layers, two heads over one of keys, random weights."""

    num_layers = LAYERS
    max_rows = 1000
    row_size = 16
    inner_size = 16
    scale = DIM**-0.5
    rotary = Rotary(plain_frequencies(10_000.0, DIM), "neox")
    device = torch.device("cpu")

    def __init__(self) -> None:
        chance = torch.Generator().manual_seed(11)
        self._embedding = torch.randn(64, 16, generator=chance)
        self._weights = torch.randn(LAYERS, 16, 4 * DIM, generator=chance) / 4
        self._out = torch.randn(LAYERS, 2 * DIM, 16, generator=chance) / 4
        self.num_embedded = 0
        """tokens that it began to compute"""
        self.num_projected = 0
        """layers of tokens that it computed"""

    def change(self) -> None:
        """Other weights."""
        self._weights = -self._weights.flip(2)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.num_embedded += len(token_ids)
        return self._embedding[token_ids]

    def project(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> Projected:
        assert len(positions) <= self.max_rows
        self.num_projected += len(positions)
        parts = (hidden @ self._weights[layer]).view(-1, 4, DIM).transpose(0, 1)
        turned = torch.stack([self.rotary.move(parts[:3, row], int(at)) for row, at in enumerate(positions)], 1)
        return Projected(turned[:2], turned[2:], parts[3:])

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        assert len(hidden) <= self.max_rows
        return hidden + torch.tanh(attended @ self._out[layer])

    def mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self._embedding.T


class Memory:
    """An engine's KV memory as rows by block."""

    dtype = torch.float32
    block_tokens = BLOCK
    row_shape = (LAYERS, 1, DIM)

    def __init__(self) -> None:
        self.keys = torch.full((LAYERS, 1, 200 * BLOCK, DIM), torch.nan)
        self.values = self.keys.clone()

    def _places(self, first: int, end: int, block_ids: Sequence[int] | torch.Tensor) -> list[int]:
        return [int(block_ids[token // BLOCK]) * BLOCK + token % BLOCK for token in range(first, end)]

    def read(self, layer: int, first: int, end: int, block_ids: torch.Tensor) -> LayerKV:
        places = self._places(first, end, block_ids)
        return LayerKV(self.keys[layer][:, places], self.values[layer][:, places])

    def write(self, layer: int, kv: LayerKV, first: int, block_ids: torch.Tensor) -> None:
        places = self._places(first, first + kv.keys.shape[1], block_ids)
        self.keys[layer][:, places], self.values[layer][:, places] = kv

    def part(self, first: int, end: int, block_ids: Sequence[int]) -> TokenKV:
        """The KV of a request's tokens in all layers."""
        places = self._places(first, end, block_ids)
        return TokenKV(self.keys[:, :, places], self.values[:, :, places])

    def put(self, kv: TokenKV, first: int, block_ids: Sequence[int]) -> None:
        """The same, to write."""
        places = self._places(first, first + kv.num_tokens, block_ids)
        self.keys[:, :, places], self.values[:, :, places] = kv.keys, kv.values


class System:
    """Both halves' chunk reuse over a real cache; steps are made by hand."""

    def __init__(
        self,
        directory: Path,
        parts: BlendParts | None = None,
        *,
        host_blocks: int = HOST_BLOCKS,
        below: Sequence[dict[str, Any]] = (),
        reports: Sequence[WorkerReport] = (CAN_BLEND,),
        num_workers: int = 1,
        async_load: bool = False,
        strict: bool = True,
    ) -> None:
        arena = Arena.open(str(directory / "arena"), host_blocks * 4096, huge_pages=False)
        arena.unlink()
        config = Config.from_mapping({"tiers": [{"type": "host", "capacity": host_blocks * 4096}, *below]})
        self.cache = CacheEngine.open(config, namespace=NAMESPACE, block_bytes=BLOCK_BYTES, arena=arena)
        geometry = Geometry(NAMESPACE.digest, BLOCK, BLOCK, num_workers, host_blocks)
        settings = DefaultSettings(async_load=async_load)
        self.half = SchedulerHalf(self.cache, geometry, settings, blend=parts or BlendParts(BlendConfig(enabled=True)), strict=strict)
        self.model = SmallModel()
        self.memory = Memory()
        self.blender = ChunkBlender(self.model, self.memory, METHODS, block_tokens=BLOCK, block_bytes=BLOCK_BYTES)
        self.arena = arena
        self.blend_steps = self.steps(self.blender)
        self.next_block = 1
        for report in reports:
            self.half.finish_step(report)

    def full(self, tokens: Sequence[int]) -> TokenKV:
        """What full prefill makes of a prompt."""
        return full_prefill(self.model, torch.tensor(tokens))[0]

    def add(self, name: str, tokens: list[int], **blend: Any) -> None:
        """A request that asks for reuse."""
        options = RequestOptions(blend=blend)
        self.half.add_request(name, tokens, num_prompt_tokens=len(tokens), options=options)

    def blocks(self, num_tokens: int) -> list[int]:
        """Engine blocks that nobody else has."""
        first, self.next_block = self.next_block, self.next_block + -(-num_tokens // BLOCK)
        return list(range(first, self.next_block))

    def step(self, scheduled: Sequence[ScheduledRequest] = (), *, fail: bool = False) -> StepMessage:
        """A step; what concerns chunks is done, stores of prompts fail."""
        message = self.half.build_step(scheduled)
        report = WorkerReport()
        steps = self.steps(None) if fail else self.blend_steps
        steps.blend(message.blends, set(), report, "", message.abandoned, message.share_tokens)
        steps.store(message.captures, message.entries, report, "", message.share_tokens)
        self.finish(message, report)
        return message

    def steps(self, blender: ChunkBlender | None) -> BlendSteps:
        """A worker's, over the arena."""
        steps = BlendSteps(blender, lambda: None)
        steps.attach(self.arena, "")
        return steps

    def finish(self, message: StepMessage, report: WorkerReport) -> None:
        """Ends a step in which no block of a prompt could be stored."""
        for job in message.stores:
            report.done[job.job_id], report.failed[job.job_id] = 1, set(range(len(job.block_ids)))
        self.half.finish_step(report)

    def serve(self, name: str, tokens: list[int], **blend: Any) -> int:
        """A request that is computed. Returns how many chunks were stored for it."""
        self.add(name, tokens, **blend)
        assert not self.half.match(name, len(tokens), 0).is_blended
        block_ids = self.blocks(len(tokens))
        self.half.allocated(name, block_ids, 0)
        self.step([ScheduledRequest(name, block_ids, len(tokens))])
        self.half.request_finished(name)
        before = self.cache.stats["blend.stored_chunks"]
        while self.half.has_pending_work:
            self.step()
        return self.cache.stats["blend.stored_chunks"] - before

    def close(self) -> None:
        """Nothing may be left."""
        assert {} == {name: count for name, count in self.cache.leftovers().items() if count}
        assert [] == self.cache.check()
        self.half.close()


def kept(system: System, chunk: Chunk) -> TokenKV | None:
    """The KV that is stored of a chunk; None: it is not, or not all of it."""
    if system.cache.match(chunk.block_keys).ready_blocks < len(chunk.block_keys):
        return None
    leased = system.cache.begin_load(chunk.block_keys, pooled=False)
    rows = [slot_view(system.arena, system.blender._shape, ref.slot).clone() for ref in leased.slots]
    system.cache.end_load(leased.job_id)
    both = torch.cat(rows, 3)[:, :, :, : chunk.num_tokens]
    return TokenKV(both[:, 0], both[:, 1])


def is_same(one: TokenKV, other: TokenKV) -> bool:
    return torch.allclose(one.keys, other.keys, atol=1e-4) and torch.allclose(one.values, other.values, atol=1e-4)


def document(number: int, length: int) -> list[int]:
    return [(7 * number + 3 * place + place * place) % 50 + 10 for place in range(length)]


def joined(documents: Sequence[Sequence[int]], before: Sequence[int], behind: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """A prompt, and where the documents lie."""
    tokens = list(before)
    spans = []
    for each in documents:
        spans.append([len(tokens), len(tokens) + len(each)])
        tokens += each
    return tokens + list(behind), spans


def begun_blend(system: System, *, num_computed_tokens: int) -> tuple[StepMessage, list[int]]:
    """The step that puts the second of two prompts of the same documents together, and the engine blocks of that prompt."""
    documents = [document(1, 9), document(2, 8)]
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    tokens, spans = joined(documents[::-1], SYSTEM, [1, 2])
    system.add("second", tokens, spans=spans)
    matched = system.half.match("second", len(tokens), num_computed_tokens)
    block_ids = system.blocks(len(tokens))
    assert matched.num_tokens is not None
    system.half.allocated("second", block_ids, matched.num_tokens)
    return system.half.build_step([ScheduledRequest("second", block_ids, len(tokens))]), block_ids
