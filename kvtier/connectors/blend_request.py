"""What a request asks of chunk reuse (``kv_transfer_params["kvtier"]["blend"]``), checked against its prompt. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from kvtier.blend.chunks import anchor_of
from kvtier.blend.finding import ChunkSpace, Span, check_spans, separated_spans
from kvtier.connectors.requests import BlendState
from kvtier.errors import BlendRefusedError, RefusalReason

METHODS = ("none", "cacheblend", "epic", "prophetkv", "cachecraft", "combined")
KEYS = ("spans", "separator", "anchor", "method", "ratio")


class BlendSettings(Protocol):
    """The ``blend:`` section of the configuration, as far as the scheduler half reads it."""

    @property
    def enabled(self) -> bool:
        """Whether requests may reuse chunks."""

    @property
    def method(self) -> str:
        """Which tokens are computed anew."""

    @property
    def ratio(self) -> float:
        """Which share of the chunks' tokens that is."""

    @property
    def min_reuse(self) -> float:
        """Which share of what would be covered must come from chunks."""


def read_request(
    asked: Mapping[str, Any], prompt: Sequence[int], settings: BlendSettings, *, root: bytes, primer: Sequence[int], block_tokens: int
) -> BlendState:
    """The request's chunks. ``primer``: tokens behind the anchor in the prompt, that chunks are computed behind too.

    Raises:
        BlendRefusedError: what is asked makes no sense, or not for this prompt.
    """
    unknown = sorted(str(key) for key in asked if key not in KEYS)
    if unknown:
        raise _bad(f"{', '.join(unknown)}: {', '.join(KEYS)} are allowed")
    spans = check_spans(_spans(asked, prompt), len(prompt))
    method = asked.get("method", settings.method)
    if method not in METHODS:
        raise BlendRefusedError(RefusalReason.METHOD, f"method is {method!r}; {', '.join(METHODS)} are allowed")
    ratio = asked.get("ratio", settings.ratio)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:  # false for NaN as well
        raise BlendRefusedError(RefusalReason.RATIO, f"ratio is {ratio!r}; 0 to 1 is allowed")
    first = min((span.start for span in spans), default=0)
    num_anchor = asked.get("anchor", first)
    if isinstance(num_anchor, bool) or not isinstance(num_anchor, int) or not 0 <= num_anchor <= first:
        raise _bad(f"anchor is {num_anchor!r}; a number of tokens up to the first chunk, 0 to {first}, is allowed")
    anchor_ids = (*prompt[:num_anchor], *primer)
    space = ChunkSpace(root, anchor_of(root, anchor_ids, block_tokens), block_tokens)
    return BlendState(space.place(prompt, spans), anchor_ids, method, float(ratio), len(prompt))


def _spans(asked: Mapping[str, Any], prompt: Sequence[int]) -> list[Span]:
    if ("spans" in asked) == ("separator" in asked):
        raise _bad("either spans or a separator is needed")
    if "separator" in asked:
        separator = asked["separator"]
        if not _is_list(separator) or not separator or not all(_is_number(token) for token in separator):
            raise _bad(f"separator is {separator!r}; a list of token ids is allowed")
        return separated_spans(prompt, separator)
    spans = asked["spans"]
    if not _is_list(spans) or not all(_is_list(span) and len(span) == 2 and all(map(_is_number, span)) for span in spans):
        raise _bad(f"spans is {spans!r}; a list of [start, end] is allowed")
    return [Span(start, end) for start, end in spans]


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(text: str) -> BlendRefusedError:
    return BlendRefusedError(RefusalReason.FORMAT, text)
