"""KVTierConnector: kvtier as a KV connector of vLLM. Only translation; the decisions are in the halves beside this package."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from kvtier.config import Config
from kvtier.connectors.messages import ScheduledRequest, StepMessage, WorkerReport
from kvtier.connectors.scheduler import IDLE_WAIT_S
from kvtier.connectors.vllm.blend_parts import blend_parts_of
from kvtier.connectors.vllm.drafters import drafter_of
from kvtier.connectors.vllm.geometry import (
    BlockSizes,
    block_sizes_of,
    namespace_of,
    refuse_bad_settings,
    refuse_unsupported,
    with_safe_loads,
)
from kvtier.connectors.vllm.identity import are_media_numbered, identity_of, options_of, spans_of
from kvtier.connectors.vllm.metrics import KVTierPromMetrics, KVTierStats
from kvtier.connectors.vllm.own_hashes import OwnHashes
from kvtier.connectors.vllm.plugin import register
from kvtier.connectors.vllm.sides import SchedulerSide, WorkerSide
from kvtier.connectors.vllm.unfilled import UnfilledBlocks
from kvtier.connectors.vllm.versions import WorkerMetadata, hit_sources, lost_block_requests

register()  # here too: the connector may be named by its module where vLLM's plugins are switched off


@dataclass
class KVTierMetadata(KVConnectorMetadata):
    """The scheduler half's message to the workers, in vLLM's envelope."""

    message: StepMessage = field(default_factory=StepMessage)


@dataclass
class KVTierWorkerMetadata(WorkerMetadata):
    """The workers' reports to the scheduler half, in vLLM's envelope."""

    report: WorkerReport = field(default_factory=WorkerReport)

    def aggregate(self, other: WorkerMetadata) -> WorkerMetadata:
        assert isinstance(other, KVTierWorkerMetadata)
        self.report.merge(other.report)
        return self


class KVTierConnector(KVConnectorBase_V1):
    """Keeps vLLM's KV cache in kvtier. Named in ``kv_transfer_config``; never imported by users.

    ``kv_connector_extra_config`` holds kvtier's settings, or ``{"config": "/path/to/kvtier.yaml"}``.

    Raises at start:
        ConfigError: a setting is wrong.
        UnsupportedModelError: kvtier would get this model or setting of vLLM wrong.
        ArenaError, TierError: a tier cannot be had.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = Config.from_mapping(dict(vllm_config.kv_transfer_config.kv_connector_extra_config))
        logging.getLogger("kvtier").setLevel(config.log_level.upper())
        refuse_bad_settings(vllm_config)
        config = with_safe_loads(config, vllm_config)
        refuse_unsupported(vllm_config, kv_cache_config)
        sizes = block_sizes_of(vllm_config, kv_cache_config, config)
        self._block_ids: dict[str, list[int]] = {}
        self._ended: list[list[int]] = []
        """blocks of requests that ended or lost them since the last report, which may speak of them"""
        self._unfilled = UnfilledBlocks(sizes.engine_block_tokens)
        self._own_hashes = OwnHashes()
        self._are_media_numbered = are_media_numbered(vllm_config)
        self._worker: WorkerSide | None = None
        self._scheduler: SchedulerSide | None = None
        arena_path = _arena_path(vllm_config)
        if role == KVConnectorRole.SCHEDULER:
            namespace = namespace_of(vllm_config, kv_cache_config, config, sizes)
            is_async = vllm_config.device_config.device_type != "cpu"
            events = _wants_events(vllm_config)
            self._scheduler = SchedulerSide(
                config,
                namespace,
                sizes,
                arena_path,
                launch=vllm_config.instance_id,
                name=_engine_name(vllm_config),
                stores_are_async=is_async,
                events=events,
                blend=blend_parts_of(vllm_config, config),
                idle_wait_s=0.0 if vllm_config.parallel_config.data_parallel_size > 1 else IDLE_WAIT_S,  # its ranks step together
            )
        else:
            has_draft_layers = bool(drafter_of(vllm_config))
            self._worker = WorkerSide(
                config,
                sizes,
                arena_path,
                launch=vllm_config.instance_id,
                num_blocks=kv_cache_config.num_blocks,
                max_step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
                has_draft_layers=has_draft_layers,
            )

    # ---- what kvtier is -----------------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a cache. A lost block is a miss, never a lost request."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:  # noqa: ARG003
        """False: nothing is done inside the forward pass."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return KVTierStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KVTierPromMetrics:
        return KVTierPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- scheduler half -----------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._unfilled.pool = gpu_block_pool

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """Workers have nothing to say to one another. vLLM calls this at start, once all of them have registered their KV memory."""
        self._half.forget_arena_name(is_mapped=True)

    def on_new_request(self, request: Request) -> None:
        """Nothing yet: a request costs nothing before it is looked up."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        half = self._half.half
        if not half.knows(request.request_id):
            options = options_of(request, are_media_numbered=self._are_media_numbered)
            half.add_request(
                request.request_id,
                request.all_token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                identity=identity_of(request, options),
                options=options,
            )
        self._note_media(request)
        matched = half.match(request.request_id, request.num_tokens, num_computed_tokens)
        if matched.is_blended:
            self._own_hashes.give(request)
        return matched.num_tokens, matched.is_async

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        self._note_media(request)
        self._own_hashes.keep(request.request_id)
        self._half.half.allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[Any, int]:
        host_tokens, disk_tokens = self._half.half.hit_tokens(request.request_id)
        return hit_sources(host_tokens, disk_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVTierMetadata:
        self._own_hashes.end_step()
        lost = lost_block_requests(scheduler_output)
        for request_id in lost:
            self._ended.append(self._block_ids.pop(request_id, []))
        self._unfilled.keep(self._block_ids.values())
        scheduled = self._scheduled(scheduler_output)
        message = self._half.half.build_step(scheduled, lost)
        unfilled = self._unfilled.read_by(scheduled, scheduler_output.num_scheduled_tokens)
        return KVTierMetadata(replace(message, unfilled=unfilled) if unfilled else message)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        metadata = connector_output.kv_connector_worker_meta
        report = metadata.report if isinstance(metadata, KVTierWorkerMetadata) else None
        unfilled = connector_output.invalid_block_ids or set()
        if unfilled:
            self._unfilled.add(unfilled, [*self._block_ids.values(), *self._ended])
        self._ended.clear()
        self._half.half.finish_step(report, unfilled)
        self._half.forget_arena_name()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._ended.append(self._block_ids.pop(request.request_id, []))
        self._own_hashes.forget(request.request_id)
        half = self._half.half
        host_tokens, disk_tokens = half.hit_tokens(request.request_id)
        blended = half.blended(request.request_id)
        is_held = half.request_finished(request.request_id)
        said = {"host_tokens": host_tokens, "disk_tokens": disk_tokens, **({"blend": blended} if blended else {})}
        return is_held, {"kvtier": said}

    def reset_cache(self) -> bool:
        return self._half.half.reset()

    def take_events(self) -> Iterable[KVCacheEvent]:
        return [_to_vllm(event, self._half.sizes) for event in self._half.half.take_events()]

    def has_pending_push_work(self) -> bool:
        """Keeps an idle engine stepping until copies have been reported."""
        return self._scheduler is not None and self._scheduler.half.has_pending_work

    # ---- worker half --------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._side.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if isinstance(kv_connector_metadata, KVTierMetadata):
            self._side.enter_step()
            self._side.half.before_overwrite(kv_connector_metadata.message)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, KVTierMetadata)
        self._side.enter_step()
        self._side.half.begin_step(connector_metadata.message)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        # A replayed CUDA graph calls nothing; where a whole step is one graph, everything must be there before it.
        self._side.start_loads(calls_layers=forward_context.cudagraph_runtime_mode != CUDAGraphMode.FULL)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._side.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        self._side.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        self._side.step_computed()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        transferred = self._side.half.finish()
        return transferred.sent or None, transferred.received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._side.half.failed_block_ids()

    def build_connector_worker_meta(self) -> KVTierWorkerMetadata | None:
        report = self._side.report()
        return KVTierWorkerMetadata(report) if report else None

    # ---- both ---------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        growth = self._scheduler.half.take_stats() if self._scheduler is not None else {}
        return KVTierStats(data=growth) if growth else None

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()

    @property
    def _half(self) -> SchedulerSide:
        assert self._scheduler is not None, "called on the worker's connector"
        return self._scheduler

    @property
    def _side(self) -> WorkerSide:
        assert self._worker is not None, "called on the scheduler's connector"
        return self._worker

    def _note_media(self, request: Request) -> None:
        """What has come since with a further part of its input: asked for before its keys are."""
        if request.resumable and request.mm_features:
            self._half.half.note_spans(request.request_id, spans_of(request))

    def _scheduled(self, output: SchedulerOutput) -> Sequence[ScheduledRequest]:
        """Who computes what in this step, with all blocks so far."""
        scheduled: list[ScheduledRequest] = []
        num_scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            block_ids = self._block_ids[new.req_id] = list(new.block_ids[0])
            scheduled.append(ScheduledRequest(new.req_id, block_ids, new.num_computed_tokens + num_scheduled[new.req_id]))
        cached = output.scheduled_cached_reqs
        for request_id, new_blocks, num_computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if request_id in cached.resumed_req_ids:
                self._block_ids[request_id] = list(new_blocks[0]) if new_blocks is not None else []
            elif new_blocks is not None:
                self._block_ids[request_id].extend(new_blocks[0])
            scheduled.append(ScheduledRequest(request_id, self._block_ids[request_id], num_computed + num_scheduled[request_id]))
        return scheduled


