"""Chunks reused at any position inside the real vLLM: with everything computed anew the tokens are those of vLLM alone.

Each test starts one engine or two, each in a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.config import LoRAConfig

from kvtier.config import Config
from kvtier.connectors.vllm.blend_parts import blend_parts_of
from tests.engine.blend_scenarios import ORDERS, REFUSED
from tests.engine.harness import Result, assert_same, host, host_and_disk, made_once, make_tiny_model, run
from tests.engine.rig import engine_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
CACHING = {"enable_prefix_caching": True}
PARALLEL = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
TWO_WORKERS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
TIGHT = {"num_gpu_blocks_override": 45, "max_num_seqs": 6}


def once(factory: pytest.TempPathFactory, worker_id: str, scenario: str, **settings: Any) -> Result:
    """What vLLM without kvtier gives."""

    def make(path: Path) -> None:
        (path / "out.json").write_text(json.dumps(run(scenario, **settings)))

    result: Result = json.loads((made_once(factory, worker_id, f"{scenario}-alone", make) / "out.json").read_text())
    return result


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Result:
    """The same requests to vLLM alone."""
    return once(tmp_path_factory, worker_id, "blended")


def blend(*, async_load: bool | None = None, entries: str = "computed") -> Result:
    """Settings with chunk reuse. ``async_load``: blends are done before their request starts, as on a GPU."""
    return host(blend={"enabled": True, "entries": entries}, connector={"async_load": async_load})


def test_all_computed_anew_gives_full_prefill(alone: Result) -> None:
    """Ratio 1, every method: documents in other orders, twice, at position 0, with text between, the prompt's end or all of it.

    With a pool in front of host memory, which prefixes pass through and chunks do not.
    """
    settings = blend()
    settings["tiers"].insert(0, {"type": "gpu", "capacity": "48MiB"})
    result = run("blended", kvtier=settings, engine=CACHING)
    assert result["counters"]["gpu.stored_blocks"] > 0
    for name in ("alone", "again", "unnamed", "mixed", "others", "afterwards", "sure", "unsure", "after_abort"):
        assert_same(alone[name if name in alone else "alone"][: len(result[name])], result[name])
    assert all(answer["loaded"]["blend"]["tokens"] > 40 for answer in result["sure"])
    assert all(answer["loaded"]["blend"] == {"tokens": 0, "refused": "unsure"} for answer in result["unsure"]), "the engine computed them"
    assert all(answer["loaded"]["blend"]["tokens"] > 100 for answer in result["unnamed"]), (
        "found by their tokens, the chat's messages, a text between"
    )
    taken = [answer["loaded"]["blend"]["tokens"] for answer in result["alone"]]
    assert all(tokens > 40 for tokens in taken[: len(ORDERS)]), taken
    assert all(tokens > 40 for tokens in taken), taken
    assert set(REFUSED) == {name for name, answer in result["refused"].items() if answer["loaded"]["blend"]["refused"] == name}
    assert_same(alone["alone"][:1] * len(REFUSED), list(result["refused"].values()))
    assert_same(alone["alone"][2:3] * 2, result["kept"])
    assert {"tokens": 0, "refused": "unsure"} == result["kept"][0]["loaded"]["blend"]
    kept = result["kept"][1]
    assert result["num_kept_tokens"] - 32 <= kept["cached"], "what the engine computed is found again"
    assert ({"tokens": 0}, True) == (kept["loaded"]["blend"], kept["loaded"]["host_tokens"] + kept["loaded"]["disk_tokens"] > 200)
    assert {**{f"blend.refused_{name}": 1 for name in REFUSED}, "blend.refused_unsure": 4} == {
        name: value for name, value in result["counters"].items() if name.startswith("blend.refused_")
    }
    assert 8 + 2 + 2 == result["counters"]["blend.stored_chunks"]
    assert not {"connector.errors", "blend.failed"} & set(result["counters"])


def test_nothing_computed_anew_harms_nobody_else(alone: Result) -> None:
    """Ratio 0, with the engine's prefix cache: the same answer each time; other requests, and later the same prompts, are exact."""
    result = run("blended", kvtier=blend(), engine=CACHING, ratio=0.0)
    assert [one["tokens"] for one in result["alone"]] == [one["tokens"] for one in result["again"]]
    assert [one["logprobs"] for one in alone["alone"]] != [one["logprobs"] for one in result["alone"]], "it is an approximation"
    for name in ("others", "afterwards", "unsure", "after_abort"):
        assert_same(alone[name if name in alone else "alone"][: len(result[name])], result[name])


