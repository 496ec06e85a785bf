"""Keeps the table of an arena's slots true while blocks come and go, and verifies what an earlier process has left there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue

from kvtier.control.host_space import PAGE_BYTES
from kvtier.control.index import Entry
from kvtier.errors import ArenaError
from kvtier.io import start_thread
from kvtier.memory.arena import Arena
from kvtier.memory.slot_table import MAX_TENANT_BYTES, SlotEntry, SlotTable
from kvtier.stats import Stats
from kvtier.tiers.record import payload_checksum

MAX_WAITING = 65_536
"""blocks whose checksum is still to be computed; more are not recorded, so that nobody finds them after a crash"""
_NO_CHECKSUM = b""


@dataclass(frozen=True, slots=True)
class _Task:
    """A slot whose checksum is wanted: of a block that was stored, or (``job_id``) of one that is to be taken over."""

    slot: int
    found: SlotEntry
    job_id: int = 0


class SlotRecorder:
    """Implements :class:`~kvtier.control.host_space.SlotRegistry`. One thread, but for the checksums, which have one of their own.

    A block is noted once its checksum is known, and struck out before its slot can get a new tenant. An entry names the slot's
    generation, so it ends with the slot's next tenant at the latest. It owns the table.
    """

    def __init__(self, table: SlotTable, arena: Arena, stats: Stats) -> None:
        """Raises ArenaError where the system lets no thread begin; the table is the caller's then."""
        self._table = table
        self._arena = arena
        self._stats = stats
        self._recording: dict[int, int] = {}
        """slots whose block is to be noted -> generation"""
        self._num_waiting = 0
        self._is_closing = False
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._done: deque[tuple[_Task, bytes]] = deque()
        try:
            self._thread = start_thread(self._run, "kvtier-checksums")
        except OSError as error:
            raise ArenaError(f"the blocks in the arena {arena.path} cannot be recorded: {error}") from error

    def filled(self, entry: Entry, generation: int) -> None:
        """A block is complete in its slot."""
        slot = entry.slot
        if self._table.holds(slot, generation):
            return  # it was taken over
        if self._num_waiting >= MAX_WAITING or len(entry.tenant.encode()) > MAX_TENANT_BYTES:
            self._stats.add("host.unrecorded_blocks")
            return
        self._recording[slot] = generation
        self._ask(_Task(slot, SlotEntry(entry.meta, entry.tenant, generation, _NO_CHECKSUM)))

    def vacated(self, slot: int) -> None:
        """A block leaves its slot, whose bytes stay until its next tenant comes."""
        self._recording.pop(slot, None)
        self._table.erase(slot)

    def left(self) -> Iterator[tuple[int, SlotEntry]]:
        """What an earlier process has noted and nobody has overwritten as far as generations tell; nothing is verified."""
        for slot, found in self._table.entries():
            end = slot * PAGE_BYTES + found.meta.num_bytes
            if end <= self._arena.ready_bytes and int(self._arena.generations[slot]) == found.generation:
                yield slot, found

    def verify(self, job_id: int, slot: int, found: SlotEntry) -> None:
        """Compares the bytes in a slot with their checksum; ``take_verified`` has the answer."""
        self._ask(_Task(slot, found, job_id))

    def take_verified(self) -> list[tuple[int, bool]]:
        """Notes what has its checksum by now. Returns the jobs of ``verify`` that are done, and whether the bytes were right."""
        verified = []
        while self._done:
            task, checksum = self._done.popleft()
            self._num_waiting -= 1
            if task.job_id:
                is_right = checksum == task.found.checksum
                self._stats.add("host.adopted_blocks" if is_right else "host.damaged_blocks")
                verified.append((task.job_id, is_right))
            elif self._recording.get(task.slot) == task.found.generation:
                del self._recording[task.slot]
                found = task.found
                self._table.write(task.slot, SlotEntry(found.meta, found.tenant, found.generation, checksum))
        return verified

    @property
    def num_waiting(self) -> int:
        """Blocks whose checksum is still to be computed or looked at."""
        return self._num_waiting

    def close(self) -> None:
        """Ends the thread; the table stays as it is. Idempotent."""
        self._is_closing = True
        self._tasks.put(None)
        self._thread.join()
        self._table.close()

    def _ask(self, task: _Task) -> None:
        self._num_waiting += 1
        self._tasks.put(task)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._is_closing:
                return
            with self._arena.view(task.slot * PAGE_BYTES, task.found.meta.num_bytes) as payload:
                self._done.append((task, payload_checksum(payload)))
