"""The adapter between vLLM and kvtier, in the installed version, without a running engine."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec

from kvtier.config import Config
from kvtier.connectors.vllm import blend_parts
from kvtier.connectors.vllm.connector import KVTierConnector
from kvtier.connectors.vllm.geometry import BlockSizes, block_sizes_of, layout_of, namespace_of, refuse_unsupported, with_safe_loads
from kvtier.connectors.vllm.identity import options_of
from kvtier.copy.base import BlockCopy
from kvtier.copy.cpu import NativeCopier
from kvtier.errors import ConfigError, KVTierError, TierBusyError, UnsupportedModelError
from kvtier.hashing import Namespace
from tests.engine.drafting import DRAFT_LAYERS, Drafter
from tests.engine.rig import (
    BLOCK_TOKENS,
    LAYERS,
    NUM_BLOCKS,
    Rig,
    cache_config,
    engine_config,
    full_attention,
    host,
    host_and_disk,
    make_kv_caches,
    prompt,
)

pytestmark = [pytest.mark.engine, pytest.mark.every_version]
SHAPE = (NUM_BLOCKS, 3, BLOCK_TOKENS, 32)
BLOCK_BYTES = 3 * BLOCK_TOKENS * 32 * 4


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(host())
    yield made
    made.close()


# ---- where the bytes lie ------------------------------------------------------------------------------------------


def own_allocations() -> dict[str, torch.Tensor]:
    return {layer: torch.zeros(SHAPE) for layer in LAYERS}


def heads_inside_tokens() -> dict[str, torch.Tensor]:
    return {layer: torch.zeros(NUM_BLOCKS, BLOCK_TOKENS, 3, 32).permute(0, 2, 1, 3) for layer in LAYERS}


def layers_in_one_allocation() -> dict[str, torch.Tensor]:
    return dict(zip(reversed(LAYERS), torch.zeros(len(LAYERS), *SHAPE), strict=True))


def layers_inside_blocks() -> dict[str, torch.Tensor]:
    return dict(zip(LAYERS, torch.zeros(NUM_BLOCKS, len(LAYERS), *SHAPE[1:]).unbind(1), strict=True))


def keys_and_values_apart() -> dict[str, torch.Tensor]:
    return {layer: torch.zeros(2, NUM_BLOCKS, BLOCK_TOKENS, 3, 16) for layer in LAYERS}


def heads_apart() -> dict[str, torch.Tensor]:
    return {layer: torch.zeros(3, NUM_BLOCKS, BLOCK_TOKENS, 32).permute(1, 0, 2, 3) for layer in LAYERS}


def smaller_blocks_of_the_kernel() -> dict[str, torch.Tensor]:
    return {layer: torch.zeros(2 * NUM_BLOCKS, 3, BLOCK_TOKENS // 2, 32) for layer in LAYERS}


def made_by_vllm() -> dict[str, torch.Tensor]:
    config = engine_config(host())
    return make_kv_caches(config, cache_config(config, dict.fromkeys(LAYERS, full_attention())))


LAYOUTS: tuple[Callable[[], dict[str, torch.Tensor]], ...] = (
    made_by_vllm,
    own_allocations,
    heads_inside_tokens,
    layers_in_one_allocation,
    layers_inside_blocks,
    keys_and_values_apart,
    heads_apart,
    smaller_blocks_of_the_kernel,
)
SIZES = BlockSizes(BLOCK_TOKENS, BLOCK_TOKENS, BLOCK_BYTES * len(LAYERS), 1)


def block_of(tensor: torch.Tensor, block_id: int) -> torch.Tensor:
    """What belongs to a block of the scheduler, as a view, whatever the shape."""
    if tensor.shape[0] == 2 * NUM_BLOCKS:
        return tensor[2 * block_id : 2 * block_id + 2]
    return tensor[block_id] if tensor.shape[0] == NUM_BLOCKS else tensor[:, block_id]


@pytest.mark.parametrize("make", LAYOUTS)
def test_a_block_goes_out_and_comes_back_whole(make: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Of every block all bytes of all layers are copied, and no byte of any other block, however the tensors are laid out."""
    kv_caches = make()
    layout, _ = layout_of(kv_caches, NUM_BLOCKS, SIZES)
    generator = torch.Generator().manual_seed(3)
    for tensor in kv_caches.values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    before = {layer: tensor.clone() for layer, tensor in kv_caches.items()}
    arena = torch.zeros(2 * layout.block_bytes, dtype=torch.int8)
    copier = NativeCopier(layout, arena_address=arena.data_ptr(), arena_bytes=arena.numel())
    copier.gather([BlockCopy(5, 0), BlockCopy(NUM_BLOCKS - 1, layout.block_bytes)]).wait()
    copier.scatter([BlockCopy(7, 0), BlockCopy(0, layout.block_bytes)]).wait()
    came_from = {7: 5, 0: NUM_BLOCKS - 1}
    for layer, tensor in kv_caches.items():
        for block_id in range(NUM_BLOCKS):
            assert torch.equal(block_of(before[layer], came_from.get(block_id, block_id)), block_of(tensor, block_id))


