"""Blends and chunks that are too large for a step go on in the next ones, and come to the same; whatever happens in between."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.blend.chunks import anchor_of
from kvtier.blend.finding import ChunkSpace
from kvtier.blend.methods import METHODS
from kvtier.blend.steps import finish
from kvtier.config import BlendConfig
from kvtier.connectors import blend_worker
from kvtier.connectors.blend_memory import Room
from kvtier.connectors.blend_steps import BlendSteps, LostChunkError
from kvtier.connectors.blend_worker import ChunkBlender, Ranks
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.chunk_rows import ArenaReads
from kvtier.connectors.messages import BlendJob, ScheduledRequest, StepMessage, WorkerReport
from kvtier.connectors.scheduler import IDLE_WAIT_S
from kvtier.connectors.step_meter import StepTokens
from kvtier.hashing import request_root
from tests.unit.blend_system import BLOCK, BLOCK_BYTES, LAYERS, NAMESPACE, SYSTEM, TOKEN_BYTES, System, document, is_same, joined, kept

ROOT = request_root(NAMESPACE.digest)
SPACE = ChunkSpace(ROOT, anchor_of(ROOT, SYSTEM, BLOCK), BLOCK)
DOCUMENTS = [document(number, 8 + number) for number in range(3)]


def parts(max_step_tokens: int) -> BlendParts:
    return BlendParts(BlendConfig(enabled=True), max_step_tokens=max_step_tokens)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[int], System]:
    return lambda max_step_tokens: System(tmp_path, parts(max_step_tokens))


def begun(
    system: System,
    *,
    name: str = "second",
    method: str = "epic",
    ratio: float = 0.5,
    min_margin: float = 0.0,
) -> tuple[BlendJob, list[int], list[int]]:
    """The order to put a prompt of the same documents together, its tokens and its blocks. Nothing is done yet."""
    tokens, spans = joined(DOCUMENTS, SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    tokens, spans = joined(DOCUMENTS[::-1], SYSTEM, [3, 4, 5])
    system.add(name, tokens, spans=spans, method=method, ratio=ratio, min_margin=min_margin)
    matched = system.half.match(name, len(tokens), 0)
    assert (True, True) == (matched.is_blended, matched.is_async)
    block_ids = system.blocks(len(tokens))
    assert matched.num_tokens is not None
    system.half.allocated(name, block_ids, matched.num_tokens)
    (job,) = system.half.build_step([]).blends
    return job, tokens, block_ids


def is_written(system: System, job: BlendJob) -> bool:
    return not bool(system.memory.part(job.first, job.end, job.block_ids).keys.isnan().all())


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(sorted(METHODS)),
    ratio=st.sampled_from([0.0, 0.3, 1.0]),
    min_margin=st.sampled_from([0.0, 1e-6]),
    shares=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    num_kept=st.integers(0, LAYERS),
)
def test_what_is_spread_comes_to_the_same(
    tmp_path_factory: pytest.TempPathFactory, method: str, ratio: float, min_margin: float, shares: list[int], num_kept: int
) -> None:
    """Bit for bit that of one step, for every method; each step has its share and what is left of a layer.

    Nothing is written before, unless it is more than may be kept elsewhere.
    """
    if method == "none" or not ratio:
        shares = [min(share, 1) for share in shares]  # little is computed
    system = System(tmp_path_factory.mktemp("spread"), parts(3))
    job, tokens, _ = begun(system, method=method, ratio=ratio, min_margin=min_margin)
    assert job.is_spread
    at_once = replace(job, block_ids=tuple(system.blocks(len(tokens))))
    finish(system.blender.blend(at_once, system.arena))
    system.blender.kept_bytes = num_kept * len(tokens) * TOKEN_BYTES
    report = WorkerReport()
    num_steps = 0
    for share in itertools.cycle(shares):
        before = system.model.num_projected
        assert not system.blend_steps.blend([] if num_steps else [job], set(), report, share_tokens=share)
        num_computed = system.model.num_projected - before
        assert num_computed <= LAYERS * share + 2 * len(tokens) if share else not num_computed, "the share, a layer, a look at one"
        assert report.done or num_computed >= LAYERS * share
        assert set() == system.blend_steps.take_received() or report.done
        assert is_written(system, job) == bool(report.done) or num_kept < LAYERS
        num_steps += 1
        if report.done:
            break
    assert num_steps > 1
    made, expected = (system.memory.part(one.first, one.end, one.block_ids) for one in (job, at_once))
    assert torch.equal(made.keys, expected.keys)
    assert torch.equal(made.values, expected.values)
    assert {} == report.failed
    ended(system, report)


def ended(system: System, report: WorkerReport, *, failed: bool = False) -> None:
    """The report arrives; nothing is left."""
    system.half.finish_step(report)
    system.half.request_finished("second")
    assert failed == bool(system.cache.stats["blend.failed"])
    while system.half.has_pending_work:
        system.step()
    system.close()


def test_the_request_is_told_at_the_end(make: Callable[[int], System]) -> None:
    """Its worker reports it as received with the last share; another request that wants a blend waits until then."""
    system = make(5)
    job, tokens, _ = begun(system)
    others, spans = joined(DOCUMENTS, SYSTEM, [6])
    system.add("third", others, spans=spans)
    report = WorkerReport()
    num_steps = 0
    while not report.done:
        assert system.half.match("third", len(others), 0).num_tokens is None
        assert system.half.has_pending_work, "an idle engine goes on"
        message = system.half.build_step([])
        assert () == message.blends
        system.blend_steps.blend([] if num_steps else [job], set(), report, share_tokens=message.share_tokens)
        num_steps += 1
        assert system.blend_steps.has_blends == (not report.done)
    assert num_steps > 2
    assert {"second"} == system.blend_steps.take_received()
    assert {job.job_id: 1} == report.done
    system.half.finish_step(report)
    assert system.half.match("third", len(others), 0).is_blended
    system.half.request_finished("third")
    assert system.half.blended("second")["tokens"] == sum(map(len, DOCUMENTS)) - len(tokens) % BLOCK + 3
    ended(system, WorkerReport())


def test_the_engine_is_kept_from_nothing_else(make: Callable[[int], System], monkeypatch: pytest.MonkeyPatch) -> None:
    """While it goes on no step waits for tiers, none is taken for the engine's own speed, and no chunk is computed beside it."""
    system = make(5)
    job, _, _ = begun(system)
    chunk = document(5, 8)
    system.half._blending._entries.add(SPACE.chunk(chunk), tuple(SYSTEM), tuple(chunk), "")
    waits: list[float] = []
    measured: list[bool] = []
    begin, poll = system.half._meter.begin, system.cache.poll

    def noted_poll(*wait_s: float) -> None:
        waits.extend(wait_s)
        poll(*wait_s)

    def noted_begin(tokens: StepTokens, *, is_pure: bool) -> int:
        measured.append(is_pure)
        return begin(tokens, is_pure=is_pure)

    with monkeypatch.context() as patch:
        patch.setattr(type(system.cache), "busy", True)
        patch.setattr(type(system.half._meter), "is_computing", False)
        patch.setattr(system.cache, "poll", noted_poll)
        patch.setattr(system.half._meter, "begin", noted_begin)
        report = WorkerReport()
        while not report.done:
            assert () == system.half.build_step([]).entries
            system.blend_steps.blend([] if measured[1:] else [job], set(), report, share_tokens=5)
        assert [] == waits
        assert {False} == set(measured)
        system.half.finish_step(report)
        waits.clear()
        (entry,) = system.half.build_step([]).entries
        assert [IDLE_WAIT_S] == waits
        system.half.finish_step(WorkerReport({entry.job_id: 1}))
    ended(system, WorkerReport())


