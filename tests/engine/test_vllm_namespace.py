"""What keeps the blocks of engines apart that compute, write or read other numbers for the same tokens."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvtier.config import Config
from kvtier.connectors.vllm import geometry
from tests.engine.rig import LAYERS, cache_config, engine_config, full_attention, host

pytestmark = [pytest.mark.engine, pytest.mark.every_version]


def set_rotation(config: VllmConfig, max_model_len: int) -> None:
    config.model_config = copy.copy(config.model_config)
    config.model_config.max_model_len = max_model_len
    config.model_config.hf_text_config = SimpleNamespace(rope_parameters={"rope_type": "longrope"})


OTHER_NUMBERS: tuple[Callable[[VllmConfig], object], ...] = (
    lambda config: setattr(config.cache_config, "cache_dtype", "fp8_e4m3"),
    lambda config: setattr(config.cache_config, "cache_dtype", "fp8_e5m2"),
    lambda config: setattr(config.model_config, "hf_overrides", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    lambda config: setattr(config.model_config, "hf_overrides", set_rotation),
    lambda config: setattr(config.model_config, "multimodal_config", SimpleNamespace(mm_processor_kwargs={"size": 336})),
    lambda config: set_rotation(config, 4096),
    lambda config: set_rotation(config, 131072),
)


def test_settings_that_change_numbers_keep_blocks_apart() -> None:
    """The kind of eight bits, what is set in place of the model's own settings, how pictures are prepared, the factors of a rotation."""
    settings, digests = Config.from_mapping(host()), []
    for change in (lambda _: None, *OTHER_NUMBERS):
        config = engine_config(host())
        made = cache_config(config, dict.fromkeys(LAYERS, full_attention(dtype=torch.uint8)))
        sizes = geometry.block_sizes_of(config, made, settings)
        change(config)
        digests.append(geometry.namespace_of(config, made, settings, sizes).digest)
        assert digests[-1] == geometry.namespace_of(config, made, settings, sizes).digest
    assert len(digests) == len(set(digests))


def test_a_layout_without_a_name_is_known_by_what_it_follows_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA devices up to 0.28: heads inside tokens, or tokens inside heads, in tensors of one shape."""
    settings, config = Config.from_mapping(host()), engine_config(host())
    made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
    made.kv_cache_layout = None
    sizes = geometry.block_sizes_of(config, made, settings)
    config.device_config.device_type = "cuda"
    digests = []
    for name in ("NHD", "HND"):
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", name)
        digests.append(geometry.namespace_of(config, made, settings, sizes).digest)
    config.attention_config = dataclasses.replace(config.attention_config, backend=AttentionBackendEnum.FLASHINFER)
    digests.append(geometry.namespace_of(config, made, settings, sizes).digest)
    assert 3 == len(set(digests))
