"""Eviction policies: pure data structures, one algorithm a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvtier.policies.base import EvictionPolicy
from kvtier.policies.fifo import FIFOPolicy
from kvtier.policies.lru import LRUPolicy

__all__ = ["POLICIES", "EvictionPolicy", "FIFOPolicy", "LRUPolicy", "create_policy"]

POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = {"default": LRUPolicy, "fifo": FIFOPolicy, "lru": LRUPolicy}
"""Name in the configuration -> factory."""


def create_policy(name: str) -> EvictionPolicy:
    """A new policy by its configured name. Raises ValueError naming what is allowed."""
    try:
        return POLICIES[name]()
    except KeyError:
        raise ValueError(f"policy {name!r} is not one of {', '.join(sorted(POLICIES))}") from None
