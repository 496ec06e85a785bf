"""Prompts put together from chunks in vLLM's own scheduler, with a blender that writes numbers: what comes of each ending, in any order."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from kvtier.connectors import blending, chunk_entries
from kvtier.connectors.blend_steps import LostChunkError, Shares, UnsureError
from kvtier.connectors.chunk_entries import ChunkEntries
from kvtier.connectors.messages import BlendJob, CaptureJob, EntryJob
from kvtier.connectors.vllm import blend_parts, sides
from kvtier.connectors.vllm.own_hashes import OwnHashes
from kvtier.copy.base import RowMover
from kvtier.memory.arena import Arena
from tests.engine.rig import APPROXIMATE, BLOCK_TOKENS, Rig, host, is_put_together, prompt
from tests.engine.switch import Switch

pytestmark = [pytest.mark.engine, pytest.mark.every_version]
MODES = [(None, False), (True, False), (None, True)]
"""asynchronous loads; asynchronous scheduling"""
ENDINGS = ("sure", "unsure", "lost", "error")
SYSTEM = prompt(9, 40)
DOCUMENTS = [prompt(number, 100) for number in range(3)]
QUESTION = [7, 7, 7]
HALF_DONE = -3.0
SERVING = ("step", "step", "step", "switch", "preempt", "abort", "reset all")


class NumberBlender:
    """Writes what the forward pass would have written, and a little more; or ends in another way. Alone: nobody computes with it."""

    has_left_others = False

    def __init__(self) -> None:
        self.rig: Rig | None = None
        self.ending: Callable[[], str] = lambda: "sure"
        self.endings: list[str] = []
        self.captured: dict[int, bool] = {}
        """chunks that were copied: whether that was what full prefill computes"""

    def blend(self, job: BlendJob, arena: Arena | None, rows: RowMover | None) -> Shares[int]:
        """All tokens count as chosen. A job for several steps is done in three, and has something of no use in its blocks meanwhile."""
        assert self.rig is not None
        share = yield
        ending = "lost" if arena is None or share == 0 else self.ending()
        for _ in range(2 if job.is_spread and arena is not None else 0):
            if ending == "lost":
                break
            self._write(job, lambda _: HALF_DONE)
            share = yield
            ending = ending if share else "lost"
        if arena is not None and share != 0:
            self._write(job, lambda _: HALF_DONE)
        self.endings.append(ending)
        if ending == "unsure":
            raise UnsureError
        if ending == "lost":
            raise LostChunkError
        if ending == "error":
            raise RuntimeError("injected: this blend fails")
        request = self.rig.scheduler.requests[job.request_id]
        value_of = self.rig.value_of
        self._write(job, lambda index: value_of(request, index) + APPROXIMATE)
        return job.end - job.first

    def _write(self, job: BlendJob, value: Callable[[int], float]) -> None:
        """The blocks that the job may fill."""
        assert self.rig is not None
        for index in range(job.first // BLOCK_TOKENS, job.end // BLOCK_TOKENS):
            self.rig.write(job.block_ids[index], value(index))

    def store(self, job: EntryJob, arena: Arena | None) -> Shares[int]:
        """What lies in the slots is nobody's concern here."""
        for _ in range(3 if job.is_spread and arena is not None else 1):
            if (yield) == 0:
                raise LostChunkError
        return len(job.token_ids)

    def capture(self, job: CaptureJob, arena: Arena | None) -> None:
        """Looks whether the blocks hold what full prefill of some request that has them would have written."""
        assert self.rig is not None
        found = [self.rig.values_in(block_id) for block_id in job.block_ids]
        self.captured[job.job_id] = False
        for name, request in self.rig.scheduler.requests.items():
            if self.rig.scheduler.kv_cache_manager.get_block_ids(name)[0][: len(found)] == list(job.block_ids):
                whole = job.end // BLOCK_TOKENS
                expected = [self.rig.value_of(request, index) for index in range(len(found))]
                is_right = [{value} for value in expected[:whole]] == found[:whole]
                self.captured[job.job_id] |= is_right and all(there in ({-1.0}, {expected[whole]}) for there in found[whole:])

    def prepare(self, rows: RowMover) -> None:
        """Nothing to do."""


