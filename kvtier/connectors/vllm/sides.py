"""The two halves put together for vLLM: the scheduler's with a cache engine or a daemon's cache, a worker's with its copier."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from kvtier.cache import Cache
from kvtier.config import Config
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.messages import WorkerReport
from kvtier.connectors.recording import RecordingHalf, recorder_of
from kvtier.connectors.requests import Geometry
from kvtier.connectors.scheduler import IDLE_WAIT_S, SchedulerHalf
from kvtier.connectors.slot_part import SlotPart
from kvtier.connectors.vllm.blend_parts import blender_of
from kvtier.connectors.vllm.geometry import BlockSizes, layers_of, layout_of
from kvtier.connectors.vllm.movers import movers_of, on_device
from kvtier.connectors.worker import WorkerHalf
from kvtier.controller import Controller
from kvtier.copy.base import Movers
from kvtier.copy.cuda_batch import tolerate_captures
from kvtier.engine import CacheEngine
from kvtier.errors import ConfigError
from kvtier.hashing import Namespace
from kvtier.memory.arena import Arena, remove_stale
from kvtier.serve.attachment import ServedArena
from kvtier.serve.channel import Attaching
from kvtier.serve.client import ServedCache
from kvtier.serve.messages import Hello

_LOG = logging.getLogger(__name__)
_DIRECTORY, _PREFIX = "/dev/shm", "kvtier-"


def open_arena(path: str, config: Config, launch: str) -> Arena:
    """Host memory of one engine: made by whichever half comes first, mapped by the others; prepared in the background.

    ``launch`` is part of its name: two engines of one ``engine_id`` would give out the same slots, each for itself.
    """
    remove_stale(_DIRECTORY, _PREFIX)
    arena = Arena.open(f"{path}-{launch}", config.host.capacity_bytes, huge_pages=config.host.huge_pages, numa_node=config.host.numa_node)
    arena.prefault()
    return arena


class SchedulerSide:
    """Owns the cache and the scheduler half. One thread. Where a daemon is named the cache is the daemon's."""

    def __init__(  # noqa: PLR0913 - by keyword
        self,
        config: Config,
        namespace: Namespace,
        sizes: BlockSizes,
        arena_path: str,
        *,
        launch: str,
        name: str,
        stores_are_async: bool,
        events: bool,
        blend: BlendParts | None = None,
        idle_wait_s: float = IDLE_WAIT_S,
    ) -> None:
        self.sizes = sizes
        self._arena: Arena | None = None
        """this engine's own, as long as it has a name"""
        wants_events = events or config.record.path is not None
        engine: Cache
        if config.daemon.socket is None:
            engine = self._open_engine(config, namespace, arena_path, launch, wants_events)
            host_bytes = config.host.capacity_bytes
        else:
            engine = served = _attach(config, namespace, sizes, arena_path, wants_events, launch)
            host_bytes = served.welcome.arena_bytes
        geometry = Geometry(
            namespace=namespace.digest,
            block_tokens=sizes.block_tokens,
            engine_block_tokens=sizes.engine_block_tokens,
            num_workers=sizes.num_workers,
            host_blocks=host_bytes // sizes.block_bytes,
        )
        self.controller = Controller(engine, namespace=namespace, block_tokens=sizes.block_tokens, name=name)
        recorder = recorder_of(config, geometry, sizes.block_bytes)
        more: dict[str, Any] = {"stores_are_async": stores_are_async, "blend": blend, "idle_wait_s": idle_wait_s}
        if recorder is None:
            self.half = SchedulerHalf(engine, geometry, config.connector, **more)
        else:
            self.half = RecordingHalf(engine, geometry, config.connector, recorder=recorder, keep_events=events, **more)
        _LOG.info("kvtier: blocks of %d tokens and %d bytes; %s", sizes.block_tokens, sizes.block_bytes, engine.num_blocks())

    def forget_arena_name(self, *, is_mapped: bool = False) -> None:
        """Takes the arena's name away once every worker has mapped it, so that a killed engine leaves nothing behind.

        ``is_mapped``: they have; else their reports say so.
        """
        if self._arena is not None and (is_mapped or self.half.num_attached_workers >= self.sizes.num_workers):
            self._arena.unlink()
            self._arena = None

    def close(self) -> None:
        """Writes down what is on its way and closes everything. Idempotent."""
        if self._arena is not None:
            self._arena.unlink()
            self._arena = None
        self.half.close()

    def _open_engine(self, config: Config, namespace: Namespace, arena_path: str, launch: str, wants_events: bool) -> CacheEngine:
        self._arena = open_arena(arena_path, config, launch)
        try:
            return CacheEngine.open(
                config,
                namespace=namespace,
                block_bytes=self.sizes.block_bytes,
                arena=self._arena,
                device_slots=pool_slots(config, self.sizes),
                events=wants_events,
            )
        except BaseException:
            self._arena.unlink()  # or an engine that does not start would leave its host memory taken
            self._arena.close()
            raise


def _attach(config: Config, namespace: Namespace, sizes: BlockSizes, arena_path: str, wants_events: bool, launch: str) -> ServedCache:
    """A daemon's cache. Raises DaemonError where there is none, ConfigError for what only an engine's own cache can do."""
    if config.gpu is not None:
        raise ConfigError("daemon.socket is set and tiers[0].type is gpu; allowed with a daemon: host and what is below it")
    hello = Hello(
        "scheduler",
        os.path.basename(arena_path),
        uuid.uuid4().hex,
        asdict(namespace),
        sizes.block_bytes,
        sizes.block_tokens,
        wants_events,
        launch,
    )
    cache = ServedCache(Attaching(config.daemon, hello, sizes.num_workers))
    if not cache.wait_until_usable(config.daemon.attach_timeout_s):
        _LOG.warning("kvtier: not all workers have mapped the daemon's arena yet; until they have, everything is a miss")
    return cache