def test_another_dimension_may_have_as_many_places_as_there_are_blocks() -> None:
    """Blocks are counted by the first dimensions: 32 blocks of two of the kernel's, whose heads are 32 numbers wide."""
    tensor = torch.zeros(64, 3, BLOCK_TOKENS // 2, 32)
    layout, _ = layout_of({"layer": tensor}, 32, BlockSizes(BLOCK_TOKENS, BLOCK_TOKENS, BLOCK_BYTES, 1))
    assert [(tensor.data_ptr(), BLOCK_BYTES, BLOCK_BYTES)] == [(it.base_address, it.stride_bytes, it.num_bytes) for it in layout.segments]


def test_layers_are_in_the_order_of_the_model() -> None:
    """Layer 2 comes before layer 10, in whatever order the engine names them: the bytes of a slot do not depend on it."""
    kv_caches = own_allocations()
    layout, views = layout_of(dict(sorted(kv_caches.items(), key=lambda item: item[0])), NUM_BLOCKS, SIZES)
    assert [kv_caches[layer].data_ptr() for layer in LAYERS] == [segment.base_address for segment in layout.segments]
    assert [(NUM_BLOCKS, BLOCK_BYTES)] * len(LAYERS) == [tuple(view.shape) for view in views]


@pytest.mark.parametrize(
    ("kv_caches", "message"),
    [
        ({"layer": torch.zeros(7, 3, 32, 32)}, "no dimension of .* is the number of blocks, 40"),
        ({"layer": torch.zeros(NUM_BLOCKS, 3, 32, 1).expand(-1, -1, -1, 32)}, r"layer layer: .* strides .* overlaps"),
        ({"layer": torch.zeros(NUM_BLOCKS, 3, 32, 16)}, "6144 bytes a block, the engine's configuration says 12288"),
        ({"layer": torch.zeros(SHAPE), "shared": torch.zeros(SHAPE)}, "24576 bytes a block, the engine's configuration says 12288"),
    ],
)
def test_memory_that_is_not_understood_is_refused(kv_caches: dict[str, torch.Tensor], message: str) -> None:
    """Tensors that do not hold what the configuration says stop the engine at start, with what is wrong."""
    with pytest.raises(UnsupportedModelError, match=message):
        layout_of(kv_caches, NUM_BLOCKS, BlockSizes(BLOCK_TOKENS, BLOCK_TOKENS, BLOCK_BYTES, 1))


@pytest.mark.parametrize(("asked", "per_slot"), [("auto", 1), (BLOCK_TOKENS, 1), (4 * BLOCK_TOKENS, 4)])
def test_block_sizes(asked: str | int, per_slot: int) -> None:
    """A kvtier block is one engine block or several, over all layers and ranks."""
    config = engine_config(host())
    made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
    config.parallel_config.tensor_parallel_size = 2
    sizes = block_sizes_of(config, made, Config.from_mapping(host(block_tokens=asked)))
    assert (BLOCK_TOKENS, per_slot * BLOCK_TOKENS, per_slot) == (sizes.engine_block_tokens, sizes.block_tokens, sizes.blocks_per_slot)
    assert per_slot * len(LAYERS) * BLOCK_BYTES * 2 == sizes.block_bytes


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_latent_attention_is_served_where_vllm_can_go_on_from_it() -> None:
    """MLA is refused for the CPU alone."""
    config = engine_config(host())
    made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
    made.kv_cache_groups = [KVCacheGroupSpec(list(LAYERS), LATENT)]
    config.device_config.device_type = "cuda"
    refuse_unsupported(config, made)


def set_on(owner: str, name: str, value: Any) -> Callable[[VllmConfig], None]:
    return lambda config: setattr(getattr(config, owner), name, value)


def speculate(method: str) -> Callable[[VllmConfig], None]:
    return Drafter(2, lambda: True, method).configure


def set_kind(name: str) -> Callable[[VllmConfig], None]:
    """Of a cached property, which vLLM has read off the model's own configuration."""
    return lambda config: config.model_config.__dict__.update({name: True})


def let_scales_follow_from_prompts(config: VllmConfig) -> None:
    """A setting of versions up to 0.28."""
    config.cache_config.__dict__["calculate_kv_scales"] = True


def launch_from_outside(config: VllmConfig) -> None:
    config.parallel_config.distributed_executor_backend = "external_launcher"
    config.parallel_config.world_size = 2


def spread_over_nodes(config: VllmConfig) -> None:
    config.parallel_config.nnodes = 2


@pytest.mark.parametrize("role", list(KVConnectorRole))
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_on("parallel_config", "pipeline_parallel_size", 2), "pipeline_parallel_size=2"),
        (set_on("parallel_config", "decode_context_parallel_size", 2), "decode context parallelism"),
        (set_on("parallel_config", "prefill_context_parallel_size", 2), "prefill context parallelism"),
        (speculate("extract_hidden_states"), "speculative decoding with method extract_hidden_states"),
        (set_kind("is_encoder_decoder"), "encoder-decoder models"),
        (set_kind("is_diffusion"), "diffusion models"),
        (set_on("model_config", "enable_sleep_mode", True), "enable_sleep_mode"),
        (let_scales_follow_from_prompts, "calculate_kv_scales"),
        (launch_from_outside, "external_launcher with several ranks"),
        (spread_over_nodes, "tensor parallelism over several nodes"),
    ],
    ids=[
        "pipeline",
        "decode-context",
        "prefill-context",
        "speculative",
        "encoder-decoder",
        "diffusion",
        "sleep",
        "scales",
        "launcher",
        "nodes",
    ],
)
def test_what_is_refused_names_the_setting(change: Callable[[VllmConfig], None], named: str, role: KVConnectorRole) -> None:
    """Either half stops the engine at start; the message names what is not supported and how to go on."""
    config = engine_config(host())
    made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
    change(config)
    refuses(config, made, role, UnsupportedModelError, named, "Start vLLM without the kvtier connector")