@contextlib.contextmanager
def rig_with(
    blender: NumberBlender, *, async_load: bool | None = None, runs_ahead: bool = False, step_tokens: int = 1024, **blend: Any
) -> Iterator[Rig]:
    """A scheduler with prefix caching, whose worker puts prompts together with ``blender``; chunks of all documents are stored."""

    def blender_of(*args: Any) -> NumberBlender:
        assert step_tokens == args[-1], "the rows that a blend computes together: no more than the engine does"
        return blender

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sides, "blender_of", blender_of)
        patch.setattr(blend_parts, "_tokenizer", lambda *_: None)  # which takes longer than all of a test
        made = Rig(
            host(connector={"async_load": async_load}, blend={"enabled": True, **blend}),
            runs_ahead=runs_ahead,
            enable_prefix_caching=True,
            max_num_batched_tokens=step_tokens,
            max_num_scheduled_tokens=step_tokens,
        )
    blender.rig = made
    try:
        for number in range(len(DOCUMENTS)):
            tokens, spans = joined([number, (number + 1) % 3])
            ask(made, f"first-{number}", tokens, spans)
        made.scheduler.reset_prefix_cache()
        blender.endings.clear()
        yield made
    finally:
        made.close()


def joined(order: list[int]) -> tuple[list[int], list[list[int]]]:
    """A prompt of documents, and where they lie."""
    tokens, spans = list(SYSTEM), []
    for number in order:
        spans.append([len(tokens), len(tokens) + len(DOCUMENTS[number])])
        tokens += DOCUMENTS[number]
    return [*tokens, *QUESTION], spans


def options(spans: list[list[int]], **more: Any) -> dict[str, Any]:
    """The sampling of a request that asks for reuse."""
    return {"extra_args": {"kv_transfer_params": {"kvtier": {"blend": {"spans": spans, **more}}}}}


def ask(rig: Rig, name: str, tokens: list[int], spans: list[list[int]], **more: Any) -> dict[str, Any]:
    """Runs a request that asks for reuse. Returns what its answer says."""
    rig.ask(name, tokens, max_tokens=3, sampling=options(spans, **more))
    assert 3 == sum(len(one.new_token_ids) for one in rig.outputs[name])
    return rig.transfer_params(name)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("min_margin", [0.0, 0.5])
