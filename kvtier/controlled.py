"""What the verbs of the control API answer: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierShare:
    """What one tier holds of a prefix."""

    leading_blocks: int
    """from the first block on, without a gap"""
    leading_tokens: int
    num_blocks: int
    """blocks of the hit that the tier holds, gaps or not"""


@dataclass(frozen=True, slots=True)
class Found:
    """The answer of ``lookup``."""

    num_blocks: int
    """full blocks that were asked for"""
    hit_blocks: int
    """leading blocks that some tier holds: what a request would be given"""
    hit_tokens: int
    tiers: Mapping[str, TierShare]
    """by name, fastest first"""


@dataclass(frozen=True, slots=True)
class Pinned:
    """The answer of ``pin``; ``unpin`` takes it."""

    pin_id: int
    num_blocks: int
    """blocks that are kept in host memory; 0: nothing of the prefix was there"""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Prefetched:
    """The answer of ``prefetch``."""

    ready_blocks: int
    """leading blocks in host memory"""
    ready_tokens: int
    missing_blocks: int
    """blocks that a lower tier holds and that did not come: too late, no room, or damaged"""


@dataclass(frozen=True, slots=True)
class Moved:
    """The answer of ``move``."""

    num_blocks: int
    """blocks that have left their tier for the other one"""
    copied_blocks: int
    """blocks that the other tier holds; more than ``num_blocks`` where some had to stay as well"""


@dataclass(frozen=True, slots=True)
class Evicted:
    """The answer of ``evict``."""

    num_blocks: int
    """blocks that left at least one tier"""


@dataclass(frozen=True, slots=True)
class Cleared:
    """The answer of ``clear``."""

    num_blocks: int
    """blocks that left at least one tier"""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The answer of ``stats``."""

    counters: Mapping[str, int]
    """since the start; ``kvtier.stats.COUNTERS`` says what each means"""
    num_blocks: Mapping[str, int]
    """readable blocks by tier"""
    num_bytes: Mapping[str, int]
    """their bytes by tier"""
    bytes_by_tenant: Mapping[str, Mapping[str, int]]
    """tier -> tenant -> bytes; what is nobody's in particular under the empty name"""
    capacity_blocks: Mapping[str, int | None]
    """how many fit; None: no bound"""
    open: Mapping[str, int]
    """copies under way, leases and pins"""
    estimates: Mapping[str, float]
    """measured speeds: see :meth:`kvtier.control.estimates.Estimates.figures`"""


@dataclass(frozen=True, slots=True)
class Health:
    """The answer of ``health``."""

    ok: bool
    online: Mapping[str, bool]
    """by tier"""
    problems: tuple[str, ...]
    """broken books, where asked for"""
