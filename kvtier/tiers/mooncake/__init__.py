"""Blocks in a Mooncake Store: memory of many machines under one master, moved to and from the arena without a copy in between."""

from __future__ import annotations

from kvtier.tiers.mooncake.client import MooncakeAccess, MooncakeClient

__all__ = ["MooncakeAccess", "MooncakeClient"]
