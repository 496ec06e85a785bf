"""Stores and reads of a disk tier on their way."""

from __future__ import annotations

from kvtier.tiers.disk.places import Entry
from kvtier.tiers.jobs import Ticket
from kvtier.types import BlockKey, Outcome


class PendingStore:
    """A block on its way to its place."""

    __slots__ = ("doomed", "entry", "followers", "key", "readers", "ticket")

    def __init__(self, ticket: Ticket, key: BlockKey, entry: Entry) -> None:
        self.key = key
        self.ticket = ticket
        self.entry = entry
        self.doomed: Outcome | None = None
        """outcome to report for a block that was removed (OK) or crowded out (REJECTED) meanwhile"""
        self.followers: list[Ticket] = []
        """stores of the same block that came later"""
        self.readers: list[Ticket] = []
        """loads of it that came later"""


class PendingRead:
    """A load that holds its place."""

    __slots__ = ("entry", "key", "ticket")

    def __init__(self, ticket: Ticket, entry: Entry) -> None:
        self.key = ticket.block.meta.key
        self.ticket = ticket
        self.entry = entry
