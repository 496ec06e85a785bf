"""A whole kvtier below a fake engine: arena, cache engine, both halves, one copier a rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvtier.config import Config
from kvtier.connectors.recording import RecordingHalf, recorder_of
from kvtier.connectors.requests import DefaultSettings, Geometry
from kvtier.connectors.scheduler import SchedulerHalf
from kvtier.connectors.slot_part import SlotPart
from kvtier.connectors.worker import WorkerHalf
from kvtier.copy.base import BlockCopier, LayerLoader, Movers
from kvtier.copy.cpu import NativeCopier
from kvtier.copy.layered import ThreadedLayerLoader
from kvtier.engine import CacheEngine
from kvtier.hashing import Namespace
from kvtier.memory.arena import Arena
from kvtier.memory.arena_file import PAGE_BYTES
from kvtier.testing.copiers import FaultyCopier, LateLayerLoader
from kvtier.testing.fake_engine import FakeEngine
from kvtier.testing.fake_kv import FakeKVMemory
from kvtier.tiers.base import Tier


@dataclass(frozen=True, slots=True)
class FakeSystemOptions:
    """What varies between runs. The defaults are small, so that everything is scarce."""

    num_ranks: int = 1
    num_polls: int = 0
    """0: synchronous copiers; else how many steps an asynchronous copy takes on rank 0 (on each further rank 2 more)"""
    engine_block_tokens: int = 4
    blocks_per_slot: int = 1
    num_engine_blocks: int = 40
    host_blocks: int = 16
    token_budget: int = 24
    prefix_caching: bool = False
    recompute: bool = True
    device_slots: int = 0
    """slots of the pool in front of host memory; 0: no pool"""
    by_layer: Literal["", "thread", "late"] = ""
    """sync loads layer by layer: copied by a thread, or when they are waited for; then stores too, at the moment a layer is computed"""
    settings: DefaultSettings = field(default_factory=DefaultSettings)
    record: Path | None = None
    """the file of a recording"""


class FakeSystem:
    """Owns everything. ``close`` when done."""

    def __init__(
        self,
        directory: Path,
        namespace: Namespace,
        options: FakeSystemOptions,
        *,
        tiers: Sequence[Tier] = (),
        clock: Callable[[], float] = time.monotonic,
        strict: bool = True,
    ) -> None:
        memory = FakeKVMemory(
            num_ranks=options.num_ranks,
            num_layers=2,
            num_blocks=options.num_engine_blocks,
            block_tokens=options.engine_block_tokens,
        )
        block_bytes = memory.engine_block_bytes * options.blocks_per_slot * options.num_ranks
        slot_bytes = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
        capacity_bytes = options.host_blocks * slot_bytes
        pool = [{"type": "gpu", "capacity": 1}] if options.device_slots else []
        config = Config.from_mapping({"tiers": [*pool, {"type": "host", "capacity": capacity_bytes}]})
        self.arena = Arena.open(str(directory / "arena"), capacity_bytes, huge_pages=False)
        self.arena.unlink()
        self.cache = CacheEngine.open(
            config,
            namespace=namespace,
            block_bytes=block_bytes,
            arena=self.arena,
            device_slots=options.device_slots,
            events=options.record is not None,
            tiers=tiers,
            clock=clock,
        )
        self.copiers = [
            FaultyCopier(
                self._copier(memory, rank, options),
                num_polls=options.num_polls + 2 * rank if options.num_polls else 0,
            )
            for rank in range(options.num_ranks)
        ]
        self.loaders = [self._loader(memory, rank, options) for rank in range(options.num_ranks)]
        self.storers = [loader.storer() if isinstance(loader, LateLayerLoader) else None for loader in self.loaders]
        geometry = Geometry(
            namespace=namespace.digest,
            block_tokens=options.engine_block_tokens * options.blocks_per_slot,
            engine_block_tokens=options.engine_block_tokens,
            num_workers=options.num_ranks,
            host_blocks=options.host_blocks,
        )
        more: dict[str, Any] = {"stores_are_async": options.num_polls > 0, "clock": clock, "strict": strict}
        self.half = SchedulerHalf(self.cache, geometry, options.settings, **more)
        if options.record is not None:
            header = Config.from_mapping({"record": {"path": str(options.record)}, "tiers": [{"type": "host", "capacity": capacity_bytes}]})
            recorder = recorder_of(header, geometry, block_bytes)
            assert recorder is not None
            self.half = RecordingHalf(self.cache, geometry, options.settings, recorder=recorder, **more)
        self.workers = [
            WorkerHalf(
                self.arena,
                Movers(copier, loader, storer),
                SlotPart(rank, options.num_ranks, memory.engine_block_bytes, options.blocks_per_slot),
                strict=strict,
            )
            for rank, (copier, loader, storer) in enumerate(zip(self.copiers, self.loaders, self.storers, strict=True))
        ]
        self.engine = FakeEngine(
            self.half,
            self.workers,
            memory,
            token_budget=options.token_budget,
            prefix_caching=options.prefix_caching,
            recompute=options.recompute,
        )
        self.engine.by_layer = bool(options.by_layer)

    def _copier(self, memory: FakeKVMemory, rank: int, options: FakeSystemOptions) -> BlockCopier:
        copier = NativeCopier(memory.layout(rank), arena_address=self.arena.address, arena_bytes=self.arena.capacity_bytes)
        if not options.device_slots:
            return copier
        from kvtier.copy.pool import PoolCopier  # noqa: PLC0415 - torch is needed for this only

        pool_bytes = options.device_slots * options.blocks_per_slot * memory.engine_block_bytes
        return PoolCopier.allocate(copier, memory.tensors(rank), self.arena.buffer, pool_bytes)

    def _loader(self, memory: FakeKVMemory, rank: int, options: FakeSystemOptions) -> LayerLoader | None:
        if not options.by_layer:
            return None
        layers = [range(layer, layer + 1) for layer in range(memory.num_layers)]
        loader = ThreadedLayerLoader(memory.layout(rank), layers, arena_address=self.arena.address, arena_bytes=self.arena.capacity_bytes)
        return LateLayerLoader(loader) if options.by_layer == "late" else loader

    def settle(self, max_steps: int = 2000) -> None:
        """Runs until no request, copy or transfer is left. Raises HangError."""
        self.engine.run(max_steps)
        steps = 0
        while (self.half.has_pending_work or self.cache.busy) and steps < max_steps:
            self.engine.step()
            self.cache.poll(0.01)
            steps += 1

    def problems(self) -> list[str]:
        """What is wrong in a settled system: leaks and broken books. Empty = healthy."""
        problems = [f"{count} {what} left" for what, count in self.cache.leftovers().items() if count]
        problems += [damage.what for damage in self.cache.check()]
        problems += [f"{self.half.num_pinned_blocks} blocks pinned by no request"] if self.half.num_pinned_blocks else []
        used = self.engine.pool.num_blocks - 1 - self.engine.pool.num_free
        return problems + ([f"{used} engine blocks left"] if used else [])

    def close(self) -> None:
        """Closes everything. Idempotent."""
        for worker in self.workers:
            worker.close()
        self.half.close()
        self.arena.close()
