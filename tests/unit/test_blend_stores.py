"""What a request that was put together from chunks stores under the keys of prefixes: only KV that is what full prefill computes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.connectors.messages import Recompute, RequestOptions, ScheduledRequest, StepMessage, WorkerReport
from kvtier.connectors.requests import BlendPlan, BlendState, Request
from kvtier.hashing import KeyChain
from tests.unit.blend_system import BLOCK, SYSTEM, System, document, joined

QUESTION = [1, 2, 3, 4, 5, 6, 7, 8, 9]


class Engine:
    """The blocks of one request, and which of them hold what full prefill computes."""

    def __init__(self, system: System, tokens: Sequence[int], num_found: int = 0) -> None:
        """``num_found``: blocks that the engine's own prefix cache has from other requests."""
        self._system = system
        self._num_tokens = len(tokens)
        self.block_ids = system.blocks(len(tokens))
        self.num_local = min(num_found, (len(tokens) - 1) // BLOCK)
        self.is_exact = [place < self.num_local for place in range(len(self.block_ids))]
        self._late: list[WorkerReport] = []
        """that the engine has not seen yet"""
        self.to_compute = len(self.block_ids)
        """from which block on, in the next step"""
        self.stored: set[int] = set()
        """places of the blocks that were"""

    def start(self, outcome: str, *, is_late: bool = False) -> bool:
        """The request gets its blocks, and what it does not get otherwise is computed. ``outcome``: of a blend, heard of a step later
        where ``is_late``. Whether there is one."""
        matched = self._system.half.match("second", self._num_tokens, self.num_local * BLOCK)
        num_matched = matched.num_tokens or 0
        end = self.num_local + num_matched // BLOCK
        self._system.half.allocated("second", self.block_ids, num_matched)
        message = self._step()
        for load in message.loads:
            self._set(load.block_ids, is_exact=True)
        report = WorkerReport(dict.fromkeys([*(load.job_id for load in message.loads), *(blend.job_id for blend in message.blends)], 1))
        for job in message.blends:
            self.to_compute = job.first // BLOCK if outcome != "sure" else len(self.block_ids)
            self._set(self.block_ids[job.first // BLOCK : job.end // BLOCK], is_exact=False)
            if outcome == "unsure":
                report.unsure.add(job.job_id)
            elif outcome == "failed":
                report.failed[job.job_id] = {0}
        assert matched.is_blended == bool(message.blends)
        self._compute(end)
        self._finish(message, report, is_late=is_late)
        return matched.is_blended

    def go_on(self) -> None:
        """A step later; what was to come from a blend that came to nothing is computed in it."""
        self._compute(self.to_compute)
        self.to_compute = len(self.block_ids)
        message = self._step()
        self._finish(message, WorkerReport())

    def preempt(self, num_kept: int) -> None:
        """The engine's own cache gives some blocks back, approximations too, but none that were never filled."""
        self.num_local = min(num_kept, (self._num_tokens - 1) // BLOCK, self.to_compute)
        self.to_compute = len(self.block_ids)
        self.is_exact[self.num_local :] = [False] * (len(self.is_exact) - self.num_local)

    def _step(self) -> StepMessage:
        return self._system.half.build_step([ScheduledRequest("second", self.block_ids, self._num_tokens)])

    def _compute(self, first: int) -> None:
        for place in range(first, len(self.is_exact)):
            self.is_exact[place] = all(self.is_exact[:place])

    def _set(self, block_ids: Sequence[int], *, is_exact: bool) -> None:
        for block_id in block_ids:
            self.is_exact[self.block_ids.index(block_id)] = is_exact

    def _finish(self, message: StepMessage, report: WorkerReport, *, is_late: bool = False) -> None:
        for job in message.stores:
            places = [self.block_ids.index(block_id) for block_id in job.block_ids]
            assert all(self.is_exact[place] for place in places), f"{places} of {self.is_exact}"
            self.stored |= set(places)
            report.done[job.job_id] = 1
        self.hear()
        self._late.append(report)
        if not is_late:
            self.hear()

    def hear(self) -> None:
        """Of what is late."""
        while self._late:
            self._system.half.finish_step(self._late.pop(0))


def system_with_chunks(directory: Path, *, async_load: bool = False) -> tuple[System, list[int], list[list[int]]]:
    """Two chunks in the cache, and a prompt that has them in another order."""
    system = System(directory, async_load=async_load)
    documents = [document(1, 9), document(2, 8)]
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    return system, *joined(documents[::-1], SYSTEM, QUESTION)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["sure", "unsure", "failed"]), st.booleans(), st.integers(0, 2), st.integers(0, 8)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 4),
)
def test_only_what_is_exact_is_stored(rounds: list[tuple[str, bool, int, int]], min_margin: float, num_found: int) -> None:
    """However often the request is preempted, with whatever the engine's own cache gives back, and whatever its blends come to."""
    with tempfile.TemporaryDirectory() as directory:
        system, tokens, spans = system_with_chunks(Path(directory))
        system.add("second", tokens, spans=spans, min_margin=min_margin)
        engine = Engine(system, tokens, num_found)
        for outcome, is_late, num_steps, num_kept in rounds:
            engine.start(outcome, is_late=is_late)
            for _ in range(num_steps):
                engine.go_on()
            engine.preempt(num_kept)
        engine.hear()
        system.half.request_finished("second")
        while system.half.has_pending_work:
            system.step()
        system.close()


@pytest.mark.parametrize("outcome", ["unsure", "failed"])
def test_what_the_engine_computed_in_place_of_a_blend_is_stored(tmp_path: Path, outcome: str) -> None:
    """So the next request with the same prompt finds all of it, and neither blends nor computes."""
    system, tokens, spans = system_with_chunks(tmp_path)
    system.add("second", tokens, spans=spans, min_margin=0.5)
    engine = Engine(system, tokens)
    assert engine.start(outcome)
    assert set() == engine.stored
    engine.go_on()
    assert set(range(len(tokens) // BLOCK)) == engine.stored
    system.half.request_finished("second")
    system.add("third", tokens, spans=spans, min_margin=0.5)
    matched = system.half.match("third", len(tokens), 0)
    assert ((len(tokens) - 1) // BLOCK * BLOCK, False) == (matched.num_tokens, matched.is_blended)
    system.half.request_finished("third")
    system.close()


def test_a_sure_blend_stores_nothing_behind_it(tmp_path: Path) -> None:
    """Neither when it goes on nor when it starts over and the engine gives its own blocks back."""
    system, tokens, spans = system_with_chunks(tmp_path)
    system.add("second", tokens, spans=spans)
    engine = Engine(system, tokens)
    assert engine.start("sure")
    engine.go_on()
    engine.preempt(7)
    assert not engine.start("sure"), "all of it is there"
    engine.go_on()
    assert set() == engine.stored
    system.half.request_finished("second")
    system.close()


def test_what_is_heard_of_an_earlier_blend_says_nothing_of_the_last() -> None:
    """It was ordered before the request started over with less; what it has now is an approximation from further ahead."""
    request = Request("r", range(100), KeyChain(bytes(16), BLOCK), RequestOptions(), "")
    request.blend = BlendState([], (), Recompute("epic", 0.5), 100)
    request.begin_blend(1, BlendPlan(16, 80, (), request.blend.recompute))
    request.start_over()
    request.begin_blend(2, BlendPlan(8, 80, (), request.blend.recompute))
    request.give_up_blend(1, BLOCK)
    assert (2, True) == (request.num_full_blocks(100, BLOCK), request.blend.is_over)
    request.give_up_blend(2, BLOCK)
    assert 4 == request.num_full_blocks(100, BLOCK), "the first one is not known to have come to nothing"


@pytest.mark.parametrize("async_load", [False, True])
def test_what_lies_before_a_blend_is_loaded_in_its_step(tmp_path: Path, async_load: bool) -> None:
    """Also where the request waits for the blend outside of the batch: it is the blend that reads it, and that says when it is done."""
    system, tokens, spans = system_with_chunks(tmp_path, async_load=async_load)
    system.add("second", tokens, spans=spans)
    engine = Engine(system, tokens)
    engine.start("failed")
    engine.go_on()
    system.half.request_finished("second")
    documents = [document(1, 9), document(2, 8)]
    tokens, spans = joined([documents[1], [1, 2], documents[0]], SYSTEM, QUESTION)
    system.add("third", tokens, spans=[spans[0], spans[2]])
    matched = system.half.match("third", len(tokens), 0)
    assert (True, async_load) == (matched.is_blended, matched.is_async)
    block_ids = system.blocks(len(tokens))
    system.half.allocated("third", block_ids, matched.num_tokens or 0)
    message = system.half.build_step([] if async_load else [ScheduledRequest("third", block_ids, len(tokens))])
    (job,) = message.blends
    assert (tuple(block_ids[: job.first // BLOCK]),) == tuple(load.block_ids for load in message.loads)
    assert ((), async_load) == (message.async_loads, job.is_async)
    assert job.first > 0
    system.half.finish_step(WorkerReport({job.job_id: 1, message.loads[0].job_id: 1}))
    system.half.request_finished("third")
    system.close()