SLIDING = SlidingWindowSpec(block_size=BLOCK_TOKENS, num_kv_heads=3, head_size=16, dtype=torch.float32, sliding_window=64)
LATENT = MLAAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=576, dtype=torch.float32)
STATE = MambaSpec(block_size=BLOCK_TOKENS, shapes=((4, 16),), dtypes=(torch.float32,))


@pytest.mark.parametrize("role", list(KVConnectorRole))
@pytest.mark.parametrize(
    ("specs", "named"),
    [
        ([SLIDING], "KV cache of kind SlidingWindowSpec"),
        ([STATE], "KV cache of kind MambaSpec"),
        ([LATENT], "MLA on the CPU"),
        ([full_attention(), SLIDING], r"hybrid KV cache with 2 groups \(FullAttentionSpec, SlidingWindowSpec\)"),
        ([full_attention(), STATE], r"hybrid KV cache with 2 groups \(FullAttentionSpec, MambaSpec\)"),
        ([], "a model without a KV cache"),
        ([full_attention(non_causal=True)], r"attention that looks ahead \(non_causal\)"),
    ],
    ids=["sliding", "state", "latent", "hybrid-sliding", "hybrid-state", "none", "non-causal"],
)
def test_kinds_of_layers_that_are_refused(specs: list[Any], named: str, role: KVConnectorRole) -> None:
    """Only one group of full attention is served; anything else is refused by its name."""
    config = engine_config(host())
    made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
    made.kv_cache_groups = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
    refuses(config, made, role, UnsupportedModelError, named, "Start vLLM without the kvtier connector")


@pytest.mark.parametrize("role", list(KVConnectorRole))
@pytest.mark.parametrize(
    ("settings", "transfer", "named", "way_out"),
    [
        (host(), {"kv_load_failure_policy": "fail"}, "kv_load_failure_policy is 'fail'", 'Allowed with kvtier: "recompute"'),
        (host(block_tokens=48), {}, "block_tokens is 48", "allowed: auto, or a multiple of .* 32"),
        ({}, {}, "tiers", "host"),
        ({"tiers": [{"type": "host", "capacity": "lots"}]}, {}, r"tiers\[0\]\.capacity", "lots"),
        (host(colour="red"), {}, "colour", ""),
        ({"config": "/nowhere/kvtier.yaml"}, {}, "/nowhere/kvtier.yaml", ""),
        ({"config": "/nowhere/kvtier.yaml", **host()}, {}, "config", ""),
    ],
    ids=["policy", "block-tokens", "no-tiers", "bad-size", "unknown-key", "no-file", "both"],
)
def test_bad_settings_are_refused(
    settings: dict[str, Any], transfer: dict[str, Any], named: str, way_out: str, role: KVConnectorRole
) -> None:
    """A wrong ``kv_connector_extra_config``, or a policy that fails requests over a lost cache entry, is an error by its name."""
    config = engine_config(settings, **transfer)
    made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
    refuses(config, made, role, ConfigError, named, way_out)


