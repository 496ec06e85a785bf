"""The real vLLM with kvtier: the same tokens in every mode, and prefill that is really skipped.

Each test starts one engine or two, each in a process of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engine.harness import Result, assert_same, host, host_and_disk, loaded_tokens, made_once, make_tiny_model, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
NEARLY_ALL = 1500
"""tokens, of 1728 in full blocks, that are loaded when all eight prompts come again"""


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[Result]:
    """What vLLM alone answers."""
    folder = made_once(
        tmp_path_factory, worker_id, "alone", lambda path: (path / "out.json").write_text(json.dumps(run("repeat", rounds=[False])))
    )
    answers: list[Result] = json.loads((folder / "out.json").read_text())["rounds"][0]
    return answers


@pytest.fixture
def filled_disk(tmp_path_factory: pytest.TempPathFactory, worker_id: str, tmp_path: Path) -> Path:
    """The disk tier that an engine with kvtier left after answering all prompts; a copy of its own for each test."""
    folder = made_once(
        tmp_path_factory, worker_id, "filled", lambda path: run("repeat", kvtier=host_and_disk(path / "tier"), rounds=[False])
    )
    shutil.copytree(folder / "tier", tmp_path / "tier")
    return tmp_path / "tier"


@pytest.mark.timeout(900)
def test_two_tensor_parallel_workers(tmp_path: Path) -> None:
    """Two workers share the arena, each with its heads of every block: the same tokens as one worker without kvtier."""
    environment = {"KVTIER_TEST_MODEL": str(make_tiny_model("llama", tmp_path / "tiny"))}
    alone = run("repeat", rounds=[False], environment=environment)["rounds"][0]
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings = host_and_disk(tmp_path / "tier")
    # Workers that wait for each other in spin loops on two busy cores are slow.
    result = run("repeat", kvtier=settings, rounds=[False, True], engine=engine, environment=environment, timeout_s=400.0)
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][1])["host_tokens"] > NEARLY_ALL


@pytest.mark.every_version
def test_the_same_tokens_from_host_memory(alone: list[Result]) -> None:
    """Prompts one by one, again, and all at once: same tokens; from the second round on nearly all of each prompt is loaded."""
    result = run("repeat", kvtier=host())
    for answers in result["rounds"]:
        assert_same(alone, answers)
    for answers in result["rounds"][1:]:
        assert loaded_tokens(answers)["host_tokens"] > NEARLY_ALL
    assert result["metrics"]["vllm:external_prefix_cache_hits"] > 2 * NEARLY_ALL


@pytest.mark.every_version
def test_a_restarted_engine_loads_from_disk(alone: list[Result], filled_disk: Path) -> None:
    """A second engine on the directory of the first gives the same tokens without computing the prompts."""
    result = run("repeat", kvtier=host_and_disk(filled_disk), rounds=[False, True])
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][0])["disk_tokens"] > NEARLY_ALL // 2, (
        "the second of two prompts finds the document in host memory"
    )
    assert sum(loaded_tokens(result["rounds"][0]).values()) > NEARLY_ALL


def test_a_damaged_disk_gives_the_same_tokens(alone: list[Result], filled_disk: Path) -> None:
    """With every third byte of the segments changed the prompts are computed; nothing wrong is loaded."""
    for path in filled_disk.rglob("*"):
        if path.is_file() and path.stat().st_size > 1 << 20:
            damaged = bytearray(path.read_bytes())
            damaged[::3] = bytes(len(damaged[::3]))
            path.write_bytes(damaged)
    result = run("repeat", kvtier=host_and_disk(filled_disk), rounds=[False])
    assert_same(alone, result["rounds"][0])
    assert loaded_tokens(result["rounds"][0])["disk_tokens"] == 0


def test_with_the_engines_own_prefix_cache(alone: list[Result]) -> None:
    """Prefix caching on: the engine's hits and kvtier's add up, before and after the engine forgets its own.

    With a pool in front of host memory, on this machine's own device.
    """
    settings = host()
    settings["tiers"].insert(0, {"type": "gpu", "capacity": "48MiB"})
    result = run("repeat", kvtier=settings, engine={"enable_prefix_caching": True})
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][1])["host_tokens"] > NEARLY_ALL // 2


@pytest.mark.every_version
def test_chunked_prefill_and_preemption(alone: list[Result]) -> None:
    """256 tokens a step and a KV pool in which four requests fit until they grow: some are preempted, the tokens stay the same."""
    engine = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 24, "max_model_len": 512}
    result = run("repeat", kvtier=host(), engine=engine, rounds=[True, True, False])
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert result["metrics"]["vllm:num_preemptions"] > 0


def test_loads_while_requests_wait(alone: list[Result], filled_disk: Path) -> None:
    """``async_load``: requests wait for their KV outside the batch; it comes from disk first, then from host memory."""
    settings = host_and_disk(filled_disk, connector={"async_load": True})
    result = run("repeat", kvtier=settings, rounds=[True, False, True])
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][0])["disk_tokens"] > 0
    assert loaded_tokens(result["rounds"][1])["host_tokens"] > NEARLY_ALL


@pytest.mark.parametrize("async_load", [False, True])
def test_failed_loads_are_computed(alone: list[Result], async_load: bool) -> None:
    """Copies that fail, all or some, sync or async: the engine computes those blocks and ends with the same tokens."""
    connector = {"async_load": async_load, "layerwise": "on"}
    result = run("failing", kvtier=host(connector=connector), num_prompts=4)
    for answers in result["rounds"]:
        assert_same(alone[:4], answers)
    assert loaded_tokens(result["rounds"][-1])["host_tokens"] > 0


def test_a_failed_load_beside_a_request_that_shares_it() -> None:
    """Where the engine lets later requests compute first: nobody computes with blocks that were not filled."""
    engine = {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "long_prefill_token_threshold": 32}
    result = run("failing_beside", kvtier=host(), engine=engine, num_rounds=4)
    assert [result["first"]] * 4 == result["rounds"]
    assert result["counters"]["connector.errors"] >= 4


def test_blocks_of_two_engine_blocks_in_a_host_too_small(alone: list[Result], tmp_path: Path) -> None:
    """``block_tokens: 64`` over engine blocks of 32, host memory for few prompts: eviction, promotion, same tokens."""
    settings = host_and_disk(tmp_path / "tier", capacity="24MiB", block_tokens=64)
    result = run("repeat", kvtier=settings, rounds=[False, False, True], engine={"enable_prefix_caching": True})
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][1])["disk_tokens"] > 0


@pytest.mark.every_version
def test_a_host_too_small_with_the_default_policy(alone: list[Result]) -> None:
    """Host memory for few prompts and nothing below: what is worth less leaves or is turned away, and the tokens stay the same."""
    result = run("repeat", kvtier=host("24MiB"), rounds=[False, False, True])
    for answers in result["rounds"]:
        assert_same(alone, answers)
    counters = result["counters"]
    assert counters.get("host.evicted_blocks", 0) + counters.get("host.not_admitted_blocks", 0) > 0
    assert sum(loaded_tokens(result["rounds"][1]).values()) > 0


def test_what_must_be_apart_stays_apart(alone: list[Result]) -> None:
    """Cache salts separate, requests can stay out, aborts leave the cache right, a reset forgets."""
    result = run("separated", kvtier=host())
    for name in ("unstored", "first", "unloaded", "salted", "salted_again", "after_reset"):
        assert_same(alone[:1], [result[name]])
    assert [0, 0, 0, 0, 0] == [result[name]["cached"] for name in ("unstored", "first", "unloaded", "salted", "after_reset")]
    assert result["salted_again"]["cached"] > 0
    assert_same(alone, result["after_abort"])


def test_the_control_api_on_a_running_engine(alone: list[Result], tmp_path: Path) -> None:
    """Every verb, and its effect in the engine: what is loaded from where; the tokens stay the same."""
    settings = host_and_disk(tmp_path / "tier", capacity="40MiB", connector={"load_or_recompute": "auto"})
    result = run("controlled", kvtier=settings)
    same = [alone[number] for number in (0, 2, 4)]
    for name in ("first", "after_pressure", "after_clear"):
        assert_same(same, result[name])
    for name in ("after_prefetch", "after_move", "after_evict"):
        assert_same(same[1:2], result[name])
    assert_same(same[2:] * 3, result["salted"])
    loaded = [one["loaded"] for one in result["after_pressure"]]
    assert result["pinned"] > 100
    assert (result["pinned"], 0) == (loaded[0]["host_tokens"], loaded[0]["disk_tokens"]), "the pinned prompt stayed in host memory"
    assert all(one["disk_tokens"] > 100 for one in loaded[1:]), "the others left it"
    (prefetched,) = (one["loaded"] for one in result["after_prefetch"])
    assert prefetched["host_tokens"] > 100
    assert prefetched["disk_tokens"] == 0
    (moved,) = (one["loaded"] for one in result["after_move"])
    assert result["moved"] > 0
    assert moved["host_tokens"] == 0
    assert 100 < moved["disk_tokens"] <= result["moved"] * 32, "the answer moved as well"
    assert result["evicted"] > 0
    assert result["after_evict"][0]["cached"] == 0
    assert [True, False] == [one["cached"] > 0 for one in result["salted"][1:]]
    assert result["cleared"] > 0
    assert [0, 0, 0] == [one["cached"] for one in result["after_clear"]]
    assert result["found"] > 100
    assert result["health"]
    measured = {name.partition("@")[0] for name in result["estimates"]}
    assert {"host.bytes_per_s", "prefill.tokens_per_s"} <= measured


def test_in_processes_of_their_own(alone: list[Result]) -> None:
    """Scheduler and worker in processes of their own share the arena."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    result = run("repeat", kvtier=host(), environment=environment, rounds=[False, True], num_prompts=4)
    for answers in result["rounds"]:
        assert_same(alone[:4], answers)
    assert all(answer["loaded"]["host_tokens"] > 100 for answer in result["rounds"][1])