def _arena_path(vllm_config: VllmConfig) -> str:
    """Shared by the processes of one engine and by no other engine."""
    parallel = vllm_config.parallel_config
    return f"/dev/shm/kvtier-{os.getuid()}-{vllm_config.kv_transfer_config.engine_id}-{parallel.data_parallel_rank}"


def _engine_name(vllm_config: VllmConfig) -> str:
    """How ``kvtier.Controller.of`` finds the engine: its ``engine_id``, and its rank where there are several."""
    parallel, engine_id = vllm_config.parallel_config, str(vllm_config.kv_transfer_config.engine_id)
    return engine_id if parallel.data_parallel_size == 1 else f"{engine_id}-{parallel.data_parallel_rank}"


def _wants_events(vllm_config: VllmConfig) -> bool:
    events = vllm_config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


def _to_vllm(event: Any, sizes: BlockSizes) -> KVCacheEvent:
    medium = "CPU" if event.tier == "host" else "STORAGE"
    if not event.stored:
        return BlockRemoved(block_hashes=[event.meta.key], medium=medium)
    return BlockStored(
        block_hashes=[event.meta.key],
        parent_block_hash=event.meta.parent,
        token_ids=[],
        block_size=sizes.block_tokens,
        lora_id=None,
        medium=medium,
        lora_name=None,
    )
