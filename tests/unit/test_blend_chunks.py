"""Chunks are known by their tokens and their anchor, found wherever they lie, and laid out beside what the prefix cache has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.blend import finding
from kvtier.blend.chunks import NO_ANCHOR, Anchor, Chunk, anchor_of, chunk_of
from kvtier.blend.finding import HEAD_TOKENS, ChunkFinder, ChunkSpace, Span
from kvtier.blend.layout import Placement, PromptLayout, lay_out
from kvtier.blend.separators import separated_spans
from kvtier.errors import BlendRefusedError, RefusalReason
from kvtier.hashing import KeyChain, Namespace, chunk_root, request_root, whole_keys

ROOT = request_root(Namespace(model="m").digest)
BLOCK_TOKENS = 4
SPACE = ChunkSpace(ROOT, NO_ANCHOR, BLOCK_TOKENS)

few_tokens = st.lists(st.integers(0, 2), max_size=70)
"""of three kinds: everything repeats"""


def test_keys_are_pinned() -> None:
    """What is stored must be found by later versions."""
    anchor = anchor_of(ROOT, [1, 2, 3, 4, 5], BLOCK_TOKENS)
    assert "e5230cd7ff0003fea29d0ae354293581" == chunk_root(ROOT).hex()
    assert "56711cdac1b20caa7741bdc210a49a6e" == chunk_of(ROOT, anchor, [7, 8, 9, 10, 11], BLOCK_TOKENS).key.hex()


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40), st.lists(st.integers(0, 99), max_size=12))
def test_a_chunk_is_never_a_prefix(tokens: list[int], prefix: list[int]) -> None:
    """No key of a chunk is one of a prompt's blocks, whatever the anchor, nor one of the same tokens behind another anchor."""
    chunk = chunk_of(ROOT, anchor_of(ROOT, prefix, BLOCK_TOKENS), tokens, BLOCK_TOKENS)
    prompts = [KeyChain(ROOT, BLOCK_TOKENS).update(ids, len(ids)) for ids in (tokens, prefix + tokens)]
    assert not set(chunk.block_keys) & {ROOT, *prompts[0], *prompts[1]}
    others = [chunk_of(ROOT, anchor_of(ROOT, [*prefix, 5], BLOCK_TOKENS), tokens, BLOCK_TOKENS)]
    others.append(chunk_of(request_root(Namespace(model="n").digest), anchor_of(ROOT, prefix, BLOCK_TOKENS), tokens, BLOCK_TOKENS))
    for other in others:
        assert not set(chunk.block_keys) & set(other.block_keys)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_equal_chunks_have_equal_tokens(left: list[int], right: list[int]) -> None:
    """The key tells all tokens apart, their number too; the KV of common leading blocks is shared."""
    first, second = (chunk_of(ROOT, NO_ANCHOR, tokens, BLOCK_TOKENS) for tokens in (left, right))
    assert (left == right) == (first.key == second.key)
    assert -(-len(left) // BLOCK_TOKENS) == len(first.block_keys)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first.block_keys, second.block_keys, strict=False)))
    assert left[: common * BLOCK_TOKENS] == right[: common * BLOCK_TOKENS]


def test_the_last_key_of_whole_blocks_is_the_chains() -> None:
    """Where tokens fill their blocks there is nothing special about the last one."""
    assert KeyChain(ROOT, 4).update(range(8), 8) == whole_keys(ROOT, range(8), 4)


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([Span(0, 5), Span(4, 8)], RefusalReason.SPANS_OVERLAP),
        ([Span(3, 5), Span(3, 5)], RefusalReason.SPANS_OVERLAP),
        ([Span(5, 11)], RefusalReason.SPAN_OUTSIDE_PROMPT),
        ([Span(-1, 4)], RefusalReason.SPAN_OUTSIDE_PROMPT),
        ([Span(4, 4)], RefusalReason.SPAN_OUTSIDE_PROMPT),
        ([Span(6, 4)], RefusalReason.SPAN_OUTSIDE_PROMPT),
    ],
)
def test_spans_that_cannot_be_are_refused(spans: Sequence[Span], reason: RefusalReason) -> None:
    """With what is wrong in the message, and the reason for the metrics."""
    with pytest.raises(BlendRefusedError, match=r"\[-?\d+, \d+\)") as caught:
        SPACE.place(list(range(10)), spans)
    assert reason == caught.value.reason


