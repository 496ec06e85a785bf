"""Chunk reuse on several workers that share the model's heads: they agree before they compute, so nobody waits for one that gave up."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvtier.blend.methods import METHODS
from kvtier.connectors import blend_worker
from kvtier.connectors.blend_steps import BlendSteps
from kvtier.connectors.blend_worker import ChunkBlender, Ranks
from kvtier.connectors.messages import ScheduledRequest, StepMessage, WorkerReport
from tests.unit.blend_system import BLOCK, BLOCK_BYTES, CAN_BLEND, LAYERS, SYSTEM, TOKEN_BYTES, System, begun_blend, document, joined


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def agreeing(system: System, asked: list[bool], answer: bool | None = None) -> ChunkBlender:
    """The system's blender as one rank of several: what it told the others, and what they answer (None: the same)."""

    def agree(ready: bool) -> bool:
        asked.append(ready)
        return ready if answer is None else answer

    return ChunkBlender(system.model, system.memory, METHODS, block_tokens=BLOCK, block_bytes=BLOCK_BYTES, ranks=Ranks(2, agree))


def ordered_chunk(system: System) -> StepMessage:
    """The step that computes one of the two chunks of a prompt, to store it."""
    tokens, spans = joined([document(number, 8) for number in range(2)], SYSTEM, [1, 2])
    system.add("first", tokens, spans=spans)
    system.half.match("first", len(tokens), 0)
    block_ids = system.blocks(len(tokens))
    system.half.allocated("first", block_ids, 0)
    system.step([ScheduledRequest("first", block_ids, len(tokens))])
    return system.half.build_step([])