@pytest.mark.parametrize("role", list(KVConnectorRole))
@pytest.mark.parametrize(
    ("engine", "named"),
    [({"async_scheduling": True}, "async_scheduling"), ({"long_prefill_token_threshold": 32}, "long_prefill_token_threshold")],
)
def test_loads_in_a_step_are_refused_where_they_cannot_fail(engine: dict[str, Any], named: str, role: KVConnectorRole) -> None:
    """An engine that could not take a request back when its load fails; without the setting, loads end before requests start there."""
    for async_load in (False, None):
        config = engine_config(host(connector={"async_load": async_load}))
        for name, value in engine.items():
            setattr(config.scheduler_config, name, value)
        if async_load is None:
            settings = Config.from_mapping(config.kv_transfer_config.kv_connector_extra_config)
            assert settings.connector.async_load is None
            assert with_safe_loads(settings, config).connector.async_load is True
        else:
            made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
            refuses(config, made, role, ConfigError, f"connector.async_load is false, .*{named}", "Allowed with this engine: null, true")
    plain = engine_config(host())
    assert with_safe_loads(Config.from_mapping(host()), plain).connector.async_load is False


def test_a_host_tier_below_one_block_is_refused() -> None:
    """The capacity, the field and what a block needs are named; the half that owns the cache says so."""
    config = engine_config(host(capacity="64KiB"))
    made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
    refuses(config, made, KVConnectorRole.SCHEDULER, ConfigError, r"tiers\[0\]\.capacity", "at least 147456")


def test_an_engine_that_does_not_start_leaves_no_memory(tmp_path: Path) -> None:
    """Also where another engine holds the disk, which is found out last: the holder is named, shared memory is free again."""
    first = Rig(host_and_disk(tmp_path / "tier"))
    config = engine_config(host_and_disk(tmp_path / "tier"))
    made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
    refuses(config, made, KVConnectorRole.SCHEDULER, TierBusyError, str(os.getpid()))
    first.close()


def test_two_engines_of_one_name_share_no_memory() -> None:
    """Each gives out the slots of its host memory as it likes, whatever ``engine_id`` says."""
    first = engine_config(host())
    second = copy.deepcopy(first)
    second.instance_id = "another start"
    engine_id = first.kv_transfer_config.engine_id
    made = cache_config(first, dict.fromkeys(LAYERS, full_attention()))
    halves = [(config, role) for config in (first, second) for role in (KVConnectorRole.WORKER, KVConnectorRole.SCHEDULER)]
    connectors = [KVConnectorFactory.create_connector(config, role, made) for config, role in halves]
    names = [path.name for path in Path("/dev/shm").glob(f"kvtier-*{engine_id}*")]
    for connector in connectors:
        connector.shutdown()
    assert len(names) == 2
    assert [] == list(Path("/dev/shm").glob(f"kvtier-*{engine_id}*"))


def test_an_engine_that_was_asked_nothing_leaves_no_memory_when_it_is_killed(rig: Rig) -> None:
    """vLLM kills its engine core where a server is stopped. The name of host memory is gone before, with the start's last call."""
    engine_id = rig.config.kv_transfer_config.engine_id
    assert len(list(Path("/dev/shm").glob(f"kvtier-*{engine_id}*"))) == 1
    rig.connector.set_xfer_handshake_metadata({})  # what vLLM makes of workers that have none
    assert [] == list(Path("/dev/shm").glob(f"kvtier-*{engine_id}*"))
    rig.ask("first", prompt(1, 64))
    assert rig.ask("again", prompt(1, 64)) > 0


