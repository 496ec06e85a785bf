"""The two halves put together for vLLM: the scheduler's with the cache engine, a worker's with its copier."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from kvtier.config import Config
from kvtier.connectors.requests import Geometry
from kvtier.connectors.scheduler import SchedulerHalf
from kvtier.connectors.vllm.geometry import BlockSizes, layout_of
from kvtier.connectors.worker import WorkerHalf
from kvtier.copy.base import BlockCopier
from kvtier.copy.cpu import NativeCopier
from kvtier.copy.torch_copier import TorchCopier
from kvtier.engine import CacheEngine
from kvtier.hashing import Namespace
from kvtier.layout import KVLayout
from kvtier.memory.arena import Arena, remove_stale

_LOG = logging.getLogger(__name__)
PREFAULT_TIMEOUT_S = 600.0
_DIRECTORY, _PREFIX = "/dev/shm", "kvtier-"


def open_arena(path: str, config: Config) -> Arena:
    """Host memory of one engine: made by whichever half comes first, mapped by the others; prepared in the background."""
    remove_stale(_DIRECTORY, _PREFIX)
    arena = Arena.open(path, config.host.capacity_bytes, huge_pages=config.host.huge_pages, numa_node=config.host.numa_node)
    arena.prefault()
    return arena


class SchedulerSide:
    """Owns the cache engine and the scheduler half. One thread."""

    def __init__(
        self, config: Config, namespace: Namespace, sizes: BlockSizes, arena_path: str, *, stores_are_async: bool, events: bool
    ) -> None:
        self.sizes = sizes
        self._arena = open_arena(arena_path, config)
        self._has_name = True
        engine = CacheEngine.open(config, namespace=namespace, block_bytes=sizes.block_bytes, arena=self._arena, events=events)
        geometry = Geometry(
            namespace=namespace.digest,
            block_tokens=sizes.block_tokens,
            engine_block_tokens=sizes.engine_block_tokens,
            num_workers=sizes.num_workers,
            host_blocks=config.host.capacity_bytes // sizes.block_bytes,
        )
        self.half = SchedulerHalf(engine, geometry, config.connector, stores_are_async=stores_are_async)
        _LOG.info("kvtier: blocks of %d tokens and %d bytes; %s", sizes.block_tokens, sizes.block_bytes, engine.num_blocks())

    def forget_arena_name(self) -> None:
        """Takes the arena's name away once every worker has mapped it, so that a killed engine leaves nothing behind."""
        if self._has_name and self.half.num_attached_workers >= self.sizes.num_workers:
            self._arena.unlink()
            self._has_name = False

    def close(self) -> None:
        """Writes down what is on its way and closes everything. Idempotent."""
        if self._has_name:
            self._arena.unlink()
            self._has_name = False
        self.half.close()


class WorkerSide:
    """Owns one rank's mapping of the arena, copier and worker half. One thread."""

    def __init__(self, config: Config, sizes: BlockSizes, arena_path: str, *, num_blocks: int) -> None:
        self._sizes = sizes
        self._num_blocks = num_blocks
        self._arena = open_arena(arena_path, config)
        self._half: WorkerHalf | None = None
        self._copy_threads = config.connector.copy_threads

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Learns where the engine's KV lies. Raises UnsupportedModelError where it is not what the configuration says."""
        layout, views = layout_of(kv_caches, self._num_blocks, self._sizes)
        self._half = WorkerHalf(
            self._arena,
            self._copier(layout, views),
            rank=get_tensor_model_parallel_rank(),
            num_workers=self._sizes.num_workers,
            engine_block_bytes=self._sizes.engine_block_bytes,
            blocks_per_slot=self._sizes.blocks_per_slot,
        )

    @property
    def half(self) -> WorkerHalf:
        """The worker half. Raises RuntimeError before ``register``."""
        if self._half is None:
            raise RuntimeError("the engine has not registered its KV memory")
        return self._half

    def close(self) -> None:
        """Waits for running copies. Idempotent."""
        if self._half is not None:
            self._half.close()
        self._arena.close()

    def _copier(self, layout: KVLayout, views: list[torch.Tensor]) -> BlockCopier:
        if views[0].device.type == "cpu":
            return NativeCopier(
                layout,
                arena_address=self._arena.address,
                arena_bytes=self._arena.capacity_bytes,
                num_threads=self._copy_threads,
            )
        pin_arena(self._arena)
        return TorchCopier(views, self._arena.buffer)


def pin_arena(arena: Arena) -> None:
    """Registers host memory with CUDA, so that copies are direct and asynchronous. Slower, but right, where that fails."""
    arena.wait_prefaulted(PREFAULT_TIMEOUT_S)
    error = torch.cuda.cudart().cudaHostRegister(arena.address, arena.ready_bytes, 0)
    if int(error) != 0:
        _LOG.warning("kvtier: cudaHostRegister of %d bytes failed (%s); copies go through pageable memory", arena.ready_bytes, error)