def test_off_unless_switched_on(alone: Result) -> None:
    """Without ``blend.enabled`` requests that ask are refused, counted, and served as any other."""
    assert "vllm.model_executor.models.llama" == alone["model"], "vLLM alone, where kvtier is installed"
    result = run("blended", kvtier=host(), engine=CACHING, num_cases=4)
    for name in ("alone", "again", "mixed", "others", "afterwards", "sure", "unsure", "after_abort"):
        assert_same(alone[name if name in alone else "alone"][: len(result[name])], result[name])
    assert {"off"} == {answer["loaded"]["blend"]["refused"] for answer in result["alone"]}
    assert {"blend.refused_off"} == set(result["counters"])
    assert "vllm.model_executor.models.llama" == result["model"]


@pytest.mark.every_version
@pytest.mark.parametrize(("adapters", "refusal"), [(None, ""), (LoRAConfig(max_lora_rank=8), "enable_lora is true")])
def test_an_engine_with_adapters_is_refused(adapters: LoRAConfig | None, refusal: str) -> None:
    """Its layers add what the adapters of the step's own tokens say, also to requests without one."""
    settings = Config.from_mapping(blend())
    config = engine_config(blend())
    config.lora_config = adapters
    assert blend_parts_of(config, settings).refusal.split(":")[0] == refusal


@pytest.mark.parametrize("async_load", [None, True])
def test_preemption_and_failures(tmp_path_factory: pytest.TempPathFactory, worker_id: str, async_load: bool | None) -> None:
    """Blended requests lose their blocks and start over, or cannot be put together: same tokens."""
    expected = once(tmp_path_factory, worker_id, "blended_under_pressure")["answers"]
    result = run("blended_under_pressure", kvtier=blend(async_load=async_load), engine=TIGHT)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert [one["tokens"] for one in expected] == [one["tokens"] for one in result["answers"]]
    assert [one["tokens"] for one in expected] == [one["tokens"] for one in result["failing"]]
    assert result["counters"]["blend.failed"] >= len(ORDERS)
    assert result["counters"]["connector.errors"] == result["counters"]["blend.failed"]


@pytest.mark.every_version
@pytest.mark.parametrize("engine", [{}, {"async_scheduling": True}])
def test_others_get_their_tokens_in_between(tmp_path_factory: pytest.TempPathFactory, worker_id: str, engine: dict[str, Any]) -> None:
    """A blend that is too large for a step is spread over many, each of which gives who generates a token. So are stored chunks."""
    expected = once(tmp_path_factory, worker_id, "blended_beside")
    settings = blend()
    settings["blend"]["max_step_tokens"] = 40
    result = run("blended_beside", kvtier=settings, engine=engine)
    assert (expected["blended"], expected["beside"]) == (result["blended"], result["beside"])
    assert result["num_between"] >= result["num_tokens"] // 60 > 5
    assert 4 == result["counters"]["blend.stored_chunks"]
    assert not {"connector.errors", "blend.failed"} & set(result["counters"])


def test_chunks_outlive_the_engine(tmp_path_factory: pytest.TempPathFactory, worker_id: str, tmp_path: Path) -> None:
    """Chunks go to the disk as any block does, and the next engine takes them from there."""
    expected = once(tmp_path_factory, worker_id, "blended_briefly")["answers"]
    settings = host_and_disk(tmp_path / "tier", blend={"enabled": True})
    for stores in (True, False):
        result = run("blended_briefly", kvtier=settings, stores=stores)
        answers = result["answers"]
        assert_same(expected, answers)
        assert "kvtier.connectors.vllm.models" == result["model"]
        assert all(answer["loaded"]["blend"]["tokens"] > 100 for answer in answers)


