"""Carries out the planner's commands on the tiers and brings their results back to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvtier.control.commands import Command, Demote, Remove
from kvtier.control.estimates import Estimates
from kvtier.control.host_space import PAGE_BYTES
from kvtier.control.planner import Planner
from kvtier.memory.arena import Arena
from kvtier.stats import Stats
from kvtier.tiers.base import SharedTier, Tier
from kvtier.types import BlockIO, JobKind, JobResult, TransferJob

_LOG = logging.getLogger(__name__)


class TransferRunner:
    """Drives the tiers below host memory. One thread, the planner's."""

    def __init__(self, planner: Planner, tiers: Sequence[Tier], arena: Arena, namespace: bytes, stats: Stats, estimates: Estimates) -> None:
        self._planner = planner
        self._tiers = tiers
        self._shared = [tier for tier in tiers if isinstance(tier, SharedTier)]
        self._arena = arena
        self._namespace = namespace
        self._stats = stats
        self._estimates = estimates
        self._running = [0] * len(tiers)
        self._online = [True] * len(tiers)
        self._logged: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether a tier has a job whose result was not seen yet."""
        return any(self._running)

    def run(self) -> None:
        """Hands everything the planner wants to the tiers."""
        for command in self._planner.take_commands():
            self._start(command)

    def poll(self, now: float, timeout_s: float = 0.0) -> None:
        """Takes results in; waits up to ``timeout_s`` for the first where a job is running."""
        for position, tier in enumerate(self._tiers):
            if not self._running[position]:
                continue
            for result in tier.poll(timeout_s):
                self._running[position] -= 1
                self._finish(tier, result, now)
        for shared in self._shared:
            for event, count in shared.take_events().items():
                self._stats.add(f"{shared.name}.{event}", count)
        self._watch_health()
        self.run()

    def _start(self, command: Command) -> None:
        tier = self._tiers[command.tier - 1]
        if isinstance(command, Remove):
            tier.remove(command.keys)
            return
        blocks = tuple(
            BlockIO(meta, self._arena.view(slot * PAGE_BYTES, meta.num_bytes))
            for meta, slot in zip(command.blocks, command.slots, strict=True)
        )
        kind = JobKind.STORE if isinstance(command, Demote) else JobKind.LOAD
        self._running[command.tier - 1] += 1
        tier.submit(TransferJob(command.job_id, kind, self._namespace, blocks))

    def _finish(self, tier: Tier, result: JobResult, now: float) -> None:
        if result.error is not None and result.error not in self._logged and len(self._logged) < 100:
            self._logged.add(result.error)
            _LOG.warning("%s tier: %s", tier.name, result.error)
        if result.kind is JobKind.STORE:
            self._planner.demoted(result.job_id, result.outcomes, result.dropped, now)
        else:
            self._estimates.transferred(tier.name, result.num_bytes, result.seconds)
            self._planner.promoted(result.job_id, result.outcomes, now)

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