def refuses(config: VllmConfig, made: Any, role: KVConnectorRole, kind: type[KVTierError], *texts: str) -> None:
    """The connector is not made, the error says all that, and no shared memory is left behind."""
    before = set(Path("/dev/shm").glob("kvtier-*"))
    with pytest.raises(kind) as caught:
        KVConnectorFactory.create_connector(config, role, made)
    for text in texts:
        assert caught.match(text)
    engine_id = config.kv_transfer_config.engine_id
    assert [] == [path for path in set(Path("/dev/shm").glob("kvtier-*")) - before if engine_id in path.name]


# ---- speculative decoding -----------------------------------------------------------------------------------------


def namespace_with(method: str, model: str = "") -> Namespace:
    """Of an engine with that drafter; empty: with none."""
    settings = Config.from_mapping(host())
    config = engine_config(host())
    if method:
        speculate(method)(config)
        config.speculative_config.model = model
    layers = (*LAYERS, *DRAFT_LAYERS) if model else LAYERS
    made = cache_config(config, dict.fromkeys(layers, full_attention()))
    return namespace_of(config, made, settings, block_sizes_of(config, made, settings))


def test_which_drafters_share_blocks() -> None:
    """Those without KV of their own do, also with an engine that drafts nothing; another drafter's KV is of no use."""
    alone = namespace_with("")
    assert [alone] * 3 == [namespace_with(method) for method in ("ngram", "suffix", "medusa")]
    others = [namespace_with(*drafter) for drafter in (("eagle", "a"), ("eagle", "b"), ("eagle3", "a"), ("draft_model", "a"), ("new", "a"))]
    assert 6 == len({alone.digest, *(one.digest for one in others)})
    assert namespace_with("eagle", "a") == others[0]


@pytest.mark.parametrize("method", ["ngram", "medusa", "eagle", "mtp", "draft_model"])
def test_chunks_are_not_reused_where_a_drafter_needs_their_kv(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """They hold KV of the model's layers alone; the reason is named."""
    monkeypatch.setattr(blend_parts, "_tokenizer", lambda *_: None)
    config = engine_config(host())
    speculate(method)(config)
    refusal = blend_parts.blend_parts_of(config, Config.from_mapping(host(blend={"enabled": True}))).refusal
    named = f"speculative decoding with a drafter that has KV of its own ({method} "
    assert refusal == "" if method in ("ngram", "medusa") else named in refusal


# ---- which requests share blocks ----------------------------------------------------------------------------------


def tenant(name: str) -> dict[str, Any]:
    """A request that names its tenant."""
    return {"sampling": {"extra_args": {"kv_transfer_params": {"kvtier": {"tenant": name}}}}}


def adapter(name: str = "poet", number: int = 1, path: str = "/adapters/poet") -> LoRARequest:
    return LoRARequest(name, number, path)


def image(identifier: str, offset: int = 0, length: int = 16) -> list[MultiModalFeatureSpec]:
    return [MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset=offset, length=length))]


APART: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {"cache_salt": "a"}),
    ({"cache_salt": "a"}, {"cache_salt": "b"}),
    ({}, {"lora_request": adapter()}),
    ({"lora_request": adapter()}, {"lora_request": adapter("critic")}),
    ({"lora_request": adapter()}, {"lora_request": adapter(path="/adapters/other")}),
    ({"lora_request": adapter("x")}, {"cache_salt": "x"}),
    ({}, tenant("x")),
    (tenant("x"), tenant("y")),
    ({"cache_salt": "x"}, tenant("x")),
    ({}, {"mm_features": image("cat")}),
    ({"mm_features": image("cat")}, {"mm_features": image("dog")}),
    ({"mm_features": image("cat", length=16)}, {"mm_features": image("cat", length=17)}),
)


