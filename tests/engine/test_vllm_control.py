"""The control API on vLLM's real scheduler and connector: each verb, and what the next requests load from where."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import kvtier
from kvtier.engine import CacheEngine
from tests.engine.rig import BLOCK_TOKENS, Rig, host, host_and_disk, prompt

FULL = 192
"""tokens in full blocks of a prompt of 200"""
SMALL = "4MiB"
"""host memory for 28 blocks; a prompt of 200 tokens has six"""


@contextmanager
def controlled(settings: dict[str, Any]) -> Iterator[tuple[Rig, kvtier.Controller]]:
    rig = Rig(settings)
    try:
        yield rig, kvtier.Controller.of()
    finally:
        rig.close()
    assert {} == kvtier.controllers()


def engine_of(rig: Rig) -> CacheEngine:
    engine = rig.connector._half.half._engine
    assert isinstance(engine, CacheEngine)
    return engine


def small_host(path: Path) -> dict[str, Any]:
    settings = host_and_disk(path)
    settings["tiers"][0]["capacity"] = SMALL
    return settings


def fill(rig: Rig, first: int, count: int) -> None:
    """Prompts that nobody asks for again."""
    for number in range(first, first + count):
        rig.ask(f"filler {number}", prompt(number))


def loaded(rig: Rig, name: str, number: int, **more: Any) -> dict[str, int]:
    """Where a request's tokens come from."""
    rig.ask(name, prompt(number), **more)
    return rig.transfer_params(name)


def test_a_pinned_prompt_survives_what_evicts_everything_else() -> None:
    """Ten prompts through host memory for four: the pinned one is loaded, the one beside it is computed."""
    with controlled(host(SMALL)) as (rig, controller):
        fill(rig, 1, 2)
        assert FULL == controller.pin(prompt(1), ttl_s=600.0).result(10.0).num_tokens
        fill(rig, 3, 10)
        assert FULL == loaded(rig, "pinned", 1)["host_tokens"]
        assert 0 == loaded(rig, "not pinned", 2)["host_tokens"]


def test_a_prefetched_prompt_hits_in_host_memory(tmp_path: Path) -> None:
    """Of two prompts that are on disk only, the prefetched one comes from host memory and the other one from the disk."""
    with controlled(small_host(tmp_path)) as (rig, controller):
        fill(rig, 1, 12)
        assert {"host": 0, "disk": FULL} == {n: s.leading_tokens for n, s in controller.lookup(prompt(1)).result(10.0).tiers.items()}
        assert FULL == controller.prefetch(prompt(1), deadline_s=30.0).result(30.0).ready_tokens
        assert {"host_tokens": FULL, "disk_tokens": 0} == loaded(rig, "prefetched", 1)
        assert {"host_tokens": 0, "disk_tokens": FULL} == loaded(rig, "not prefetched", 2)


def test_a_moved_prompt_comes_from_the_other_tier(tmp_path: Path) -> None:
    """Down to the disk and up again."""
    with controlled(host_and_disk(tmp_path)) as (rig, controller):
        fill(rig, 1, 1)
        assert 6 == controller.move(prompt(1), from_tier="host", to_tier="disk").result(30.0).num_blocks
        assert {"host_tokens": 0, "disk_tokens": FULL} == loaded(rig, "moved down", 1)
        assert 6 == controller.move(prompt(1), from_tier="disk", to_tier="host").result(30.0).num_blocks
        assert {"host_tokens": FULL, "disk_tokens": 0} == loaded(rig, "moved up", 1)


def test_evicted_and_cleared_prompts_are_computed(tmp_path: Path) -> None:
    """Evicting drops one prompt, clearing a tenant all of its prompts, clearing a tier what is there only."""
    with controlled(host_and_disk(tmp_path)) as (rig, controller):
        fill(rig, 1, 2)
        for number in (1, 2):
            rig.ask(f"theirs {number}", prompt(number), cache_salt="them")
        assert 6 == controller.evict(prompt(1), tier="all").result(10.0).num_blocks
        assert [0, FULL] == [sum(loaded(rig, f"evicted {number}", number).values()) for number in (1, 2)]
        assert FULL == sum(loaded(rig, "theirs again", 1, cache_salt="them").values())
        assert 12 == controller.clear(tenant="them").result(10.0).num_blocks
        assert 0 == sum(loaded(rig, "theirs cleared", 1, cache_salt="them").values())
        assert FULL == sum(loaded(rig, "not theirs", 2).values())
        engine_of(rig).drain(10.0)
        controller.clear(tier="host").result(10.0)
        assert {"host_tokens": 0, "disk_tokens": FULL} == loaded(rig, "from disk", 2)


def test_another_policy_evicts_others() -> None:
    """The oldest prompt is used again before others need its room: under lru it stays, under fifo it leaves all the same."""
    settings = host(SMALL, connector={"max_pinned_fraction": 0})  # the end of a pin counts as a use, also under fifo
    for policy, expected in (("lru", FULL), ("fifo", 0)):
        with controlled(settings) as (rig, controller):
            fill(rig, 1, 4)
            controller.set_policy("host", policy).result(10.0)
            assert FULL == loaded(rig, "again", 1)["host_tokens"]
            fill(rig, 5, 2)
            assert expected == loaded(rig, "last", 1)["host_tokens"]


