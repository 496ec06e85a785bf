"""A least margin: a prompt from chunks after which the model is less sure of its first token is computed by the engine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.blend.blender import margin
from kvtier.blend.entries import full_prefill
from kvtier.config import BlendConfig
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.messages import ScheduledRequest, WorkerReport
from tests.unit.blend_system import BLOCK, SYSTEM, System, document, joined


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., System]:
    return lambda *args, **more: System(tmp_path, *args, **more)


def margin_of_full_prefill(system: System, tokens: list[int]) -> float:
    """What the model is like when it computes the prompt itself."""
    _, rows = full_prefill(system.model, torch.tensor(tokens))
    return margin(system.model.logits(rows.hidden[-1:])[0])


def test_the_margin_is_between_the_two_likeliest() -> None:
    """Whatever the others have, in any order; none where two are alike."""
    assert 0.5 == pytest.approx(margin(torch.tensor([0.05, 0.7, 0.2, 0.05]).log()))
    assert 0.0 == pytest.approx(margin(torch.tensor([3.0, -1.0, 3.0])))
    assert 1.0 == pytest.approx(margin(torch.tensor([90.0, 0.0, 1.0])))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    order=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    system=st.sampled_from([[], SYSTEM]),
    num_question=st.integers(1, 9),
    num_local=st.integers(0, 4),
    method=st.sampled_from(["epic", "cacheblend", "prophetkv", "combined"]),
    is_sure=st.booleans(),
)
def test_the_engine_computes_what_the_model_is_not_sure_of(
    lengths: list[int], order: list[int], system: list[int], num_question: int, num_local: int, method: str, is_sure: bool
) -> None:
    """With all tokens computed anew the margin is full prefill's: a little less is reached, and the whole prompt is there but for its last
    block; a little more is not, nothing is written, and the chunks are not tried again."""
    documents = [document(number, length) for number, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as directory:
        system_ = System(Path(directory))
        first, spans = joined(documents, system, [1, 2])
        system_.serve("first", first, spans=spans)
        tokens, spans = joined([documents[number % len(documents)] for number in order], system, [1, 2, 3, 4, 5, 6, 7, 8, 9][:num_question])
        found, expected = margin_of_full_prefill(system_, tokens), system_.full(tokens)
        num_local = min(num_local, (len(tokens) - 1) // BLOCK) * BLOCK
        block_ids = system_.blocks(len(tokens))
        system_.memory.put(expected.part(0, num_local), 0, block_ids)
        asked = max(1e-9, found - 1e-4) if is_sure else min(1.0, found + 1e-4)
        system_.add("second", tokens, spans=spans, ratio=1.0, method=method, min_margin=asked)
        matched = system_.half.match("second", len(tokens), num_local)
        covered = num_local + (matched.num_tokens or 0)
        system_.half.allocated("second", block_ids, covered - num_local)
        system_.step([ScheduledRequest("second", block_ids, len(tokens))])
        if matched.is_blended:
            assert (len(tokens) - 1) // BLOCK * BLOCK == covered
            got = system_.memory.part(0, covered, block_ids).part(num_local, covered)
            if is_sure:
                torch.testing.assert_close(got.values, expected.values[:, :, num_local:covered], rtol=0, atol=1e-4)
                assert "refused" not in system_.half.blended("second")
            else:
                assert bool(got.keys.isnan().all())
                assert {"tokens": 0, "refused": "unsure"} == system_.half.blended("second")
            assert (0, int(not is_sure)) == tuple(system_.cache.stats[f"blend.{name}"] for name in ("failed", "refused_unsure"))
            system_.finish(system_.half.build_step([], ["second"]), WorkerReport())
            assert is_sure == system_.half.match("second", len(tokens), num_local).is_blended
        system_.half.request_finished("second")
        while system_.half.has_pending_work:
            system_.step()
        system_.close()


def test_the_configuration_says_what_requests_do_not(make: Callable[..., System]) -> None:
    """Its least margin, wherever the chunks were found; a request's own counts more, also where that is none."""
    documents = [document(1, 24), document(2, 20)]
    system = make(BlendParts(BlendConfig(enabled=True, min_margin=1.0)))
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    tokens, spans = joined(documents[::-1], SYSTEM, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    asked: list[tuple[dict[str, Any], int]] = [
        ({"spans": spans}, 56),
        ({"boundaries": "auto"}, 56),
        ({"spans": spans, "min_margin": 0}, 48),
    ]
    for blend, covered in asked:
        system.add("second", tokens, **blend)
        assert covered == system.half.match("second", len(tokens), 0).num_tokens
        system.half.request_finished("second")
    system.close()


def test_nobody_looks_where_nobody_asks(make: Callable[..., System]) -> None:
    """Without a margin the engine computes what lies behind the chunks, and so it does behind a first token that is out already."""
    documents = [document(1, 9), document(2, 8)]
    system = make()
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    question = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for name, asked, num_written, covered in (("plain", 0.0, 0, 20), ("new", 1.0, 0, 28), ("begun", 1.0, 1, 20)):
        tokens, spans = joined(documents[::-1], SYSTEM, question)
        system.add(name, tokens, spans=spans, min_margin=asked)
        assert covered == system.half.match(name, len(tokens) + num_written, 0).num_tokens
        block_ids = system.blocks(len(tokens))
        system.half.allocated(name, block_ids, covered)
        message = system.step([ScheduledRequest(name, block_ids, len(tokens))])
        assert [0.0 if covered == 20 else 1.0] == [job.recompute.min_margin for job in message.blends]
        assert bool(system.memory.part(0, covered, block_ids).keys.isnan().any()) == (covered == 28)
        system.half.request_finished(name)
    system.close()


@pytest.mark.parametrize("order", ["together", "in turn", "the other first"])
@pytest.mark.parametrize(
    ("others", "counted"),
    [("sure", "blend.refused_unsure"), ("unsure", "blend.refused_unsure"), ("failed", "blend.failed"), ("none", "blend.tokens")],
)
def test_one_worker_is_enough(make: Callable[..., System], others: str, counted: str, order: str) -> None:
    """To be unsure; to have failed, since what is left of that may make another one unsure. What nobody gave up counts once."""
    system = make(num_workers=2, reports=[WorkerReport(attached=2, blenders=2)])
    documents = [document(1, 9), document(2, 8)]
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    system.add("first", tokens, spans=spans)
    system.half.match("first", len(tokens), 0)
    system.half.allocated("first", system.blocks(len(tokens)), 0)
    for _ in range(2):
        message = system.half.build_step([])
        report = WorkerReport()
        system.blend_steps.store(message.captures, message.entries, report)
        system.finish(message, report.merge(WorkerReport({job.job_id: 1 for job in message.entries})))
    system.half.request_finished("first")
    system.add("second", tokens, spans=spans, min_margin=1e-9 if others == "none" else 1.0)
    matched = system.half.match("second", len(tokens), 0)
    assert matched.is_blended
    block_ids = system.blocks(len(tokens))
    system.half.allocated("second", block_ids, matched.num_tokens or 0)
    message = system.half.build_step([ScheduledRequest("second", block_ids, len(tokens))])
    (job,) = message.blends
    report, other = WorkerReport(), WorkerReport()
    unfilled = system.blend_steps.blend([job], set(), report)
    assert set(block_ids[:5] if others != "none" else []) == unfilled
    assert ({job.job_id} if others != "none" else set()) == report.unsure
    assert {} == report.failed
    if others == "sure":
        other = WorkerReport({job.job_id: 1}, num_chosen={job.job_id: 2})
    else:
        system.steps(None if others == "failed" else system.blender).blend([job], set(), other)
    first, last = (other, report) if order == "the other first" else (report, other)
    if order == "together":
        system.finish(message, WorkerReport().merge(first).merge(last))
    else:
        system.finish(message, first)
        assert {"tokens": 15} == system.half.blended("second"), "not known before the last one has said it"
        system.half.finish_step(last)
    names = ("blend.refused_unsure", "blend.failed", "blend.tokens", "blend.chosen_tokens", "blend.requests")
    taken = {"blend.tokens": 15, "blend.chosen_tokens": 2}
    assert {"blend.requests": 1, **({counted: 1} if others != "none" else taken)} == {
        name: system.cache.stats[name] for name in names if system.cache.stats[name]
    }
    said = {"blend.refused_unsure": {"tokens": 0, "refused": "unsure"}, "blend.failed": {"tokens": 0}, "blend.tokens": {"tokens": 15}}
    assert said[counted] == system.half.blended("second")
    system.half.request_finished("second")
    system.close()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_unsure(make: Callable[..., System], monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    """A comparison with NaN is false: that must not count as sure, however little is asked for."""
    system = make()
    documents = [document(1, 9), document(2, 8)]
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    system.add("second", tokens, spans=spans, min_margin=1e-9)
    matched = system.half.match("second", len(tokens), 0)
    assert matched.is_blended
    block_ids = system.blocks(len(tokens))
    system.half.allocated("second", block_ids, matched.num_tokens or 0)
    monkeypatch.setattr(system.model, "logits", lambda hidden: torch.full((len(hidden), 64), wrong))
    system.step([ScheduledRequest("second", block_ids, len(tokens))])
    assert {"tokens": 0, "refused": "unsure"} == system.half.blended("second")
    assert bool(system.memory.part(0, len(tokens), block_ids).keys.isnan().all()), "nothing is written"
    system.half.request_finished("second")
    system.close()


@pytest.mark.parametrize(("min_margin", "covered", "num_too_few"), [(0.0, 20, 0), (0.1, 0, 1)])
def test_what_lies_behind_the_chunks_counts_where_it_is_computed(
    make: Callable[..., System], min_margin: float, covered: int, num_too_few: int
) -> None:
    """``min_reuse`` is a share of all that is covered: no step has to compute a long text because a few chunks lie before it."""
    documents = [document(1, 9), document(2, 8)]
    system = make()
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    tokens, spans = joined(documents[::-1], SYSTEM, document(3, 20))
    system.add("second", tokens, spans=spans, min_margin=min_margin)
    assert (covered, num_too_few) == (system.half.match("second", len(tokens), 0).num_tokens, system.cache.stats["blend.too_few"])
    system.half.request_finished("second")
    system.close()


def test_no_more_is_promised_than_was_asked_for(make: Callable[..., System]) -> None:
    """Of a part of a prompt one token at least is left to compute, though the workers look behind all of it."""
    documents = [document(1, 9), document(2, 8)]
    system = make()
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    tokens, spans = joined(documents[::-1], SYSTEM, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    system.add("second", tokens, spans=spans, min_margin=0.1)
    matched = system.half.match("second", 25, 0)
    assert (24, True) == (matched.num_tokens, matched.is_blended)
    system.half.request_finished("second")
    system.close()
