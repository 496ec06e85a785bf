"""Speculative decoding in vLLM's own scheduler: drafts are accepted and rejected, and nothing that was only guessed is ever stored."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.engine.drafting import ANSWER, Drafter
from tests.engine.rig import BLOCK_TOKENS, Rig, host, prompt
from tests.engine.switch import Switch

pytestmark = [pytest.mark.engine, pytest.mark.every_version]
METHODS = ("ngram", "draft_model", "eagle")
"""one without KV of its own, one with, and one for which vLLM drops the last block of what its prefix cache has"""

ACTIONS = ("add", "add", "step", "step", "step", "step", "switch", "preempt", "abort", "reset", "reset all", "settle")


@contextlib.contextmanager
def rig_with(
    drafter: Drafter, *, async_load: bool | None = None, step_tokens: int = 1024, connector: dict[str, Any] | None = None, **more: Any
) -> Iterator[Rig]:
    """A scheduler with prefix caching whose worker drafts."""
    engine = {"enable_prefix_caching": True, "max_num_batched_tokens": step_tokens, "max_num_scheduled_tokens": step_tokens, **more}
    made = Rig(host(connector={"async_load": async_load, **(connector or {})}), drafter=drafter, **engine)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("num_accepted", range(4))
@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_generated_is_stored_block_by_block(method: str, runs_ahead: bool, num_accepted: int) -> None:
    """However many drafts are accepted, an answer's full blocks are found by who goes on from it, and no other ones."""
    turns = iter(range(1 << 30))
    drafter = Drafter(3, lambda: next(turns) % 3 < num_accepted, method)
    with rig_with(drafter, runs_ahead=runs_ahead) as rig:
        tokens = prompt(1, 50)
        for num_new in (20, 40, 33):
            rig.ask(f"a-{num_new}", tokens, max_tokens=num_new)
            tokens = [*tokens, *[ANSWER] * num_new]
            rig.scheduler.reset_prefix_cache()
            last = [*tokens, 5]
            assert (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS == rig.ask(f"b-{num_new}", last)
            rig.scheduler.reset_prefix_cache()
        assert 0 == rig.num_stale_drafts


@pytest.mark.parametrize("num_drafts", [1, 5])
@pytest.mark.parametrize("async_load", [None, True])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_all_but_one_token_is_loaded(runs_ahead: bool, async_load: bool | None, num_drafts: int) -> None:
    """vLLM then fills the request's first step up with drafts that nobody made, which must not count for anything."""
    with rig_with(Drafter(num_drafts, lambda: True), async_load=async_load, runs_ahead=runs_ahead) as rig:
        tokens = prompt(1, 2 * BLOCK_TOKENS + 1)
        rig.ask("a", tokens, max_tokens=2)
        for name in "bc":
            rig.scheduler.reset_prefix_cache()
            assert 2 * BLOCK_TOKENS == rig.add(name, tokens, max_tokens=40).num_tokens - 1
            rig.run()
            assert 40 == sum(len(one.new_token_ids) for one in rig.outputs[name])
            assert 2 * BLOCK_TOKENS <= sum(rig.transfer_params(name).values())


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_a_drafter_come_with_their_blocks(method: str) -> None:
    """They run behind the model's, and some several times, so nothing is loaded or stored by layer. Without them it is: the rig's forward
    pass waits for no layer, which is found out although vLLM asks for the report before it says that the step was computed."""
    with rig_with(Drafter(2, lambda: True, method), connector={"layerwise": "on"}) as rig:
        found = []
        for name in "abc":
            found.append(rig.ask(name, prompt(1, 200)))
            rig.scheduler.reset_prefix_cache()
        assert (0, method != "ngram", 192) == (found[0], found[1] == 192, found[2])


@pytest.mark.parametrize("num_steps", range(1, 6))
@pytest.mark.parametrize("method", METHODS)
def test_a_load_fails_in_a_step_that_is_followed_by_drafts(monkeypatch: pytest.MonkeyPatch, method: str, num_steps: int) -> None:
    """The drafter has drafted from a token that the scheduler drops; the request goes back, with these drafts."""
    switch = Switch(monkeypatch)
    with rig_with(Drafter(3, lambda: True, method), step_tokens=64) as rig:
        tokens = prompt(1, 200)
        rig.ask("before", tokens)
        rig.scheduler.reset_prefix_cache()
        switch.is_broken = True
        rig.add("first", tokens, max_tokens=40)
        for _ in range(num_steps):
            rig.step()
        rig.add("second", [*tokens[:150], 5, 5], max_tokens=40)
        rig.run()
        switch.is_broken = False
        rig.scheduler.reset_prefix_cache()
        assert 224 == rig.ask("after", [*tokens, *[ANSWER] * 40])


@settings(max_examples=100, phases=[Phase.generate], deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    seed=st.integers(0, 1 << 30),
    method=st.sampled_from(METHODS),
    async_load=st.sampled_from([None, True]),
    runs_ahead=st.booleans(),
    step_tokens=st.sampled_from([64, 160, 1024]),
)
def test_any_order_of_drafts_loads_failures_and_preemptions(
    data: st.DataObject, seed: int, method: str, async_load: bool | None, runs_ahead: bool, step_tokens: int
) -> None:
    """Requests over shared beginnings with answers of some blocks; drafts are accepted at random, copies fail, requests are preempted and
    aborted, caches are reset, also under running requests. No token is wrong, and no drafter reads KV that is not its own."""
    chance = random.Random(seed)
    share = chance.choice([0.2, 0.5, 0.9])
    drafter = Drafter(data.draw(st.sampled_from([1, 3, 7])), lambda: chance.random() < share, method)
    with (
        pytest.MonkeyPatch.context() as patch,
        rig_with(drafter, async_load=async_load, step_tokens=step_tokens, runs_ahead=runs_ahead) as rig,
    ):
        switch = Switch(patch)
        beginnings = [prompt(1, 193), [*prompt(2, 60), *[ANSWER] * 120]]
        for number, beginning in enumerate(beginnings):
            rig.ask(f"before-{number}", beginning)
        rig.scheduler.reset_prefix_cache()
        for number in range(data.draw(st.integers(1, 30))):
            action = data.draw(st.sampled_from(ACTIONS))
            if action == "add" and len(rig.scheduler.requests) < 5:
                beginning = data.draw(st.sampled_from(beginnings))
                length = data.draw(st.sampled_from([33, 60, 65, 100, 180, len(beginning)]))
                rig.add(
                    f"{number}", [*beginning[:length], *[number] * data.draw(st.integers(0, 3))], max_tokens=data.draw(st.integers(1, 70))
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
        assert 0 == rig.num_stale_drafts
