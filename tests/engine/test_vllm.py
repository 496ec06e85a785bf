"""The real vLLM with kvtier: the same tokens in every mode, and prefill that is really skipped.

Each test starts one engine or two, each in a process of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Result, assert_same, host, host_and_disk, loaded_tokens, make_tiny_model, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
EVERY_SECOND_PROMPT_HITS = 8 * 200
"""a lower bound of the tokens loaded when all eight prompts come again"""


@pytest.fixture(scope="session")
def alone() -> list[Result]:
    """What vLLM alone answers."""
    answers: list[Result] = run("repeat", rounds=[False])["rounds"][0]
    return answers


@pytest.mark.every_version
def test_the_same_tokens_from_host_memory(alone: list[Result]) -> None:
    """Prompts one by one, again, and all at once: same tokens; from the second round on nearly all of each prompt is loaded."""
    result = run("repeat", kvtier=host())
    for answers in result["rounds"]:
        assert_same(alone, answers)
    for answers in result["rounds"][1:]:
        assert loaded_tokens(answers)["host_tokens"] > EVERY_SECOND_PROMPT_HITS
    assert result["metrics"]["vllm:external_prefix_cache_hits"] > 2 * EVERY_SECOND_PROMPT_HITS


@pytest.mark.every_version
def test_a_restarted_engine_loads_from_disk(alone: list[Result], tmp_path: Path) -> None:
    """A second engine on the directory of the first gives the same tokens without computing the prompts."""
    run("repeat", kvtier=host_and_disk(tmp_path / "tier"), rounds=[False])
    result = run("repeat", kvtier=host_and_disk(tmp_path / "tier"), rounds=[False, True])
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][0])["disk_tokens"] > EVERY_SECOND_PROMPT_HITS


def test_a_damaged_disk_gives_the_same_tokens(alone: list[Result], tmp_path: Path) -> None:
    """With every third byte of the segments changed the prompts are computed; nothing wrong is loaded."""
    run("repeat", kvtier=host_and_disk(tmp_path / "tier"), rounds=[False])
    for path in (tmp_path / "tier").rglob("*"):
        if path.is_file() and path.stat().st_size > 1 << 20:
            damaged = bytearray(path.read_bytes())
            damaged[::3] = bytes(len(damaged[::3]))
            path.write_bytes(damaged)
    result = run("repeat", kvtier=host_and_disk(tmp_path / "tier"), rounds=[False])
    assert_same(alone, result["rounds"][0])
    assert loaded_tokens(result["rounds"][0])["disk_tokens"] == 0


def test_with_the_engines_own_prefix_cache(alone: list[Result]) -> None:
    """Prefix caching on: the engine's hits and kvtier's add up, before and after the engine forgets its own."""
    result = run("repeat", kvtier=host(), engine={"enable_prefix_caching": True})
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][1])["host_tokens"] > EVERY_SECOND_PROMPT_HITS // 2


@pytest.mark.every_version
def test_chunked_prefill_and_preemption(alone: list[Result]) -> None:
    """256 tokens a step and a KV pool of 40 blocks: requests are preempted, the tokens stay the same."""
    engine = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 40}
    result = run("repeat", kvtier=host(), engine=engine, rounds=[True, True, False])
    for answers in result["rounds"]:
        assert_same(alone, answers)


def test_loads_while_requests_wait(alone: list[Result], tmp_path: Path) -> None:
    """``async_load``: requests wait for their KV outside the batch, from host memory and from disk."""
    settings = host_and_disk(tmp_path / "tier", connector={"async_load": True})
    result = run("repeat", kvtier=settings, rounds=[False, False, True])
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][1])["host_tokens"] > EVERY_SECOND_PROMPT_HITS
    again = run("repeat", kvtier=settings, rounds=[True])
    assert_same(alone, again["rounds"][0])
    assert loaded_tokens(again["rounds"][0])["disk_tokens"] > 0


@pytest.mark.parametrize("async_load", [False, True])
def test_failed_loads_are_computed(alone: list[Result], async_load: bool) -> None:
    """Copies that fail, all or some, sync or async: the engine computes those blocks and ends with the same tokens."""
    result = run("failing", kvtier=host(connector={"async_load": async_load, "layerwise": "on"}))
    for answers in result["rounds"]:
        assert_same(alone, answers)


def test_blocks_of_two_engine_blocks_in_a_host_too_small(alone: list[Result], tmp_path: Path) -> None:
    """``block_tokens: 64`` over engine blocks of 32, host memory for few prompts: eviction, promotion, same tokens."""
    settings = host_and_disk(tmp_path / "tier", capacity="48MiB", block_tokens=64)
    result = run("repeat", kvtier=settings, rounds=[False, False, True], engine={"enable_prefix_caching": True})
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][1])["disk_tokens"] > 0


def test_what_must_be_apart_stays_apart(alone: list[Result]) -> None:
    """Cache salts separate, requests can stay out, aborts leave the cache right, a reset forgets."""
    result = run("separated", kvtier=host())
    for name in ("unstored", "first", "unloaded", "salted", "salted_again", "after_reset"):
        assert_same(alone[:1], [result[name]])
    assert [0, 0, 0, 0, 0] == [result[name]["cached"] for name in ("unstored", "first", "unloaded", "salted", "after_reset")]
    assert result["salted_again"]["cached"] > 0
    assert_same(alone, result["after_abort"])


def test_in_processes_of_their_own(alone: list[Result]) -> None:
    """Scheduler and worker in processes of their own share the arena."""
    result = run("repeat", kvtier=host(), environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, rounds=[False, True])
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][1])["host_tokens"] > EVERY_SECOND_PROMPT_HITS


def test_what_is_refused_says_why() -> None:
    """Settings that would fail requests or give wrong blocks stop the engine at start, by name."""
    cases = [
        {"kvtier": host(), "failure_policy": "fail"},
        {"kvtier": host(block_tokens=48)},
        {"kvtier": {"tiers": [{"type": "host", "capacity": "1MiB"}]}},
    ]
    messages = run("refusals", cases=cases)["messages"]
    assert "kv_load_failure_policy" in messages[0]
    assert "recompute" in messages[0]
    assert "block_tokens is 48" in messages[1]
    assert "tiers[0].capacity" in messages[2]


@pytest.mark.timeout(900)
def test_two_tensor_parallel_workers(tmp_path: Path) -> None:
    """Two workers share the arena, each with its heads of every block: the same tokens as two workers without kvtier."""
    model = make_tiny_model(tmp_path / "tiny")
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "KVTIER_TEST_MODEL": str(model)}
    # Few prompts: two workers that wait for each other in spin loops on two busy cores are slow.
    more: dict[str, Any] = {"engine": engine, "environment": environment, "num_prompts": 3, "timeout_s": 400.0}
    alone = run("repeat", rounds=[False], **more)["rounds"][0]
    result = run("repeat", kvtier=host_and_disk(tmp_path / "tier"), rounds=[False, True], **more)
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert loaded_tokens(result["rounds"][1])["host_tokens"] > 3 * 200
