"""Carries out the planner's commands on the tiers and brings their results back to it."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence

from kvtier.control.commands import Command, Demote, Forget, Probe, Remove
from kvtier.control.estimates import Estimates
from kvtier.control.host_space import PAGE_BYTES
from kvtier.control.planner import Planner
from kvtier.memory.arena import Arena
from kvtier.stats import Stats
from kvtier.tiers.base import LastingTier, SharedTier, Tier
from kvtier.types import BlockIO, JobKind, JobResult, ProbeJob, ProbeResult, TransferJob

_LOG = logging.getLogger(__name__)
MAX_LOGGED = 100
"""different errors of tiers that are logged, each once"""


class TransferRunner:
    """Drives the tiers below host memory. One thread, the planner's."""

    def __init__(self, planner: Planner, tiers: Sequence[Tier], arena: Arena, namespace: bytes, stats: Stats, estimates: Estimates) -> None:
        self._planner = planner
        self._tiers = tiers
        self._shared = {index: tier for index, tier in enumerate(tiers, start=1) if isinstance(tier, SharedTier)}
        """number of each tier that others write to -> the tier"""
        self._arena = arena
        self._namespace = namespace
        self._shared_namespace = namespace
        self._stats = stats
        self._estimates = estimates
        self._running = [0] * len(tiers)
        self._online = [True] * len(tiers)
        self._logged: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether a tier has a job or a probe whose result was not seen yet."""
        return any(self._running)

    @property
    def is_stuck(self) -> bool:
        """Whether all that is under way, or will be by itself, is under way in tiers that are offline."""
        busy = [online for running, online in zip(self._running, self._online, strict=True) if running]
        return bool(busy) and not any(busy) and not self._planner.will_write

    def run(self) -> None:
        """Hands everything the planner wants to the tiers."""
        for command in self._planner.take_commands():
            self._start(command)

    def leave_others(self) -> None:
        """From now on shared tiers are used in a namespace that nobody else has, and a later process finds nothing in those of this engine.

        For an engine whose weights may have changed under the name of its model: what others or it itself stored there may be wrong for it
        now, and what it stores wrong for others, or for itself when it is started again.
        """
        self._shared_namespace = secrets.token_bytes(len(self._namespace))
        for tier in self._tiers:
            if isinstance(tier, LastingTier):
                tier.reset()

    def poll(self, now: float, timeout_s: float = 0.0) -> None:
        """Takes results in; waits up to ``timeout_s`` for the first where a job is running."""
        for position, tier in enumerate(self._tiers):
            if not self._running[position]:
                continue
            for result in tier.poll(timeout_s):
                self._running[position] -= 1
                self._finish(tier, result, now)
        for index, shared in self._shared.items():
            if self._running[index - 1]:
                for probe in shared.take_probes():
                    self._running[index - 1] -= 1
                    self._probed(shared, probe, now)
        for tier in self._tiers:
            for event, count in tier.take_events().items():
                self._stats.add(f"{tier.name}.{event}", count)
        self._watch_health()
        self.run()

    def _start(self, command: Command) -> None:
        tier = self._tiers[command.tier - 1]
        if isinstance(command, Remove):
            tier.remove(command.keys)
            return
        shared = self._shared.get(command.tier)
        if isinstance(command, (Forget, Probe)):
            assert shared is not None, "only what is shared is asked, and forgotten without being removed"
            if isinstance(command, Forget):
                shared.forget(command.keys)
            else:
                self._running[command.tier - 1] += 1
                shared.probe(ProbeJob(command.job_id, self._shared_namespace, command.keys))
            return
        blocks = tuple(
            BlockIO(meta, self._arena.view(slot * PAGE_BYTES, meta.num_bytes))
            for meta, slot in zip(command.blocks, command.slots, strict=True)
        )
        kind = JobKind.STORE if isinstance(command, Demote) else JobKind.LOAD
        self._running[command.tier - 1] += 1
        tier.submit(TransferJob(command.job_id, kind, self._namespace if shared is None else self._shared_namespace, blocks))

    def _finish(self, tier: Tier, result: JobResult, now: float) -> None:
        self._log(tier, result.error)
        if result.kind is JobKind.STORE:
            self._planner.demoted(result.job_id, result.outcomes, result.dropped, now)
        else:
            self._estimates.transferred(tier.name, result.num_bytes, result.seconds)
            self._planner.promoted(result.job_id, result.outcomes, now)

    def _probed(self, tier: SharedTier, result: ProbeResult, now: float) -> None:
        self._log(tier, result.error)
        if result.is_complete:
            self._estimates.probed(tier.name, result.seconds)
        self._planner.probed(result.job_id, result.num_bytes, now)

    def _log(self, tier: Tier, error: str | None) -> None:
        if error is not None and error not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(error)
            _LOG.warning("%s tier: %s", tier.name, error)

    def _watch_health(self) -> None:
        for position, tier in enumerate(self._tiers):
            online = tier.online
            if online == self._online[position]:
                continue
            self._online[position] = online
            self._planner.set_online(position + 1, online)
            if not online:
                self._stats.add(f"{tier.name}.offline")
            _LOG.warning("%s tier is %s", tier.name, "back" if online else "offline; its blocks are misses until it is back")