def test_spans_that_are_not_the_named_chunk_are_refused() -> None:
    """A caller who says which chunk lies there is held to it."""
    tokens = list(range(20))
    chunk = SPACE.chunk(tokens[3:9])
    assert [3] == [placement.start for placement in SPACE.place(tokens, [Span(3, 9)], {Span(3, 9): chunk.key})]
    with pytest.raises(BlendRefusedError, match=chunk.key.hex()) as caught:
        SPACE.place(tokens, [Span(4, 10)], {Span(4, 10): chunk.key})
    assert RefusalReason.TOKENS_DIFFER == caught.value.reason


def naive_find(tokens: list[int], chunks: list[list[int]]) -> list[tuple[int, int]]:
    """Leftmost, then longest, then on behind it."""
    found = []
    position = 0
    while position < len(tokens):
        fitting = [len(chunk) for chunk in chunks if len(chunk) >= HEAD_TOKENS and tokens[position : position + len(chunk)] == chunk]
        if fitting:
            found.append((position, max(fitting)))
            position += max(fitting)
        else:
            position += 1
    return found


chunk_tokens = st.builds(
    lambda kind, number: [kind * 50 + index % 7 for index in range(number)], st.integers(0, 3), st.integers(HEAD_TOKENS - 2, 40)
)
"""periodic, so that a chunk occurs in itself and one is the beginning of another"""


parts_of_prompts = st.lists(st.one_of(chunk_tokens, st.lists(st.integers(0, 3), max_size=5)), max_size=6)


@given(st.lists(chunk_tokens, max_size=4), parts_of_prompts, st.data())
def test_stored_chunks_are_found_wherever_they_lie(stored: list[list[int]], parts: list[list[int]], data: st.DataObject) -> None:
    """Any lengths, orders, repetitions; at position 0, as the whole prompt, twice; some forgotten again."""
    finder = ChunkFinder(SPACE)
    keys = [finder.add(chunk) for chunk in stored]
    gone = data.draw(st.sets(st.sampled_from(range(len(stored))))) if stored else set()
    for index in gone:
        chunk = keys[index]
        finder.discard(chunk.key if chunk is not None else b"unknown")
    left = [chunk for chunk in stored if all(chunk != stored[index] for index in gone)]
    tokens = [token for part in parts for token in part]
    found = finder.find(tokens)
    assert naive_find(tokens, left) == [(placement.start, placement.num_tokens) for placement in found]
    assert len(finder) == len({tuple(chunk) for chunk in left if len(chunk) >= HEAD_TOKENS})
    for placement in found:
        assert SPACE.chunk(tokens[placement.start : placement.end]) == placement.chunk


