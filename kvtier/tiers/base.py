"""The contract of a tier below host memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from kvtier.types import BlockKey, BlockMeta, Damage, JobResult, ProbeJob, ProbeResult, TransferJob


class Tier(Protocol):
    """Keeps blocks' bytes under keys. Knows nothing of tokens, engines, policies or GPUs.

    All methods are called from one thread, the owner's; the tier does its I/O on threads of its own.
    ``lookup``, ``submit``, ``poll(0)`` and ``remove`` never wait for I/O and never raise for anything
    that goes wrong with the storage: that becomes an :class:`~kvtier.types.Outcome`.  Jobs and removals
    take effect in the order in which they were handed in: a STORE submitted after a ``remove`` may use
    the room it freed, and a LOAD submitted after a STORE of the same key sees it.  In a forked child a tier counts as closed.
    """

    name: str
    capacity_bytes: int | None
    """``None``: the place has no bound that kvtier must keep"""

    @property
    def online(self) -> bool:
        """False while the tier has taken itself offline after failures (its blocks are misses); it comes back by itself."""

    def max_blocks(self, num_bytes: int) -> int | None:
        """How many blocks of ``num_bytes`` payload the tier can hold when it holds nothing else."""

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        """Length of the leading run of ``keys`` that is readable now."""

    def submit(self, job: TransferJob) -> None:
        """Starts a STORE or LOAD. The job's buffers belong to the tier until its result was polled.

        A STORE of a key that is present is OK at once (values are immutable).
        Raises ClosedError after ``close()``.
        """

    def poll(self, timeout_s: float = 0.0) -> list[JobResult]:
        """The results that came in since the last call; every submitted job appears exactly once.

        Waits up to ``timeout_s`` for the first result where there is none and a job is running.
        """

    def remove(self, keys: Collection[BlockKey]) -> None:
        """Forgets keys; absent ones are fine. Their room is free for jobs submitted later."""

    def entries(self) -> Iterator[BlockMeta]:
        """Every readable block, oldest store first. For recovery, right after opening."""

    def take_events(self) -> Mapping[str, int]:
        """What happened since the last call and how often, by the names in :mod:`kvtier.stats` without the tier's."""

    def check(self) -> list[Damage]:
        """Verifies everything the tier holds, payloads included. Empty = healthy. No job may be running."""

    def close(self) -> None:
        """Finishes running jobs (their results can still be polled), releases everything. Idempotent.

        Does not wait for ever: a job that does not end within half a minute is given up, or left behind with all that it uses.
        """


@runtime_checkable
class LastingTier(Tier, Protocol):
    """A tier of this process alone whose blocks a later process finds."""

    def reset(self) -> None:
        """Forgets everything, for good: no later opening finds what is there or what is stored from now on.

        For an engine whose weights may be others now under the name of its model. May wait for I/O, for some seconds at most; where that
        is not enough, nothing is stored until it is done.
        """


@runtime_checkable
class SharedTier(Tier, Protocol):
    """A tier that others write to as well, so that only the store itself knows what it holds.

    ``lookup`` and ``entries`` speak of what this process stored, loaded or found by probing, and of no more; a block they name may
    be gone already (the store evicts by its own rules), which a LOAD finds out.  A LOAD asks the store whatever ``lookup`` says.
    """

    def probe(self, job: ProbeJob) -> None:
        """Starts to ask the store for the leading run of keys. Does not wait. Raises ClosedError after ``close()``."""

    def forget(self, keys: Collection[BlockKey]) -> None:
        """Stops counting on blocks; absent ones are fine. The store keeps them: ``remove`` is for what must not be there any more."""

    def take_probes(self) -> list[ProbeResult]:
        """The answers that came in since the last call; every probe appears exactly once. ``poll`` wakes up for them too."""
