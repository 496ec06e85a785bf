"""The real connector between vLLM's real scheduler and its real worker hooks, without a model: a step takes milliseconds.

The forward pass is a function of the test; KV memory is made by vLLM itself, in the layout of the installed version.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from vllm.config import KVEventsConfig, KVTransferConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from kvtier.connectors.vllm.connector import KVTierConnector
from tests.engine.drafting import ANSWER, Drafter, Part, Sequences

BLOCK_TOKENS = 32
NUM_BLOCKS = 40
LAYERS = tuple(f"model.layers.{number}.self_attn.attn" for number in range(12))
APPROXIMATE = 0.25
"""by how much the number differs in a block that was put together from chunks, or computed behind such a one"""
OWN_SALT = "kvtier blend"
Forward = Callable[[SchedulerOutput], None]


@functools.cache
def _base_config() -> VllmConfig:
    args = EngineArgs(
        model=os.environ["KVTIER_TEST_MODEL"],
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        block_size=BLOCK_TOKENS,
        max_num_seqs=8,
    )
    config = args.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/meeting", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    return config


def engine_config(settings: dict[str, Any], **more: Any) -> VllmConfig:
    """A configuration of its own, as the engine would have it, with kvtier's ``settings``. ``more``: fields of the transfer's."""
    config = copy.deepcopy(_base_config())
    config.scheduler_config.disable_hybrid_kv_cache_manager = True  # what vLLM decides for a connector like kvtier
    config.cache_config.enable_prefix_caching = False
    config.cache_config.num_gpu_blocks_override = NUM_BLOCKS
    arguments = {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings,
        "engine_id": uuid.uuid4().hex,
        **more,
    }
    config.kv_transfer_config = KVTransferConfig(**arguments)
    return config


def full_attention(**more: Any) -> FullAttentionSpec:
    """What an ordinary layer needs."""
    return FullAttentionSpec(**{"block_size": BLOCK_TOKENS, "num_kv_heads": 3, "head_size": 16, "dtype": torch.float32, **more})


def cache_config(config: VllmConfig, specs: dict[str, KVCacheSpec]) -> KVCacheConfig:
    """What vLLM makes of the layers' needs."""
    layout = getattr(config.cache_config, "kv_cache_layout", "")
    if layout is None:
        config.cache_config.kv_cache_layout = "LBHNC"  # since 0.29; this is the layout that the CPU's backend gets
    with set_current_vllm_config(config):
        made = get_kv_cache_configs(config, [specs], [1 << 28])[0]
    if layout != "":
        made.kv_cache_layout = config.cache_config.kv_cache_layout
    return made


def make_kv_caches(config: VllmConfig, made: KVCacheConfig) -> dict[str, torch.Tensor]:
    """KV memory, made by vLLM's own code where it can be called without a model runner."""
    try:
        from vllm.v1.worker.utils import allocate_kv_cache  # noqa: PLC0415 - since 0.29
    except ImportError:
        return {layer: _own_allocation(tensor.size, made, layer) for tensor in made.kv_cache_tensors for layer in tensor.shared_by}
    caches: dict[str, torch.Tensor] = allocate_kv_cache(made, torch.device("cpu"), config.cache_config.get_resolved_kv_cache_layout())
    return caches


def _own_allocation(num_bytes: int, made: KVCacheConfig, layer: str) -> torch.Tensor:
    """As the model runner of 0.27 makes it: raw bytes for a layer, in the shape that the backend asks for."""
    group_spec = made.kv_cache_groups[0].kv_cache_spec
    spec = getattr(group_spec, "kv_cache_specs", {layer: group_spec})[layer]
    shape = CPUAttentionBackend.get_kv_cache_shape(made.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size)
    return torch.zeros(num_bytes, dtype=torch.int8).view(spec.dtype).view(shape)