def test_verbs_of_another_thread_while_the_engine_steps() -> None:
    """A thread looks up and pins what requests are just computing; the engine's steps carry it out."""
    with controlled(host()) as (rig, controller):
        rig.wait_for_host_memory()
        answers: list[int] = []

        def watch() -> None:
            while not answers or answers[-1] < FULL:
                answers.append(controller.lookup(prompt(7)).result(30.0).hit_tokens)
            answers.append(controller.pin(prompt(7), ttl_s=60.0).result(30.0).num_tokens)

        thread = threading.Thread(target=watch)
        thread.start()
        rig.add("watched", prompt(7), max_tokens=5)
        while thread.is_alive():
            rig.step()
        thread.join()
        rig.run()
        assert (FULL, FULL) == (answers[-1], answers[-2])
        assert FULL % BLOCK_TOKENS == 0


@pytest.mark.every_version
def test_the_controller_is_found_by_the_engines_id() -> None:
    """Its name is the ``engine_id`` of the transfer configuration."""
    with controlled(host()) as (rig, controller):
        assert rig.config.kv_transfer_config.engine_id == controller.name
        assert controller is kvtier.Controller.of(controller.name)
        assert controller.health(check_books=True).result(10.0).ok


def asks(**options: Any) -> dict[str, Any]:
    """What a request says to kvtier."""
    return {"sampling": {"extra_args": {"kv_transfer_params": {"kvtier": options}}}}


def computing_takes(rig: Rig, seconds_per_token: float) -> None:
    """Lets kvtier believe that it has seen the engine compute at this speed."""
    for _ in range(20):
        for context in (1, 10, 100, 200, 500):
            rig.connector._half.half._engine.estimates.computed(100, context, 100 * seconds_per_token)


def test_a_session_that_waits_for_a_tool_survives_what_evicts_everything_else() -> None:
    """Said in the request's options; the session beside it, which said nothing, is computed."""
    with controlled(host(SMALL)) as (rig, controller):
        computing_takes(rig, 1.0)
        rig.ask("waits", prompt(1), **asks(session="agent", tool_call={"name": "tests", "expected_s": 30}))
        rig.ask("does not", prompt(2), **asks(session="other"))
        fill(rig, 3, 10)
        assert FULL == loaded(rig, "back", 1, **asks(session="agent"))["host_tokens"]
        assert 0 == loaded(rig, "other", 2)["host_tokens"]
        counters = controller.stats().result(10.0).counters
        assert (1, 0, 0) == (counters["hint.taken"], counters["hint.refused"], counters["hint.bad"])


def test_a_hinted_session_is_brought_back_from_disk(tmp_path: Path) -> None:
    """A workflow says who runs next: that agent's prompt hits in host memory, the other one's comes from the disk."""
    with controlled(small_host(tmp_path)) as (rig, controller):
        for number, agent in ((1, "coder"), (2, "writer")):
            rig.ask(agent, prompt(number), **asks(session=agent))
        fill(rig, 3, 12)
        graph = kvtier.StepGraph({"coder": ["planner"], "writer": ["coder"]})
        controller.hint(kvtier.Workflow(graph, running=("planner",))).result(10.0)
        engine_of(rig).drain(10.0)
        assert {"host_tokens": FULL, "disk_tokens": 0} == loaded(rig, "next", 1)
        assert {"host_tokens": 0, "disk_tokens": FULL} == loaded(rig, "later", 2)
        with pytest.raises(kvtier.UnknownSessionError, match="session is 'stranger'"):
            controller.hint(kvtier.NextUse("stranger", eta_s=1.0)).result(10.0)


def test_a_tenant_within_its_quota_is_not_evicted_by_others() -> None:
    """Ten prompts of another tenant through host memory for four."""
    with controlled(host(SMALL)) as (rig, controller):
        block_bytes = rig.connector._half.sizes.block_bytes
        controller.quota("small", tier="host", num_bytes=7 * block_bytes).result(10.0)
        rig.ask("theirs", prompt(1), **asks(tenant="small"))
        for number in range(2, 12):
            rig.ask(f"large {number}", prompt(number), **asks(tenant="large"))
        assert FULL == loaded(rig, "theirs again", 1, **asks(tenant="small"))["host_tokens"]
        shares = controller.stats().result(10.0).bytes_by_tenant["host"]
        assert 6 * block_bytes == shares["small"]
        assert set(shares) == {"small", "large"}


def test_loads_that_are_slower_than_computing_are_not_made() -> None:
    """With estimates of a slow copy the engine computes what kvtier holds, and the statistics say so."""
    with controlled(host(connector={"load_or_recompute": "auto"})) as (rig, controller):
        fill(rig, 1, 1)
        computing_takes(rig, 1e-5)
        for _ in range(20):
            rig.connector._half.half._engine.estimates.transferred("host", 1 << 20, 1000.0)
        assert 0 == loaded(rig, "slow", 1)["host_tokens"]
        counters = controller.stats().result(10.0).counters
        assert 6 == counters["recompute.refused_blocks"]
        assert counters["recompute.estimated_load_ms"] > counters["recompute.estimated_compute_ms"]