class WorkerSide:
    """Owns one rank's mapping of the arena, copier and worker half. One thread."""

    def __init__(
        self,
        config: Config,
        sizes: BlockSizes,
        arena_path: str,
        *,
        launch: str,
        num_blocks: int,
        max_step_tokens: int,
        has_draft_layers: bool = False,
    ) -> None:
        """
        Args:
            launch: the same for all processes of one start of the engine
            num_blocks: of the engine
            max_step_tokens: that the engine computes in one
            has_draft_layers: blocks hold KV of layers that run behind the model's, some of them several times in a step
        """
        self._sizes = sizes
        self._has_draft_layers = has_draft_layers
        self._has_reported = False
        """in this step"""
        self._num_blocks = num_blocks
        self._max_step_tokens = max_step_tokens
        self._name = os.path.basename(arena_path)
        self._launch = launch
        self._arena = open_arena(arena_path, config, launch) if config.daemon.socket is None else None
        self._served: ServedArena[Movers] | None = None
        self._half: WorkerHalf | None = None
        self._movers: Movers | None = None
        """of an arena of the engine's own"""
        self._layer_indices: dict[str, int] = {}
        self._config = config
        self._layerwise = config.connector.layerwise
        self._device = torch.device("cpu")
        self._by_layer = False

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Learns where the engine's KV lies. Raises UnsupportedModelError where it is not what the configuration says."""
        layout, views = layout_of(kv_caches, self._num_blocks, self._sizes)
        layers, self._layer_indices = layers_of(kv_caches, self._num_blocks)
        self._device = device = views[0].device
        self._by_layer = not self._has_draft_layers and (self._layerwise == "on" or (self._layerwise == "auto" and device.type != "cpu"))
        rank = get_tensor_model_parallel_rank()
        part = SlotPart(rank, self._sizes.num_workers, self._sizes.engine_block_bytes, self._sizes.blocks_per_slot)
        pool_bytes = pool_slots(self._config, self._sizes) * self._sizes.part_bytes
        used_layers = layers if self._by_layer else None

        def movers_for(arena: Arena) -> Movers:
            if self._arena is None and device.type != "cpu":
                tolerate_captures()  # on a thread of its own, while the engine may be capturing
            with on_device(device):
                return movers_of(arena, layout, views, layers=used_layers, pool_bytes=pool_bytes, settings=self._config.connector)

        is_blending = self._config.blend.enabled
        blender = blender_of(self._num_blocks, self._sizes, self._config.blend, self._max_step_tokens) if is_blending else None
        if self._arena is not None:
            self._movers = movers_for(self._arena)
            self._half = WorkerHalf(self._arena, self._movers, part, blender=blender, stores_at_end=self._has_draft_layers)
        else:
            self._half = WorkerHalf(None, Movers(), part, blender=blender, stores_at_end=self._has_draft_layers)
            hello = Hello("worker", self._name, str(rank), {}, launch=self._launch)
            self._served = ServedArena(self._config.daemon, hello, self, movers_for, release=lambda movers: movers.release())

    def attach(self, arena: Arena, arena_id: str, prepared: Movers) -> None:
        self.half.attach(arena, prepared, arena_id)

    def detach(self) -> None:
        with on_device(self._device):  # on this thread or on the arena's
            self.half.detach()

    def enter_step(self) -> None:
        """Before anything of a step: a daemon's arena may be replaced here. Idempotent in a step."""
        self._has_reported = False
        if self._served is not None:
            self._served.enter()

    def report(self) -> WorkerReport:
        """What ended since the last call. The step is over, unless stores wait for the drafter."""
        report = self.half.report()
        self._has_reported = True
        self._leave_step()
        return report

    @property
    def half(self) -> WorkerHalf:
        """The worker half. Raises RuntimeError before ``register``."""
        if self._half is None:
            raise RuntimeError("the engine has not registered its KV memory")
        return self._half

    def start_loads(self, *, calls_layers: bool) -> None:
        """Starts the step's loads. ``calls_layers``: the forward pass of this step will call ``wait_for_layer``."""
        self.half.start_loads(by_layer=calls_layers and self._by_layer)
        if not calls_layers or not self._by_layer:
            self.half.wait_for_loads()

    def wait_for_layer(self, name: str) -> None:
        """Before a layer reads its KV. A layer without KV of its own reads that of another one: all are waited for."""
        self.half.wait_for_layer(self._layer_indices.get(name))

    def layer_computed(self, name: str) -> None:
        """After a layer has written its KV. A layer without KV of its own writes none."""
        layer = self._layer_indices.get(name)
        if layer is not None:
            self.half.layer_computed(layer)

    def step_computed(self) -> None:
        """The engine has submitted all that computes KV in the step. It says so before or after it asks for the report."""
        self.half.forward_ended()
        self.half.start_stores()
        if self._has_reported:
            self._leave_step()

    def _leave_step(self) -> None:
        """After everything of a step: a daemon's arena may be let go of."""
        if self._served is not None and not self.half.has_stores_to_start:
            self._served.leave()

    def close(self) -> None:
        """Waits for running copies. Idempotent."""
        if self._served is not None:
            self._served.close()
        if self._half is not None:
            self._half.close()
        movers, self._movers = self._movers, None
        if movers is not None:
            movers.release()
        if self._arena is not None:
            self._arena.close()


def pool_slots(config: Config, sizes: BlockSizes) -> int:
    """How many blocks fit into the pool on each device; 0: no pool."""
    return 0 if config.gpu is None else config.gpu.capacity_bytes // sizes.part_bytes
