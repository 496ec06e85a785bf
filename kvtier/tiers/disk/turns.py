"""When a place on disk may be written: not before everything that was there is gone.

A place is *kept* by each read and write under way there, by each store queued for it, and by an entry of the index file
that must be deleted first.  While a segment keeps its slot size, two places in it share all their pages or none, so a
store waits for its own place alone.  An emptied segment may be divided into slots of another size; then a new place may
overlap any of the old ones, and the stores wait at the segment's *gate* until nothing in the segment is kept.

Not thread-safe: the ledger calls it with the tier's lock held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from kvtier.io import PAGE_BYTES
from kvtier.tiers.disk.format import record_bytes_for
from kvtier.tiers.disk.pending import PendingStore


class Turns:
    """Lets stores through in the order in which they came. What may be written now collects in ``runnable``."""

    def __init__(self, pages_per_segment: int) -> None:
        self._pages_per_segment = pages_per_segment
        self.undeleted: dict[int, None] = {}
        """places whose entry in the index file must go, oldest first"""
        self.num_waiting = 0
        """stores queued for a place or at a gate"""
        self.runnable: list[PendingStore] = []
        self._busy: dict[int, int] = {}
        self._queues: dict[int, deque[PendingStore]] = {}
        self._gates: dict[int, deque[PendingStore]] = {}
        self._num_kept: dict[int, int] = {}
        """by segment: reads and writes, queued stores and undeleted places"""
        self._slot_pages: dict[int, int] = {}
        """by segment: the division of what is kept there"""

    def adopt(self, place: int, num_bytes: int) -> None:
        """Notes that a block of this length was found at a place, at recovery."""
        self._slot_pages[place // self._pages_per_segment] = record_bytes_for(num_bytes) // PAGE_BYTES

    def enqueue(self, store: PendingStore) -> None:
        """Makes a store runnable as soon as its place is free of everything that came before it."""
        self.num_waiting += 1
        segment = store.entry.place // self._pages_per_segment
        slot_pages = _slot_pages(store)
        gate = self._gates.get(segment)
        if gate is not None:
            gate.append(store)
        elif self._slot_pages.get(segment) == slot_pages or segment not in self._num_kept:
            self._slot_pages[segment] = slot_pages
            self._queue(store)
        else:
            self._gates[segment] = deque([store])

    def keep(self, place: int) -> None:
        """One more read (or write) is under way at a place."""
        self._busy[place] = self._busy.get(place, 0) + 1
        self._count(place)

    def let_go(self, place: int) -> None:
        """A read or write at a place ended."""
        left = self._busy[place] - 1
        if left:
            self._busy[place] = left
        else:
            del self._busy[place]
            self._start_next(place)
        self._discount(place)

    def delete_later(self, place: int) -> None:
        """The index file names a record at this place, and no longer should."""
        if place not in self.undeleted:
            self.undeleted[place] = None
            self._count(place)

    def deleted(self, places: Collection[int]) -> None:
        """The index file names no record at these places any more."""
        for place in places:
            if place in self.undeleted:
                del self.undeleted[place]
                self._start_next(place)
                self._discount(place)

    def take_those_waiting_for_deletions(self) -> list[PendingStore]:
        """Gives up every store that waits for a deletion. Their places are kept as if by a write: ``let_go`` of each must follow."""
        taken: list[PendingStore] = []
        for place in [place for place in self._queues if place in self.undeleted]:
            for store in self._queues.pop(place):
                self._busy[place] = self._busy.get(place, 0) + 1
                taken.append(store)
        if self._gates:
            for segment in {place // self._pages_per_segment for place in self.undeleted} & self._gates.keys():
                for store in self._gates.pop(segment):
                    self.keep(store.entry.place)
                    taken.append(store)
        self.num_waiting -= len(taken)
        return taken

    def check(self, *, is_idle: bool) -> list[str]:
        """Broken promises in words."""
        kept: dict[int, int] = {}
        marks = [*self.undeleted, *(place for place, count in self._busy.items() for _ in range(count))]
        marks += [place for place, queue in self._queues.items() for _ in queue]
        for place in marks:
            kept[place // self._pages_per_segment] = kept.get(place // self._pages_per_segment, 0) + 1
        problems = [] if kept == self._num_kept else [f"what keeps the segments is miscounted, really {kept}"]
        if is_idle and (self._busy or self._queues or self._gates or self.num_waiting or self.runnable):
            problems.append("no job is running, yet places are busy or awaited")
        return problems

    def _queue(self, store: PendingStore) -> None:
        place = store.entry.place
        self._count(place)
        if place in self._busy or place in self.undeleted or place in self._queues:
            self._queues.setdefault(place, deque()).append(store)
        else:
            self._start(store)

    def _start_next(self, place: int) -> None:
        """Makes the next store that waits for a place runnable, if nothing else keeps the place."""
        queue = self._queues.get(place)
        if queue is None or place in self._busy or place in self.undeleted:
            return
        store = queue.popleft()
        if not queue:
            del self._queues[place]
        self._start(store)

    def _start(self, store: PendingStore) -> None:
        self.num_waiting -= 1
        self._busy[store.entry.place] = 1  # keeps the place in the queue's stead, so the segment's count stays as it is
        self.runnable.append(store)

    def _count(self, place: int) -> None:
        segment = place // self._pages_per_segment
        self._num_kept[segment] = self._num_kept.get(segment, 0) + 1

    def _discount(self, place: int) -> None:
        segment = place // self._pages_per_segment
        left = self._num_kept[segment] - 1
        if left:
            self._num_kept[segment] = left
        else:
            del self._num_kept[segment]
            self._open_gate(segment)

    def _open_gate(self, segment: int) -> None:
        """Lets the stores of the next division through; those of a later one stay."""
        gate = self._gates.get(segment)
        if gate is None:
            return
        slot_pages = self._slot_pages[segment] = _slot_pages(gate[0])
        while gate and _slot_pages(gate[0]) == slot_pages:
            self._queue(gate.popleft())
        if not gate:
            del self._gates[segment]


def _slot_pages(store: PendingStore) -> int:
    return record_bytes_for(store.entry.num_bytes) // PAGE_BYTES
