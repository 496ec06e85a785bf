"""Blends that the workers were told to put together: the leases on their chunks, and what became of them."""

from __future__ import annotations

from collections.abc import Iterable

from kvtier.cache import Cache
from kvtier.connectors.boundary import Boundary
from kvtier.connectors.jobs import BlendRun
from kvtier.connectors.messages import WorkerReport
from kvtier.connectors.requests import BlendPlan, Geometry, Request
from kvtier.errors import RefusalReason


class BlendRuns:
    """One thread, the scheduler half's. A blend ends when all workers have reported it, whatever has become of its request."""

    def __init__(self, engine: Cache, geometry: Geometry, boundary: Boundary) -> None:
        self._engine = engine
        self._geometry = geometry
        self._boundary = boundary
        self._runs: dict[int, BlendRun] = {}
        self._abandoned: set[int] = set()

    def __len__(self) -> int:
        """How many the workers have not all reported."""
        return len(self._runs)

    def __contains__(self, job_id: int) -> bool:
        """Whether they have not all reported this one."""
        return job_id in self._runs

    @property
    def is_spreading(self) -> bool:
        """Whether the workers may go on with one in a later step."""
        return any(run.is_spread for run in self._runs.values())

    def begin(self, request: Request, plan: BlendPlan, load_ids: list[int], *, is_spread: bool) -> int:
        """One is ordered, with these leases on its chunks. Returns its job's id."""
        job_id = load_ids[0]
        self._runs[job_id] = BlendRun(request, load_ids, plan.num_reused, self._geometry.num_workers, is_spread)
        request.begin_blend(job_id, plan)
        self._engine.stats.add("blend.requests")
        self._engine.stats.add("blend.hit_chunks", len(plan.placements))
        return job_id

    def advance(self, job_id: int, report: WorkerReport) -> None:
        """Workers have reported one."""
        run, stats = self._runs[job_id], self._engine.stats
        run.advance(job_id, report)
        if run.remaining > 0:
            return
        del self._runs[job_id]
        self.end_leases(run.load_ids)
        if run.failed:  # also where another worker is unsure: of what came of it
            run.request.give_up_blend(job_id, self._geometry.block_tokens)
            stats.add("blend.failed")
        elif run.is_unsure:
            run.request.give_up_blend(job_id, self._geometry.block_tokens, RefusalReason.UNSURE.value)
            stats.add(f"blend.refused_{RefusalReason.UNSURE.value}")
        else:
            stats.add("blend.tokens", run.num_tokens)
            stats.add("blend.chosen_tokens", run.num_chosen)

    def lose(self, job_id: int) -> None:
        """The workers are not going to be told of one: it has failed."""
        run = self._runs.pop(job_id)
        self.end_leases(run.load_ids)
        run.request.give_up_blend(job_id, self._geometry.block_tokens)

    def end_leases(self, load_ids: Iterable[int]) -> None:
        """Nobody reads these chunks' slots any more."""
        for load_id in load_ids:
            with self._boundary.at("end_load"):
                self._engine.end_load(load_id)

    def abandon(self, request: Request | None = None) -> None:
        """Nobody wants what the workers are putting together over several steps, for a request or for any."""
        self._abandoned.update(job_id for job_id, run in self._runs.items() if run.is_spread and request in (None, run.request))

    def take_abandoned(self) -> tuple[int, ...]:
        """Those that are to end, of those that were ordered in earlier steps."""
        abandoned, self._abandoned = self._abandoned, set()
        return tuple(sorted(abandoned & self._runs.keys()))