def test_chunks_with_the_same_ends_cost_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a prompt repeats tokens that many chunks begin and end with, none is hashed that does not lie there."""
    finder = ChunkFinder(SPACE)
    for middle in range(20):
        finder.add([7] * 20 + [100 + middle] + [7] * (20 + middle % 3))
    hashed: list[int] = []

    def counted(root: bytes, anchor: Anchor, token_ids: Sequence[int], block_tokens: int) -> Chunk:
        hashed.append(len(token_ids))
        return chunk_of(root, anchor, token_ids, block_tokens)

    monkeypatch.setattr(finding, "chunk_of", counted)
    prompt = [7] * 300 + [105] + [7] * 25 + [106] + [7] * 100
    (placement,) = finder.find(prompt)
    assert (280, [43]) == (placement.start, hashed)


def test_a_chunk_is_exact_only_behind_its_own_anchor() -> None:
    """At the place where it was computed, behind the very tokens; nowhere else, and not behind others of the same number."""
    system, body = [1, 2, 3, 4, 5], list(range(10, 40))
    space = ChunkSpace(ROOT, anchor_of(ROOT, system, BLOCK_TOKENS), BLOCK_TOKENS)
    finder = ChunkFinder(space)
    finder.add(body)
    places = {
        tuple(prompt): [(placement.start, placement.is_exact, placement.shift) for placement in finder.find(prompt)]
        for prompt in ([*system, *body], [9, 9, 9, 9, 9, *body], [*system, 7, *body], body, [*system, *body, *body])
    }
    assert [[(5, True, 0)], [(5, False, 0)], [(6, False, 1)], [(0, False, -5)], [(5, True, 0), (35, False, 30)]] == list(places.values())
    assert places[5 * (9,) + tuple(body)] == [
        (placement.start, placement.is_exact, placement.shift) for placement in space.place([9] * 5 + body, [Span(5, 35)])
    ]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[Placement]]:
    position = 0
    placements = []
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), max_size=4)):
        position += gap
        chunk = SPACE.chunk(list(range(length)))
        placements.append(Placement(chunk, position, is_exact=position == 0))
        position += length
    return max(1, position + draw(st.integers(0, 3))), placements


@given(layouts(), st.data())
def test_each_token_comes_from_one_place(layout: tuple[int, list[Placement]], data: st.DataObject) -> None:
    """Prefix, chunks and fresh tokens divide the prompt; what a prefix hit covers is not taken from chunks."""
    num_tokens, placements = layout
    num_prefix = data.draw(st.integers(0, num_tokens))
    result = lay_out(num_tokens, num_prefix, data.draw(st.permutations(placements)))
    from_chunks = [position for placement in result.placements for position in range(placement.start, placement.end)]
    assert list(range(num_tokens)) == sorted([*range(num_prefix), *from_chunks, *result.fresh])
    everywhere = {position: (at.chunk, position - at.start) for at in placements for position in range(at.start, at.end)}
    for placement in result.placements:
        assert (placement.chunk, placement.first_token) == everywhere[placement.start]
    assert {position for position in everywhere if position >= num_prefix} == set(from_chunks)
    assert set(result.candidates) <= set(from_chunks)
    assert result.question[-1] == num_tokens - 1
    assert len(result.question) == 1 or not set(result.question) & set(from_chunks)


def test_layouts_that_cannot_be_are_refused() -> None:
    """Overlaps and chunks that leave the prompt, by a typed refusal; nonsense from inside kvtier by ValueError."""
    chunk = SPACE.chunk([1, 2, 3, 4, 5])
    with pytest.raises(BlendRefusedError, match="ends at 5") as caught:
        lay_out(20, 0, [Placement(chunk, 0), Placement(chunk, 4)])
    assert RefusalReason.SPANS_OVERLAP == caught.value.reason
    for start in (16, -1):
        with pytest.raises(BlendRefusedError, match="of a prompt of 20") as caught:
            lay_out(20, 0, [Placement(chunk, start)])
        assert RefusalReason.SPAN_OUTSIDE_PROMPT == caught.value.reason
    for arguments in ((0, 0), (5, 6), (5, -1)):
        with pytest.raises(ValueError, match="are a prefix"):
            PromptLayout(*arguments)
    with pytest.raises(ValueError, match="token 5 of a chunk of 5"):
        PromptLayout(20, 0, (Placement(chunk, 3, first_token=5),))
    for text, call in (("at least one token", lambda: SPACE.chunk([])), ("at least one token", lambda: separated_spans([1], []))):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(ValueError, match="an anchor has 16 bytes"):
        chunk_root(ROOT, b"short")
