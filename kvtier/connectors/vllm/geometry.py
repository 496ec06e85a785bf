"""What vLLM's KV memory looks like, read off its configuration and the registered tensors, and what kvtier refuses."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, MLAAttentionSpec

from kvtier.config import Config
from kvtier.connectors.vllm.drafters import drafter_of, refused_method
from kvtier.connectors.vllm.kv_memory import by_blocks
from kvtier.connectors.vllm.versions import allocated_bytes, unnamed_layout, vllm_version
from kvtier.connectors.vllm.weights import weights_of
from kvtier.errors import ConfigError, UnsupportedModelError
from kvtier.hashing import Namespace
from kvtier.layout import Axis, KVLayout, Segment, StrideTable

_SUPPORTED_SPECS = (FullAttentionSpec, MLAAttentionSpec)


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Sizes that the scheduler and all workers must agree on."""

    engine_block_tokens: int
    block_tokens: int
    engine_block_bytes: int
    """bytes of one engine block, all layers, on one rank"""
    num_workers: int

    @property
    def blocks_per_slot(self) -> int:
        """Engine blocks in one kvtier block."""
        return self.block_tokens // self.engine_block_tokens

    @property
    def part_bytes(self) -> int:
        """Bytes of one kvtier block on one rank."""
        return self.blocks_per_slot * self.engine_block_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one kvtier block over all ranks."""
        return self.part_bytes * self.num_workers


def refuse_unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raises UnsupportedModelError naming the first thing that kvtier would get wrong."""
    parallel = vllm_config.parallel_config
    groups = kv_cache_config.kv_cache_groups
    refusals = [
        (not groups, "a model without a KV cache"),
        (len(groups) > 1, f"hybrid KV cache with {len(groups)} groups ({', '.join(type(g.kv_cache_spec).__name__ for g in groups)})"),
        (parallel.pipeline_parallel_size > 1, f"pipeline_parallel_size={parallel.pipeline_parallel_size}"),
        (_size(parallel, "decode_context_parallel_size") > 1, "decode context parallelism"),
        (_size(parallel, "prefill_context_parallel_size") > 1, "prefill context parallelism"),
        (bool(refused_method(vllm_config)), f"speculative decoding with method {refused_method(vllm_config)}"),
        (vllm_config.model_config.is_encoder_decoder, "encoder-decoder models"),
        (bool(getattr(vllm_config.model_config, "is_diffusion", False)), "diffusion models"),
        (vllm_config.model_config.enable_sleep_mode, "enable_sleep_mode"),
        # The scales would follow from the first prompt of each start, and nobody could read what another start has stored.
        (_size(vllm_config.cache_config, "calculate_kv_scales", 0) > 0, "calculate_kv_scales"),
        # Every rank has a scheduler of its own there, which hears of its own rank alone.
        (parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1, "external_launcher with several ranks"),
        # Host memory is one machine's.
        (_size(parallel, "nnodes_within_dp") > 1, "tensor parallelism over several nodes"),
    ]
    kinds = [type(spec) for group in groups for spec in _layer_specs(group, vllm_config)]
    refusals += [(kind not in _SUPPORTED_SPECS, f"KV cache of kind {kind.__name__}") for kind in kinds]
    # vLLM computes wrong tokens where a prompt goes on from KV that is there already, and so turns its own prefix caching off.
    is_cpu = vllm_config.device_config.device_type == "cpu"
    refusals += [(is_cpu and issubclass(kind, MLAAttentionSpec), "MLA on the CPU") for kind in kinds]
    refusals += [
        (_is_non_causal(spec), "attention that looks ahead (non_causal)") for group in groups for spec in _layer_specs(group, vllm_config)
    ]
    for is_refused, what in refusals:
        if is_refused:
            raise UnsupportedModelError(
                f"kvtier does not support this yet: {what}. It supports models with one group of full-attention (or MLA) layers, "
                "tensor parallelism, speculative decoding, and no sleep mode. Start vLLM without the kvtier connector for this model"
            )


