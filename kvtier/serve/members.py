"""The engines of a daemon: their connections, the copies that they have begun, and what becomes of those when an engine goes.

A slot that a worker may still be writing or reading must not get a new tenant. A worker maps the arena only while it is connected, and
the kernel closes the connection when the process dies, however it dies. So the copies of a scheduler that has gone wait for the
workers that were connected then; once the last of them has gone too, they are given up. A scheduler that comes back
takes over what it had begun: its workers' reports end those copies, without a result.

A worker that outlives its scheduler is none of the next scheduler's, which has workers of its own and copies nothing before they have
mapped the arena: whoever was connected when a scheduler left belongs to that one. But for workers that say that they were started with
the next one: they may be there before the kernel has closed the connection of a scheduler that is dying.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvtier.types import BlockKey


class CopyEnder(Protocol):
    """What ends copies: a :class:`~kvtier.CacheEngine`."""

    def end_load(self, job_id: int, failed: Collection[int] = (), *, partial: Collection[int] = ()) -> None: ...
    def abort_store(self, job_id: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Copy:
    """A load or store that an engine has begun."""

    plan_id: int
    """the planner's number"""
    is_load: bool
    num_slots: int
    keys: Sequence[BlockKey] = ()
    """of a load: the blocks in its slots"""
    is_void: bool = False
    """its session has ended: what was copied counts for nothing, but its slots are taken"""

    def give_up(self, cache: CopyEnder) -> None:
        """Frees the slots."""
        if self.is_load:
            cache.end_load(self.plan_id)
        else:
            cache.abort_store(self.plan_id)


@dataclass(slots=True)
class Left:
    """Copies of a scheduler that has gone."""

    instance: str
    copies: dict[int, Copy]
    waits_for: set[int]
    """connections of workers that may be copying"""


@dataclass(slots=True)
class Member:
    """One engine: at most one scheduler and any number of workers, each a connection, by number."""

    name: str
    scheduler: int = 0
    """0: there is none"""
    instance: str = ""
    launch: str = ""
    """of the scheduler"""
    copies: dict[int, Copy] = field(default_factory=dict)
    """by the engine's own number"""
    workers: dict[int, str] = field(default_factory=dict)
    """connection -> launch"""
    mapped: set[int] = field(default_factory=set)
    """workers that have mapped the arena"""
    left: list[Left] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    """copies of earlier sessions that were given up before the engine came back: it will still say that they have ended"""

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left to remember."""
        return not self.scheduler and not self.workers and not self.left

    @property
    def num_ready(self) -> int:
        """Workers of the scheduler that have mapped the arena."""
        return sum(map(self._is_own, self.mapped))

    def scheduler_came(self, connection: int, instance: str, launch: str = "") -> None:
        """A scheduler attaches. The one before has left."""
        self.scheduler, self.instance, self.launch = connection, instance, launch
        for left in list(self.left):
            if left.instance == instance:
                self.left.remove(left)
                self.copies |= left.copies

    def resume(self, open_jobs: Iterable[int], cache: CopyEnder) -> None:
        """Of the copies begun in earlier sessions only these have not ended; the others have, unheard."""
        still_open = set(open_jobs)
        self.ended = still_open - self.copies.keys()
        for job, copy in list(self.copies.items()):
            if copy.is_void and job not in still_open:
                del self.copies[job]
                copy.give_up(cache)

    def scheduler_left(self, cache: CopyEnder) -> None:
        """The scheduler's connection is closed."""
        copies = {job: replace(copy, is_void=True) for job, copy in self.copies.items()}
        self.left.append(Left(self.instance, copies, set(self.workers)))
        self.scheduler, self.instance, self.launch, self.copies, self.ended = 0, "", "", {}, set()
        self._give_up(cache)

    def worker_left(self, connection: int, cache: CopyEnder) -> None:
        """A worker's connection is closed: it copies no more."""
        self.workers.pop(connection, None)
        self.mapped.discard(connection)
        for left in self.left:
            left.waits_for.discard(connection)
        self._give_up(cache)

    def _is_own(self, worker: int) -> bool:
        is_of_launch = self.launch != "" and self.workers[worker] == self.launch
        return is_of_launch or all(worker not in left.waits_for for left in self.left)

    def _give_up(self, cache: CopyEnder) -> None:
        for left in self.left:
            if not left.waits_for:
                for copy in left.copies.values():
                    copy.give_up(cache)
        self.left = [left for left in self.left if left.waits_for]
