"""Many runs of one trace: policies and sizes, in parallel processes, each summed up as one record."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.sim.hinting import Agents, Hinting, HintKind
from kvtier.sim.model import Machine
from kvtier.sim.optimum import Future, ideal_hits, look_ahead, optimal_hits, token_hit_rate
from kvtier.sim.processes import Progress, in_processes
from kvtier.sim.replay import Replay, Replayed, times_to_first_token
from kvtier.sim.setup import Setup, TierSetup
from kvtier.sim.trace import Trace

PERCENTILES = (50, 95, 99)
_WORKER = "kvtier.sim.worker"
"""what replays in a process of its own"""


@dataclass(frozen=True, slots=True)
class Run:
    """One replay to be done. ``capacity_fraction`` is of the trace's unique blocks; None where the setup says otherwise."""

    setup: Setup
    capacity_fraction: float | None = None
    hints: HintKind = "off"
    wrong_hints: float = 0.0
    """share of the hints that is wrong"""


@dataclass(frozen=True, slots=True)
class Task:
    """What all runs of a trace have in common."""

    trace: Trace
    machine: Machine
    engine_block_tokens: int = 16
    agents: Agents | None = None
    """who gives hints; None: nobody"""


def host_runs(trace: Trace, base: Setup, policies: Sequence[str], fractions: Sequence[float]) -> list[Run]:
    """Every policy at every size of host memory, which is the only tier."""
    runs = []
    for fraction in fractions:
        capacity = max(1, round(fraction * trace.num_unique))
        for policy in policies:
            host = TierSetup(capacity, policy, base.host.ttl_s, base.host.ttl_mode)
            runs.append(Run(dataclasses.replace(base, host=host, disk=None), fraction))
    return runs


class Ceiling:
    """What is possible at all on a trace: computed once, asked per size."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._future: Future = look_ahead(trace)
        self.ideal = token_hit_rate(trace, ideal_hits(self._future, trace))
        self._optima: dict[int, float] = {}

    def at(self, capacity_blocks: int) -> float:
        """The token hit rate of the offline optimum."""
        if capacity_blocks not in self._optima:
            self._optima[capacity_blocks] = token_hit_rate(self._trace, optimal_hits(self._future, capacity_blocks))
        return self._optima[capacity_blocks]


def replay(task: Task, run: Run, progress: Progress = lambda _more: None) -> dict[str, Any]:
    """Does one run and sums it up. The garbage collector rests meanwhile: what a replay makes has no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    done = 0

    def tell(now_done: int) -> None:
        nonlocal done
        progress(now_done - done)
        done = now_done

    try:
        replayed = _replayed(task, run, tell)
    finally:
        if was_enabled:
            gc.enable()
    return record_of(task, run, replayed)


def _replayed(task: Task, run: Run, tell: Callable[[int], None]) -> Replayed:
    if run.hints == "off" or task.agents is None:
        return Replay(task.trace, run.setup, task.machine, engine_block_tokens=task.engine_block_tokens).run(tell)
    hinting = Hinting(task.trace, task.agents, run.hints, wrong=run.wrong_hints)
    hinted = Replay(task.trace, run.setup, task.machine, engine_block_tokens=task.engine_block_tokens, observer=hinting)
    hinting.attach(hinted.planner, task.machine, run.setup)
    return hinted.run(tell)


def record_of(task: Task, run: Run, done: Replayed) -> dict[str, Any]:
    """One run as plain values. Rates are shares of 1; times are seconds unless the name says otherwise."""
    trace, counters, size = task.trace, done.counters, done.block_bytes
    disk = run.setup.disk
    record: dict[str, Any] = {
        "trace": trace.name,
        "policy": run.setup.host.policy,
        "hints": run.hints,
        "wrong_hints": run.wrong_hints,
        "capacity_fraction": run.capacity_fraction,
        "capacity_blocks": run.setup.host.capacity_blocks,
        "capacity_bytes": run.setup.host.capacity_blocks * size,
        "disk_capacity_blocks": 0 if disk is None else disk.capacity_blocks,
        "disk_capacity_bytes": 0 if disk is None else disk.capacity_blocks * size,
        "disk_policy": None if disk is None else disk.policy,
        "block_tokens": trace.block_tokens,
        "unique_blocks": trace.num_unique,
        "requests": len(trace),
        "skipped_lines": trace.num_skipped,
        "token_hit_rate": token_hit_rate(trace, done.hit_blocks),
        "host_token_hit_rate": token_hit_rate(trace, done.host_blocks),
        "disk_token_hit_rate": token_hit_rate(trace, done.hit_blocks - done.host_blocks),
        "request_hit_rate": float(np.count_nonzero(done.hit_blocks) / len(trace)),
        "host_request_hit_rate": float(np.count_nonzero(done.host_blocks) / len(trace)),
        "host_loaded_bytes": counters["host.loaded_blocks"] * size,
        "host_stored_bytes": counters["host.stored_blocks"] * size,
        "disk_read_bytes": counters["disk.loaded_blocks"] * size,
        "disk_written_bytes": counters["disk.stored_blocks"] * size,
        "host_evicted_blocks": counters["host.evicted_blocks"],
        "disk_evicted_blocks": counters["disk.evicted_blocks"],
        "expired_blocks": counters["host.expired_blocks"] + counters["disk.expired_blocks"],
        "refused_blocks": counters["store.refused_blocks"],
        "promote_timeouts": int(np.count_nonzero(done.wait_s >= run.setup.promote_wait_s)) if disk is not None else 0,
        "policy_us_per_request": 1e6 * done.policy_s / len(trace),
        "accesses_per_s": trace.num_accesses / done.cpu_s if done.cpu_s else 0.0,
        "replay_s": done.cpu_s,
    }
    nothing = np.zeros(len(trace))
    for name, hits, wait_s in (("ttft", done.hit_blocks, done.wait_s), ("ttft_without", nothing, nothing)):
        times = times_to_first_token(trace, task.machine, hits, wait_s)
        record |= {f"{name}_p{share}_s": float(np.percentile(times, share)) for share in PERCENTILES}
    working = dataclasses.replace(task.machine, overhead_s=0.0)
    record["gpu_s"] = float(times_to_first_token(trace, working, done.hit_blocks, nothing).sum())
    record["gpu_without_s"] = float(times_to_first_token(trace, working, nothing, nothing).sum())
    return record


def replay_all(task: Task, runs: Sequence[Run], *, jobs: int = 1, progress: Progress = lambda _more: None) -> Generator[dict[str, Any]]:
    """The records of all runs in their order, with shares of the optimum. ``jobs``: processes at the same time.

    ``progress`` is told how many more requests have been replayed. Closing the generator ends the processes.
    Raises ChildProcessError: one of them ended by itself.
    """
    ceiling = Ceiling(task.trace)
    if min(jobs, len(runs)) <= 1:
        records: Iterator[dict[str, Any]] = (replay(task, run, progress) for run in runs)
    else:
        records = in_processes(_WORKER, task, runs, jobs, progress)
    for record in records:
        optimum = ceiling.at(max(1, min(task.trace.num_unique, record["capacity_blocks"] + record["disk_capacity_blocks"])))
        record["optimum_token_hit_rate"] = optimum
        record["ideal_token_hit_rate"] = ceiling.ideal
        record["share_of_optimum"] = record["token_hit_rate"] / optimum if optimum else None
        yield record
