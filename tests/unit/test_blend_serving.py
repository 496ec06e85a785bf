"""Chunk reuse between the two halves: chunks are stored, found, leased and put together, over a real cache and a small model."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtier.blend.model import LayerKV, TokenKV
from kvtier.blend.steps import finish
from kvtier.config import BlendConfig
from kvtier.connectors.blend_steps import LostChunkError
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.chunk_entries import MAX_DEFERRED_STEPS
from kvtier.connectors.messages import BlendJob, RequestOptions, ScheduledRequest, WorkerReport
from kvtier.connectors.requests import RequestIdentity
from kvtier.connectors.vllm.paged_tokens import PagedTokens
from kvtier.errors import BlendRefusedError
from tests.unit.blend_system import BLOCK, LAYERS, SYSTEM, TOKEN_BYTES, System, begun_blend, document, joined


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., System]:
    return lambda *args, **more: System(tmp_path, *args, **more)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    order=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    system=st.sampled_from([[], SYSTEM]),
    num_question=st.integers(0, 6),
    num_local=st.integers(0, 4),
    method=st.sampled_from(["none", "epic", "cacheblend", "prophetkv", "combined"]),
    in_flight=st.booleans(),
    num_kept=st.integers(0, LAYERS),
    max_rows=st.sampled_from([1, 7, 1000]),
)
@example(
    lengths=[14, 13], order=[0, 1], system=SYSTEM, num_question=3, num_local=4, method="combined", in_flight=True, num_kept=0, max_rows=64
)
@example(
    lengths=[14, 13], order=[0, 1], system=SYSTEM, num_question=3, num_local=4, method="prophetkv", in_flight=True, num_kept=1, max_rows=64
)
def test_all_computed_anew_is_full_prefill(
    lengths: list[int],
    order: list[int],
    system: list[int],
    num_question: int,
    num_local: int,
    method: str,
    in_flight: bool,
    num_kept: int,
    max_rows: int,
) -> None:
    """Any lengths, orders, repetitions; chunks at position 0 and at the end; beside a prefix hit that is there or still being computed.

    However many layers are kept out of the engine's blocks, and however many tokens are computed together.
    """
    documents = [document(number, length) for number, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as directory:
        system_ = System(Path(directory))
        first, spans = joined(documents, system, [1, 2])
        assert len({tuple(each) for each in documents}) == system_.serve("first", first, spans=spans)
        tokens, spans = joined([documents[number % len(documents)] for number in order], system, [1, 2, 3, 4, 5, 6][:num_question])
        if len(tokens) < 2:
            tokens.append(3)
        expected = system_.full(tokens)
        system_.blender.kept_bytes = num_kept * len(tokens) * TOKEN_BYTES
        system_.model.max_rows = max_rows
        num_local = min(num_local, (len(tokens) - 1) // BLOCK) * BLOCK
        block_ids = system_.blocks(len(tokens))
        if not in_flight:
            system_.memory.put(expected.part(0, num_local), 0, block_ids)
        system_.add("second", tokens, spans=spans, ratio=1.0, method=method)
        matched = system_.half.match("second", len(tokens), num_local)
        covered = num_local + (matched.num_tokens or 0)
        assert matched.is_blended == (covered > num_local)
        system_.half.allocated("second", block_ids, covered - num_local)
        other = [ScheduledRequest("other", block_ids[: num_local // BLOCK], num_local)] if in_flight and num_local else []
        system_.half.add_request("other", tokens, num_prompt_tokens=len(tokens))
        system_.step([ScheduledRequest("second", block_ids, len(tokens)), *other])
        if matched.is_blended:
            got = system_.memory.part(0, covered, block_ids).part(num_local, covered)
            torch.testing.assert_close(got.keys, expected.keys[:, :, num_local:covered], rtol=0, atol=1e-4)
            torch.testing.assert_close(got.values, expected.values[:, :, num_local:covered], rtol=0, atol=1e-4)
            assert bool(system_.memory.keys[:, :, : block_ids[0] * BLOCK].isnan().all()), "somebody else's blocks"
            if in_flight and num_local:
                assert bool(system_.memory.part(0, num_local, block_ids).keys.isnan().all()), "blocks that another request fills"
        for name in ("second", "other"):
            system_.half.request_finished(name)
        while system_.half.has_pending_work:
            system_.step()
        system_.close()


def test_a_block_that_a_request_with_rejected_drafts_fills_is_not_there_yet(make: Callable[..., System]) -> None:
    """Speculative decoding: the step before went beyond the block, and its drafts were wrong, so that it is filled beside the blend."""
    system = make()
    documents = [document(1, 9), document(2, 8)]
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    assert 2 == system.serve("first", tokens, spans=spans)
    tokens, spans = joined(documents[::-1], SYSTEM, [1, 2])
    expected = system.full(tokens)
    block_ids = system.blocks(len(tokens))
    other = tokens[:2]
    system.half.add_request("other", other, num_prompt_tokens=len(other))
    system.half.match("other", len(other), 0)
    system.half.allocated("other", block_ids[:2], 0)
    for end in (2, 2 + 1 + 2):
        system.step([ScheduledRequest("other", block_ids[:2], end)])
        other.append(tokens[len(other)])
    assert BLOCK == len(other), "the last of them is computed next, with two drafts again"
    system.add("second", tokens, spans=spans, ratio=1.0)
    matched = system.half.match("second", len(tokens), BLOCK)
    assert matched.is_blended
    covered = BLOCK + (matched.num_tokens or 0)
    system.half.allocated("second", block_ids, covered - BLOCK)
    system.step([ScheduledRequest("other", block_ids[:2], 3 + 1 + 2), ScheduledRequest("second", block_ids, len(tokens))])
    got = system.memory.part(0, covered, block_ids).part(BLOCK, covered)
    torch.testing.assert_close(got.values, expected.values[:, :, BLOCK:covered], rtol=0, atol=1e-4)
    for name in ("second", "other"):
        system.half.request_finished(name)
    system.close()


def test_chunks_are_found_from_other_prompts(make: Callable[..., System]) -> None:
    """With nothing computed anew the KV is the chunks', keys moved; the counters and the request's own answer say so."""
    system = make()
    documents = [document(1, 9), document(2, 8)]
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    assert 2 == system.serve("first", tokens, spans=spans)
    tokens, spans = joined(documents[::-1], SYSTEM, [1, 2])
    system.add("second", tokens, spans=spans, ratio=0.0)
    matched = system.half.match("second", len(tokens), 0)
    assert (20, True, False) == (matched.num_tokens, matched.is_blended, matched.is_async)
    block_ids = system.blocks(len(tokens))
    system.half.allocated("second", block_ids, 20)
    (job,) = system.step([ScheduledRequest("second", block_ids, len(tokens))]).blends
    own = system.full([*SYSTEM, *documents[1]])
    torch.testing.assert_close(system.memory.part(0, 13, block_ids).values, own.values, rtol=0, atol=1e-5)
    assert {"tokens": 15} == system.half.blended("second")
    assert (1, 15, 0) == tuple(system.cache.stats[f"blend.{name}"] for name in ("requests", "tokens", "chosen_tokens"))
    assert (5, 20) == (job.layout.placements[0].start, job.end)
    system.half.request_finished("second")
    system.close()


@pytest.mark.parametrize(
    ("reason", "blend"),
    [
        ("spans_overlap", {"spans": [[5, 9], [8, 12]]}),
        ("span_outside_prompt", {"spans": [[5, 99]]}),
        ("span_outside_prompt", {"spans": [[-1, 4]]}),
        ("ratio", {"spans": [[5, 9]], "ratio": 1.01}),
        ("ratio", {"spans": [[5, 9]], "ratio": float("nan")}),
        ("ratio", {"spans": [[5, 9]], "ratio": "much"}),
        ("margin", {"spans": [[5, 9]], "min_margin": 1.01}),
        ("margin", {"spans": [[5, 9]], "min_margin": float("nan")}),
        ("margin", {"spans": [[5, 9]], "min_margin": True}),
        ("method", {"spans": [[5, 9]], "method": "best"}),
        ("format", {"spans": [[5, 9, 11]]}),
        ("format", {"spans": [[5, 9]], "separator": [1]}),
        ("format", {}),
        ("format", {"separator": []}),
        ("format", {"separator": None}),
        ("format", {"separator": [-1]}),
        ("format", {"boundaries": "separator"}),
        ("format", {"boundaries": "separator", "separator": "x"}),
        ("boundaries", {"separator": "---"}),
        ("format", {"spans": [[5, 9]], "anchor": 6}),
        ("format", {"spans": [[5, 9]], "span": 1}),
        ("format", {"boundaries": "words"}),
        ("format", {"boundaries": "auto", "spans": [[5, 9]]}),
        ("boundaries", {"boundaries": "messages"}),
        ("tokens_differ", {"spans": [[5, 9]], "tokens": [[1, 2, 3, 4]]}),
        ("format", {"spans": [[5, 9]], "tokens": [[1, 2], [3]]}),
        ("format", {"spans": [[5, 9]], "tokens": "text"}),
        ("format", {"separator": [5], "tokens": []}),
        ("format", {"spans": [[5, 9]], "tokens": [[1, 2, 3, -4]]}),
        ("format", {"spans": [[5, 9]], "tokens": [[1, 2, 3, 1 << 32]]}),
        ("format", "please"),
    ],
)
def test_bad_requests_are_served_as_any_other(make: Callable[..., System], reason: str, blend: Any) -> None:
    """Refused by name, counted once, and computed."""
    system = make()
    tokens, _ = joined([document(1, 9)], SYSTEM, [1, 2])
    for name in ("first", "second"):
        system.half.add_request(name, tokens, num_prompt_tokens=len(tokens), options=RequestOptions(blend=blend))
    assert not system.half.match("first", len(tokens), 0).is_blended
    system.half.allocated("first", system.blocks(len(tokens)), 0)
    assert not system.step().entries
    system.half.request_finished("first")
    assert 2 == system.cache.stats[f"blend.refused_{reason}"]
    assert {"tokens": 0, "refused": reason} == system.half.blended("second")
    system.half.request_finished("second")
    system.close()


def test_off_and_unsupported(make: Callable[..., System]) -> None:
    """Off by default; a model, an adapter or a worker that cannot is a refusal of its own."""
    tokens, spans = joined([document(1, 9)], SYSTEM, [1, 2])
    system = make(BlendParts())
    system.add("a", tokens, spans=spans)
    assert "off" == system.half.blended("a")["refused"]
    system = make(BlendParts(BlendConfig(enabled=True), refusal="learned positions"))
    system.add("a", tokens, spans=spans)
    assert "model" == system.half.blended("a")["refused"]
    system = make()
    adapted = RequestIdentity((b"lora x",), has_adapter=True)
    system.half.add_request("a", tokens, num_prompt_tokens=len(tokens), identity=adapted, options=RequestOptions(blend={"spans": spans}))
    assert "model" == system.half.blended("a")["refused"]
    whole = RequestOptions(load=False, blend={"spans": spans})
    system.half.add_request("whole", tokens, num_prompt_tokens=len(tokens), options=whole)
    assert "load" == system.half.blended("whole")["refused"]
    assert not system.half.match("whole", len(tokens), 0).is_blended
    system.half.finish_step(WorkerReport(attached=1))
    system.add("b", tokens, spans=spans)
    assert "model" == system.half.blended("b")["refused"]


def test_chunks_wait_for_no_worker_that_cannot(make: Callable[..., System]) -> None:
    """What requests named before the worker said that it cannot is not stored, and does not keep the engine awake."""
    system = make(reports=[])
    tokens, spans = joined([document(1, 9)], SYSTEM, [1, 2])
    for name in ("early", "late"):
        system.add(name, tokens, spans=spans)
        assert not system.half.match(name, len(tokens), 0).is_blended
    system.half.allocated("early", system.blocks(len(tokens)), 0)
    before = system.half.has_pending_work
    system.half.finish_step(WorkerReport(attached=1))
    between = system.half.has_pending_work
    system.half.allocated("late", system.blocks(len(tokens)), 0)
    assert (True, False, False) == (before, between, system.half.has_pending_work)
    assert 2 == system.cache.stats["blend.unstored_chunks"]
    for name in ("early", "late"):
        system.half.request_finished(name)
    system.close()


def test_too_few_chunks_are_computed(make: Callable[..., System]) -> None:
    """One stored chunk behind three others is not worth a blend."""
    system = make()
    documents = [document(number, 8) for number in range(4)]
    tokens, spans = joined(documents[3:], SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    assert 3 == system.serve("second", tokens, spans=spans)
    assert 1 == system.cache.stats["blend.too_few"]
    system.close()


def test_chunks_that_are_missing_beside_others_are_stored(make: Callable[..., System]) -> None:
    """A prompt that is put together without a new document has it stored, so that the next one finds it."""
    system = make()
    documents = [document(number, 8) for number in range(4)]
    tokens, spans = joined(documents[:3], SYSTEM, [1, 2])
    assert 3 == system.serve("first", tokens, spans=spans)
    for name, chunks, num_new in (("second", documents, 1), ("third", documents[::-1], 0)):
        tokens, spans = joined(chunks, SYSTEM, [1, 2])
        system.add(name, tokens, spans=spans)
        matched = system.half.match(name, len(tokens), 0)
        assert matched.is_blended
        block_ids = system.blocks(len(tokens))
        system.half.allocated(name, block_ids, matched.num_tokens or 0)
        (job,) = system.step([ScheduledRequest(name, block_ids, len(tokens))]).blends
        assert 4 - num_new == len(job.layout.placements)
        before = system.cache.stats["blend.stored_chunks"]
        while system.half.has_pending_work:
            system.step()
        assert num_new == system.cache.stats["blend.stored_chunks"] - before
        system.half.request_finished(name)
    system.close()


def test_chunks_that_another_engine_stored_are_found(make: Callable[..., System], tmp_path: Path) -> None:
    """In a store that both share: the request waits for an answer, then for the chunks. What the store does not have is not waited for."""
    below = [{"type": "object", "url": (tmp_path / "store").as_uri()}]
    documents = [document(number, 9) for number in range(3)]
    first = make(below=below)
    tokens, spans = joined(documents[:2], SYSTEM, [1, 2])
    assert 2 == first.serve("first", tokens, spans=spans)
    while first.half.has_pending_work:
        first.step()
    first.close()
    second = make(below=below)
    tokens, spans = joined(documents[1::-1], SYSTEM, [1, 2])
    second.add("shared", tokens, spans=spans)
    assert second.half.match("shared", len(tokens), 0).num_tokens is None
    while (matched := second.half.match("shared", len(tokens), 0)).num_tokens is None:
        second.step()
    assert matched.is_blended
    second.half.request_finished("shared")
    tokens, spans = joined(documents[2:], SYSTEM, [1, 2])
    second.add("new", tokens, spans=spans)
    while (matched := second.half.match("new", len(tokens), 0)).num_tokens is None:
        second.step()
    assert 0 == matched.num_tokens
    second.half.request_finished("new")
    second.close()


def test_chunks_that_are_brought_do_not_drive_out_those_beside_them(make: Callable[..., System], tmp_path: Path) -> None:
    """In full host memory what comes from the disk takes the room of what the prompt does not need, however old the rest is."""
    below = [{"type": "disk", "path": str(tmp_path / "disk"), "capacity": "256MiB", "write": "through"}]
    system = make(below=below, host_blocks=10)
    needed = [document(number, 16) for number in range(2)]
    for name, chunk in (("a", needed[1]), ("b", needed[0]), ("c", document(2, 16))):
        tokens, spans = joined([chunk], SYSTEM, [1, 2])
        assert 1 == system.serve(name, tokens, spans=spans)
        while system.half.has_pending_work:
            system.step()
    tokens, spans = joined(needed, SYSTEM, [1, 2])
    system.add("both", tokens, spans=spans)
    while (matched := system.half.match("both", len(tokens), 0)).num_tokens is None:
        system.step()
    assert matched.is_blended
    assert 3 == system.cache.stats["disk.loaded_blocks"], "those of one chunk that had left, and nothing a second time"
    system.half.request_finished("both")
    system.close()


def test_a_failed_blend_is_reported_and_ends(make: Callable[..., System]) -> None:
    """All blocks from the first one that was not there count as failed; leases end."""
    system = make()
    message, block_ids = begun_blend(system, num_computed_tokens=4)
    (job,) = message.blends
    report = WorkerReport()
    assert set(block_ids[1:5]) == system.steps(None).blend([job], set(), report)
    steps = system.steps(system.blender)
    assert set(block_ids[1:5]) == steps.blend([job], {block_ids[0]}, WorkerReport()), "its prefix failed"
    assert set(block_ids[1:5]) == steps.blend([job], set(), WorkerReport(), "other"), "planned for another arena"
    steps.attach(None, "")
    assert set(block_ids[1:5]) == steps.blend([job], set(), WorkerReport()), "no arena"
    assert system.half.blended("second")["tokens"]
    system.finish(message, report)
    assert 1 == system.cache.stats["blend.failed"]
    assert {"tokens": 0} == system.half.blended("second"), "the engine computes them"
    system.half.request_finished("second")
    while system.half.has_pending_work:
        system.step()
    system.close()


def test_slots_with_other_tenants_are_lost(make: Callable[..., System]) -> None:
    """A chunk whose slot has got a new tenant is never used, nor written to."""
    system = make()
    message, _ = begun_blend(system, num_computed_tokens=0)
    (job,) = message.blends
    chunk = job.chunks[0]
    stale = BlendJob(
        **{
            **{name: getattr(job, name) for name in job.__slots__},
            "chunks": (type(chunk)(chunk.positions, chunk.slots, tuple(one + 1 for one in chunk.generations)), *job.chunks[1:]),
        }
    )
    with pytest.raises(LostChunkError, match="tenant"):
        finish(system.blender.blend(stale, system.arena))
    system.finish(message, WorkerReport({job.job_id: 1}))
    system.half.request_finished("second")
    system.close()


def test_chunks_are_computed_when_no_prompt_waits(make: Callable[..., System]) -> None:
    """Not beside prompts, unless for long; one a step; a reset drops those that wait."""
    system = make()
    tokens, spans = joined([document(number, 8) for number in range(3)], SYSTEM, [1, 2] * MAX_DEFERRED_STEPS)
    system.add("first", tokens, spans=spans)
    system.half.match("first", len(tokens), 0)
    block_ids = system.blocks(len(tokens))
    system.half.allocated("first", block_ids, 0)
    num_deferred = 0
    while not system.step([ScheduledRequest("first", block_ids, 2 * (1 + num_deferred))]).entries:
        num_deferred += 1
    assert MAX_DEFERRED_STEPS == num_deferred
    assert 1 == len(system.step().entries)
    system.half.reset()
    assert () == system.step().entries
    system.half.request_finished("first")
    system.close()


@settings(max_examples=40, deadline=None)
@given(
    orders=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=5),
    ratio=st.sampled_from([0.0, 0.2, 1.0]),
    max_step_tokens=st.integers(1, 60),
)
def test_the_blends_of_a_step_compute_no_more_than_they_may(orders: list[list[int]], ratio: float, max_step_tokens: int) -> None:
    """Those that would wait for another step, in the order in which they came; one that is too large for any is spread over steps, and
    goes alone. A step computes a share and what is left of a layer, and the beginning of a prompt for its shape."""
    documents = [document(number, 8 + number) for number in range(4)]
    parts = BlendParts(BlendConfig(enabled=True), max_step_tokens=max_step_tokens)
    with tempfile.TemporaryDirectory() as directory:
        system = System(Path(directory), parts, host_blocks=200)
        tokens, spans = joined(documents, SYSTEM, [1, 2])
        system.serve("first", tokens, spans=spans)
        waiting = {}
        for number, order in enumerate(orders):
            waiting[f"{number}"], spans = joined([documents[place] for place in order], SYSTEM, [1, 2, 3])
            system.add(f"{number}", waiting[f"{number}"], spans=spans, ratio=ratio, method="epic")
        spread: set[str] = set()
        while waiting or spread:
            begun = []
            is_spread = bool(spread)
            before = system.model.num_projected
            for name, tokens in waiting.items():
                matched = system.half.match(name, len(tokens), 0)
                if matched.num_tokens is not None:
                    assert matched.is_blended
                    block_ids = system.blocks(len(tokens))
                    system.half.allocated(name, block_ids, matched.num_tokens)
                    spread |= {name} if matched.is_async else set()
                    begun.append(ScheduledRequest(name, block_ids, len(tokens)))
            assert bool(begun) != is_spread, "somebody goes on in each step, and nobody begins beside one that is spread"
            assert not begun or next(iter(waiting)) == begun[0].request_id, "who came first is not passed"
            blends = system.step([item for item in begun if item.request_id not in spread]).blends
            assert [item.request_id in spread for item in begun] == [job.is_spread for job in blends]
            assert len(begun) <= 1 or not spread
            num_rows = max((len(waiting[item.request_id]) for item in begun), default=max(map(len, orders)) * 12 + 8)
            assert system.model.num_projected - before <= LAYERS * max_step_tokens + num_rows + len(begun)
            received = system.blend_steps.take_received()
            assert received <= spread
            spread -= received
            for item in begun:
                del waiting[item.request_id]
            for name in {*received, *(item.request_id for item in begun)} - spread:
                system.half.request_finished(name)
        assert not system.cache.stats["blend.failed"]
        system.close()


def test_a_reset_forgets_what_chunks_were_computed_behind(make: Callable[..., System]) -> None:
    """After it, as for new weights, not even the anchor's KV is from before; without it the anchor is computed once."""
    system = make()
    for name, number in (("first", 1), ("second", 2), ("third", 3)):
        if name == "third":
            system.model.change()
            system.half.reset()
        with_anchor = system.model.num_embedded
        tokens, spans = joined([document(number, 8)], SYSTEM, [1, 2])
        assert 1 == system.serve(name, tokens, spans=spans)
        assert 8 + (0 if name == "second" else len(SYSTEM)) == system.model.num_embedded - with_anchor
    system.add("fourth", tokens, spans=spans, ratio=0.0)
    matched = system.half.match("fourth", len(tokens), 0)
    block_ids = system.blocks(len(tokens))
    system.half.allocated("fourth", block_ids, matched.num_tokens or 0)
    system.step([ScheduledRequest("fourth", block_ids, len(tokens))])
    torch.testing.assert_close(system.memory.part(0, 12, block_ids).values, system.full(tokens[:12]).values, rtol=0, atol=1e-5)
    system.half.request_finished("fourth")
    system.close()