@pytest.mark.parametrize("why", ["abort", "reset", "another arena", "the arena comes back", "another rank"])
def test_what_nobody_wants_ends_in_the_next_step(make: Callable[[int], System], why: str) -> None:
    """Nothing more is computed nor written, the engine is told that all of it is missing, and leases end."""
    system = make(5)
    job, _, block_ids = begun(system)
    answers = {"another rank": iter([True, True, True, False])}.get(why)
    ranks = Ranks(2, bool if answers is None else lambda ready: ready and next(answers))
    blender = ChunkBlender(system.model, system.memory, METHODS, block_tokens=BLOCK, block_bytes=BLOCK_BYTES, ranks=ranks)
    steps = system.steps(blender)
    report = WorkerReport()
    for jobs in ([job], []):
        assert not steps.blend(jobs, set(), report, share_tokens=5)
    if why == "abort":
        assert not system.half.request_finished("second")
    elif why == "reset":
        system.half.reset()
    elif why != "another rank":
        steps.attach(None, "")
        if why == "the arena comes back":
            steps.attach(system.arena, "")
    before = system.model.num_projected
    message = system.half.build_step([])
    assert ((job.job_id,) if why in ("abort", "reset") else ()) == message.abandoned
    unfilled = steps.blend(message.blends, set(), report, message.arena_id, message.abandoned, message.share_tokens)
    assert set(block_ids[job.first // BLOCK : job.end // BLOCK]) == unfilled
    assert before == system.model.num_projected
    assert not is_written(system, job)
    assert ({job.job_id: 1}, {job.job_id: {0}}) == (report.done, report.failed)
    assert {"second"} == steps.take_received()
    assert not steps.has_blends
    assert () == system.half.build_step([]).abandoned, "once is enough"
    ended(system, report, failed=True)


def test_one_that_is_abandoned_as_it_is_ordered_ends(make: Callable[[int], System]) -> None:
    """Nothing is computed of it."""
    system = make(5)
    job, _, block_ids = begun(system)
    report = WorkerReport()
    before = system.model.num_projected
    assert set(block_ids[: job.end // BLOCK]) == system.blend_steps.blend([job], set(), report, "", [job.job_id], 5)
    assert before == system.model.num_projected
    ended(system, report, failed=True)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_error_in_a_later_share_fails_it(make: Callable[[int], System], monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
    """As one in the first does. Where others compute it too this worker ends."""
    system = make(5)
    job, _, block_ids = begun(system)
    report = WorkerReport()
    errors: list[int] = []
    ranks = Ranks(num_ranks)
    blender = ChunkBlender(system.model, system.memory, METHODS, block_tokens=BLOCK, block_bytes=BLOCK_BYTES, ranks=ranks)
    steps = BlendSteps(blender, lambda: errors.append(1))
    steps.attach(system.arena, "")
    steps.blend([job], set(), report, share_tokens=5)

    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(system.model, "finish", fail)
    monkeypatch.setattr(system.model, "project", fail)
    if num_ranks > 1:
        with pytest.raises(SystemExit):
            steps.blend([], set(), report, share_tokens=5)
        report.done[job.job_id], report.failed[job.job_id] = 1, {0}
    else:
        assert set(block_ids[: job.end // BLOCK]) == steps.blend([], set(), report, share_tokens=5)
    assert [1] == errors
    ended(system, report, failed=True)


def test_a_copy_that_fails_at_the_end_of_a_share_is_told_to_all(make: Callable[[int], System], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that could go on ask whether to: one that had ended alone would keep them waiting for good."""
    system = make(5)
    job, _, block_ids = begun(system)
    asked: list[bool] = []

    def agree(ready: bool) -> bool:
        asked.append(ready)
        return ready

    def fail(_: object) -> None:
        raise RuntimeError("injected: a copy failed")

    errors: list[int] = []
    blender = ChunkBlender(system.model, system.memory, METHODS, block_tokens=BLOCK, block_bytes=BLOCK_BYTES, ranks=Ranks(2, agree))
    steps = BlendSteps(blender, lambda: errors.append(1))
    steps.attach(system.arena, "")
    report = WorkerReport()
    with monkeypatch.context() as patch:
        patch.setattr(ArenaReads, "rest", fail)
        assert not steps.blend([job], set(), report, share_tokens=5)
    assert ({}, [True, True], []) == (report.done, asked, errors)
    assert set(block_ids[: job.end // BLOCK]) == steps.blend([], set(), report, share_tokens=5)
    assert ([True, True, False], [1]) == (asked, errors)
    ended(system, report, failed=True)


def test_a_slot_that_changes_hands_in_between_fails_it(make: Callable[[int], System]) -> None:
    """What was read may be another chunk's."""
    system = make(5)
    job, _, block_ids = begun(system)
    report = WorkerReport()
    system.blend_steps.blend([job], set(), report, share_tokens=5)
    system.arena.bump(job.chunks[0].slots[0])
    unfilled: set[int] = set()
    while not report.done:
        unfilled = system.blend_steps.blend([], set(), report, share_tokens=5)
    assert set(block_ids[: job.end // BLOCK]) == unfilled
    assert not is_written(system, job)
    system.half.finish_step(report)
    assert 1 == system.cache.stats["blend.failed"]


def test_without_room_between_steps_it_is_done_in_one(make: Callable[[int], System], monkeypatch: pytest.MonkeyPatch) -> None:
    """On every rank, if one has none: the engine's own steps need what its memory allocator keeps."""
    system = make(5)
    job, _, _ = begun(system)
    for own, others in ((False, True), (True, False)):
        asked: list[bool] = []
        answers = iter([True, others])

        def agree(ready: bool, asked: list[bool] = asked, answers: object = answers) -> bool:
            asked.append(ready)
            return ready and next(answers)  # type: ignore[call-overload]

        blender = ChunkBlender(system.model, system.memory, METHODS, block_tokens=BLOCK, block_bytes=BLOCK_BYTES, ranks=Ranks(2, agree))
        monkeypatch.setattr(blend_worker, "room_for", lambda *_, own=own, **_more: Room("", own))
        report = WorkerReport()
        system.steps(blender).blend([job], set(), report, share_tokens=1)
        assert [True, own] == asked
        assert ({job.job_id: 1}, {}) == (report.done, report.failed)
    ended(system, report)


def stored(system: System, *, step: Callable[[], StepMessage]) -> list[StepMessage]:
    """A long prompt is served, and its chunks are computed by ``step``."""
    tokens, spans = joined(DOCUMENTS, SYSTEM, [1, 2])
    system.add("first", tokens, spans=spans)
    assert not system.half.match("first", len(tokens), 0).is_blended
    block_ids = system.blocks(len(tokens))
    system.half.allocated("first", block_ids, 0)
    system.step([ScheduledRequest("first", block_ids, len(tokens))])
    system.half.request_finished("first")
    messages = []
    while system.half.has_pending_work:
        messages.append(step())
    return messages


@pytest.mark.parametrize("max_step_tokens", [2, 5, 12, 100])
def test_chunks_are_computed_in_shares(make: Callable[[int], System], max_step_tokens: int) -> None:
    """One after another, each over as many steps as it needs with what it is computed behind; what is kept is the same."""
    system = make(max_step_tokens)
    most = 0

    def step() -> StepMessage:
        nonlocal most
        before = system.model.num_projected
        message = system.step()
        most = max(most, system.model.num_projected - before)
        return message

    messages = stored(system, step=step)
    assert 3 == system.cache.stats["blend.stored_chunks"] == sum(len(message.entries) for message in messages)
    sizes = [len(job.anchor_ids) + len(job.token_ids) for message in messages for job in message.entries]
    assert [size > max_step_tokens for size in sizes] == [job.is_spread for message in messages for job in message.entries]
    assert (len(messages) > 3) == (max_step_tokens < max(sizes))
    if max_step_tokens < max(sizes):
        assert most <= LAYERS * max_step_tokens + max(sizes) + 2
    for each in DOCUMENTS:
        found = kept(system, SPACE.chunk(each))
        assert found is not None
        assert is_same(found, system.full([*SYSTEM, *each]).part(len(SYSTEM), len(SYSTEM) + len(each)))
    system.close()


def test_a_chunk_that_cannot_go_on_is_not_stored(make: Callable[[int], System]) -> None:
    """Its slots are given back, the next chunk is begun."""
    system = make(4)
    broken = False

    def step() -> StepMessage:
        nonlocal broken
        if system.half._blending.is_spread and not broken:
            broken = True
            system.blend_steps.attach(system.arena, "")
        return system.step()

    stored(system, step=step)
    assert (2, 1) == (system.cache.stats["blend.stored_chunks"], system.cache.stats["blend.unstored_chunks"])
    system.close()


@pytest.mark.parametrize(("num_beside", "share"), [(0, 20), (1, 19), (12, 8), (15, 5), (200, 5)])
def test_a_share_is_what_the_engine_leaves(make: Callable[[int], System], num_beside: int, share: int) -> None:
    """Of a step's tokens, but no less than a fourth of them. While nothing is spread there is none."""
    system = make(20)
    assert 0 == system.half.build_step([]).share_tokens
    begun(system, ratio=1.0)
    beside = [7] * max(num_beside, 1)
    system.half.add_request("beside", beside, num_prompt_tokens=len(beside))
    block_ids = system.blocks(len(beside))
    system.half.match("beside", len(beside), 0)
    system.half.allocated("beside", block_ids, 0)
    assert share == system.half.build_step([ScheduledRequest("beside", block_ids, num_beside)] if num_beside else []).share_tokens


def test_chunks_wait_while_a_blend_goes_on(make: Callable[[int], System]) -> None:
    """The blend was first, or is worth more: a request waits for it."""
    system = make(4)
    tokens, spans = joined([document(7, 9)], SYSTEM, [1])
    job, _, _ = begun(system)
    system.half.finish_step(WorkerReport({job.job_id: 1}))
    system.add("third", tokens, spans=spans)
    assert not system.half.match("third", len(tokens), 0).is_blended
    block_ids = system.blocks(len(tokens))
    system.half.allocated("third", block_ids, 0)
    system.step([ScheduledRequest("third", block_ids, len(tokens))])
    (entry,) = system.half.build_step([]).entries
    report = WorkerReport()
    system.blend_steps.store([], [entry], report, share_tokens=1)
    system.blend_steps.blend([job], set(), report, share_tokens=1)
    while job.job_id not in report.done:
        before = system.model.num_projected
        system.blend_steps.store([], [], report, share_tokens=1)
        assert before == system.model.num_projected
        system.blend_steps.blend([], set(), report, share_tokens=1)
    assert entry.job_id not in report.done
    while entry.job_id not in report.done:
        system.blend_steps.store([], [], report, share_tokens=1)
    assert {} == report.failed
    del report.done[job.job_id]
    system.half.request_finished("third")
    ended(system, report)


def test_without_an_arena_nothing_is_begun(make: Callable[[int], System]) -> None:
    """The blender says so at once."""
    system = make(5)
    job, _, _ = begun(system)
    with pytest.raises(LostChunkError):
        finish(system.blender.blend(job, None))
    ended(system, WorkerReport({job.job_id: 1}))
