"""Eviction policies: pure data structures, one algorithm a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvtier.policies.arc import ARCPolicy
from kvtier.policies.base import EvictionPolicy
from kvtier.policies.fifo import FIFOPolicy
from kvtier.policies.gdsf import GDSFPolicy
from kvtier.policies.hazard import HazardPolicy
from kvtier.policies.lru import LRUPolicy
from kvtier.policies.lru2 import LRU2Policy
from kvtier.policies.s3fifo import S3FIFOPolicy
from kvtier.policies.sieve import SIEVEPolicy

__all__ = [
    "POLICIES",
    "ARCPolicy",
    "EvictionPolicy",
    "FIFOPolicy",
    "GDSFPolicy",
    "HazardPolicy",
    "LRU2Policy",
    "LRUPolicy",
    "S3FIFOPolicy",
    "SIEVEPolicy",
    "create_policy",
]

POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = {
    "default": HazardPolicy,
    "fifo": FIFOPolicy,
    "lru": LRUPolicy,
    "arc": ARCPolicy,
    "lru2": LRU2Policy,
    "s3fifo": S3FIFOPolicy,
    "sieve": SIEVEPolicy,
    "gdsf": GDSFPolicy,
    "hazard": HazardPolicy,
}
"""Name in the configuration -> factory. ``default`` is the one that the traces chose (docs/explanation/policies.md)."""


def create_policy(name: str) -> EvictionPolicy:
    """A new policy by its configured name. Raises ValueError naming what is allowed."""
    try:
        return POLICIES[name]()
    except KeyError:
        raise ValueError(f"policy {name!r} is not one of {', '.join(sorted(POLICIES))}") from None
