"""What a disk tier has begun and not finished: jobs, their blocks, stores and reads on their way."""

from __future__ import annotations

from kvtier.tiers.disk.places import Entry
from kvtier.types import BlockIO, BlockKey, Outcome, TransferJob


class RunningJob:
    """A job with the outcomes known so far."""

    __slots__ = ("dropped", "error", "job", "num_bytes", "num_open", "outcomes", "started")

    def __init__(self, job: TransferJob, started: float) -> None:
        self.job = job
        self.started = started
        self.outcomes: list[Outcome | None] = [None] * len(job.blocks)
        self.num_open = len(job.blocks)
        self.num_bytes = 0
        self.dropped: list[BlockKey] = []
        self.error: str | None = None


class Ticket:
    """One block of a running job."""

    __slots__ = ("index", "running")

    def __init__(self, running: RunningJob, index: int) -> None:
        self.running = running
        self.index = index

    @property
    def block(self) -> BlockIO:
        """The block in question."""
        return self.running.job.blocks[self.index]


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
