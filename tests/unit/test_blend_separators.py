"""Chunks between separators: given as tokens, or as a text that lies in the prompt's tokens however they divide it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvtier.blend.finding import Span, check_spans
from kvtier.blend.separators import MAX_SEPARATOR, TokenTexts, separated_spans
from kvtier.config import BlendConfig, Config
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.messages import ScheduledRequest
from kvtier.errors import BlendRefusedError, ConfigError, RefusalReason
from tests.unit.blend_system import SYSTEM, System, document

PIECES = ["a", "b", "|", "ab", "|a", "b|", "||", "a|b", "|ab|"]
texts = st.text("ab|", min_size=1, max_size=3)
few_tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=30)


def same(text: str) -> str:
    return text


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=3))
@example([0, 0, 1, 0, 0, 2, 0, 0], [0, 0])
def test_separated_chunks_are_what_lies_between(tokens: list[int], separator: list[int]) -> None:
    """Joined again, with the separators and both ends, they are the prompt; and none holds a separator."""
    spans = separated_spans(tokens, separator)
    assert spans == check_spans(spans, len(tokens))
    for span in spans:
        inside = tokens[span.start : span.end]
        assert separator == tokens[span.start - len(separator) : span.start]
        assert separator == tokens[span.end : span.end + len(separator)]
        assert all(separator != inside[at : at + len(separator)] for at in range(len(inside)))


def test_separators_do_not_overlap() -> None:
    """What is left of a second one, which begins within the first, is a part of the chunk."""
    assert [Span(2, 4)] == separated_spans([0, 0, 0, 1, 0, 0], [0, 0])


@given(few_tokens, texts)
@example([2, 2, 2, 0, 2, 2], "||")
def test_a_text_is_found_wherever_tokens_divide_it(tokens: list[int], separator: str) -> None:
    """Between the occurrences of the text all tokens that hold no part of one, and no others."""
    text = "".join(PIECES[token] for token in tokens)
    covered = [0] * len(text)
    position = text.find(separator)
    number = 0
    while position >= 0:
        number += 1
        covered[position : position + len(separator)] = [number] * len(separator)
        position = text.find(separator, position + len(separator))
    chunks: dict[int, list[int]] = {}
    start = before = 0
    for index, token in enumerate(tokens):
        parts = covered[start : start + len(PIECES[token])]
        if not any(parts):
            chunks.setdefault(before, []).append(index)
        before = max(before, *parts)
        start += len(parts)
    expected = [Span(inside[0], inside[-1] + 1) for number_before, inside in chunks.items() if 0 < number_before < number]
    assert expected == TokenTexts(PIECES, same).separated_spans(tokens, separator)


@given(few_tokens, st.integers(0, len(PIECES) - 1))
def test_a_text_that_is_one_token_separates_as_that_token(tokens: list[int], separator: int) -> None:
    """Where every token is a letter of its own, both ways find the same."""
    letters = [chr(ord("a") + number) for number in range(len(PIECES))]
    assert separated_spans(tokens, [separator]) == TokenTexts(letters, same).separated_spans(tokens, letters[separator])


def test_a_token_without_a_text_separates_nothing() -> None:
    """Ids beyond the tokenizer's, as padded vocabularies have them, neither match nor join what is beside them."""
    assert [Span(2, 3)] == TokenTexts(["a", "b", "c"], same).separated_spans([0, 1, 2, 0, 1, 2, 0, 99, 1], "ab")


@pytest.mark.parametrize("separator", ["", "x" * (MAX_SEPARATOR + 1), "\ud800"])
def test_no_separator(separator: str) -> None:
    """Nothing, too much of it, or half a character: refused before the tokenizer sees it."""

    def written(text: str) -> str:
        if text:
            raise AssertionError(text)
        return text

    with pytest.raises(BlendRefusedError, match=r"a text of at most 1000 characters") as caught:
        TokenTexts(PIECES, written).separated_spans([0, 1], separator)
    assert RefusalReason.FORMAT == caught.value.reason


def test_the_separator_is_configured(tmp_path: Path) -> None:
    """``boundaries: separator`` needs one; a mistake is an error that names the field."""
    path = tmp_path / "kvtier.yaml"
    host = "tiers: [{type: host, capacity: 1GiB}]\n"
    path.write_text(host + 'blend: {enabled: true, boundaries: separator, separator: "\\n---\\n"}')
    assert "\n---\n" == Config.load(path).blend.separator
    for wrong, named in (
        ("boundaries: separator", "blend.boundaries"),
        ("boundaries: separator, separator: ''", "blend.separator"),
        (f"separator: {'x' * 1001}", "blend.separator"),
        ("separator: 7", "blend.separator"),
    ):
        path.write_text(f"{host}blend: {{{wrong}}}")
        with pytest.raises(ConfigError, match=named):
            Config.load(path)


def a_system(make: Callable[..., System], **settings: Any) -> System:
    """Its tokens are letters; token 60 is the separator's."""
    texts = TokenTexts([chr(0x100 + token) for token in range(64)], same)
    return make(BlendParts(BlendConfig(enabled=True, min_reuse=0.2, **settings), texts=texts), host_blocks=200)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., System]:
    return lambda *args, **more: System(tmp_path, *args, **more)


@pytest.mark.parametrize("named_by", ["request", "configuration", "tokens", "boundaries"])
def test_chunks_between_texts_are_reused(make: Callable[..., System], named_by: str) -> None:
    """Wherever they stand later, whether the request names what lies between them or the configuration."""
    text = chr(0x100 + 60)
    configured = {"boundaries": "separator", "separator": text} if named_by == "configuration" else {}
    configured = {"separator": text} if named_by == "boundaries" else configured
    named: dict[str, dict[str, Any]] = {
        "request": {"separator": text},
        "tokens": {"separator": [60]},
        "boundaries": {"boundaries": "separator"},
    }
    asked = named.get(named_by, {})
    system = a_system(make, **configured)
    documents = [document(number, 20 + number) for number in range(3)]

    def prompt(*order: int) -> list[int]:
        between = [token for number in order for token in [60, *documents[number]]]
        return [*SYSTEM, *between, 60, 1, 2]

    assert 2 == system.serve("first", prompt(0, 1), **asked)
    second = prompt(1, 2, 0)
    system.add("second", second, ratio=0.0, **asked)
    matched = system.half.match("second", len(second), 0)
    block_ids = system.blocks(len(second))
    system.half.allocated("second", block_ids, matched.num_tokens or 0)
    (job,) = system.step([ScheduledRequest("second", block_ids, len(second))]).blends
    assert [1 + len(SYSTEM), 4 + len(SYSTEM) + 21 + 22 - 1] == [at.start for at in job.layout.placements]
    system.half.request_finished("second")
    system.close()
