"""Loads that fail beside requests that share their blocks, in vLLM's own scheduler: nobody computes with what was not loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvtier.connectors.messages import ScheduledRequest
from kvtier.connectors.vllm.unfilled import UnfilledBlocks
from tests.engine.drafting import ANSWER
from tests.engine.rig import Rig, host, prompt
from tests.engine.switch import Switch

pytestmark = [pytest.mark.engine, pytest.mark.every_version]
STEP_TOKENS = 64
SHARED = prompt(1, 320)


@contextlib.contextmanager
def rig_with(*, async_load: bool | None, threshold: int, step_tokens: int = STEP_TOKENS, runs_ahead: bool = False) -> Iterator[Rig]:
    """A scheduler with prefix caching and steps of few tokens."""
    made = Rig(
        host(connector={"async_load": async_load}),
        runs_ahead=runs_ahead,
        enable_prefix_caching=True,
        max_num_batched_tokens=step_tokens,
        max_num_scheduled_tokens=step_tokens,
        long_prefill_token_threshold=threshold,
    )
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("num_steps", range(9))
@pytest.mark.parametrize("threshold", [0, 32])
@pytest.mark.parametrize("async_load", [None, True])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_who_shares_blocks_of_a_failed_load(
    monkeypatch: pytest.MonkeyPatch, runs_ahead: bool, async_load: bool | None, threshold: int, num_steps: int
) -> None:
    """A request that begins alike comes in the same step, or while the first one computes what it did not get; that one is preempted."""
    switch = Switch(monkeypatch)
    with rig_with(async_load=async_load, threshold=threshold, runs_ahead=runs_ahead) as rig:
        rig.ask("before", SHARED)
        rig.scheduler.reset_prefix_cache()
        switch.is_broken = True
        rig.add("first", SHARED, max_tokens=3)
        for _ in range(num_steps):
            rig.step()
        rig.add("second", [*SHARED[:300], 7, 7, 7], max_tokens=3)
        rig.run()
        assert 3 == len(rig.outputs["first"]) == len(rig.outputs["second"])
        rig.scheduler.reset_prefix_cache()
        switch.is_broken = False
        assert 288 == rig.ask("after", [*SHARED[:300], 8, 8, 8])


@pytest.mark.parametrize("num_steps", range(1, 7))
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_failed_load_and_a_preemption(monkeypatch: pytest.MonkeyPatch, runs_ahead: bool, num_steps: int) -> None:
    """What comes back from the engine's prefix cache when the request goes on is what it computed before."""
    switch = Switch(monkeypatch)
    with rig_with(async_load=None, threshold=0, runs_ahead=runs_ahead) as rig:
        rig.ask("before", SHARED)
        rig.scheduler.reset_prefix_cache()
        switch.is_broken = True
        rig.add("first", SHARED, max_tokens=3)
        for _ in range(num_steps):
            rig.step()
        if rig.scheduler.running:  # or it waits for its load
            rig.preempt(0)
        rig.run()
        assert 3 == len(rig.outputs["first"])


@pytest.mark.parametrize("how", ["aborted", "preempted"])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_who_was_to_compute_shared_blocks_is_gone(monkeypatch: pytest.MonkeyPatch, num_steps: int, how: str) -> None:
    """vLLM takes them for computed: the first request that has them was to do it, in the next steps."""
    switch = Switch(monkeypatch)
    with rig_with(async_load=None, threshold=0, step_tokens=160) as rig:
        rig.ask("before", SHARED)
        rig.scheduler.reset_prefix_cache()
        switch.is_broken = True
        rig.add("first", SHARED, max_tokens=3)
        rig.add("second", [*SHARED[:300], 7, 7, 7], max_tokens=3)
        for _ in range(num_steps):
            rig.step()
        if how == "aborted":
            rig.abort("first")
        else:
            rig.preempt(0)
        rig.run()
        assert 3 == len(rig.outputs["second"])


