"""Where chunks lie in a prompt: as the caller says, with its messages, or wherever stored ones occur. Pure.

Found without being told, a chunk is looked for by a hash of its first tokens over every window of the prompt (after Karp and Rabin,
"Efficient randomized pattern-matching algorithms", 1987); where one matches, such a hash of all tokens is compared, and only then the
chunk's key, a cryptographic hash of them. So a false match costs time and never wrong KV.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.blend.chunks import Anchor, Chunk, anchor_of, chunk_of
from kvtier.blend.layout import Placement
from kvtier.errors import BlendRefusedError, RefusalReason
from kvtier.types import BlockKey

HEAD_TOKENS = 16
"""of a chunk are hashed to find it; shorter chunks are found only where the caller says"""
MIN_MESSAGE_TOKENS = 64
"""shorter messages of a chat are not worth a chunk"""

Hashes = np.ndarray[Any, np.dtype[np.uint64]]

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True, slots=True)
class Span:
    """Positions ``[start, end)`` of a prompt that the caller says are one chunk."""

    start: int
    end: int


def check_spans(spans: Iterable[Span], num_tokens: int) -> list[Span]:
    """The spans in the prompt's order.

    Raises:
        BlendRefusedError: a span is empty or leaves the prompt, or two overlap.
    """
    ordered = sorted(spans, key=lambda span: (span.start, span.end))
    end = 0
    for span in ordered:
        if not 0 <= span.start < span.end <= num_tokens:
            text = f"span [{span.start}, {span.end}) of a prompt of {num_tokens} tokens; 0 <= start < end <= {num_tokens} is allowed"
            raise BlendRefusedError(RefusalReason.SPAN_OUTSIDE_PROMPT, text)
        if span.start < end:
            raise BlendRefusedError(
                RefusalReason.SPANS_OVERLAP, f"span [{span.start}, {span.end}) begins before {end}, where the last one ends"
            )
        end = span.end
    return ordered


def message_spans(token_ids: Sequence[int], turn_markers: Collection[int]) -> tuple[int, list[Span]]:
    """The messages of a chat that are chunks, and the length of the first one, which is what they lie behind.

    A message goes from a marker to the next one. The last two are no chunks: what is asked, and the beginning of the answer. Nor are
    those of less than ``MIN_MESSAGE_TOKENS``.
    """
    starts = [position for position, token in enumerate(token_ids) if token in turn_markers]
    spans = [Span(start, end) for start, end in itertools.pairwise(starts[1:-1]) if end - start >= MIN_MESSAGE_TOKENS]
    return (starts[1] if len(starts) > 1 else 0), spans


@dataclass(frozen=True, slots=True)
class ChunkSpace:
    """Within what chunks are equal: the request's root, the anchor that they are computed behind, the size of their blocks in tokens."""

    root: bytes
    anchor: Anchor
    block_tokens: int

    def chunk(self, token_ids: Sequence[int]) -> Chunk:
        """The chunk of these tokens.

        Raises:
            ValueError: as :func:`kvtier.blend.chunks.chunk_of` does.
        """
        return chunk_of(self.root, self.anchor, token_ids, self.block_tokens)

    def begins(self, token_ids: Sequence[int]) -> bool:
        """Whether the prompt begins with the anchor's tokens."""
        tokens = token_ids[: self.anchor.num_tokens]
        return len(tokens) == self.anchor.num_tokens and anchor_of(self.root, tokens, self.block_tokens) == self.anchor

    def place(self, token_ids: Sequence[int], spans: Iterable[Span], expected: Mapping[Span, BlockKey] | None = None) -> list[Placement]:
        """The chunks at spans that the caller gives. ``expected``: the keys of chunks that it says lie there.

        Raises:
            BlendRefusedError: spans overlap or leave the prompt, or the tokens of one are not those of the chunk that is expected.
        """
        has_anchor = self.begins(token_ids)
        placements = []
        for span in check_spans(spans, len(token_ids)):
            chunk = self.chunk(token_ids[span.start : span.end])
            key = (expected or {}).get(span, chunk.key)
            if key != chunk.key:
                text = f"the tokens in [{span.start}, {span.end}) are chunk {chunk.key.hex()}, not {key.hex()}"
                raise BlendRefusedError(RefusalReason.TOKENS_DIFFER, text)
            placements.append(Placement(chunk, span.start, is_exact=has_anchor and span.start == self.anchor.num_tokens))
        return placements


