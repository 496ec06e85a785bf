"""The arena: one shared-memory file that every process of an engine maps, and in which all blocks of the host tier lie."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Self

import numpy as np
import numpy.typing as npt

from kvtier.errors import ArenaError, ClosedError
from kvtier.io import start_thread
from kvtier.memory import arena_file, numa, pages
from kvtier.memory.arena_file import PAGE_BYTES, remove_stale, to_words
from kvtier.types import Damage

__all__ = ["Arena", "remove_stale"]

_STEP_BYTES = 32 << 20
"""reserved at a time: some ten milliseconds, during which mmap() in other threads waits"""
_FIRST_BYTES = 64 << 20
"""reserved at creation, so that there is something to work with at once"""
_FOLLOW_S = 0.05
_LOOK_S = 0.1
"""how often a process that attached looks how far the creator has come, until that is final"""


class Arena:
    """A payload area in shared memory, with a generation per 4 KiB page.

    Only the first ``ready_bytes`` of the payload are reserved; they grow until the arena is complete or the file system
    is full.  Memory at or above them must not be touched (a touch could kill the process), so the allocator's limit
    follows them.  Made by :meth:`open`.
    """

    def __init__(self, path: str, fd: int, capacity_bytes: int, *, created: bool, huge_pages: bool) -> None:
        """Maps the open file, which the arena closes from then on. Use :meth:`open`."""
        payload_offset = arena_file.payload_offset_for(capacity_bytes)
        self.path = path
        self.capacity_bytes = capacity_bytes
        self.created = created
        """this process made the file: it reserves the memory, the others follow"""
        self._fd = fd
        self._mapping = mmap.mmap(fd, payload_offset + capacity_bytes)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._base = base
        self._payload_offset = payload_offset
        self.address = base + payload_offset
        """where the payload starts in this process; a multiple of 4096, and of 2 MiB where there are huge pages"""
        whole = memoryview(self._mapping)
        self._whole = whole
        self._header = whole[: arena_file.HEADER_WORDS * 8].cast("Q")
        self._table = whole[PAGE_BYTES : PAGE_BYTES + capacity_bytes // PAGE_BYTES * 4].cast("I")
        self._payload = whole[payload_offset:]
        self._generations = np.frombuffer(self._table, dtype=np.uint32)
        self._closed = False
        self._stop = threading.Event()
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None
        self.while_waiting: Callable[[], object] = lambda: None
        """called again and again by whoever waits for the memory; what it raises ends the waiting"""
        self._known_ready_bytes = 0
        self.huge_pages = huge_pages and pages.use_huge_pages(self.address, capacity_bytes, path)
        """whether kernel and file system let the payload have 2 MiB pages"""
        pages.leave_out_of_core_dumps(self.address, capacity_bytes)

    @classmethod
    def open(
        cls, path: str, capacity_bytes: int, *, huge_pages: bool = True, numa_node: int | None = None, take_over: bool = False
    ) -> Self:
        """Creates the arena at ``path``, or attaches to it where a living process has it open.

        Processes may race: exactly one creates.  A file that a dead process left is made anew, or with ``take_over`` used as it
        is.  ``capacity_bytes`` is rounded up to whole pages; ``numa_node`` is preferred for the payload; the creator's choice counts.

        Raises:
            ArenaError: too little room (says how much there is and how to mend it), another capacity or version than
                the living arena at ``path``, with ``take_over`` any living arena there, a NUMA node that does not exist, or a path
                that cannot be used.
        """
        if capacity_bytes <= 0:
            raise ArenaError(f"the capacity of an arena must be positive, not {capacity_bytes}")
        if numa_node is not None:
            numa.check_node(numa_node)
        capacity_bytes = -(-capacity_bytes // PAGE_BYTES) * PAGE_BYTES
        fd = arena_file.open_for_setup(path)
        arena: Self | None = None
        created = False
        try:
            created = arena_file.nobody_lives(fd)
            if take_over:
                arena_file.take_over(fd, path, capacity_bytes, is_alone=created)
            elif created:
                arena_file.initialise(fd, path, capacity_bytes)
            else:
                arena_file.verify(fd, path, capacity_bytes)
            arena_file.live_on(fd)
            arena = cls(path, fd, capacity_bytes, created=created, huge_pages=huge_pages)
            if created:
                arena._reserve_first(numa_node)
            arena_file.end_setup(fd)
        except (OSError, ValueError) as error:  # ValueError: mmap of a file that was cut off meanwhile
            if created and arena_file.is_arena_or_empty(fd):
                os.unlink(path)
            if arena is None:
                os.close(fd)
            else:
                arena.close()
            if isinstance(error, ArenaError):
                raise
            raise ArenaError(f"cannot set up the arena {path}: {error}") from error
        return arena

    @property
    def buffer(self) -> memoryview:
        """The whole payload, writable. Only the first ``ready_bytes`` may be touched. Raises ClosedError."""
        self._require_open()
        return self._payload

    @property
    def generations(self) -> npt.NDArray[np.uint32]:
        """One number per 4 KiB page of payload, shared by all processes; see :meth:`bump`. Raises ClosedError."""
        self._require_open()
        return self._generations

    @property
    def ready_bytes(self) -> int:
        """How much of the payload, from its start, is reserved. Only grows. Raises ClosedError."""
        self._require_open()
        return self._header[arena_file.FIELD_READY]

    @property
    def reserve_error(self) -> str | None:
        """Why the arena stays smaller than asked for; None where it does not. Raises ClosedError."""
        self._require_open()
        code = self._header[arena_file.FIELD_ERRNO]
        if not code:
            return None
        got, wanted = to_words(self._header[arena_file.FIELD_READY]), to_words(self.capacity_bytes)
        return f"only {got} of {wanted} could be reserved in {os.path.dirname(self.path)}: {os.strerror(code)}"

    @property
    def prefaulted(self) -> bool:
        """Whether all that is and ever will be reserved is mapped in this process: no first touch is left."""
        return self._finished.is_set()

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """``num_bytes`` of payload from ``offset`` on, writable.

        Raises IndexError where that is not within the first ``ready_bytes``, ClosedError after ``close()``.
        """
        end = offset + num_bytes
        if end > self._known_ready_bytes or offset < 0 or num_bytes < 0:
            self._known_ready_bytes = self.ready_bytes
            if end > self._known_ready_bytes or offset < 0 or num_bytes < 0:
                raise IndexError(f"{num_bytes} bytes at {offset} are not within the {self._known_ready_bytes} bytes that are ready")
        elif self._closed:
            raise ClosedError(f"the arena {self.path} is closed")
        return self._payload[offset:end]

    def bump(self, slot: int) -> int:
        """Gives ``slot`` (a page index) a new generation and returns it; never 0. Only the owner of the slots does that.

        Raises IndexError, or ClosedError after ``close()``.
        """
        if self._closed or slot < 0:
            self._require_open()
            raise IndexError(f"there is no slot {slot}")
        generation = (self._table[slot] + 1) & 0xFFFFFFFF or 1
        self._table[slot] = generation
        return generation

    def prefault(self) -> None:
        """Reserves (creator) and maps the payload on a background thread; ``ready_bytes`` tells how far it is. Idempotent.

        Raises ArenaError where the system lets no thread begin.
        """
        self._require_open()
        if self._thread is None:
            try:
                self._thread = start_thread(self._prefault, "kvtier-prefault")
            except OSError as error:
                raise ArenaError(f"the arena {self.path} cannot be prepared: {error}") from error

    def wait_prefaulted(self, timeout_s: float) -> bool:
        """Waits until ``prefaulted``, at most ``timeout_s``; returns it. Raises what ``while_waiting`` does, which is called meanwhile."""
        deadline = time.monotonic() + timeout_s
        while not self._finished.wait(max(0.0, min(_LOOK_S, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
            self.while_waiting()
        return True

    def unlink(self) -> None:
        """Removes the name: nobody can attach any more, memory is freed when the last process closes. Idempotent."""
        if not self._closed and arena_file.leads_to(self.path, self._fd):
            os.unlink(self.path)

    def check(self) -> list[Damage]:
        """Verifies header and file. Empty = healthy. Raises ClosedError."""
        self._require_open()
        expected = {
            "magic": (arena_file.FIELD_MAGIC, arena_file.MAGIC),
            "version": (arena_file.FIELD_VERSION, arena_file.VERSION),
            "capacity": (arena_file.FIELD_CAPACITY, self.capacity_bytes),
            "payload offset": (arena_file.FIELD_PAYLOAD_OFFSET, self._payload_offset),
        }
        where = f"arena {self.path}"
        damages = [
            Damage(where, f"the header's {name} is {self._header[field]}, not {value}")
            for name, (field, value) in expected.items()
            if self._header[field] != value
        ]
        if self.ready_bytes > self.capacity_bytes:
            damages.append(Damage(where, f"{self.ready_bytes} bytes are called ready, more than there are"))
        file_bytes = os.fstat(self._fd).st_size
        if file_bytes != self._payload_offset + self.capacity_bytes:
            damages.append(Damage(where, f"the file has {file_bytes} bytes instead of {self._payload_offset + self.capacity_bytes}"))
        return damages

    def close(self) -> None:
        """Stops the background thread and unmaps. Idempotent. The file stays (see ``unlink``).

        Where a view that was handed out is still in use, the mapping lives (and counts as alive) until that is gone.
        """
        if self._closed:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.created:
            self._header[arena_file.FIELD_FINAL] = 1
        self._closed = True
        del self._generations
        for view in (self._payload, self._table, self._header, self._whole):
            with contextlib.suppress(BufferError):  # somebody uses it: it goes with the last user
                view.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()
        del self._payload, self._table, self._header, self._whole, self._mapping
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the arena {self.path} is closed")

    def _reserve_first(self, numa_node: int | None) -> None:
        """Reserves the first part right away. Raises ArenaError where not even that is there."""
        if numa_node is not None:
            numa.prefer_node(self.address, self.capacity_bytes, numa_node)
        while self.ready_bytes < min(_FIRST_BYTES, self.capacity_bytes):
            code = self._reserve_step()
            if code:
                raise ArenaError(f"{self.reserve_error}: lower the host tier's capacity or make room")

    def _reserve_step(self) -> int:
        """Reserves and maps the next part and publishes it. Returns 0 or an errno, which it publishes as well."""
        offset = self.ready_bytes
        num_bytes = min(_STEP_BYTES, self.capacity_bytes - offset)
        code = self._populate(offset, num_bytes)
        if code:
            # what did come is left to others: a file system that is full to the last byte kills its users
            pages.drop_pages(self.address + offset, num_bytes)
            self._header[arena_file.FIELD_ERRNO] = code
        else:
            self._header[arena_file.FIELD_READY] = offset + num_bytes
        return code

    def _populate(self, offset: int, num_bytes: int) -> int:
        return pages.populate(self.address + offset, num_bytes, self._fd, self._payload_offset + offset)

    def _prefault(self) -> None:
        """The background thread. Ends with the work, with an error, or with ``close()``."""
        pages.populate(self._base, self._payload_offset, self._fd, 0)  # reserved since creation: this only maps
        if self.created:
            while self.ready_bytes < self.capacity_bytes and not self._stop.is_set() and not self._reserve_step():
                pass
            self._header[arena_file.FIELD_FINAL] = 1
            is_complete = True
        else:
            is_complete = self._follow()
        if is_complete and not self._stop.is_set():
            self._finished.set()

    def _follow(self) -> bool:
        """Maps what the creator reserves. False: this process could not, and pays with slower first touches."""
        mapped_bytes = 0
        while not self._stop.is_set():
            is_final = bool(self._header[arena_file.FIELD_FINAL])  # read before the bytes it is about
            num_bytes = min(_STEP_BYTES, self.ready_bytes - mapped_bytes)
            if num_bytes:
                if self._populate(mapped_bytes, num_bytes):
                    return False
                mapped_bytes += num_bytes
            elif is_final or mapped_bytes == self.capacity_bytes:
                return True
            else:
                self._stop.wait(_FOLLOW_S)
        return False
