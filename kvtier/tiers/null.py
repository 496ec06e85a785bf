"""The tier that keeps nothing: a valid twin for tests and for switching a tier off."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence

from kvtier.errors import ClosedError
from kvtier.types import BlockKey, BlockMeta, Damage, JobKind, JobResult, Outcome, TransferJob


class NullTier:
    """Rejects every store and misses every load. Implements :class:`~kvtier.tiers.base.Tier`."""

    def __init__(self, name: str = "null") -> None:
        self.name = name
        self.capacity_bytes: int | None = 0
        self.online = True
        self._results: list[JobResult] = []
        self._is_closed = False

    def max_blocks(self, num_bytes: int) -> int | None:
        return 0

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        return 0

    def submit(self, job: TransferJob) -> None:
        if self._is_closed:
            raise ClosedError("the null tier is closed")
        started = time.monotonic()
        outcome = Outcome.REJECTED if job.kind is JobKind.STORE else Outcome.MISS
        self._results.append(JobResult(job.job_id, job.kind, (outcome,) * len(job.blocks), time.monotonic() - started, 0))

    def poll(self, timeout_s: float = 0.0) -> list[JobResult]:
        results, self._results = self._results, []
        return results

    def remove(self, keys: Collection[BlockKey]) -> None:
        """Nothing to forget."""

    def entries(self) -> Iterator[BlockMeta]:
        return iter(())

    def take_events(self) -> dict[str, int]:
        return {}

    def check(self) -> list[Damage]:
        return []

    def close(self) -> None:
        self._is_closed = True
