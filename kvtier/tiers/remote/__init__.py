"""Everything that the tiers in remote stores have in common; a store itself is a :class:`~kvtier.tiers.remote.client.RemoteClient`."""

from __future__ import annotations

from kvtier.tiers.remote.client import Answer, Get, Put, RemoteClient, Reply
from kvtier.tiers.remote.deadline import Deadline
from kvtier.tiers.remote.tier import RemoteSettings, RemoteTier

__all__ = ["Answer", "Deadline", "Get", "Put", "RemoteClient", "RemoteSettings", "RemoteTier", "Reply"]
