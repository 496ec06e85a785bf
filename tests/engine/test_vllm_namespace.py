"""What keeps the blocks of engines apart that compute, write or read other numbers for the same tokens."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvtier.config import Config
from kvtier.connectors.vllm import geometry, weights
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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the test's model, to be changed."""
    shutil.copytree(os.environ["KVTIER_TEST_MODEL"], tmp_path / "one")
    return tmp_path / "one"


def digest_of(model: str | Path, **load: str) -> bytes:
    """Of an engine with that model's files."""
    settings, config = Config.from_mapping(host()), engine_config(host())
    made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
    sizes = geometry.block_sizes_of(config, made, settings)
    config.model_config = copy.copy(config.model_config)
    config.model_config.model = str(model)
    config.load_config = dataclasses.replace(config.load_config, **load)
    return geometry.namespace_of(config, made, settings, sizes).digest


def change_a_tensor(checkpoint: Path) -> None:
    """Other numbers in the last one; nothing else."""
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000:] = bytes(byte ^ 1 for byte in content[-1000:])
    path.write_bytes(content)


def test_other_weights_under_the_same_name_keep_blocks_apart(checkpoint: Path) -> None:
    """A checkpoint that is written over, and a link that is turned."""
    link = checkpoint.parent / "current"
    link.symlink_to(checkpoint)
    before = digest_of(checkpoint), digest_of(link)
    assert before == (digest_of(checkpoint), digest_of(link))
    change_a_tensor(checkpoint)
    after = digest_of(checkpoint), digest_of(link)
    assert 4 == len({*before, *after})


def test_weights_that_are_not_loaded_keep_blocks_apart(checkpoint: Path) -> None:
    """Random numbers in place of the model's."""
    assert digest_of(checkpoint) != digest_of(checkpoint, load_format="dummy")


def test_a_name_on_the_hub_is_the_snapshot_that_is_here(checkpoint: Path) -> None:
    """The branch has moved on: the name and revision are the same, the weights are not. One that is not here has its name alone."""
    cache = checkpoint.parent / "hub"
    repository = cache / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    digests = []
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(checkpoint, repository / "snapshots" / commit)
        (repository / "refs/main").write_text(commit)
        digests.append(digest_of("some/model", download_dir=str(cache)))
        change_a_tensor(checkpoint)
    digests.append(digest_of("some/model", download_dir=str(checkpoint.parent)))
    assert 3 == len(set(digests))
    for name in ("some/model", "s3://some/model", "no name: at all"):
        assert digest_of(name) == digest_of(name)


def test_weights_that_cannot_be_read_have_their_name(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The start goes on, and says so."""
    found = [digest_of(checkpoint)]

    def failing(_: object) -> str:
        raise PermissionError(13, "no")

    monkeypatch.setattr(weights, "fingerprint", failing)
    found += [digest_of(checkpoint), digest_of("another")]
    assert 3 == len(set(found))
    assert "cannot be read" in caplog.text


def test_an_adapter_is_the_one_that_was_loaded(tmp_path: Path) -> None:
    """Its files when its name, number and path were first seen; those of now where each request loads it anew."""
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"1")
    (poet, next_poet), inplace = (LoRARequest("poet", number, str(tmp_path)) for number in (1, 2)), LoRARequest("poet", 1, str(tmp_path))
    inplace.load_inplace = True
    first = weights.adapter_weights(poet)
    assert first == weights.adapter_weights(inplace)
    file.write_bytes(b"2")
    assert first == weights.adapter_weights(poet)
    assert 3 == len({first, weights.adapter_weights(inplace), ""})
    assert weights.adapter_weights(inplace) == weights.adapter_weights(next_poet)
    assert "" == weights.adapter_weights(LoRARequest("poet", 3, "/adapters/absent"))


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