@pytest.mark.parametrize("max_step_tokens", [None, 20])
@pytest.mark.parametrize(("async_load", "runs_ahead"), MODES)
def test_every_ending_gives_the_right_tokens(
    async_load: bool | None, runs_ahead: bool, max_step_tokens: int | None, min_margin: float, ending: str
) -> None:
    """Sure: chunks are taken. Else the engine computes, and what it computes is found by the next one with the same prompt, as it is by
    one that asks for no reuse; what was put together is found by nobody. In one step or in three."""
    blender = NumberBlender()
    with rig_with(blender, async_load=async_load, runs_ahead=runs_ahead, max_step_tokens=max_step_tokens) as rig:
        tokens, spans = joined([2, 0, 1])
        num_full = (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        blender.ending = lambda: ending
        said = ask(rig, "a", tokens, spans, min_margin=min_margin)
        assert [ending] == blender.endings
        assert said["blend"] == (
            {"tokens": 280} if ending == "sure" else {"tokens": 0, **({"refused": "unsure"} if ending == "unsure" else {})}
        )
        rig.scheduler.reset_prefix_cache()
        found = rig.ask("b", tokens)
        assert (found, num_full) == ((BLOCK_TOKENS, num_full) if ending == "sure" else (num_full, num_full))
        rig.scheduler.reset_prefix_cache()
        blender.ending = lambda: "error"
        assert {"tokens": 0} == ask(rig, "c", tokens, spans)["blend"], "all of it is there as it is"
        assert [ending] == blender.endings


@pytest.mark.parametrize(
    ("max_step_tokens", "ended", "apart", "ahead"),
    [
        (1, [1, 1, 1], [3, 3], [4, 4]),
        (49, [1, 1, 1], [3, 3], [3, 4]),
        (78, [1, 1, 1], [1, 1], [1, 1]),
        (79, [2, 1], [1], [1]),
        (None, [3], [], []),
    ],
)
@pytest.mark.parametrize(("async_load", "runs_ahead"), MODES)
def test_blends_are_spread_over_steps(
    async_load: bool | None, runs_ahead: bool, max_step_tokens: int | None, ended: list[int], apart: list[int], ahead: list[int]
) -> None:
    """Three at once, of which 29, 50 and 50 tokens are computed: 15 % of chunks, and what lies before them, unless it is there as it is.
    Those that are too large for a step are done in three, one after the other; in between those who are there get their tokens. An engine
    that runs ahead knows a step later that one has ended."""
    blender = NumberBlender()
    with rig_with(blender, async_load=async_load, runs_ahead=runs_ahead, max_step_tokens=max_step_tokens) as rig:
        for number in range(3):
            tokens, spans = joined([number, (number + 2) % 3, (number + 1) % 3])
            rig.add(f"{number}", tokens, max_tokens=3, sampling=options(spans))
        rig.add("beside", QUESTION, max_tokens=30)
        num_blends: list[int] = []
        while sum(num_blends) < 3:
            before = len(blender.endings)
            rig.step()
            num_blends.append(len(blender.endings) - before)
        ends = [index for index, number in enumerate(num_blends) if number]
        assert ended == [num_blends[index] for index in ends]
        assert (ahead if runs_ahead else apart) == [later - end for end, later in itertools.pairwise(ends)]
        assert len(rig.outputs.get("beside", [])) >= len(num_blends) - 1 - runs_ahead, "a token a step"
        rig.run()
        assert [3, 3, 3] == [sum(len(one.new_token_ids) for one in rig.outputs[f"{number}"]) for number in range(3)]


@pytest.mark.parametrize("num_leased", [0, 2])
@pytest.mark.parametrize("max_step_tokens", [None, 20])
@pytest.mark.parametrize(("async_load", "runs_ahead"), MODES)
def test_chunks_that_cannot_be_leased_are_computed(
    monkeypatch: pytest.MonkeyPatch, async_load: bool | None, runs_ahead: bool, max_step_tokens: int | None, num_leased: int
) -> None:
    """vLLM has been promised them by then."""
    blender = NumberBlender()
    with rig_with(blender, async_load=async_load, runs_ahead=runs_ahead, max_step_tokens=max_step_tokens) as rig:
        engine = rig.connector._half.half._engine
        begin_load, num_calls = engine.begin_load, itertools.count()

        def broken(*args: Any, pooled: bool = True) -> Any:
            if not pooled and next(num_calls) == num_leased:
                raise RuntimeError("injected: no lease")
            return begin_load(*args, pooled=pooled)

        tokens, spans = joined([2, 0, 1])
        with monkeypatch.context() as patch:
            patch.setattr(engine, "begin_load", broken)
            assert {"tokens": 0} == ask(rig, "a", tokens, spans)["blend"]
        assert [] == blender.endings
        assert (1, 1) == (engine.stats["connector.errors"], engine.stats["blend.failed"])


@pytest.mark.parametrize("place", ["blocks_in_flight", "job_of"])
@pytest.mark.parametrize("max_step_tokens", [None, 20])
@pytest.mark.parametrize(("async_load", "runs_ahead"), MODES)
def test_blends_that_cannot_be_ordered_are_computed(
    monkeypatch: pytest.MonkeyPatch, async_load: bool | None, runs_ahead: bool, max_step_tokens: int | None, place: str
) -> None:
    """An error in the step that was to begin one."""
    blender = NumberBlender()
    with rig_with(blender, async_load=async_load, runs_ahead=runs_ahead, max_step_tokens=max_step_tokens) as rig:
        stats = rig.connector._half.half._engine.stats
        tokens, spans = joined([2, 0, 1])
        with monkeypatch.context() as patch:
            patch.setattr(blending, place, _raising)
            assert {"tokens": 0} == ask(rig, "a", tokens, spans)["blend"]
        assert [] == blender.endings
        assert (1, 1) == (stats["connector.errors"], stats["blend.failed"])


@pytest.mark.parametrize("entries", ["computed", "served"])
@pytest.mark.parametrize(("async_load", "runs_ahead"), MODES)
def test_an_error_beside_the_chunks_of_a_step(
    monkeypatch: pytest.MonkeyPatch, async_load: bool | None, runs_ahead: bool, entries: str
) -> None:
    """They are not stored; the request that named them gets its tokens, and the next one has them stored."""
    blender = NumberBlender()
    with rig_with(blender, async_load=async_load, runs_ahead=runs_ahead, entries=entries) as rig:
        stats = rig.connector._half.half._engine.stats
        num_stored = stats["blend.stored_chunks"]
        tokens = [*SYSTEM, *prompt(77, 100), *QUESTION]
        with monkeypatch.context() as patch:
            patch.setattr(chunk_entries, "chunk_slots", _raising)
            ask(rig, "a", tokens, [[40, 140]])
        assert (1, num_stored) == (stats["connector.errors"], stats["blend.stored_chunks"])
        rig.scheduler.reset_prefix_cache()
        rig.connector.reset_cache()
        ask(rig, "b", tokens, [[40, 140]])
        assert num_stored + 1 == stats["blend.stored_chunks"]


@pytest.mark.parametrize(("async_load", "runs_ahead"), MODES)
def test_waiting_for_blocks_keeps_the_prefix(async_load: bool | None, runs_ahead: bool) -> None:
    """A request that does not get its blocks at once finds in each step what vLLM's prefix cache has of it, and is hashed once."""
    with rig_with(NumberBlender(), async_load=async_load, runs_ahead=runs_ahead) as rig:
        tokens, spans = joined([2, 0, 1])
        num_cached = 4 * BLOCK_TOKENS
        rig.ask("before", tokens[: num_cached + 3], max_tokens=1, sampling=options([]))
        rig.add("big", prompt(55, 990), max_tokens=12)  # nearly all blocks
        rig.step()
        asked = []
        matched = rig.connector.get_num_new_matched_tokens

        def noting(request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
            asked.append((request.request_id, num_computed_tokens, request.cache_salt))
            return matched(request, num_computed_tokens)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rig.connector, "get_num_new_matched_tokens", noting)
            rig.add("aborted", tokens, sampling=options(spans))
            rig.step()
            rig.step()
            rig.abort("aborted")
            rig.add("a", tokens, max_tokens=3, sampling=options(spans))
            request = rig.scheduler.requests["a"]
            num_hashed = _count_hashes(request)
            rig.run()
        assert len(asked) > 6
        assert {(name, num_cached, None) for name in ("a", "aborted")} == set(asked)
        assert sum(num_hashed) <= len(tokens) // BLOCK_TOKENS + 1
        assert 3 == sum(len(one.new_token_ids) for one in rig.outputs["a"])
        assert is_put_together(request)
        assert 0 == len(rig.connector._own_hashes)


def test_hashes_that_a_request_has_got_blocks_with_stay() -> None:
    """So it finds what it had when it is preempted, however often."""
    with rig_with(NumberBlender()) as rig:
        own, request = OwnHashes(), rig.request("a", prompt(1), cache_salt="tenant")
        shared = list(request.block_hashes)
        own.give(request)
        given = list(request.block_hashes)
        assert len(shared) == len(given) > len(set(shared) & set(given)) == 0
        own.end_step()
        assert ("tenant", shared) == (request.cache_salt, request.block_hashes)
        own.give(request)
        own.keep("a")
        own.end_step()
        own.give(request)
        own.end_step()
        assert (True, given) == (is_put_together(request), request.block_hashes)
        assert 1 == len(own)
        own.forget("a")
        assert 0 == len(own)


def _count_hashes(request: Request) -> list[int]:
    """How many blocks each call that hashes some of a request has hashed, from now on."""
    hasher, counts = request._block_hasher, list[int]()
    assert hasher is not None

    def counting(request: Request) -> list[BlockHash]:
        hashes: list[BlockHash] = hasher(request)
        counts.append(len(hashes))
        return hashes

    request._block_hasher = counting
    return counts


def _raising(*_: Any) -> None:
    raise RuntimeError("injected: an error while a step is built")


@settings(max_examples=60, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), ahead=st.sampled_from(MODES), step_tokens=st.sampled_from([64, 1024]))
def test_any_order_of_blends_and_preemptions(data: st.DataObject, ahead: tuple[bool | None, bool], step_tokens: int) -> None:
    """Requests with and without reuse over the same documents, preempted, aborted; blends end in any way, some over several steps. Nobody
    computes with KV that was not loaded, and only who asked for it with an approximation."""
    blender = NumberBlender()
    most = data.draw(st.sampled_from([None, 25, 1]))
    with rig_with(blender, async_load=ahead[0], runs_ahead=ahead[1], step_tokens=step_tokens, max_step_tokens=most) as rig:
        blender.ending = lambda: data.draw(st.sampled_from(ENDINGS))
        for number in range(data.draw(st.integers(1, 16))):
            action = data.draw(st.sampled_from(["reuse", "reuse", "plain", "step", "step", "step", "preempt", "abort", "reset", "settle"]))
            if action in ("reuse", "plain") and len(rig.scheduler.requests) < 4:
                tokens, spans = joined(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)))
                asks = options(spans, min_margin=data.draw(st.sampled_from([0.0, 0.5]))) if action == "reuse" else None
                rig.add(f"{number}", tokens, max_tokens=data.draw(st.integers(1, 4)), sampling=asks)
            elif action == "step" and rig.scheduler.has_requests():
                rig.step()
            elif action == "settle":
                rig.run()
            else:
                rig.disturb(action, data.draw)
        rig.run()


