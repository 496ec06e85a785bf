"""The rows of ``kvtier.connectors.vllm.differences``, one test for each, in the installed version; and the interface of 0.33."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from kvtier.config import Config
from kvtier.connectors.messages import MoveJob, StepMessage
from kvtier.connectors.vllm import geometry
from kvtier.connectors.vllm.connector import KVTierConnector, KVTierMetadata
from kvtier.connectors.vllm.versions import vllm_version
from kvtier.copy.cpu import NativeCopier
from kvtier.types import BlockKey
from tests.engine import interface_0_33
from tests.engine.rig import (
    BLOCK_TOKENS,
    LAYERS,
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
HIT = 192
"""of a prompt of 200 tokens, the last of which must be computed"""


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(host(connector={"async_load": request.param}))
    yield made
    made.close()


def since(version: str) -> bool:
    """Whether the installed version is that or newer."""
    installed, other = (tuple(map(int, text.split("."))) for text in (vllm_version(), version))
    return installed >= other


# ---- the worker's hooks -------------------------------------------------------------------------------------------


def test_loads_are_there_before_the_forward_pass(rig: Rig) -> None:
    """Whatever a step computes with is in the engine's blocks when the forward pass begins, also beside requests that load nothing."""
    assert 0 == rig.ask("a", prompt(1))
    seen: dict[str, set[float]] = {}

    def look(output: SchedulerOutput) -> None:
        for name in output.num_scheduled_tokens:
            if name == "b" and name not in seen:
                block_ids = rig.scheduler.kv_cache_manager.get_block_ids(name)[0]
                seen[name] = {value for block_id in block_ids[: HIT // BLOCK_TOKENS] for value in rig.values_in(block_id)}
        rig.fill(output)

    before = rig.add("other", prompt(2))
    after = rig.add("b", prompt(1))
    rig.run(look)
    assert {rig.value_of(after, index) for index in range(HIT // BLOCK_TOKENS)} == seen["b"]
    assert (200, 200 - HIT) == (rig.computed["other"], rig.computed["b"])
    assert before.is_finished()


def test_the_newer_model_runner(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other set of hooks, which CUDA devices use and which passes more arguments: the same loads and stores."""
    with set_current_vllm_config(rig.config):
        active = ActiveKVConnector(rig.config, rig.kv_caches)
    arguments: list[set[str]] = []
    start = type(rig.worker).start_load_kv

    def record(self: KVTierConnector, forward_context: Any, **more: Any) -> None:
        arguments.append(set(more))
        start(self, forward_context, **more)

    monkeypatch.setattr(KVTierConnector, "start_load_kv", record)
    rig.use_newer_runner(active)
    assert 0 == rig.ask("a", prompt(1))
    assert HIT == rig.ask("b", prompt(1))
    assert since("0.29") == any("scheduler_output" in names for names in arguments)


def test_a_step_without_a_forward_pass_copies_too(rig: Rig) -> None:
    """Orders that come with an empty step are carried out in it and reported by it."""
    rig.wait_for_host_memory()
    half = rig.connector._half.half
    plan = half._engine.begin_store([BlockKey(bytes(16))], 0)
    for layer in LAYERS:
        rig.kv_caches[layer][3] = 42.0
    job = MoveJob(plan.job_id, "r", (3,), tuple(ref.slot for ref in plan.slots), tuple(ref.generation for ref in plan.slots))
    output = SchedulerOutput.make_empty()
    output.kv_connector_metadata = KVTierMetadata(StepMessage(stores=(job,)))
    with set_current_vllm_config(rig.config):
        made = KVConnectorModelRunnerMixin.kv_connector_no_forward(output, rig.config)
    assert {plan.job_id: 1} == made.kv_connector_output.kv_connector_worker_meta.report.done
    stored = torch.frombuffer(
        rig.worker._side._arena.view(plan.slots[0].slot * 4096, rig.connector._half.sizes.block_bytes), dtype=torch.float32
    )
    assert {42.0} == set(stored.tolist())
    half._engine.abort_store(plan.job_id)


def test_finished_and_failed_loads_reach_the_scheduler(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads that fail are told to the scheduler, which computes the prompt; the failed blocks stop being hits until stored anew."""
    assert 0 == rig.ask("a", prompt(1))
    scatter = NativeCopier.scatter

    def fail(self: NativeCopier, copies: Any) -> Any:
        raise RuntimeError("injected: this copy fails")

    monkeypatch.setattr(NativeCopier, "scatter", fail)
    request = rig.add("b", prompt(1))
    rig.run()
    assert request.is_finished()
    assert 200 <= rig.computed["b"]
    monkeypatch.setattr(NativeCopier, "scatter", scatter)
    assert HIT == rig.ask("c", prompt(1))


# ---- the scheduler's calls ----------------------------------------------------------------------------------------


def test_the_scheduler_makes_and_binds_the_connector(rig: Rig) -> None:
    """vLLM's scheduler makes the connector through its factory, binds what it binds in this version, and runs with it."""
    assert type(rig.connector) is KVTierConnector
    assert rig.scheduler.requires_kv_delivery is False
    assert since("0.30") == hasattr(KVConnectorBase_V1, "bind_kv_cache_manager")
    assert HIT == rig.ask("a", prompt(1)) + rig.ask("b", prompt(1))
    assert not rig.scheduler.has_requests()


def test_hits_are_counted_by_tier(tmp_path: Path) -> None:
    """Hits add up to what vLLM took, by tier where the version has tiers: first from host memory, after a restart from disk."""
    counted = []
    for restarts, name in enumerate(("host", "disk")):
        rig = Rig(host_and_disk(tmp_path / "tier"))
        if not restarts:
            rig.ask("a", prompt(1))
        assert HIT == rig.ask("b", prompt(1))
        records = [stats.connector_prefix_cache_stats for stats in rig.stats if stats.connector_prefix_cache_stats]
        assert HIT == sum(record.hits for record in records)
        assert {f"{name}_tokens": HIT, "host_tokens": HIT * (name == "host"), "disk_tokens": HIT * (name == "disk")} == rig.transfer_params(
            "b"
        )
        counted += [dict(record.hits_by_source) for record in records if getattr(record, "hits_by_source", None)]
        rig.close()
    assert ([{"host": HIT}, {"disk": HIT}] if since("0.32") else []) == counted


@pytest.mark.parametrize("asks", [{"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}], ids=["prompt log-probabilities", "by name"])
def test_requests_that_must_compute_their_prompt(rig: Rig, asks: dict[str, Any]) -> None:
    """A request that reads no prefix cache loads nothing from kvtier either; what it computes may serve others."""
    assert 0 == rig.ask("a", prompt(1))
    assert 0 == rig.ask("b", prompt(1), sampling=asks)
    assert 0 == rig.ask("c", prompt(2), sampling=asks)
    assert HIT == rig.ask("d", prompt(2))


# ---- memory and names ---------------------------------------------------------------------------------------------


def test_kv_memory_is_read_off_the_tensors() -> None:
    """The same segments whether layers have allocations of their own or share one: an address and a stride for each layer."""
    config = engine_config(host())
    made = cache_config(config, dict.fromkeys(LAYERS, full_attention()))
    kv_caches = make_kv_caches(config, made)
    storages = {tensor.untyped_storage().data_ptr() for tensor in kv_caches.values()}
    assert (1 if since("0.29") else len(LAYERS)) == len(storages)
    sizes = geometry.block_sizes_of(config, made, Config.from_mapping(host()))
    layout, _ = geometry.layout_of(kv_caches, made.num_blocks, sizes)
    expected = [(kv_caches[layer][0].data_ptr(), kv_caches[layer].stride(0) * 4, kv_caches[layer][0].numel() * 4) for layer in LAYERS]
    assert expected == [(segment.base_address, segment.stride_bytes, segment.num_bytes) for segment in layout.segments]


def test_versions_do_not_share_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of vLLM, another layout of its memory or another kind of spec: another namespace."""
    config = engine_config(host())
    settings = Config.from_mapping(host())

    def digest(**spec: Any) -> bytes:
        made = cache_config(config, dict.fromkeys(LAYERS, full_attention(**spec)))
        return geometry.namespace_of(config, made, settings, geometry.block_sizes_of(config, made, settings)).digest

    digests = [digest(), digest(sliding_window=64), digest(dtype=torch.bfloat16)]
    if since("0.29"):
        config.cache_config.kv_cache_layout = "LBNHC"
        digests.append(digest())
        config.cache_config.kv_cache_layout = "LBHNC"
    assert digest() == digests[0]
    monkeypatch.setattr(geometry, "vllm_version", lambda: "0.1")
    digests.append(digest())
    assert len(digests) == len(set(digests))


def test_events_are_vllms_own() -> None:
    """Blocks that come and go are told in this version's own events, which pass through its encoder: keys, parents, sizes, medium."""
    rig = Rig(host(capacity="1MiB"), events=True)  # seven blocks
    taken: list[Any] = []
    rig.scheduler.kv_event_publisher.publish = lambda batch: taken.extend(batch.events)
    first = rig.keys(rig.request("first", prompt(1)))
    rig.wait_for_host_memory()
    rig.ask("a", prompt(1))
    rig.ask("b", prompt(2))
    rig.step()
    rig.close()
    batch = msgspec.msgpack.decode(msgspec.msgpack.encode(KVEventBatch(ts=1.0, events=taken)), type=KVEventBatch)
    stored = {event.block_hashes[0]: event for event in batch.events if isinstance(event, BlockStored) and event.medium == "CPU"}
    removed = [event for event in batch.events if isinstance(event, BlockRemoved) and event.medium == "CPU"]
    assert set(first) <= set(stored)
    assert [None, *first[:-1]] == [stored[key].parent_block_hash for key in first]
    assert {BLOCK_TOKENS} == {event.block_size for event in stored.values()}
    assert set() < {event.block_hashes[0] for event in removed} <= set(first)


# ---- signatures ---------------------------------------------------------------------------------------------------


def kind_of(owner: type, name: str) -> str:
    """How a member is used, to a caller."""
    member = inspect.getattr_static(owner, name)
    return type(member).__name__ if isinstance(member, property | classmethod | staticmethod) else "method"


def why_not(base: type, ours: type, name: str) -> str | None:
    """What keeps a call that ``base`` allows from being understood by ``ours``, if anything."""
    if kind_of(base, name) != kind_of(ours, name):
        return f"{name}: {kind_of(base, name)} there, {kind_of(ours, name)} here"
    if kind_of(base, name) == "property":
        return None
    theirs = list(inspect.signature(getattr(base, name)).parameters.values())
    own = list(inspect.signature(getattr(ours, name)).parameters.values())
    shape = [(one.name, one.kind) for one in theirs]
    if shape != [(one.name, one.kind) for one in own][: len(shape)]:
        return f"{name}: {[one.name for one in theirs]} there, {[one.name for one in own]} here"
    optional = {one.name for one in theirs if one.default is not one.empty}
    missing = optional - {one.name for one in own if one.default is not one.empty}
    more = [one.name for one in own[len(shape) :] if one.default is one.empty]
    return f"{name}: without default: {sorted(missing) + more}" if missing or more else None


BASES = {
    "installed": (KVConnectorBase_V1, KVConnectorBase_V1.__abstractmethods__),
    "0.33": (interface_0_33.KVConnectorBase, interface_0_33.ABSTRACT),
}


@pytest.mark.parametrize("which", BASES)
def test_overrides_accept_what_the_base_class_accepts(which: str) -> None:
    """Every method that the connector has in common with the interface takes the same calls, of the installed version and of 0.33."""
    base, abstract = BASES[which]
    public = [name for name in vars(base) if not name.startswith("_")] + ["__init__"]
    common = [name for name in public if name in vars(KVTierConnector)]
    assert 20 < len(common)
    assert [] == [why for name in common if (why := why_not(base, KVTierConnector, name))]
    assert set() == set(abstract) - set(vars(KVTierConnector))
    assert set() == set(KVTierConnector.__abstractmethods__)


@pytest.mark.parametrize("which", BASES)
def test_every_public_method_is_one_of_the_interface(which: str) -> None:
    """A public method that no version calls is misspelt or gone: each is in the interface, or in that of a newer version."""
    newest = set(vars(interface_0_33.KVConnectorBase))
    public = {name for name in vars(KVTierConnector) if not name.startswith("_")}
    assert set() == public - newest
    if which == "installed":
        assert {"get_external_cache_hit_sources"} >= public - set(dir(KVConnectorBase_V1))


def test_no_private_name_is_taken_twice() -> None:
    """The connector's own attributes and helpers are none of the base class's, which would change under it."""
    own, other = ({*re.findall(r"(?:self\.|def )(_[a-z]\w*)", inspect.getsource(one))} for one in (KVTierConnector, KVConnectorBase_V1))
    assert {"_scheduler", "_worker", "_block_ids"} <= own
    assert {"_connector_metadata", "_role"} <= other
    assert set() == own & other


def test_calls_that_do_not_fit_are_found() -> None:
    """The comparison of signatures itself: another name, a missing parameter, a lost default, another kind."""

    class Base:
        def method(self, a: int, b: int = 1, **more: Any) -> None: ...
        @property
        def flag(self) -> None: ...

    class Renamed:
        def method(self, a: int, c: int = 1, **more: Any) -> None: ...

    class Fewer:
        def method(self, a: int, b: int = 1) -> None: ...

    class Stricter:
        def method(self, a: int, b: int, **more: Any) -> None: ...

    class Method:
        def flag(self) -> None: ...

    assert why_not(Base, Base, "method") is None
    assert [True] * 3 == [bool(why_not(Base, other, "method")) for other in (Renamed, Fewer, Stricter)]
    assert why_not(Base, Method, "flag")