def run_out(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("injected")


@pytest.mark.parametrize(
    "case", ["fine", "no arena", "no prefix", "another tenant", "a block is missing", "no memory", "another rank cannot"]
)
def test_ranks_agree_before_they_compute(system: System, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job asks all ranks once, whatever this one could do, and computes only if all can: nobody waits for one that gave up."""
    message, block_ids = begun_blend(system, num_computed_tokens=4)
    (job,) = message.blends
    asked: list[bool] = []
    steps = system.steps(agreeing(system, asked, False if case == "another rank cannot" else None))
    failed_block_ids = {block_ids[0]} if case == "no prefix" else set()
    first, *others = job.chunks
    if case == "no arena":
        steps.attach(None, "")
    if case == "another tenant":
        system.arena.bump(first.slots[0])
    if case == "a block is missing":
        job = replace(job, chunks=(replace(first, slots=first.slots[:-1], generations=first.generations[:-1]), *others))
    before = system.model.num_embedded
    report = WorkerReport()
    with monkeypatch.context() as patch:
        if case == "no memory":
            patch.setattr(torch, "empty", run_out)
        unfilled = steps.blend([job], failed_block_ids, report)
    assert [case in ("fine", "another rank cannot")] == asked
    assert (case == "fine") == (not unfilled) == (not report.failed) == (system.model.num_embedded > before)
    system.finish(message, report)
    system.half.request_finished("second")
    while system.half.has_pending_work:
        system.step()
    system.close()


@pytest.mark.parametrize("case", ["fine", "no arena", "no memory", "another rank cannot"])
def test_ranks_agree_before_they_compute_a_chunk(system: System, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for chunks that are stored."""
    message = ordered_chunk(system)
    assert 1 == len(message.entries)
    asked: list[bool] = []
    steps = system.steps(agreeing(system, asked, False if case == "another rank cannot" else None))
    if case == "no arena":
        steps.attach(None, "")
    before = system.model.num_embedded
    report = WorkerReport()
    with monkeypatch.context() as patch:
        if case == "no memory":
            patch.setattr(torch, "empty", run_out)
        steps.store(message.captures, message.entries, report)
    assert [case in ("fine", "another rank cannot")] == asked
    assert (case == "fine") == (not report.failed) == (system.model.num_embedded > before)
    system.finish(message, report)
    system.half.request_finished("first")
    while system.half.has_pending_work:
        system.step()
    system.close()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("place", "is_shared"), [("the prefix", True), ("a layer", True), ("the result", False)])
def test_who_breaks_off_what_others_compute_ends_the_engine(
    system: System, place: str, is_shared: bool, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for good in the next layer. Alone, or when they have no part in what is left, it is one that failed."""
    message, block_ids = begun_blend(system, num_computed_tokens=4)
    (job,) = message.blends
    blender = ChunkBlender(system.model, system.memory, METHODS, block_tokens=BLOCK, block_bytes=BLOCK_BYTES, ranks=Ranks(num_ranks))
    errors: list[int] = []
    steps = BlendSteps(blender, lambda: errors.append(1))
    steps.attach(system.arena, "")
    where = {"the prefix": (system.memory, "read"), "a layer": (system.model, "finish"), "the result": (system.memory, "write")}[place]
    report = WorkerReport()
    with monkeypatch.context() as patch:
        patch.setattr(*where, run_out)
        if is_shared and num_ranks > 1:
            with pytest.raises(SystemExit):
                steps.blend([job], set(), report)
        else:
            assert set(block_ids[job.first // BLOCK : job.end // BLOCK]) == steps.blend([job], set(), report)
    assert [1] == errors
    report.done[job.job_id], report.failed[job.job_id] = 1, {0}
    system.finish(message, report)
    system.half.request_finished("second")
    while system.half.has_pending_work:
        system.step()
    system.close()


def test_who_breaks_off_a_chunk_ends_the_engine(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for chunks that are computed to be stored."""
    message = ordered_chunk(system)
    blender = ChunkBlender(system.model, system.memory, METHODS, block_tokens=BLOCK, block_bytes=BLOCK_BYTES, ranks=Ranks(2))
    monkeypatch.setattr(system.model, "finish", run_out)
    with pytest.raises(SystemExit):
        system.steps(blender).store([], message.entries, WorkerReport())


@pytest.mark.parametrize("num_kept", [0, 1, LAYERS])
@pytest.mark.parametrize("fails", ["copies", "first copy", "slots"])
def test_what_a_rank_copies_by_itself_is_its_own_concern(
    system: System, num_kept: int, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk's layers go to its slots between those that all ranks compute: who cannot copy one computes on, and says so at the end."""
    message = ordered_chunk(system)
    (job,) = message.entries
    blender = ChunkBlender(system.model, system.memory, METHODS, block_tokens=BLOCK, block_bytes=BLOCK_BYTES, ranks=Ranks(2))
    blender.kept_bytes = num_kept * (len(job.anchor_ids) + len(job.token_ids)) * TOKEN_BYTES
    if fails == "copies":
        monkeypatch.setattr(blend_worker, "fill_slots", run_out)
    elif fails == "first copy":
        outcomes = itertools.chain([run_out], itertools.repeat(lambda: None))
        monkeypatch.setattr(blend_worker, "fill_slots", lambda *_: next(outcomes)())
    else:
        system.arena.bump(job.slots.slots[0])
    before, report = system.model.num_projected, WorkerReport()
    system.steps(blender).store([], message.entries, report)
    assert {job.job_id: {0}} == report.failed
    assert system.model.num_projected - before >= LAYERS * (len(job.anchor_ids) + len(job.token_ids))
    system.finish(message, report)
    system.half.request_finished("first")
    while system.half.has_pending_work:
        system.step()
    system.close()


def test_blends_wait_for_every_worker(tmp_path: Path) -> None:
    """Nothing is put together, nor stored, before all ranks have said that they can."""
    system = System(tmp_path, num_workers=2, reports=[CAN_BLEND])
    tokens, spans = joined([document(1, 8)], SYSTEM, [1, 2])
    system.add("first", tokens, spans=spans)
    system.half.match("first", len(tokens), 0)
    block_ids = system.blocks(len(tokens))
    system.half.allocated("first", block_ids, 0)
    assert () == system.half.build_step([ScheduledRequest("first", block_ids, len(tokens))]).entries
    assert () == system.half.build_step([]).entries
    system.half.finish_step(CAN_BLEND)
    assert 1 == len(system.half.build_step([]).entries)
    system.half.close()
