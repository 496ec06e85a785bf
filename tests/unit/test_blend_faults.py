"""What goes wrong around blends in the scheduler half: nobody reads what is not there, waits for good, or is told of an error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from kvtier.config import BlendConfig
from kvtier.connectors import blending, chunk_entries
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.messages import ScheduledRequest, StepMessage, WorkerReport
from kvtier.types import BlockKey, LoadPlan, StorePlan
from tests.unit.blend_system import BLOCK, SYSTEM, System, document, joined

DOCUMENTS = [document(1, 14), document(2, 13)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., System]:
    return lambda **more: System(tmp_path, **more)


@pytest.mark.parametrize("kind", ["load", "blend"])
@pytest.mark.parametrize("async_load", [False, True])
def test_blocks_that_were_not_filled_are_not_there_for_others(make: Callable[..., System], kind: str, async_load: bool) -> None:
    """A load or a blend fails, and its request computes these blocks in a later step: a blend of that step, of a request that shares them
    through the engine's prefix cache, does not read them."""
    system = make(async_load=async_load)
    tokens, spans = joined(DOCUMENTS, SYSTEM, [1, 2])
    assert 2 == system.serve("first", tokens, spans=spans)
    if kind == "load":
        _store(system, tokens[: 4 * BLOCK])
        loaded = [*tokens[: 4 * BLOCK], 50, 51]
        system.half.add_request("loads", loaded, num_prompt_tokens=len(loaded))
    else:
        loaded = tokens
        system.add("loads", loaded, spans=spans)
    matched = system.half.match("loads", len(loaded), BLOCK)
    assert matched.num_tokens
    block_ids = system.blocks(len(loaded))
    system.half.allocated("loads", block_ids, matched.num_tokens)
    message = system.half.build_step([] if async_load else [ScheduledRequest("loads", block_ids, len(loaded))])
    assert 1 == len([*message.loads, *message.async_loads, *message.blends])
    system.half.finish_step(_all_fails(message), set(block_ids[1:]))
    system.add("shares", tokens, spans=spans)
    num_local = 3 * BLOCK
    matched = system.half.match("shares", len(tokens), num_local)
    assert matched.is_blended
    shared = [*block_ids[:3], *system.blocks(len(tokens) - num_local)]
    system.half.allocated("shares", shared, matched.num_tokens or 0)
    message = system.half.build_step([ScheduledRequest("loads", block_ids, len(loaded))])
    (job,) = message.blends
    assert BLOCK == job.layout.num_prefix_tokens, "what the engine had before"
    system.half.finish_step(_all_fails(message))
    _end(system, "loads", "shares")


