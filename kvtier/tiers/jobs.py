"""Jobs that a tier has begun and not finished: the outcomes so far, and the result once the last block is settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kvtier.types import BlockIO, BlockKey, JobResult, Outcome, TransferJob


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

    def refuse(self, outcome: Outcome, error: str) -> Outcome:
        """Notes why a block of this job comes out as ``outcome``, and returns it."""
        self.error = self.error or error
        return outcome


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


def misfit(buffer: memoryview, num_bytes: int, *, is_load: bool) -> str | None:
    """Why a buffer cannot be used for a block of ``num_bytes``, or None where it can. ``is_load``: it is to be written."""
    try:
        if buffer.nbytes != num_bytes or not buffer.c_contiguous or (is_load and buffer.readonly):
            return f"a buffer of {buffer.nbytes} bytes for a block of {num_bytes}{', read-only' if buffer.readonly else ''}"
    except ValueError:
        return f"a buffer that was released for a block of {num_bytes} bytes"
    return None


class JobBook:
    """Every job that was opened ends as exactly one result in ``results``. Not thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.num_jobs = 0
        """opened and not finished"""
        self.results: deque[JobResult] = deque()

    def open_job(self, job: TransferJob) -> RunningJob:
        """Takes a job in; one without blocks is finished at once."""
        running = RunningJob(job, self._clock())
        self.num_jobs += 1
        if not job.blocks:
            self._finish(running)
        return running

    def settle(self, ticket: Ticket, outcome: Outcome, error: str | None = None) -> None:
        """Notes the outcome of one block and, with the last one, the job's result."""
        running = ticket.running
        assert running.outcomes[ticket.index] is None, "a block was settled twice"
        running.outcomes[ticket.index] = outcome
        running.num_open -= 1
        running.error = running.error or error
        if outcome is Outcome.OK:
            running.num_bytes += ticket.block.meta.num_bytes
        if not running.num_open:
            self._finish(running)

    def forget_jobs(self) -> None:
        """No job is known any more: whoever has it tells its owner."""
        self.num_jobs = 0
        self.results.clear()

    def _finish(self, running: RunningJob) -> None:
        job = running.job
        outcomes = tuple(outcome for outcome in running.outcomes if outcome is not None)
        seconds = self._clock() - running.started
        self.num_jobs -= 1
        self.results.append(JobResult(job.job_id, job.kind, outcomes, seconds, running.num_bytes, tuple(running.dropped), running.error))
