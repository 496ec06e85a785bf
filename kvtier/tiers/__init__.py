"""Tiers below host memory: bytes under keys, nothing else. :class:`~kvtier.tiers.base.Tier` is the contract."""

from __future__ import annotations

from kvtier.tiers.base import Tier
from kvtier.tiers.null import NullTier

__all__ = ["NullTier", "Tier"]