class ChunkFinder:
    """Finds stored chunks in prompts. Not thread-safe.

    Of chunks that overlap the one that begins first is taken, and of those the longest.
    """

    def __init__(self, space: ChunkSpace) -> None:
        self._space = space
        self._by_head: defaultdict[int, dict[bytes, tuple[Chunk, int]]] = defaultdict(dict)
        """hash of the first tokens -> key -> chunk, hash of all its tokens"""
        self._head_of: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._head_of)

    def add(self, token_ids: Sequence[int]) -> Chunk | None:
        """Finds these tokens from now on. ``None``, and nothing else happens, where there are fewer than ``HEAD_TOKENS``."""
        if len(token_ids) < HEAD_TOKENS:
            return None
        chunk = self._space.chunk(token_ids)
        head = int(_window_hashes(token_ids[:HEAD_TOKENS])[0])
        self._by_head[head][chunk.key] = (chunk, int(_Sums.of(token_ids).sums[-1]))
        self._head_of[chunk.key] = head
        return chunk

    def discard(self, key: bytes) -> None:
        """Finds this chunk no more; an unknown key is fine."""
        head = self._head_of.pop(key, None)
        if head is None:
            return
        del self._by_head[head][key]
        if not self._by_head[head]:
            del self._by_head[head]

    def find(self, token_ids: Sequence[int]) -> list[Placement]:
        """Where stored chunks lie, in the prompt's order; not among the anchor's tokens where the prompt begins with them."""
        placements: list[Placement] = []
        if len(token_ids) < HEAD_TOKENS or not self._by_head:
            return placements
        has_anchor = self._space.begins(token_ids)
        first = end = self._space.anchor.num_tokens if has_anchor else 0
        hashes = _window_hashes(token_ids)
        sums = _Sums.of(token_ids)
        heads: dict[int, _Candidates] = {}
        wanted = np.fromiter(self._by_head, dtype=np.uint64, count=len(self._by_head))
        for position in np.flatnonzero(np.isin(hashes, wanted)).tolist():
            if position < end:
                continue
            head = int(hashes[position])
            if head not in heads:
                heads[head] = _Candidates.of(self._by_head[head].values())
            chunk = self._longest_at(token_ids, position, heads[head], sums)
            if chunk is not None:
                placements.append(Placement(chunk, position, is_exact=has_anchor and position == first))
                end = position + chunk.num_tokens
        return placements

    def _longest_at(self, token_ids: Sequence[int], position: int, candidates: _Candidates, sums: _Sums) -> Chunk | None:
        for index in sums.places(position, candidates).tolist():
            chunk: Chunk = candidates.chunks[index]
            if self._space.chunk(token_ids[position : position + chunk.num_tokens]) == chunk:
                return chunk
        return None


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The chunks that begin with the same tokens, longest first."""

    chunks: list[Chunk]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    hashes: Hashes

    @classmethod
    def of(cls, chunks: Iterable[tuple[Chunk, int]]) -> _Candidates:
        ordered = sorted(chunks, key=lambda item: -item[0].num_tokens)
        lengths = np.array([chunk.num_tokens for chunk, _ in ordered], np.int64)
        return cls([chunk for chunk, _ in ordered], lengths, np.array([whole for _, whole in ordered], np.uint64))


@dataclass(frozen=True, slots=True)
class _Sums:
    """Hashes of all windows of a prompt: sums of its tokens' numbers, each times the base to the power of its position."""

    sums: Hashes
    """of the tokens before each position"""
    powers: Hashes

    @classmethod
    def of(cls, token_ids: Sequence[int]) -> _Sums:
        powers = np.full(len(token_ids) + 1, _BASE)
        powers[0] = 1
        powers = np.cumprod(powers, dtype=np.uint64)
        return cls(np.concatenate((np.zeros(1, np.uint64), np.cumsum(_mixed(token_ids) * powers[:-1], dtype=np.uint64))), powers)

    def places(self, position: int, candidates: _Candidates) -> np.ndarray[Any, np.dtype[np.intp]]:
        """Which of the candidates lie at the position, as far as the hashes show."""
        first = int(np.searchsorted(-candidates.lengths, position + 1 - len(self.sums)))  # the others leave the prompt
        windows = self.sums[position + candidates.lengths[first:]] - self.sums[position]
        return first + np.flatnonzero(windows == candidates.hashes[first:] * self.powers[position])


def _mixed(token_ids: Sequence[int]) -> Hashes:
    """A number for each token that says little about its neighbours'."""
    mixed = (np.asarray(token_ids, dtype=np.uint64) + np.uint64(1)) * _MIX
    return mixed ^ (mixed >> np.uint64(29))


def _window_hashes(token_ids: Sequence[int]) -> Hashes:
    """A hash of the ``HEAD_TOKENS`` tokens from each position on, as far as there are so many."""
    mixed = _mixed(token_ids)
    num_windows = len(mixed) - HEAD_TOKENS + 1
    hashes = np.zeros(num_windows, np.uint64)
    for offset in range(HEAD_TOKENS):
        hashes = hashes * _BASE + mixed[offset : offset + num_windows]
    return hashes