class Rig:
    """One scheduler, one worker, one connector for each; ``close`` it.

    Each block of a request is filled by the forward pass with a number that its tokens up to there decide. Wrong KV makes wrong KV and
    a wrong token, and a test that sees one fails.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        events: bool = False,
        runs_ahead: bool = False,
        drafter: Drafter | None = None,
        parallel: Mapping[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        """``parallel``: fields of the parallel configuration.

        ``runs_ahead``: asynchronous scheduling, which CUDA devices use: a step is scheduled before the one before it is heard of.
        """
        self.config = engine_config(settings)
        for name, value in engine.items():
            owner = self.config.cache_config if name == "enable_prefix_caching" else self.config.scheduler_config
            setattr(owner, name, value)
        for name, value in (parallel or {}).items():
            setattr(self.config.parallel_config, name, value)
        self.config.scheduler_config.async_scheduling = runs_ahead
        if events:
            self.config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        if drafter is not None:
            drafter.configure(self.config)
        draft_specs = {} if drafter is None else {layer: full_attention(num_kv_heads=drafter.num_heads) for layer in drafter.layers}
        self._draft_layers = tuple(draft_specs)
        self.cache_config = cache_config(self.config, {**dict.fromkeys(LAYERS, full_attention()), **draft_specs})
        self.config.cache_config.num_gpu_blocks = self.cache_config.num_blocks
        self.kv_caches = make_kv_caches(self.config, self.cache_config)
        with set_current_vllm_config(self.config):
            self.worker = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, self.cache_config)
            self.worker.register_kv_caches(self.kv_caches)
            kv_transfer_state._KV_CONNECTOR_AGENT = self.worker
            self.scheduler = (AsyncScheduler if runs_ahead else Scheduler)(
                self.config,
                generate_scheduler_kv_cache_config([self.cache_config]),
                StructuredOutputManager(self.config),
                block_size=BLOCK_TOKENS,
                log_stats=True,
            )
        assert isinstance(self.scheduler.connector, KVTierConnector)
        self.connector = self.scheduler.connector
        init_none_hash(hash)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, lambda value: hashlib.sha256(repr(value).encode()).digest())
        self.outputs: dict[str, list[Any]] = {}
        """what the engine would send to a client, by request"""
        self.stats: list[Any] = []
        """statistics of the steps that had any"""
        self.computed: dict[str, int] = {}
        """tokens that the forward pass computed, by request"""
        self._runs_ahead = runs_ahead
        self._unheard: list[tuple[SchedulerOutput, ModelRunnerOutput]] = []
        """steps that were run, and that the scheduler has not heard of"""
        self._sequences = Sequences(self._unheard, drafter)
        self.num_stale_drafts = 0
        """requests that drafted in a step from KV of draft layers that is not what they computed"""
        self._newer_runner: Any = None
        self._parts: dict[str, Part] = {}
        """what the last step computes"""
        self._wrong: set[str] = set()
        """requests whose last step computed with wrong KV, which the scheduler must find out before it takes their tokens"""

    def request(
        self, name: str, tokens: Sequence[int], *, max_tokens: int = 1, sampling: dict[str, Any] | None = None, **more: Any
    ) -> Request:
        """A request as the engine makes it."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0, **(sampling or {}))
        params.update_from_generation_config({}, 2)
        return Request(name, list(tokens), params, None, block_hasher=self._hasher, **more)

    def add(self, name: str, tokens: Sequence[int], **more: Any) -> Request:
        """Gives a request to the scheduler."""
        request = self.request(name, tokens, **more)
        self.scheduler.add_request(request)
        return request

    def ask(self, name: str, tokens: Sequence[int], **more: Any) -> int:
        """Runs a request to its end. Returns how many tokens of its prompt were not computed."""
        self.wait_for_host_memory()
        request = self.add(name, tokens, **more)
        self.run()
        assert request.is_finished()
        return len(tokens) - self.computed[name]

    def run(self, forward: Forward | None = None, max_steps: int = 200) -> None:
        """Steps until nothing is left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_requests() and not self._unheard:
                assert {ANSWER} >= {token for outputs in self.outputs.values() for one in outputs for token in one.new_token_ids}
                return
            self.step(forward)
        raise AssertionError("the scheduler does not come to an end")

    def abort(self, name: str) -> None:
        """Its client is gone."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def preempt(self, place: int) -> None:
        """Takes a running request's blocks away, as the scheduler does where it needs them for another one."""
        self.scheduler._preempt_request(self.scheduler.running.pop(place), 0.0)

    def disturb(self, action: str, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        """Preempts a request, aborts one, before a step or in it, or forgets the engine's prefix cache; where there is what it takes.

        ``reset all``: under running requests, and kvtier's as well or not.
        """
        if action == "preempt" and self.scheduler.running:
            self.preempt(draw(st.integers(0, len(self.scheduler.running) - 1)))
        elif action == "abort" and self.scheduler.requests:
            name = draw(st.sampled_from(sorted(self.scheduler.requests)))
            if draw(st.booleans()):
                self.abort(name)
            else:
                self.step(meanwhile=functools.partial(self.abort, name))
        elif action == "reset" and not self.scheduler.requests:
            self.scheduler.reset_prefix_cache()
        elif action == "reset all":
            with contextlib.suppress(RuntimeError):  # vLLM: not while requests wait for KV; all are preempted nevertheless
                self.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=draw(st.booleans()))

    def step(self, forward: Forward | None = None, meanwhile: Callable[[], None] = lambda: None) -> SchedulerOutput:
        """One step, with the hooks in the order in which vLLM's model runner for this device calls them.

        ``meanwhile``: what happens to the scheduler while the step runs.
        """
        output = SchedulerOutput.make_empty()
        if self.scheduler.has_requests() or not self._runs_ahead:
            output = self.scheduler.schedule()
            self._unheard.append((output, self._carry_out(output, forward or self.fill)))
        meanwhile()
        if not self._runs_ahead or len(self._unheard) > 1 or not (output.num_scheduled_tokens or self.scheduler.has_requests()):
            self._hear()
        return output

    def _carry_out(self, output: SchedulerOutput, forward: Forward) -> ModelRunnerOutput:
        self._parts = {name: self._sequences.part_of(self.scheduler.requests[name], output) for name in output.num_scheduled_tokens}
        with set_current_vllm_config(self.config), set_forward_context(None, self.config):
            if self._newer_runner is not None:
                made = self._step_of_newer_runner(output, forward)
            elif output.total_num_scheduled_tokens:
                self.worker.handle_preemptions(output.kv_connector_metadata)
                drafts = self.config.speculative_config is not None
                with KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(output, defer_finalize=drafts) as transfers:
                    forward(output)
                made = self._runner_output(output, transfers)
                if drafts:
                    self._fill_draft_layers(output)
                    KVConnectorModelRunnerMixin.finalize_kv_connector()
            else:
                made = KVConnectorModelRunnerMixin.kv_connector_no_forward(output, self.config)
        return made

    def _hear(self) -> None:
        """The scheduler hears of the oldest step that it has not heard of."""
        output, made = self._unheard.pop(0)
        for client_outputs in self.scheduler.update_from_output(output, made).values():
            for one in client_outputs.outputs:
                self.outputs.setdefault(one.request_id, []).append(one)
            if client_outputs.scheduler_stats is not None:
                self.stats.append(client_outputs.scheduler_stats)
        drafts = self._sequences.draft(made.req_ids) if not self._runs_ahead else None
        if drafts is not None:
            self.scheduler.update_draft_token_ids(drafts)

    def fill(self, output: SchedulerOutput) -> None:
        """The forward pass: writes the blocks of the tokens that are computed, wrongly where what lies before them is wrong."""
        for name, num_tokens in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            part = self._parts[name]
            self.computed[name] = self.computed.get(name, 0) + num_tokens
            block_ids = self.scheduler.kv_cache_manager.get_block_ids(name)[0]
            values = self._values(request, part.tokens)
            num_before = part.first // BLOCK_TOKENS
            found = [self.values_in(block_id) for block_id in block_ids[:num_before]]
            is_near = is_put_together(request) and any({value + APPROXIMATE} == there for value, there in zip(values, found, strict=False))
            allowed = [[{value}, {value + APPROXIMATE}] if is_near else [{value}] for value in values[:num_before]]
            is_wrong = any(there not in either for there, either in zip(found, allowed, strict=True))
            (self._wrong.add if is_wrong else self._wrong.discard)(name)
            for value, block_id in zip(values[num_before:], block_ids[num_before:], strict=False):
                self.write(block_id, -2.0 if is_wrong else value + APPROXIMATE * is_near)

    def _fill_draft_layers(self, output: SchedulerOutput) -> None:
        """The drafter's pass behind the model's, in layers of its own."""
        for name in output.num_scheduled_tokens if self._draft_layers else ():
            request = self.scheduler.requests[name]
            part = self._parts[name]
            block_ids = self.scheduler.kv_cache_manager.get_block_ids(name)[0]
            values = self._values(request, part.tokens)
            num_before = part.first // BLOCK_TOKENS
            found = [self.values_in(block_id, self._draft_layers) for block_id in block_ids[:num_before]]
            self.num_stale_drafts += name not in self._wrong and found != [{value} for value in values[:num_before]]
            for value, block_id in zip(values[num_before:], block_ids[num_before:], strict=False):
                self.write(block_id, value, self._draft_layers)

    def write(self, block_id: int, value: float, layers: Sequence[str] = LAYERS) -> None:
        """Puts a number into a block, in all layers."""
        for layer in layers:
            self.kv_caches[layer][block_id] = value

    def value_of(self, request: Request, index: int) -> float:
        """What a full block of a request's tokens holds."""
        return self._values(request, request.all_token_ids)[index]

    def _values(self, request: Request, tokens: Sequence[int]) -> list[float]:
        """What blocks hold: decided by all tokens up to their end and by what keeps requests apart; -1 where one is not full."""
        apart = (
            None if is_put_together(request) else request.cache_salt,
            request.lora_request and request.lora_request.lora_name,
            [f.identifier for f in request.mm_features],
        )
        ends = range(BLOCK_TOKENS, len(tokens) + BLOCK_TOKENS, BLOCK_TOKENS)
        return [float(hash((tuple(tokens[:end]), repr(apart))) % 1_000_003) if end <= len(tokens) else -1.0 for end in ends]

    def values_in(self, block_id: int, layers: Sequence[str] = LAYERS) -> set[float]:
        """The numbers in a block, over all layers."""
        return {float(value) for layer in layers for value in self.kv_caches[layer][block_id].unique()}

    def keys(self, request: Request) -> list[bytes]:
        """The keys that kvtier gives to the full blocks of a request."""
        half = self.connector._half.half
        if not half.knows(request.request_id):
            self.connector.get_num_new_matched_tokens(request, 0)
        return list(half._requests[request.request_id].keys(request.num_tokens // BLOCK_TOKENS, BLOCK_TOKENS))

    def use_newer_runner(self, active: Any) -> None:
        """Steps go through these hooks from now on."""
        self._newer_runner = active

    def wait_for_host_memory(self) -> None:
        """Until all of it is prepared, which happens in the background."""
        engine = self.connector._half.half._engine
        while engine.is_growing:
            engine.poll()
            time.sleep(0.001)

    def transfer_params(self, name: str) -> dict[str, int]:
        """What the answer says of kvtier."""
        return dict(self.outputs[name][-1].kv_transfer_params["kvtier"])

    def close(self) -> None:
        """Ends both sides."""
        self.scheduler.shutdown()
        self.worker.shutdown()
        kv_transfer_state._KV_CONNECTOR_AGENT = None

    def _step_of_newer_runner(self, output: SchedulerOutput, forward: Forward) -> ModelRunnerOutput:
        """As ``vllm.v1.worker.gpu.model_runner`` does it, which runs on CUDA devices only."""
        hooks = self._newer_runner
        if not output.total_num_scheduled_tokens:
            made: ModelRunnerOutput = hooks.no_forward(output)
            return made
        names = list(output.num_scheduled_tokens)
        batch = SimpleNamespace(idx_mapping=torch.arange(len(names)), req_ids=names, num_tokens=output.total_num_scheduled_tokens)
        takes_batch = "input_batch" in inspect.signature(hooks.pre_forward).parameters
        hooks.pre_forward(output, **({"input_batch": batch} if takes_batch else {}))
        forward(output)
        self._fill_draft_layers(output)
        return self._runner_output(output, hooks.post_forward(output.finished_req_ids))

    def _runner_output(self, output: SchedulerOutput, transfers: KVConnectorOutput) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        if self._runs_ahead:
            self._sequences.draft(names)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: number for number, name in enumerate(names)},
            sampled_token_ids=[self._parts[name].sampled(is_wrong=name in self._wrong) for name in names],
            kv_connector_output=transfers,
        )


def is_put_together(request: Request) -> bool:
    """Whether it has been given a salt of its own, because blocks of it may come from chunks."""
    return (request.cache_salt or "").startswith(OWN_SALT)


def host(capacity: str = "16MiB", **more: Any) -> dict[str, Any]:
    """Settings with host memory alone. Loads are not compared with computing, which takes no time here."""
    more["connector"] = {"load_or_recompute": "always", **more.get("connector", {})}
    return {"tiers": [{"type": "host", "capacity": capacity, "policy": "lru", "huge_pages": False}], **more}


def host_and_disk(path: Path, **more: Any) -> dict[str, Any]:
    """Settings with a disk below."""
    settings = host(**more)
    settings["tiers"].append({"type": "disk", "path": str(path), "capacity": "64MiB", "segment": "4MiB"})
    return settings


def prompt(number: int, length: int = 200) -> list[int]:
    """Tokens that no other prompt begins with."""
    return [number * 1000 + position for position in range(length)]