def test_chunks_lie_within_the_models_positions(make: Callable[..., System]) -> None:
    """A chunk that a primer would push behind the last position of the model is not computed."""
    tokens, spans = joined([document(1, 9)], SYSTEM, [1, 2])
    for num_positions, num_stored in ((17, 1), (16, 0)):
        system = make(BlendParts(BlendConfig(enabled=True), primer=(3, 4, 5), num_positions=num_positions))
        assert num_stored == system.serve("first", tokens, spans=spans)
        assert 1 - num_stored == system.cache.stats["blend.unstored_chunks"]
        system.close()


def test_no_room_for_a_chunk(make: Callable[..., System]) -> None:
    """What does not fit is not stored, counted, and leaves nothing behind."""
    system = make(host_blocks=4)
    tokens, spans = joined([document(1, 40)], SYSTEM, [1, 2])
    assert 0 == system.serve("first", tokens, spans=spans)
    assert 1 == system.cache.stats["blend.unstored_chunks"]
    system.close()


class FakeAttention:
    """An attention backend with a layout of its own: keys transposed and the order of bytes shuffled."""

    num_kv_heads, head_size = 2, 8

    def __init__(self, dtype: torch.dtype, *, loses: bool = False) -> None:
        self.kv_cache = torch.zeros((6, 2, BLOCK, 16), dtype=dtype)
        self.impl = self
        self._loses = loses
        self._shuffle = torch.randperm(2 * BLOCK * 16, generator=torch.Generator().manual_seed(5))

    def do_kv_cache_update(
        self, layer: object, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        for row, slot in enumerate(slots.tolist()):
            block = kv_cache[slot // BLOCK].view(-1)
            flat = block.clone()
            flat[self._shuffle] = block
            halves = flat.view(2, 2, BLOCK * 8)
            halves[0].view(2, 8, BLOCK)[:, :, slot % BLOCK] = key[row]
            halves[1].view(2, BLOCK, 8)[:, slot % BLOCK] = key[row] if self._loses else value[row]
            block.copy_(flat[self._shuffle])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_read_where_the_backend_writes_them(dtype: torch.dtype) -> None:
    """Any order of bytes inside a block; tokens begin and end anywhere; others keep their bytes."""
    layers = [FakeAttention(dtype) for _ in range(3)]
    tokens = PagedTokens(layers, 6, BLOCK)
    assert (3, 2, 8) == tokens.row_shape
    kv = TokenKV(torch.randn(3, 2, 11, 8).to(dtype), torch.randn(3, 2, 11, 8).to(dtype))
    block_ids = torch.tensor([4, 1, 3])
    for layer in range(3):
        for first, end in ((0, 6), (6, 11)):
            tokens.write(layer, LayerKV(kv.keys[layer][:, first:end], kv.values[layer][:, first:end]), first, block_ids)
    for layer, first in itertools.product(range(3), range(11)):
        for end in range(first + 1, 12):
            part = tokens.read(layer, first, end, block_ids)
            assert torch.equal(kv.keys[layer][:, first:end], part.keys)
            assert torch.equal(kv.values[layer][:, first:end], part.values)
    assert all(not layer.kv_cache[[0, 2, 5]].any() for layer in layers)


def test_a_backend_that_loses_elements_is_refused() -> None:
    """Where every element is not once in its block nothing may be read."""
    with pytest.raises(BlendRefusedError, match="not where they can be found"):
        PagedTokens([FakeAttention(torch.float32, loses=True)], 6, BLOCK)