@pytest.mark.parametrize("num_leased", [0, 1])
@pytest.mark.parametrize("async_load", [False, True])
def test_chunks_that_cannot_be_leased(
    make: Callable[..., System], monkeypatch: pytest.MonkeyPatch, async_load: bool, num_leased: int
) -> None:
    """The engine has been promised their tokens: all of these blocks are reported as not filled, and the leases that were had end."""
    system = make(async_load=async_load, strict=False)
    tokens, spans = joined(DOCUMENTS, SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    tokens, spans = joined(DOCUMENTS[::-1], SYSTEM, [1, 2])
    _store(system, tokens[:BLOCK])
    system.add("second", tokens, spans=spans)
    matched = system.half.match("second", len(tokens), 0)
    assert (True, async_load) == (matched.is_blended, matched.is_async)
    block_ids = system.blocks(len(tokens))
    begin_load, num_calls = system.cache.begin_load, itertools.count()

    def broken(keys: Sequence[BlockKey], *, pooled: bool = True) -> LoadPlan:
        if not pooled and next(num_calls) == num_leased:
            raise RuntimeError("injected: no lease")
        return begin_load(keys, pooled=pooled)

    with monkeypatch.context() as patch:
        patch.setattr(system.cache, "begin_load", broken)
        system.half.allocated("second", block_ids, matched.num_tokens or 0)
    message = system.half.build_step([] if async_load else [ScheduledRequest("second", block_ids, len(tokens))])
    exact, *lost = [*message.loads, *message.async_loads]
    assert ((block_ids[0],), ()) == (exact.block_ids, exact.missing)
    assert [("second", (), tuple(block_ids[1 : (matched.num_tokens or 0) // BLOCK]))] == [
        (job.request_id, job.block_ids, job.missing) for job in lost
    ]
    assert ((), len(message.async_loads)) == (message.blends, int(async_load))
    done = {job.job_id: 1 for job in (exact, *lost)}
    system.finish(message, WorkerReport(done=done))
    assert 1 == system.cache.stats["blend.failed"] == system.cache.stats["connector.errors"]
    assert {"tokens": 0} == system.half.blended("second")
    _end(system, "second")


@pytest.mark.parametrize("broken", ["blocks_in_flight", "job_of"])
@pytest.mark.parametrize("async_load", [False, True])
def test_blends_that_cannot_be_ordered(make: Callable[..., System], monkeypatch: pytest.MonkeyPatch, async_load: bool, broken: str) -> None:
    """An error in the step that was to begin one: as with chunks that cannot be leased. Another one beside it is none the worse."""
    system = make(async_load=async_load, strict=False)
    prompts = {name: joined(order, SYSTEM, [1, 2]) for name, order in (("first", DOCUMENTS), ("second", DOCUMENTS[::-1]))}
    tokens, spans = prompts["first"]
    system.serve("before", tokens, spans=spans)
    block_ids, matches = {}, {}
    for name, (tokens, spans) in prompts.items():
        system.add(name, tokens, spans=spans)
        matches[name] = system.half.match(name, len(tokens), 0)
        block_ids[name] = system.blocks(len(tokens))
        system.half.allocated(name, block_ids[name], matches[name].num_tokens or 0)
    scheduled = [] if async_load else [ScheduledRequest(name, block_ids[name], len(tokens)) for name, (tokens, _) in prompts.items()]
    with monkeypatch.context() as patch:
        patch.setattr(blending, broken, _first_call_raises(getattr(blending, broken)))
        message = system.half.build_step(scheduled)
    num_lost = 1 if broken == "job_of" else 2
    assert ["second"][: 2 - num_lost] == [job.request_id for job in message.blends]
    lost = [*message.loads, *message.async_loads]
    assert (num_lost, num_lost * async_load) == (len(lost), len(message.async_loads))
    for job in lost:
        filled = block_ids[job.request_id][: (matches[job.request_id].num_tokens or 0) // BLOCK]
        assert ((), tuple(filled)) == (job.block_ids, job.missing)
        assert {"tokens": 0} == system.half.blended(job.request_id)
    system.finish(message, WorkerReport(done=dict.fromkeys([job.job_id for job in lost] + [job.job_id for job in message.blends], 1)))
    assert (num_lost, 1) == (system.cache.stats["blend.failed"], system.cache.stats["connector.errors"])
    for name, (tokens, _) in prompts.items():
        matched = system.half.match(name, len(tokens), 0)
        assert not matched.is_blended or name not in {job.request_id for job in lost}, "a failure that lasts must not go round for ever"
    _end(system, *prompts)


@pytest.mark.parametrize("entries", ["computed", "served"])
def test_chunks_that_get_no_slots(
    make: Callable[..., System], monkeypatch: pytest.MonkeyPatch, entries: Literal["computed", "served"]
) -> None:
    """An error while slots are taken for a chunk: it is not stored, and the next prompt with it has it stored."""
    system = make(parts=BlendParts(BlendConfig(enabled=True, entries=entries)), strict=False)
    tokens, spans = joined(DOCUMENTS[:1], SYSTEM, [1, 2])
    begin_store = system.cache.begin_store

    def broken(*args: Any, **more: Any) -> StorePlan:
        if not more["pooled"]:
            raise RuntimeError("injected: no slots")
        return begin_store(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(system.cache, "begin_store", broken)
        system.serve("first", tokens, spans=spans)
    assert (1, 0) == (system.cache.stats["connector.errors"], system.cache.stats["blend.stored_chunks"])
    system.serve("second", tokens, spans=spans)
    assert 1 == system.cache.stats["blend.stored_chunks"]
    system.close()


@pytest.mark.parametrize("entries", ["computed", "served"])
def test_slots_of_a_chunk_are_given_back(
    make: Callable[..., System], monkeypatch: pytest.MonkeyPatch, entries: Literal["computed", "served"]
) -> None:
    """An error when they are there already: nobody is going to fill them."""
    system = make(parts=BlendParts(BlendConfig(enabled=True, entries=entries)), strict=False)
    tokens, spans = joined(DOCUMENTS[:1], SYSTEM, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(chunk_entries, "chunk_slots", _first_call_raises(chunk_entries.chunk_slots))
        system.serve("first", tokens, spans=spans)
    assert (1, 0) == (system.cache.stats["connector.errors"], system.cache.stats["blend.stored_chunks"])
    system.serve("second", tokens, spans=spans)
    assert 1 == system.cache.stats["blend.stored_chunks"]
    system.close()


def _first_call_raises(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count()

    def broken(*args: Any) -> Any:
        if next(calls) == 0:
            raise RuntimeError("injected: this call fails")
        return function(*args)

    return broken


def _all_fails(message: StepMessage) -> WorkerReport:
    """What a worker reports that can do nothing of what it is told."""
    moves = [*message.loads, *message.async_loads, *message.stores]
    job_ids = [job.job_id for job in moves] + [job.job_id for job in message.blends] + [job.job_id for job in message.captures]
    return WorkerReport(done=dict.fromkeys(job_ids, 1), failed={job_id: {0} for job_id in job_ids})


def _store(system: System, tokens: list[int]) -> None:
    """Keeps these tokens under their prefix keys, too."""
    system.half.add_request("stores", tokens, num_prompt_tokens=len(tokens))
    system.half.match("stores", len(tokens), 0)
    block_ids = system.blocks(len(tokens))
    system.half.allocated("stores", block_ids, 0)
    message = system.half.build_step([ScheduledRequest("stores", block_ids, len(tokens))])
    system.half.finish_step(WorkerReport(done={job.job_id: 1 for job in message.stores}))
    system.half.request_finished("stores")


def _end(system: System, *names: str) -> None:
    for name in names:
        system.half.request_finished(name)
    while system.half.has_pending_work:
        system.step()
    system.close()