@pytest.mark.parametrize(("first", "second"), APART)
def test_what_tells_requests_apart_is_in_their_keys(rig: Rig, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Equal requests have equal keys; those that differ in nothing but adapter, salt or picture have no key in common."""
    keys = [rig.keys(rig.request(str(number), prompt(1), **more)) for number, more in enumerate((first, first, second, second))]
    assert 6 == len(keys[0]) == len(set(keys[0]))
    assert keys[0] == keys[1]
    assert keys[2] == keys[3]
    assert set() == set(keys[0]) & set(keys[2])


def test_an_adapter_with_other_weights_is_another(rig: Rig, tmp_path: Path) -> None:
    """Under the same name, number and path, where each request loads it anew."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    first = rig.keys(rig.request("first", prompt(1), lora_request=adapter(path=str(tmp_path))))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"2")
    again = adapter(path=str(tmp_path))
    again.load_inplace = True
    second = rig.keys(rig.request("second", prompt(1), lora_request=again))
    assert 6 == len(first) == len(second)
    assert set() == set(first) & set(second)


def test_a_picture_counts_from_where_it_lies(rig: Rig) -> None:
    """Blocks before a picture are shared; the block where it begins and all behind are not."""
    keys = [rig.keys(rig.request(name, prompt(1), mm_features=image(name, offset=70, length=40))) for name in ("cat", "dog")]
    assert [True, True, False, False, False, False] == [one == other for one, other in zip(*keys, strict=True)]


@pytest.mark.parametrize("more", [{"cache_salt": "a"}, {"lora_request": adapter()}, tenant("a")])
def test_requests_load_their_own_blocks_only(rig: Rig, more: dict[str, Any]) -> None:
    """Through vLLM's scheduler: the same prompt with another salt or adapter is computed, with the same one it is loaded."""
    assert 0 == rig.ask("plain", prompt(1))
    assert 0 == rig.ask("first", prompt(1), **more)
    assert [192, 192] == [rig.ask("plain again", prompt(1)), rig.ask("again", prompt(1), **more)]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, (True, True)),
        ({"other connector": {"load": False}}, (True, True)),
        ({"kvtier": {"load": False}}, (False, True)),
        ({"kvtier": {"store": False}}, (True, False)),
        ({"kvtier": {"load": "no", "speed": 3, "store": False}}, (True, False)),
        ({"kvtier": "no"}, (True, True)),
        (["kvtier"], (True, True)),
    ],
)
def test_what_a_request_may_ask_for(rig: Rig, params: dict[str, Any] | None, expected: tuple[bool, bool]) -> None:
    """``kv_transfer_params["kvtier"]`` switches loading and storing; what makes no sense is ignored."""
    request = rig.request("a", prompt(1), sampling={"extra_args": {"kv_transfer_params": params} if params else None})
    options = options_of(request)
    assert expected == (options.load, options.store)


def test_prompts_without_token_ids_pass_kvtier_by(rig: Rig) -> None:
    """A prompt of embeddings has no keys: nothing is looked up for it, nothing stored."""
    request = rig.request("a", prompt(1))
    request.prompt_embeds = torch.zeros(200, 8)
    options = options_of(request)
    assert (False, False) == (options.load, options.store)


# ---- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_go_through_vllms_metrics(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """The counters reach vLLM's log line and Prometheus, added up over steps, each step once."""
    rig.ask("a", prompt(1))
    rig.ask("b", prompt(1))
    reports = [stats.kv_connector_stats for stats in rig.stats if stats.kv_connector_stats]
    expected = {"host.stored_blocks": 6, "host.loaded_blocks": 6, "lookup.blocks": 12, "lookup.hit_blocks": 6}
    log = KVConnectorLogging(rig.config.kv_transfer_config)
    for report in reports:
        log.observe(dict(report))
    total = log.transfer_stats_accumulator
    assert total is not None
    assert not total.is_empty()
    assert expected == {name: total.reduce().get(name) for name in expected}
    lines: list[str] = []
    log.log(lambda text, *args: lines.append(text % args))
    assert ["host.stored_blocks=6"] == [word for line in lines for word in line.replace(",", "").split() if word.startswith("host.stored")]

    prometheus = KVConnectorProm(rig.config, ["engine"], {0: ["0"], 1: ["1"]})
    for report in [*reports, {"lookup.blocks": -1}]:
        prometheus.observe(dict(report), 1)
    values = {name: REGISTRY.get_sample_value(f"kvtier:{name.replace('.', '_')}_total", {"engine": "1"}) for name in expected}
    assert expected == values
    assert prometheus.prom_metrics is not None
    for counter in prometheus.prom_metrics._counters.values():
        REGISTRY.unregister(counter)


def test_statistics_can_be_empty_and_reset() -> None:
    """No news is no report; what was reset counts from nothing again; an unknown name from another version does no harm."""
    stats = KVTierConnector.build_kv_connector_stats()
    assert stats.is_empty()
    stats.aggregate(KVTierConnector.build_kv_connector_stats({"host.stored_blocks": 2}))
    stats.aggregate(KVTierConnector.build_kv_connector_stats({"host.stored_blocks": 3, "of.tomorrow": 1}))
    assert {"host.stored_blocks": 5, "of.tomorrow": 1} == stats.reduce()
    stats.reset()
    assert stats.is_empty()
    assert {} == stats.reduce()