def refuse_bad_settings(vllm_config: VllmConfig) -> None:
    """Raises ConfigError where vLLM would fail requests over a lost cache entry."""
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    if policy != "recompute":
        raise ConfigError(
            f"kv_transfer_config.kv_load_failure_policy is {policy!r}: requests would fail where a cache entry is lost. "
            'Allowed with kvtier: "recompute"'
        )


def with_safe_loads(config: Config, vllm_config: VllmConfig) -> Config:
    """``async_load`` as it is going to be: on where vLLM cannot take back a request whose load fails in the step that computes with it.

    Raises:
        ConfigError: it is to be off there.
    """
    wanted, reason = config.connector.async_load, _why_not_in_a_step(vllm_config)
    if reason and wanted is False:
        raise ConfigError(
            f"connector.async_load is false, but {reason}, so that a request whose load fails would answer from what was not loaded. "
            "Allowed with this engine: null, true"
        )
    return config.model_copy(update={"connector": config.connector.model_copy(update={"async_load": bool(wanted or reason)})})


def _why_not_in_a_step(vllm_config: VllmConfig) -> str:
    """Why loads have to end before their request starts; empty: they need not."""
    scheduler_config = vllm_config.scheduler_config
    if scheduler_config.async_scheduling:
        return "vLLM schedules the next step before it hears of this one (async_scheduling)"
    if scheduler_config.long_prefill_token_threshold:
        return "with long_prefill_token_threshold vLLM computes requests that share blocks beside the one that loads them"
    if vllm_config.use_v2_model_runner:
        return "vLLM's newer model runner never goes back in a request (VLLM_USE_V2_MODEL_RUNNER)"
    return ""


def block_sizes_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: Config) -> BlockSizes:
    """The sizes, from configuration alone. Raises ConfigError for a block_tokens that does not fit."""
    group = kv_cache_config.kv_cache_groups[0]
    engine_block_tokens = group.kv_cache_spec.block_size
    block_tokens = config.block_tokens or engine_block_tokens
    if block_tokens % engine_block_tokens:
        raise ConfigError(
            f"block_tokens is {block_tokens}; allowed: auto, or a multiple of the engine's block size, which is {engine_block_tokens}"
        )
    return BlockSizes(
        engine_block_tokens,
        block_tokens,
        _block_bytes(vllm_config, kv_cache_config),
        vllm_config.parallel_config.tensor_parallel_size,
    )


def _block_bytes(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    if drafter_of(vllm_config):  # its layers may be of another shape, which the scheduler is not told
        return allocated_bytes(kv_cache_config) // int(kv_cache_config.num_blocks)
    group = kv_cache_config.kv_cache_groups[0]
    return int(group.kv_cache_spec.page_size_bytes) * len(group.layer_names)


def _layer_specs(group: KVCacheGroupSpec, vllm_config: VllmConfig) -> list[KVCacheSpec]:
    """What the layers of a group need; of its own kind where it is a model's and a drafter's of other shapes."""
    specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return list(specs.values()) if specs and drafter_of(vllm_config) else [group.kv_cache_spec]


def namespace_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: Config, sizes: BlockSizes) -> Namespace:
    """What two engines must have in common to use each other's blocks."""
    model = vllm_config.model_config
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    return Namespace(
        model=str(model.model),
        revision=str(model.revision or ""),
        weights=weights_of(vllm_config),
        engine=f"vllm {vllm_version()}",
        kv_dtype=str(spec.dtype),
        num_layers=len(kv_cache_config.kv_cache_groups[0].layer_names),
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        block_tokens=sizes.block_tokens,
        layout=f"{_layout_name(vllm_config, kv_cache_config)} {spec!r} {sizes.engine_block_tokens} {model.dtype} {model.quantization}"
        f" {numbers_of(vllm_config)}",
        tensor_parallel_size=sizes.num_workers,
        salt=config.namespace_salt,
    )


