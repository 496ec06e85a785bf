"""Blocks in Redis or Valkey: redis-py connects, payloads pass between the socket and the arena without a copy in between."""

from __future__ import annotations

from kvtier.tiers.redis.client import RedisClient
from kvtier.tiers.redis.endpoint import RedisAccess

__all__ = ["RedisAccess", "RedisClient"]
