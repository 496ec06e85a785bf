"""What is compared: methods, each with entries computed one way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvtier.blend.methods import (
    CacheBlend,
    CacheCraft,
    Combined,
    Epic,
    Evidence,
    FullReuse,
    ProphetKV,
    Selection,
    SelectionMethod,
)
from kvtier.blend.methods.base import AsksNothing, top
from kvtier.blend.ratio import FixedRatio


class Random(AsksNothing):
    """Tokens drawn at random: what a method must beat to be worth its name."""

    name = "random"

    def select(self, evidence: Evidence, ratio: FixedRatio) -> Selection:
        """Any."""
        scores = torch.rand(len(evidence.layout.candidates), generator=torch.Generator().manual_seed(evidence.layout.num_tokens))
        return Selection(top(scores, ratio.num_tokens(len(scores))))


@dataclass(frozen=True)
class Variant:
    """A method, with entries computed one way."""

    label: str
    method: SelectionMethod
    entries: str
    """How they were computed.

    * alone: behind nothing
    * prefix: behind the system prompt
    * primed: behind the system prompt and one neutral document that is always the same and in no prompt
    * reordered: in a prompt that was served, of the same documents in another order
    * mixed: the same, each behind other documents
    * again: as reordered, and nothing is known of what was there; as kvtier copies entries
    * elsewhere: as mixed, in the same way
    """
    needs_question: bool = False
    is_reuse: bool = False
    """nothing is computed, whatever the ratio"""
    kept_layers: range | None = None
    """the KV is full prefill's but for these layers; None: as the method makes it"""


VARIANTS = (
    Variant("none, alone", FullReuse(), "alone", is_reuse=True),
    Variant("cacheblend, alone", CacheBlend(), "alone"),
    Variant("epic, alone", Epic(), "alone"),
    Variant("prophetkv, alone", ProphetKV(), "alone", needs_question=True),
    Variant("none, prefix", FullReuse(), "prefix", is_reuse=True),
    Variant("random, prefix", Random(), "prefix"),
    Variant("cacheblend, prefix", CacheBlend(), "prefix"),
    Variant("epic, prefix", Epic(), "prefix"),
    Variant("prophetkv, prefix", ProphetKV(), "prefix", needs_question=True),
    Variant("cachecraft, reordered", CacheCraft(), "reordered"),
    Variant("none, mixed", FullReuse(), "mixed", is_reuse=True),
    Variant("cachecraft, mixed", CacheCraft(), "mixed"),
    Variant("combined, mixed", Combined(), "mixed", needs_question=True),
    Variant("none, primed", FullReuse(), "primed", is_reuse=True),
    Variant("cacheblend, primed", CacheBlend(), "primed"),
    Variant("epic, primed", Epic(), "primed"),
    Variant("prophetkv, primed", ProphetKV(), "primed", needs_question=True),
    Variant("combined, primed", Combined(), "primed", needs_question=True),
    Variant("combined, prefix", Combined(), "prefix", needs_question=True),
    Variant("combined, served again", Combined(), "again", needs_question=True),
    Variant("combined, served elsewhere", Combined(), "elsewhere", needs_question=True),
)


def layer_variants(num_layers: int, size: int) -> list[Variant]:
    """Full prefill's KV but for some neighbouring layers, which are reused as they are: so many of them each time, from the first on."""
    groups = [range(first, min(first + size, num_layers)) for first in range(0, num_layers, size)]
    return [
        Variant(f"reused in layers {group.start} to {group.stop - 1}, primed", FullReuse(), "primed", is_reuse=True, kept_layers=group)
        for group in groups
    ]


def with_telling_layers(variant: Variant, first: float, last: float) -> Variant:
    """The same, where its method is ``combined`` with other layers."""
    if not isinstance(variant.method, Combined):
        return variant
    return replace(variant, method=replace(variant.method, telling_layers=(first, last)))