@pytest.mark.parametrize("num_steps", range(3))
@pytest.mark.parametrize(("async_load", "runs_ahead"), [(None, False), (True, False), (None, True)])
def test_a_request_that_ends_while_its_load_fails(
    monkeypatch: pytest.MonkeyPatch, async_load: bool | None, runs_ahead: bool, num_steps: int
) -> None:
    """Of what it leaves in the engine's prefix cache nothing was not computed."""
    switch = Switch(monkeypatch)
    with rig_with(async_load=async_load, threshold=0, runs_ahead=runs_ahead) as rig:
        rig.ask("before", SHARED)
        rig.scheduler.reset_prefix_cache()
        switch.is_broken = True
        rig.add("first", SHARED, max_tokens=3)
        for _ in range(num_steps):
            rig.step()
        rig.step(meanwhile=lambda: rig.abort("first"))
        rig.add("second", [*SHARED[:300], 7, 7, 7], max_tokens=3)
        rig.run()
        assert 3 == len(rig.outputs["second"])


def test_what_was_computed_behind_a_failed_load_is_not_found_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when others have computed what lies before it."""
    switch = Switch(monkeypatch)
    with rig_with(async_load=None, threshold=0) as rig:
        rig.ask("before", SHARED)
        rig.scheduler.reset_prefix_cache()
        switch.is_broken = True
        rig.add("first", [*SHARED, *range(50)])
        rig.step(meanwhile=lambda: rig.abort("first"))
        rig.ask("second", [*SHARED, 7, 7, 7])
        assert 320 == rig.ask("third", [*SHARED, *range(50)])


def test_who_reads_what_is_computed_anew_behind_unfilled_blocks() -> None:
    """Of those that share them the first computes all from there on; where it does not, the others are told."""
    unfilled = UnfilledBlocks(4)
    unfilled.add({3}, [[1, 2, 3, 4], [1, 2, 3, 4, 5]])
    first, second = ScheduledRequest("first", [1, 2, 3, 4], 12), ScheduledRequest("second", [1, 2, 3, 4, 5], 18)
    assert (4,) == unfilled.read_by([first, second], {"first": 4, "second": 2})
    assert () == unfilled.read_by([ScheduledRequest("second", [1, 2, 3, 4, 5], 18)], {"second": 6})
    unfilled.add({3}, [[1, 2, 3, 4]])
    unfilled.keep([[1, 2]])
    assert () == unfilled.read_by([second], {"second": 2})


@settings(max_examples=80, phases=[Phase.generate], deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    async_load=st.sampled_from([None, True]),
    runs_ahead=st.booleans(),
    threshold=st.sampled_from([0, 0, 32]),
    step_tokens=st.sampled_from([64, 160, 1024]),
)
def test_any_order_of_loads_failures_and_preemptions(
    data: st.DataObject, async_load: bool | None, runs_ahead: bool, threshold: int, step_tokens: int
) -> None:
    """Requests over two shared beginnings; copies fail and work again, requests are preempted and aborted, caches are reset."""
    with (
        pytest.MonkeyPatch.context() as patch,
        rig_with(async_load=async_load, threshold=threshold, step_tokens=step_tokens, runs_ahead=runs_ahead) as rig,
    ):
        switch = Switch(patch)
        beginnings = [prompt(1, 256), prompt(2, 200)]
        for number, beginning in enumerate(beginnings):
            rig.ask(f"before-{number}", beginning)
        rig.scheduler.reset_prefix_cache()
        switch.is_broken = data.draw(st.booleans())
        for number in range(data.draw(st.integers(1, 24))):
            action = data.draw(st.sampled_from(["add", "add", "step", "step", "step", "switch", "preempt", "abort", "reset", "settle"]))
            if action == "add" and len(rig.scheduler.requests) < 5:
                beginning = data.draw(st.sampled_from(beginnings))
                length = data.draw(st.integers(40, len(beginning)))
                rig.add(
                    f"{number}", [*beginning[:length], *[number] * data.draw(st.integers(1, 40))], max_tokens=data.draw(st.integers(1, 4))
                )
            elif action == "step" and rig.scheduler.has_requests():
                rig.step()
            elif action == "switch":
                switch.is_broken = not switch.is_broken
            elif action == "settle":
                rig.run()
            else:
                rig.disturb(action, data.draw)
        rig.run()
        assert {ANSWER} >= {token for outputs in rig.outputs.values() for one in outputs for token in one.new_token_ids}