@settings(max_examples=60, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), ahead=st.sampled_from(MODES), step_tokens=st.sampled_from([64, 160, 1024]))
def test_only_exact_kv_is_copied_into_chunks(data: st.DataObject, ahead: tuple[bool | None, bool], step_tokens: int) -> None:
    """Ever new chunks of the same documents; loads and blends fail, requests are preempted and aborted, caches reset under them. What is
    copied from a request's blocks and stored is full prefill's; a few copies of other things are made, and come to nothing."""
    blender = NumberBlender()
    most = data.draw(st.sampled_from([None, 25, 1]))
    stored: list[int] = []
    advance = ChunkEntries.advance

    def noting(entries: ChunkEntries, job_id: int, count: int, *, has_failed: bool) -> None:
        entry = entries._running[job_id]
        advance(entries, job_id, count, has_failed=has_failed)
        if entry.remaining == 0 and not entry.failed and entry.read_block_ids:
            stored.append(job_id)

    with (
        pytest.MonkeyPatch.context() as patch,
        rig_with(blender, async_load=ahead[0], runs_ahead=ahead[1], step_tokens=step_tokens, entries="served", max_step_tokens=most) as rig,
    ):
        patch.setattr(ChunkEntries, "advance", noting)
        switch = Switch(patch)
        blender.ending = lambda: data.draw(st.sampled_from(ENDINGS))
        for scene in range(data.draw(st.integers(1, 5))):
            rig.run()
            rig.scheduler.reset_prefix_cache(reset_connector=data.draw(st.integers(0, 4)) == 0)
            switch.is_broken = data.draw(st.booleans())
            for number in range(data.draw(st.integers(1, 3))):
                tokens, spans = joined(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)))
                spans = [[start + data.draw(st.integers(0, 5)), end] for start, end in spans]
                asked = options(spans) if data.draw(st.integers(0, 3)) else None
                rig.add(f"{scene}-{number}", tokens, max_tokens=data.draw(st.integers(1, 4)), sampling=asked)
            for action in data.draw(st.lists(st.sampled_from(SERVING), max_size=8)):
                if action == "step" and rig.scheduler.has_requests():
                    rig.step()
                elif action == "switch":
                    switch.is_broken = not switch.is_broken
                else:
                    rig.disturb(action, data.draw)
        rig.run()
    assert all(blender.captured[job_id] for job_id in stored), (stored, blender.captured)