def numbers_of(vllm_config: VllmConfig) -> str:
    """What besides the model's name decides which numbers are its KV, and which of them a byte means."""
    model = vllm_config.model_config
    overrides, media = model.hf_overrides, model.multimodal_config
    rotation = str(getattr(model.hf_text_config, "rope_parameters", None))
    found = {
        "kv": str(vllm_config.cache_config.cache_dtype),  # the tensors' type is the same for all kinds of eight bits
        "model": f"{overrides.__module__}.{overrides.__qualname__}" if callable(overrides) else overrides,
        "media": None if media is None else media.mm_processor_kwargs,
        "rotation": model.max_model_len if "longrope" in rotation else None,  # which factors are used follows from it
    }
    return json.dumps(found, sort_keys=True, default=str)


def layout_of(kv_caches: Mapping[str, torch.Tensor], num_blocks: int, sizes: BlockSizes) -> tuple[KVLayout, list[torch.Tensor]]:
    """The segments of an engine block, in the order of the model's layers, and an int8 view ``[num_blocks, bytes]`` of each.

    Raises UnsupportedModelError where the tensors do not hold what the configuration says.
    """
    views = [view for name in sorted(kv_caches, key=_natural) for view in _views(name, kv_caches[name], num_blocks)]
    layout = KVLayout(tuple(Segment(view.data_ptr(), view.stride(0), view.shape[1]) for view in views), num_blocks)
    if layout.block_bytes != sizes.engine_block_bytes:
        raise UnsupportedModelError(
            f"the KV tensors hold {layout.block_bytes} bytes a block, the engine's configuration says {sizes.engine_block_bytes}"
        )
    return layout, views


def layers_of(kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> tuple[list[range], dict[str, int]]:
    """The segments of ``layout_of`` that belong to each tensor, in the same order; and each layer's place in that order."""
    ranges: list[range] = []
    names = sorted(kv_caches, key=_natural)
    for name in names:
        start = ranges[-1].stop if ranges else 0
        ranges.append(range(start, start + len(_views(name, kv_caches[name], num_blocks))))
    return ranges, {name: index for index, name in enumerate(names)}


def _views(name: str, tensor: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """One layer's block as contiguous runs of bytes: as a rule one, or two where K and V lie apart."""
    tensor, dim = by_blocks(name, tensor, num_blocks)
    item = tensor.element_size()
    axes = [Axis(size, stride * item) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    try:
        segments = StrideTable(tensor.data_ptr(), axes[dim], (*axes[:dim], *axes[dim + 1 :]), item).segments()
    except ValueError as error:
        what = f"shape {tuple(tensor.shape)}, strides {tuple(tensor.stride())}"
        raise UnsupportedModelError(f"layer {name}: kvtier cannot say where its blocks lie ({what}): {error}") from error
    start = tensor.untyped_storage().data_ptr()
    return [_bytes_view(tensor, s.base_address - start, (num_blocks, s.num_bytes), s.stride_bytes) for s in segments]


def _bytes_view(tensor: torch.Tensor, offset: int, shape: tuple[int, int], stride: int) -> torch.Tensor:
    empty = torch.empty(0, dtype=torch.int8, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), offset, shape, (stride, 1))


def _layout_name(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """What besides the shapes decides what a byte is: the backend's choice, whose layers they are, and on a CPU its instruction set."""
    named = getattr(kv_cache_config, "kv_cache_layout", None)  # since 0.29
    drafter = drafter_of(vllm_config)  # another one of the same shape would be given KV that it makes nothing of
    if vllm_config.device_config.device_type != "cpu":
        return f"{named or unnamed_layout(vllm_config)} {drafter} {vllm_config.device_config.device_type}"
    instructions = f"avx512={torch.cpu._is_avx512_supported()} amx={torch.cpu._is_amx_tile_supported()}"
    return f"{named} {drafter} cpu {platform.machine()} {instructions}"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_non_causal(spec: object) -> bool:
    """Whether KV depends on tokens behind it, so that a prefix says nothing."""
    return bool(getattr(spec, "non_causal", False))  # not in every kind of specification


def _size(settings: object, name: str, absent: int = 1) -> int:
    return int(getattr(settings, name, absent))  # not in every version
