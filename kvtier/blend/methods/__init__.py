"""Which tokens of reused chunks are computed anew. One file, one method, with its paper and when to use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvtier.blend.methods.base import Evidence, Selection, SelectionMethod
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

__all__ = ["METHODS", "CacheBlend", "CacheCraft", "Combined", "Epic", "Evidence", "FullReuse", "ProphetKV", "Selection", "SelectionMethod"]
