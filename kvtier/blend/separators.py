"""Chunks between separators, which are given as tokens or as a text. Pure."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence

from kvtier.blend.finding import Span
from kvtier.errors import BlendRefusedError, RefusalReason

MAX_SEPARATOR = 1000
"""characters of a separator that is a text"""


def separated_spans(token_ids: Sequence[int], separator: Sequence[int]) -> list[Span]:
    """What lies between each two occurrences of the separator. What is before the first and behind the last one is no chunk.

    Raises:
        ValueError: the separator is empty.
    """
    if not separator:
        raise ValueError("a separator has at least one token")
    tokens, pattern = list(token_ids), list(separator)
    found = []
    end = 0
    for position in (position for position, token in enumerate(tokens) if token == pattern[0]):
        if position >= end and tokens[position : position + len(pattern)] == pattern:
            end = position + len(pattern)
            found.append(Span(position, end))
    return _between(found)


class TokenTexts:
    """Finds a text in a prompt's tokens, however it was divided into tokens there: next to other text it may have been divided otherwise
    than by itself, or have become one token with a part of that. Thread-safe as far as the tokenizer is.

    Args:
        pieces: each token's text, in the tokenizer's own alphabet (``"Ġthe"``); those of a prompt, joined, are the prompt's
        written: a text in that alphabet. Raises BlendRefusedError for one that cannot be told.
    """

    def __init__(self, pieces: Sequence[str], written: Callable[[str], str]) -> None:
        self._pieces = pieces
        self._written = written

    def separated_spans(self, token_ids: Sequence[int], separator: str) -> list[Span]:
        """What lies between each two occurrences of the separator; tokens that hold a part of one are in no chunk.

        Raises:
            BlendRefusedError: the separator is too long, or nothing that could be found in a prompt.
        """
        pattern = self._written(separator) if len(separator) <= MAX_SEPARATOR and _is_text(separator) else ""
        if not pattern:
            text = f"separator is {separator[:MAX_SEPARATOR]!r}; a text of at most {MAX_SEPARATOR} characters that has tokens is allowed"
            raise BlendRefusedError(RefusalReason.FORMAT, text)
        pieces = [self._pieces[token] if token < len(self._pieces) else "\0" for token in token_ids]
        text = "".join(pieces)
        ends = list(itertools.accumulate(map(len, pieces)))
        found = []
        position = text.find(pattern)
        while position >= 0:
            end = position + len(pattern)
            found.append(Span(bisect_right(ends, position), bisect_left(ends, end) + 1))
            position = text.find(pattern, end)
        return _between(found)


def _is_text(value: str) -> bool:
    """Not half of a surrogate pair, which JSON may hold and no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _between(separators: Iterable[Span]) -> list[Span]:
    return [Span(left.end, right.start) for left, right in itertools.pairwise(separators) if left.end < right.start]