def assert_as_served(expected: Result, result: Result) -> None:
    """Chunks in their old order are full prefill's KV; in another one that is computed anew or an approximation."""
    assert_same(expected["answers"], result["answers"])
    assert all(answer["loaded"]["blend"]["tokens"] > 40 for answer in [*result["answers"], *result["reordered"]])
    assert_same(expected["reordered"], result["reordered"][:1])
    assert max(abs(a - b) for a, b in zip(*(one["logprobs"] for one in result["reordered"]), strict=True)) > 0.1, "an approximation"


@pytest.mark.every_version
@pytest.mark.parametrize("engine", [{}, {"max_num_batched_tokens": 48, "max_num_seqs": 4}, {"async_scheduling": True}])
def test_chunks_are_copied_from_what_was_served(tmp_path_factory: pytest.TempPathFactory, worker_id: str, engine: dict[str, Any]) -> None:
    """Without computing anything for them, whether a prompt is computed at once or in parts."""
    expected = once(tmp_path_factory, worker_id, "blended_as_served")
    result = run("blended_as_served", kvtier=blend(entries="served"), engine=engine)
    assert_as_served(expected, result)
    assert 4 == result["counters"]["blend.stored_chunks"]
    assert not {"connector.errors", "blend.failed", "blend.unstored_chunks"} & set(result["counters"])


@pytest.mark.timeout(900)
def test_two_tensor_parallel_workers_copy_what_was_served(tmp_path: Path) -> None:
    """Each its heads."""
    environment = {"KVTIER_TEST_MODEL": str(make_tiny_model("llama", tmp_path / "tiny"))}
    expected = run("blended_as_served", environment=environment)
    environment |= PARALLEL
    result = run("blended_as_served", kvtier=blend(entries="served"), engine=TWO_WORKERS, environment=environment, timeout_s=600.0)
    assert_as_served(expected, result)


@pytest.mark.every_version
def test_in_processes_of_their_own(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    """Scheduler and worker in processes of their own, which vLLM spawns on a CPU: the settings alone tell them."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    expected = once(tmp_path_factory, worker_id, "blended_briefly")["answers"]
    answers = run("blended_briefly", kvtier=blend(), environment=environment)["answers"]
    assert_same(expected, answers)
    assert all(answer["loaded"]["blend"]["tokens"] > 100 for answer in answers)


@pytest.mark.timeout(900)
def test_two_tensor_parallel_workers(tmp_path: Path) -> None:
    """Each with its heads of every chunk, choosing the same tokens, over several steps: full prefill's answers, also where one of them
    has lost the chunks."""
    environment = {"KVTIER_TEST_MODEL": str(make_tiny_model("llama", tmp_path / "tiny"))}
    expected = run("blended_in_parallel", environment=environment)["answers"]
    environment |= PARALLEL
    settings = blend(async_load=True)
    settings["blend"]["max_step_tokens"] = 60
    result = run("blended_in_parallel", kvtier=settings, engine=TWO_WORKERS, environment=environment, timeout_s=600.0)
    assert_same(expected, result["answers"])
    assert all(answer["loaded"]["blend"]["tokens"] > 100 for answer in [*result["answers"], *result["chosen"]])
    assert_same(expected[:1], result["unsure"])
    assert {"tokens": 0, "refused": "unsure"} == result["unsure"][0]["loaded"]["blend"]
    assert_same(expected[:2], result["lost"])
    assert [0, 0] == [answer["loaded"]["blend"]["tokens"] for answer in result["lost"]], "the engine computed them"
    assert "EngineDeadError" == result["apart"]["error"], "the first worker would wait for good for one that broke off a blend"
    assert result["apart"]["seconds"] < 60, "not only when vLLM's own patience is over"
