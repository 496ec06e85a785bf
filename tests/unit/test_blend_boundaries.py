"""Where chunks begin and end: as the caller says, with the messages of a chat, or wherever known ones lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvtier.config import BlendConfig
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.messages import RequestOptions, ScheduledRequest
from tests.unit.blend_system import SYSTEM, System, document, joined


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., System]:
    return lambda *args, **more: System(tmp_path, *args, **more)


def test_expected_tokens_that_lie_there_are_fine(make: Callable[..., System]) -> None:
    """A caller may say what it means to lie at its spans."""
    system = make()
    documents = [document(1, 9), document(2, 8)]
    tokens, spans = joined(documents, SYSTEM, [1, 2])
    options = RequestOptions(blend={"spans": spans, "tokens": documents})
    system.half.add_request("first", tokens, num_prompt_tokens=len(tokens), options=options)
    assert {"tokens": 0} == system.half.blended("first")
    assert 2 == system.cache.stats["blend.chunks"]
    system.half.request_finished("first")
    system.close()


def test_chunks_are_found_without_being_named(make: Callable[..., System]) -> None:
    """``boundaries: auto``: what requests named before, behind the same anchor; nothing before that, nor in another order of its tokens."""
    system = make(BlendParts(BlendConfig(enabled=True, boundaries="auto", min_reuse=0.2), primer=(3, 4)))
    documents = [document(1, 24), document(2, 20)]
    first, spans = joined(documents, SYSTEM, [1, 2])
    assert 0 == system.serve("before", first)
    assert 2 == system.serve("first", first, spans=spans)
    other, _ = joined([[60, 61], documents[1], [62], documents[0]], SYSTEM, [1, 2])
    for name, tokens, starts in (
        ("second", other, [7, 28]),
        ("elsewhere", [9, *other], []),
        ("altered", [*other[:10], 63, *other[11:]], [28]),
    ):
        system.add(name, tokens, ratio=0.0)
        matched = system.half.match(name, len(tokens), 0)
        assert bool(starts) == matched.is_blended
        block_ids = system.blocks(len(tokens))
        system.half.allocated(name, block_ids, matched.num_tokens or 0)
        message = system.step([ScheduledRequest(name, block_ids, len(tokens))])
        assert starts == [at.start for job in message.blends for at in job.layout.placements]
        system.half.request_finished(name)
    system.close()


def test_messages_are_chunks(make: Callable[..., System]) -> None:
    """``boundaries: messages``: all but the first, the last two and short ones, behind the first; wherever they stand later."""
    system = make(BlendParts(BlendConfig(enabled=True, boundaries="messages"), turn_markers=frozenset({60})), host_blocks=200)
    start = [60, *SYSTEM]
    texts = [[60, *document(number, 70)] for number in range(3)]
    question, answer = [60, 1, 2, 3], [60, 4]
    first = [*start, *texts[0], *question, *texts[1], *question, *answer]
    assert 2 == system.serve("first", first)
    second = [*start, *texts[1], *texts[0], *texts[2], *answer]
    system.add("second", second, ratio=0.0)
    matched = system.half.match("second", len(second), 0)
    assert (True, 148) == (matched.is_blended, matched.num_tokens)
    block_ids = system.blocks(len(second))
    system.half.allocated("second", block_ids, 148)
    (job,) = system.step([ScheduledRequest("second", block_ids, len(second))]).blends
    assert [6, 77] == [at.start for at in job.layout.placements]
    assert 2 + 2 == system.cache.stats["blend.chunks"], "what is asked is none, however long"
    own = system.full([*start, *texts[1]])
    torch.testing.assert_close(system.memory.part(0, 77, block_ids).values, own.values, rtol=0, atol=1e-5)
    system.half.request_finished("second")
    system.close()
