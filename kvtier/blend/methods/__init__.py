"""Which tokens of reused chunks are computed anew. One file, one method, with its paper and when to use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from kvtier.blend.methods.base import Asks, Evidence, Selection, SelectionMethod
from kvtier.blend.methods.cacheblend import CacheBlend
from kvtier.blend.methods.cachecraft import CacheCraft
from kvtier.blend.methods.combined import Combined
from kvtier.blend.methods.epic import Epic
from kvtier.blend.methods.full_reuse import FullReuse
from kvtier.blend.methods.prophetkv import ProphetKV

METHODS: Mapping[str, Callable[[], SelectionMethod]] = {
    "none": FullReuse,
    "cacheblend": CacheBlend,
    "epic": Epic,
    "prophetkv": ProphetKV,
    "cachecraft": CacheCraft,
    "combined": Combined,
}
"""by the name under which a request asks for one"""


def methods_with(first_layer: float, last_layer: float) -> Mapping[str, Callable[[], SelectionMethod]]:
    """The methods for a model in which these layers count, from where to where as shares of its depth."""
    return {**METHODS, "combined": partial(Combined, telling_layers=(first_layer, last_layer))}


__all__ = [
    "METHODS",
    "Asks",
    "CacheBlend",
    "CacheCraft",
    "Combined",
    "Epic",
    "Evidence",
    "FullReuse",
    "ProphetKV",
    "Selection",
    "SelectionMethod",
    "methods_with",
]
