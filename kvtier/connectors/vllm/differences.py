"""The table of all differences between vLLM versions that the connector lives with. Data only: read without vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VERSIONS: Mapping[str, str] = {
    "0.27": "oldest; the tests marked `every_version` run in it",
    "0.32": "every test of the engine runs in it",
    "0.33": "after its signatures; not run, since it has no CPU build",
}
"""Version -> how much is known of it. Those between lie between: each difference says since when."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same in all of :data:`VERSIONS`."""

    what: str
    changed: str
    """what is how in which versions"""
    handling: str
    """what kvtier does, in all versions alike"""
    test: str
    """the test in tests/engine that fails where it does not: ``file::name``"""


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "when loads start",
        "Up to 0.28 `start_load_kv` runs before every forward pass. Since 0.29 it runs after the pass where no request of the step waits "
        "for a load (`has_sync_kv_loads`).",
        "What a step computes with is there before it is read: when `start_load_kv` returns or, layer by layer, when `wait_for_layer_load` "
        "does. Only loads of requests outside the batch may come late.",
        "test_vllm_versions.py::test_loads_are_there_before_the_forward_pass",
    ),
    Difference(
        "extra arguments of `start_load_kv`",
        "0.27 hands over the forward context alone. Since 0.29 the newer model runner (default on CUDA) adds `scheduler_output`, "
        "`request_ids` and more.",
        "All are taken and none is used: what to load is in the connector's own message.",
        "test_vllm_versions.py::test_the_newer_model_runner",
    ),
    Difference(
        "steps without a forward pass",
        "0.27 does not call `wait_for_save` in them; newer versions do.",
        "`get_finished` does what the step left out.",
        "test_vllm_versions.py::test_a_step_without_a_forward_pass_copies_too",
    ),
    Difference(
        "how finished transfers are asked for",
        "Up to 0.29 `get_finished`. Since 0.30 `get_transfer_results`, which can name failed requests and calls `get_finished`.",
        "Only `get_finished` is written; failures go through `get_block_ids_with_load_errors`, which all versions ask for.",
        "test_vllm_versions.py::test_finished_and_failed_loads_reach_the_scheduler",
    ),
    Difference(
        "binding to the scheduler's block pool",
        "Up to 0.29 `bind_gpu_block_pool`. Since 0.30 `bind_kv_cache_manager`, which calls it.",
        "Only `bind_gpu_block_pool` is written: through the pool, blocks of failed loads leave the engine's prefix cache.",
        "test_vllm_versions.py::test_the_scheduler_makes_and_binds_the_connector",
    ),
    Difference(
        "where hits come from",
        "Since 0.32 `get_external_cache_hit_sources` is asked after each hit; older versions count external hits in one sum.",
        "Host and disk tokens add up to what vLLM says it took; nothing is said where `CacheHitSource` does not exist.",
        "test_vllm_versions.py::test_hits_are_counted_by_tier",
    ),
    Difference(
        "requests that must not read a cache",
        "Up to some version after 0.27 the scheduler took the connector's hits for requests with `skip_reading_prefix_cache` (prompt "
        "log-probabilities) as well; 0.32 drops them.",
        "kvtier finds nothing for such a request.",
        "test_vllm_versions.py::test_requests_that_must_compute_their_prompt",
    ),
    Difference(
        "KV memory",
        "Up to 0.28 each layer has an allocation of its own. Since 0.29 the layers may be views into one, in an order that the resolved "
        "`kv_cache_layout` names.",
        "Segments are read off addresses and strides of the registered tensors, never off their storages.",
        "test_vllm_versions.py::test_kv_memory_is_read_off_the_tensors",
    ),
    Difference(
        "how much KV memory there is",
        "Up to 0.28 each `KVCacheTensor` is an allocation. Since 0.29 it is a place in one, and names the size of all of it.",
        "Where a drafter's layers are of another shape than the model's, which the scheduler is not told, a block's size follows from it.",
        "test_vllm_drafts.py::test_what_was_generated_is_stored_block_by_block",
    ),
    Difference(
        "bytes inside a block",
        "They belong to the attention backend and may change with any version.",
        "vLLM's version is part of the namespace, and since 0.29 the resolved layout; before, what it follows from (backend, device, "
        "`VLLM_KV_CACHE_LAYOUT`, FlashInfer): versions and layouts do not read each other's blocks.",
        "test_vllm_versions.py::test_versions_do_not_share_blocks",
    ),
    Difference(
        "fields of KV events",
        "`BlockStored` and `BlockRemoved` gained `session_id`, `ownership` and others after 0.27, in changing places.",
        "Events are made with names for all fields, and only with those that all versions have.",
        "test_vllm_versions.py::test_events_are_vllms_own",
    ),
    Difference(
        "methods that come and go",
        "0.29 dropped `register_cross_layers_kv_cache`; 0.28 to 0.33 added `supports_divergent_local_hybrid_hits`, `finish_forward`, "
        "`reset_capture_state`, `register_finished_partial_tail`, `has_pending_block_frees`, `get_mem_pool_context`, "
        "`get_loaded_kv_cache_group_ids`.",
        "Their defaults in the base class are right for kvtier; it overrides none of them and takes no name that the base class uses.",
        "test_vllm_versions.py::test_overrides_accept_what_the_base_class_accepts",
    ),
    Difference(
        "sleep mode",
        "Since 0.33 `supports_sleep_mode`, `unregister_kv_caches` and `restore_kv_caches`; before, a connector is not told.",
        "`enable_sleep_mode` is refused at start in every version: new weights may come with it, and copies may run when it begins.",
        "test_vllm_adapter.py::test_what_is_refused_names_the_setting",
    ),
)
