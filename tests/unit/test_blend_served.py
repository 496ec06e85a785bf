"""``blend.entries: served``: chunks are copied out of the prompts that the engine computes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.blend.chunks import Chunk, anchor_of, served_anchor
from kvtier.blend.entries import full_prefill
from kvtier.blend.finding import ChunkSpace
from kvtier.blend.model import TokenKV
from kvtier.config import BlendConfig
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.messages import RequestOptions, ScheduledRequest, StepMessage, WorkerReport
from kvtier.connectors.requests import NEVER
from kvtier.hashing import request_root
from tests.unit.blend_system import BLOCK, CAN_BLEND, HOST_BLOCKS, NAMESPACE, SYSTEM, System, document, is_same, joined, kept

SERVED = BlendConfig(enabled=True, entries="served")
PRIMER = (40, 41, 42)
DOCUMENTS = [document(number, length) for number, length in enumerate((9, 4, 13, 6))]
ROOT = request_root(NAMESPACE.digest)


def chunk_of(tokens: Sequence[int], before: Sequence[int], primer: Sequence[int] = ()) -> Chunk:
    return ChunkSpace(ROOT, served_anchor(ROOT, [*before, *primer], BLOCK), BLOCK).chunk(tokens)


def turned_back(system: System, kv: TokenKV, start: int, end: int, num_anchor: int) -> TokenKV:
    """What is to be stored of a chunk that lies there in a prompt."""
    part = kv.part(start, end)
    return TokenKV(system.model.rotary.move(part.keys, num_anchor - start), part.values)


class Served:
    """One request that an engine serves step by step. Its blocks hold full prefill's KV, or something that must never be stored."""

    def __init__(self, system: System, name: str, order: Sequence[int], before: Sequence[int]) -> None:
        self.system, self.name = system, name
        self.tokens, self.spans = joined([DOCUMENTS[number] for number in order], before, [1, 2, 3])
        self.block_ids = system.blocks(len(self.tokens))
        self.num_computed = 0
        self.is_blended = False
        system.add(name, self.tokens, spans=self.spans)

    def start(self) -> None:
        """It gets its blocks, anew after a preemption."""
        self._write(0, len(self.tokens), torch.nan)
        matched = self.system.half.match(self.name, len(self.tokens), 0)
        self.is_blended |= matched.is_blended
        self.num_computed = matched.num_tokens or 0
        self.system.half.allocated(self.name, self.block_ids, self.num_computed)

    def step(self, num_tokens: int, failing: int | None = None) -> None:
        """Computes some tokens. ``failing``: the place of a block that turns out not to hold what was loaded into it."""
        first, end = self.num_computed, min(self.num_computed + num_tokens, len(self.tokens))
        message = self.system.half.build_step([ScheduledRequest(self.name, self.block_ids[: -(-end // BLOCK)], end)])
        report = WorkerReport()
        steps = self.system.blend_steps
        steps.blend(message.blends, set(), report)
        self._compute(first, end)
        self.num_computed = end
        bad: set[int] = set()
        if failing is not None and failing < -(-end // BLOCK):
            self._write(failing * BLOCK, end, torch.nan)
            bad = {self.block_ids[failing]}
            self.num_computed = failing * BLOCK
        steps.store(message.captures, message.entries, report)
        for job in message.stores:
            report.done[job.job_id], report.failed[job.job_id] = 1, set(range(len(job.block_ids)))
        self.system.half.finish_step(report, bad)

    def _compute(self, first: int, end: int) -> None:
        if self.is_blended:
            self._write(first, end, 777.0)
        else:
            self.system.memory.put(self.system.full(self.tokens).part(first, end), first, self.block_ids)

    def _write(self, first: int, end: int, value: float) -> None:
        like = torch.full((2, 1, end - first, 8), value)
        self.system.memory.put(TokenKV(like, like), first, self.block_ids)

    def expected(self) -> list[tuple[list[int], TokenKV]]:
        """Each chunk, and what may be stored of it from here."""
        full, num_anchor = self.system.full(self.tokens), self.spans[0][0]
        return [(self.tokens[start:end], turned_back(self.system, full, start, end, num_anchor)) for start, end in self.spans]


def drained(system: System) -> None:
    while system.half.has_pending_work:
        system.step()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., System]:
    return lambda primer=(), **more: System(tmp_path, BlendParts(SERVED, tuple(primer)), **more)


def test_chunks_are_copied_and_nothing_is_computed(make: Callable[..., System]) -> None:
    """Where they lay in the prompt, their keys turned back; in the steps that compute their last tokens; and found afterwards."""
    system = make()
    first = Served(system, "first", [0, 1, 2], SYSTEM)
    first.start()
    before = system.model.num_embedded
    num_stored = []
    for _ in range(len(first.tokens)):
        num_of_test = system.model.num_embedded
        first._compute(first.num_computed, first.num_computed + 1)
        num_of_test = system.model.num_embedded - num_of_test
        before += 2 * num_of_test
        first.step(1)
        num_stored.append(system.cache.stats["blend.stored_chunks"])
    assert before == system.model.num_embedded, "by kvtier"
    assert [sum(end <= place + 1 for _, end in first.spans) for place in range(len(first.tokens))] == num_stored
    for tokens, expected in first.expected():
        got = kept(system, chunk_of(tokens, SYSTEM))
        assert got is not None
        assert is_same(expected, got)
    system.half.request_finished("first")
    assert not system.half.has_pending_work
    second, spans = joined([DOCUMENTS[2], DOCUMENTS[0]], SYSTEM, [1, 2, 3])
    system.add("second", second, spans=spans, ratio=0.0, method="none")
    matched = system.half.match("second", len(second), 0)
    assert (True, (len(second) - 3) // BLOCK * BLOCK) == (matched.is_blended, matched.num_tokens)
    system.half.request_finished("second")
    system.close()


def test_a_chunk_where_it_was_is_not_exact(make: Callable[..., System]) -> None:
    """Directly behind the system prompt: with chunks that are computed there that is exact; here it may have been copied from anywhere."""
    system = make()
    served = Served(system, "first", [1, 0], SYSTEM)
    served.start()
    served.step(100)
    system.half.request_finished("first")
    tokens, spans = joined([DOCUMENTS[0]], SYSTEM, [1, 2, 3])
    system.add("second", tokens, spans=spans, ratio=0.0)
    assert system.half.match("second", len(tokens), 0).is_blended
    request = system.half._requests["second"]
    assert request.blend is not None
    assert [False] == [at.is_exact for at in request.blend.placements]
    system.half.request_finished("second")
    system.close()


def test_the_two_kinds_are_apart() -> None:
    """One setting's chunks are not found with the other one."""
    chunks = {chunk_of(DOCUMENTS[0], before) for before in ((), SYSTEM, SYSTEM[:-1])}
    chunks |= {ChunkSpace(ROOT, anchor_of(ROOT, before, BLOCK), BLOCK).chunk(DOCUMENTS[0]) for before in ((), SYSTEM, SYSTEM[:-1])}
    assert 6 == len({chunk.key for chunk in chunks})


def test_what_a_blend_computed_is_computed_once_more(make: Callable[..., System]) -> None:
    """A new document among those that are there: what the request has of it is no exact KV, so it is computed behind the primer."""
    system = make(PRIMER)
    first = Served(system, "first", [0, 2], SYSTEM)
    first.start()
    first.step(100)
    system.half.request_finished("first")
    assert 2 == system.cache.stats["blend.stored_chunks"]
    second = Served(system, "second", [2, 1, 0], SYSTEM)
    second.start()
    assert second.is_blended
    second.step(100)
    system.half.request_finished("second")
    drained(system)
    got = kept(system, chunk_of(DOCUMENTS[1], SYSTEM, PRIMER))
    assert got is not None
    anchor = [*SYSTEM, *PRIMER]
    alone = full_prefill(system.model, torch.tensor([*anchor, *DOCUMENTS[1]]))[0]
    assert is_same(alone.part(len(anchor), alone.num_tokens), got)
    system.close()


def test_chunks_before_a_blend_are_copied(make: Callable[..., System]) -> None:
    """What the engine's own cache has of the prompt is exact."""
    system = make()
    first = Served(system, "first", [2], SYSTEM)
    first.start()
    first.step(100)
    system.half.request_finished("first")
    second = Served(system, "second", [1, 2], SYSTEM)
    exact = system.full(second.tokens)
    num_local = (len(SYSTEM) + len(DOCUMENTS[1])) // BLOCK * BLOCK + BLOCK
    system.memory.put(exact.part(0, num_local), 0, second.block_ids)
    matched = system.half.match("second", len(second.tokens), num_local)
    assert matched.is_blended
    system.half.allocated("second", second.block_ids, matched.num_tokens or 0)
    message = system.step([ScheduledRequest("second", second.block_ids, len(second.tokens))])
    assert (1, ()) == (len(message.captures), message.entries)
    got = kept(system, chunk_of(DOCUMENTS[1], SYSTEM))
    assert got is not None
    assert is_same(second.expected()[0][1], got)
    system.half.request_finished("second")
    system.close()


def test_a_request_that_starts_over_with_a_blend_leaves_what_was_to_be_copied(tmp_path: Path) -> None:
    """Its first chunk is there by then, so what it computes behind that is an approximation; nor has the model positions for the second."""
    system = System(tmp_path, BlendParts(SERVED, num_positions=17))
    served = Served(system, "first", [0, 2], SYSTEM)
    served.start()
    served.step(15)
    assert 1 == system.cache.stats["blend.stored_chunks"]
    served.start()
    assert served.is_blended
    served.step(100)
    system.half.request_finished("first")
    drained(system)
    assert None is kept(system, chunk_of(DOCUMENTS[2], SYSTEM))
    assert (1, 1) == (system.cache.stats["blend.stored_chunks"], system.cache.stats["blend.unstored_chunks"])
    system.close()


@pytest.mark.parametrize("kind", ["store false", "worker fails", "no room", "other arena"])
def test_nothing_is_stored(make: Callable[..., System], tmp_path: Path, kind: str) -> None:
    """Where the request does not want it, or there is no room, or the copy fails: counted, and the cache is as before."""
    system = make(host_blocks=2 if kind == "no room" else HOST_BLOCKS)
    served = Served(system, "first", [0, 2], SYSTEM)
    if kind == "store false":
        system.half.request_finished("first")
        options = RequestOptions(blend={"spans": served.spans}, store=False)
        system.half.add_request("first", served.tokens, num_prompt_tokens=len(served.tokens), options=options)
    system.half.match("first", len(served.tokens), 0)
    system.half.allocated("first", served.block_ids, 0)
    message = system.half.build_step([ScheduledRequest("first", served.block_ids, len(served.tokens))])
    assert (2 if kind in ("worker fails", "other arena") else 0) == len(message.captures)
    report = WorkerReport()
    steps = system.steps(None if kind == "worker fails" else system.blender)
    steps.store(message.captures, message.entries, report, "another" if kind == "other arena" else "")
    system.finish(message, report)
    system.half.request_finished("first")
    drained(system)
    assert 0 == system.cache.stats["blend.stored_chunks"]
    assert (0 if kind == "store false" else 2) == system.cache.stats["blend.unstored_chunks"]
    assert None is kept(system, chunk_of(DOCUMENTS[0], SYSTEM))
    system.close()


def test_the_first_prompt_is_copied_too(make: Callable[..., System]) -> None:
    """Before any worker has said that it can. One that cannot fails."""
    system = make(reports=[])
    served = Served(system, "first", [2, 0], SYSTEM)
    served.start()
    served.step(100)
    system.half.finish_step(CAN_BLEND)
    for tokens, expected in served.expected():
        got = kept(system, chunk_of(tokens, SYSTEM))
        assert got is not None
        assert is_same(expected, got)
    system.half.request_finished("first")
    system.close()


EVENTS = ("go on", "go on", "go on", "go on", "load fails", "preempted", "reset", "aborted")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), primer=st.sampled_from([(), PRIMER]), num_positions=st.sampled_from([NEVER, 17]))
def test_what_is_stored_is_what_full_prefill_computes_there(data: st.DataObject, primer: tuple[int, ...], num_positions: int) -> None:
    """Requests one after another, computed in parts, beside loads that fail, preemptions, aborts and resets behind which the model has
    other weights: the KV of a chunk is always that of a prompt that was computed with it, or that of the chunk behind its anchor, where
    the model has positions enough for it to be computed there."""
    with tempfile.TemporaryDirectory() as directory:
        system = System(Path(directory), BlendParts(SERVED, primer, num_positions=num_positions))
        allowed: dict[bytes, list[TokenKV]] = {}
        for number in range(data.draw(st.integers(1, 4))):
            before = data.draw(st.sampled_from([[], SYSTEM]))
            served = Served(system, f"r{number}", data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)), before)
            anchor = [*before, *primer]

            def allow(served: Served = served, before: list[int] = before, anchor: list[int] = anchor) -> None:
                for tokens, _ in served.expected():
                    alone = system.full([*anchor, *tokens]).part(len(anchor), len(anchor) + len(tokens))
                    allowed.setdefault(chunk_of(tokens, before, primer).key, []).append(alone)
                if not served.is_blended:
                    full = system.full(served.tokens)
                    for (tokens, _), (start, end) in zip(served.expected(), served.spans, strict=True):
                        kv = turned_back(system, full, start, end, len(anchor))
                        allowed[chunk_of(tokens, before, primer).key].append(kv)

            served.start()
            allow()
            while served.num_computed < len(served.tokens):
                event = data.draw(st.sampled_from(EVENTS))
                if event == "aborted":
                    break
                if event == "preempted":
                    served.start()
                    allow()
                elif event == "reset":
                    system.half.reset()
                    system.model.change()
                    allowed.clear()
                failing = data.draw(st.integers(0, 9)) if event == "load fails" and not served.is_blended else None
                served.step(data.draw(st.integers(1, 30)), failing)
            system.half.request_finished(served.name)
            drained(system)
            for tokens in DOCUMENTS:
                for prefix in ([], SYSTEM):
                    chunk = chunk_of(tokens, prefix, primer)
                    got = kept(system, chunk)
                    assert got is None or any(is_same(kv, got) for kv in allowed.get(chunk.key, [])), (tokens, prefix)
        system.close()


@pytest.mark.parametrize("says", ["engine", "worker"])
def test_a_load_that_failed_voids_the_copies_of_its_step(make: Callable[..., System], says: str) -> None:
    """Whoever says so, the engine of its blocks or the worker of the load."""
    system = make()
    first = Served(system, "first", [0, 1], SYSTEM)
    first.start()
    keys = system.half._requests["first"].keys(2, BLOCK)
    message = system.half.build_step([ScheduledRequest("first", first.block_ids[:2], 2 * BLOCK)])
    system.half.finish_step(WorkerReport({job.job_id: 1 for job in message.stores}))
    system.half.request_finished("first")
    assert 2 == system.cache.match(keys).ready_blocks
    second = Served(system, "second", [0, 1], SYSTEM)
    second.start()
    assert 2 * BLOCK == second.num_computed
    message = system.half.build_step([ScheduledRequest("second", second.block_ids, len(second.tokens))])
    (load,) = message.loads
    done = {load.job_id: 1, **{job.job_id: 1 for job in message.captures}}
    if says == "worker":
        system.half.finish_step(WorkerReport(done, {load.job_id: {1}}))
    else:
        system.half.finish_step(WorkerReport(done), {load.block_ids[1]})
    assert (2, 0) == (len(message.captures), system.cache.stats["blend.stored_chunks"])
    system.finish(message, WorkerReport())
    system.half.request_finished("second")
    system.close()


def test_all_ranks_must_have_copied_it(make: Callable[..., System]) -> None:
    """A chunk of which one rank's part is missing is not stored."""
    system = make(num_workers=2, reports=[WorkerReport(attached=2, blenders=2)])
    served = Served(system, "first", [0], SYSTEM)
    served.start()
    message: StepMessage = system.half.build_step([ScheduledRequest("first", served.block_ids, len(served.tokens))])
    (job,) = message.captures
    system.finish(message, WorkerReport({job.job_id: 1}))
    assert 0 == system.cache.stats["blend.stored_chunks"]
    system.finish(message, WorkerReport({job.job_id: 1}, {job.job_id: {0}}))
    assert (0, 1) == (system.cache.stats["blend.stored_chunks"], system.cache.stats["blend.unstored_chunks"])
    system.half.request_finished("first")
    system.close()
