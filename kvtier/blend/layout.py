"""Which tokens of a prompt come from where. Pure.

A prompt is a prefix whose KV is exact (the prefix cache's), then chunks and tokens that nobody has. Chunks lie apart from
each other; what no chunk covers is computed. So is the prompt's last token, whose logits choose the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvtier.blend.chunks import Chunk
from kvtier.errors import BlendRefusedError, RefusalReason


@dataclass(frozen=True, slots=True)
class Placement:
    """A chunk, or its end, at a place of a prompt."""

    chunk: Chunk
    start: int
    """the position in the prompt of the first token taken from the chunk"""
    first_token: int = 0
    """which token of the chunk that is: others before it are covered by the prefix"""
    is_exact: bool = False
    """the chunk lies directly behind its own anchor at the beginning of the prompt, so its KV is what full prefill computes"""

    @property
    def num_tokens(self) -> int:
        """Tokens taken from the chunk."""
        return self.chunk.num_tokens - self.first_token

    @property
    def end(self) -> int:
        """The position behind the chunk."""
        return self.start + self.num_tokens

    @property
    def shift(self) -> int:
        """By how many positions its keys move, against where they were computed."""
        return self.start - self.first_token - self.chunk.anchor.num_tokens


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """A checked division of a prompt. ``placements`` are in the prompt's order and none overlaps another or the prefix."""

    num_tokens: int
    num_prefix_tokens: int = 0
    placements: tuple[Placement, ...] = ()

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or not 0 <= self.num_prefix_tokens <= self.num_tokens:
            raise ValueError(f"a prompt of {self.num_tokens} tokens of which the first {self.num_prefix_tokens} are a prefix")
        end = self.num_prefix_tokens
        for placement in self.placements:
            _check(placement, end, self.num_tokens)
            end = placement.end

    @property
    def fresh(self) -> list[int]:
        """Positions that are neither prefix nor chunk."""
        covered = [False] * self.num_prefix_tokens
        for placement in self.placements:
            covered += [False] * (placement.start - len(covered)) + [True] * placement.num_tokens
        covered += [False] * (self.num_tokens - len(covered))
        return [position for position in range(self.num_prefix_tokens, self.num_tokens) if not covered[position]]

    @property
    def candidates(self) -> list[int]:
        """Positions whose KV comes from a chunk and may differ from that of full prefill: what a ratio is a share of."""
        return [position for placement in self.placements if not placement.is_exact for position in range(placement.start, placement.end)]

    @property
    def question(self) -> list[int]:
        """Positions behind the last chunk; the prompt's last one where there is none."""
        end = self.placements[-1].end if self.placements else self.num_prefix_tokens
        return list(range(min(end, self.num_tokens - 1), self.num_tokens))


def _check(placement: Placement, end: int, num_tokens: int) -> None:
    if not 0 <= placement.first_token < placement.chunk.num_tokens:
        raise ValueError(f"token {placement.first_token} of a chunk of {placement.chunk.num_tokens}")
    if placement.start < 0 or placement.end > num_tokens:
        text = f"tokens {placement.start} to {placement.end} of a prompt of {num_tokens}"
        raise BlendRefusedError(RefusalReason.SPAN_OUTSIDE_PROMPT, text)
    if placement.start < end:
        text = f"a chunk begins at token {placement.start}; what lies before it ends at {end}"
        raise BlendRefusedError(RefusalReason.SPANS_OVERLAP, text)


def lay_out(num_tokens: int, num_prefix_tokens: int, placements: Sequence[Placement]) -> PromptLayout:
    """The layout of chunks beside a prefix hit: chunks that the hit covers leave, and of one that it cuts the rest is taken.

    Raises:
        BlendRefusedError: chunks overlap each other or leave the prompt.
        ValueError: the prompt is empty or the prefix longer than it.
    """
    ordered = sorted(placements, key=lambda placement: placement.start)
    PromptLayout(num_tokens, 0, tuple(ordered))
    kept = []
    for placement in ordered:
        covered = max(0, num_prefix_tokens - placement.start)
        if covered < placement.num_tokens:
            kept.append(replace(placement, start=placement.start + covered, first_token=placement.first_token + covered))
    return PromptLayout(num_tokens, num_prefix_tokens, tuple(kept))
