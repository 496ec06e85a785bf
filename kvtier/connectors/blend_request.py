"""What a request asks of chunk reuse (``kv_transfer_params["kvtier"]["blend"]``), checked against its prompt. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvtier.blend.chunks import anchor_of, served_anchor
from kvtier.blend.finding import ChunkSpace, Span, check_spans, message_spans
from kvtier.blend.separators import MAX_SEPARATOR, TokenTexts, separated_spans
from kvtier.connectors.known_chunks import KnownChunks
from kvtier.connectors.messages import Recompute
from kvtier.connectors.requests import BlendState
from kvtier.errors import BlendRefusedError, RefusalReason

METHODS = ("none", "cacheblend", "epic", "prophetkv", "cachecraft", "combined")
BOUNDARIES = ("messages", "separator", "auto")
KEYS = ("spans", "separator", "boundaries", "tokens", "anchor", "method", "ratio", "min_margin")


class BlendSettings(Protocol):
    """The ``blend:`` section of the configuration, as far as the scheduler half reads it."""

    @property
    def enabled(self) -> bool:
        """Whether requests may reuse chunks."""

    @property
    def boundaries(self) -> str:
        """Where chunks begin and end, where a request does not say."""

    @property
    def separator(self) -> str | None:
        """What lies between the chunks where they lie between separators and a request does not say which."""

    @property
    def entries(self) -> str:
        """Whether chunks are computed, or copied from prompts that were served."""

    @property
    def method(self) -> str:
        """Which tokens are computed anew."""

    @property
    def ratio(self) -> float:
        """Which share of the chunks' tokens that is."""

    @property
    def min_margin(self) -> float:
        """By how much the first token's probability must exceed the next likely one's."""

    @property
    def min_reuse(self) -> float:
        """Which share of what would be covered must come from chunks."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a request's chunks depend on beside the request."""

    root: bytes
    """of the request's keys"""
    block_tokens: int
    primer: tuple[int, ...] = ()
    """tokens that chunks are computed behind too, after what the prompt begins with"""
    turn_markers: frozenset[int] = frozenset()
    """tokens that a message begins with"""
    texts: TokenTexts | None = None
    """finds separators that are given as a text"""
    known: KnownChunks = field(default_factory=KnownChunks)


def read_request(asked: object, prompt: Sequence[int], settings: BlendSettings, around: Surroundings) -> BlendState:
    """The request's chunks; what it names is known from now on.

    Raises:
        BlendRefusedError: what is asked makes no sense, or not for this prompt.
    """
    if not isinstance(asked, Mapping):
        raise _bad(f"{asked!r}; a mapping is allowed")
    unknown = sorted(str(key) for key in asked if key not in KEYS)
    if unknown:
        raise _bad(f"{', '.join(unknown)}: {', '.join(KEYS)} are allowed")
    named = [key for key in ("spans", "separator", "boundaries") if key in asked]
    if len(named) > 1 or (not named and settings.boundaries == "request"):
        raise _bad("one of spans, separator and boundaries is needed")
    method = asked.get("method", settings.method)
    if method not in METHODS:
        raise BlendRefusedError(RefusalReason.METHOD, f"method is {method!r}; {', '.join(METHODS)} are allowed")
    ratio = _share("ratio", asked.get("ratio", settings.ratio), RefusalReason.RATIO)
    min_margin = _share("min_margin", asked.get("min_margin", settings.min_margin), RefusalReason.MARGIN)
    recompute = Recompute(method, ratio, min_margin)
    if not named or "boundaries" in named:
        boundaries = asked.get("boundaries", settings.boundaries)
        if boundaries not in BOUNDARIES:
            raise _bad(f"boundaries is {boundaries!r}; {', '.join(BOUNDARIES)} are allowed")
        if boundaries == "auto":
            num_anchor, placements = around.known.find(around.root, prompt)
            return BlendState(placements, (*prompt[:num_anchor], *around.primer), recompute, len(prompt))
    return _placed(asked, prompt, settings, around, recompute)


def _placed(
    asked: Mapping[str, Any], prompt: Sequence[int], settings: BlendSettings, around: Surroundings, recompute: Recompute
) -> BlendState:
    """The chunks at the places that the request gives, or its messages."""
    first, spans = _spans(asked, prompt, settings, around)
    num_anchor = asked.get("anchor", first)
    if not _is_number(num_anchor) or not 0 <= num_anchor <= first:
        raise _bad(f"anchor is {num_anchor!r}; a number of tokens up to the first chunk, 0 to {first}, is allowed")
    prefix_ids = tuple(prompt[:num_anchor])
    anchor_ids = (*prefix_ids, *around.primer)
    make_anchor = served_anchor if settings.entries == "served" else anchor_of
    space = ChunkSpace(around.root, make_anchor(around.root, anchor_ids, around.block_tokens), around.block_tokens)
    expected = None
    if "tokens" in asked:
        texts = asked["tokens"]
        if "spans" not in asked or not _is_list(texts) or len(texts) != len(spans) or not all(text and _is_tokens(text) for text in texts):
            raise _bad("tokens: a list of token ids, 0 to 2**32 - 1, for each of the spans is allowed")
        expected = {span: space.chunk(text).key for span, text in zip(spans, texts, strict=True)}
    placements = space.place(prompt, spans, expected)
    around.known.learn(space, prefix_ids, prompt, placements)
    return BlendState(placements, anchor_ids, recompute, len(prompt))


def _share(name: str, value: Any, reason: RefusalReason) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:  # false for NaN as well
        raise BlendRefusedError(reason, f"{name} is {value!r}; 0 to 1 is allowed")
    return float(value)


def _spans(asked: Mapping[str, Any], prompt: Sequence[int], settings: BlendSettings, around: Surroundings) -> tuple[int, list[Span]]:
    """Where the chunks lie, and how many tokens before them are their anchor."""
    if "spans" in asked:
        given = asked["spans"]
        if not _is_list(given) or not all(_is_span(span) for span in given):
            raise _bad(f"spans is {given!r}; a list of [start, end] is allowed")
        spans = [Span(start, end) for start, end in given]
        check_spans(spans, len(prompt))
    elif "separator" in asked or asked.get("boundaries", settings.boundaries) == "separator":
        spans = _separated(asked.get("separator", settings.separator), prompt, around.texts)
    else:
        if not around.turn_markers:
            raise BlendRefusedError(RefusalReason.BOUNDARIES, "boundaries is messages, and no token is known that begins one")
        return message_spans(prompt, around.turn_markers)
    return min((span.start for span in spans), default=0), spans


def _separated(separator: Any, prompt: Sequence[int], texts: TokenTexts | None) -> list[Span]:
    if isinstance(separator, str):
        if texts is None:
            raise BlendRefusedError(RefusalReason.BOUNDARIES, "separator is a text, and the model has no tokenizer to find it by")
        return texts.separated_spans(prompt, separator)
    if not separator or not _is_tokens(separator):
        allowed = f"a text of at most {MAX_SEPARATOR} characters, or a list of token ids, is allowed"
        raise _bad(f"separator is {separator!r}, in the request or in blend.separator; {allowed}")
    return separated_spans(prompt, separator)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_tokens(value: Any) -> bool:
    return _is_list(value) and all(_is_number(token) and 0 <= token < 1 << 32 for token in value)


def _is_span(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(text: str) -> BlendRefusedError:
    return BlendRefusedError(RefusalReason.FORMAT, text)
