"""The I/O engine on io_uring: deep queues without a thread for each transfer, and memory whose pages the kernel knows beforehand."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from kvtier import _native
from kvtier.errors import ClosedError
from kvtier.io.aligned_file import PAGE_BYTES, address_of, without_leading
from kvtier.io.transfers import Completion, Transfer, TransferQueue

logger = logging.getLogger(__name__)

_MAX_BUFFERS_PER_PIECE = 1000
"""below the kernel's IOV_MAX of 1024"""
_FIXED_BYTES = 256 << 10
"""from here on it pays to let a buffer of registered memory be a piece of its own"""
_MEMORY_SLOT_BYTES = 64 << 20
"""registered at a time; at most 1 GiB"""
_MAX_MEMORY_SLOTS = 1 << 14
_NO_SLOT = -1
_MAX_RETRIES = 100
"""without progress"""
_STALL_S = 0.01
_WAIT_S = 1.0
"""the longest wait at once: a thread that waits on a ring which is gone is woken by nothing else"""
_LOST_POLL_S = 0.02
"""how often a ring that is gone is looked at for completions, which wake nobody then"""


class RingCalls(Protocol):
    """The system calls. All but ``close`` raise OSError.

    Completions lie in memory shared with the kernel: also where the ring's descriptor is gone ``wait`` finds what is there, and raises
    only where nothing is.
    """

    def submit(self, token: int, is_read: bool, fd: int, offset: int, buffers: Sequence[memoryview], slot: int) -> None:
        """Starts a transfer; ``slot`` is the registered memory that its only buffer lies in, or -1."""

    def wait(self, timeout_us: int) -> list[tuple[int, int]]:
        """Tokens (0: of a ``wake``) and results of what is over; waits for the first (negative: without end)."""

    def wake(self) -> None:
        """Has ``wait`` return."""

    def register(self, slot: int, address: int, num_bytes: int) -> None:
        """Registers memory."""

    def close(self) -> None:
        """Frees the ring; nothing may run."""


class NativeRing:
    """The ring of the compiled core."""

    def __init__(self, num_entries: int) -> None:
        """Raises OSError where the system has no io_uring, or forbids it."""
        self._ring = _native.ring_open(num_entries)

    def submit(self, token: int, is_read: bool, fd: int, offset: int, buffers: Sequence[memoryview], slot: int) -> None:
        _native.ring_submit(self._ring, token, is_read, fd, offset, buffers, slot)

    def wait(self, timeout_us: int) -> list[tuple[int, int]]:
        events: list[tuple[int, int]] = _native.ring_wait(self._ring, timeout_us)
        return events

    def wake(self) -> None:
        _native.ring_wake(self._ring)

    def register(self, slot: int, address: int, num_bytes: int) -> None:
        _native.ring_register(self._ring, slot, address, num_bytes)

    def close(self) -> None:
        _native.ring_close(self._ring)


class _Piece:
    """The part of a transfer that one entry of the ring carries out."""

    __slots__ = ("buffers", "moved", "num_bytes", "num_retries", "offset", "slot", "work")

    def __init__(self, work: _Work, offset: int, buffers: list[memoryview], slot: int) -> None:
        self.work = work
        self.offset = offset
        self.buffers = buffers
        self.slot = slot
        self.num_bytes = sum(map(len, buffers))
        self.moved = 0
        self.num_retries = 0


class _Work:
    """A running transfer."""

    __slots__ = ("error", "num_open", "pieces", "transfer")

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.pieces: list[_Piece] = []
        self.num_open = 0
        self.error: OSError | None = None

    def completion(self) -> Completion:
        num_bytes = 0
        for piece in self.pieces:
            num_bytes += piece.moved
            if piece.moved < piece.num_bytes:
                break
        return Completion(self.transfer, num_bytes, self.error)


class RingEngine:
    """An :class:`~kvtier.io.transfers.IoEngine` on one io_uring.

    A transfer that the kernel was given ends by its own completion and by nothing else, also where the ring is *lost* (somebody closed its
    descriptor, say): until then the kernel may write to its buffers, which must not have another owner.  All others fail at once then.
    """

    name = "io_uring"

    def __init__(
        self,
        queue_depth: int,
        max_bytes: int,
        *,
        memory: tuple[int, int] | None = None,
        make_ring: Callable[[int], RingCalls] = NativeRing,
    ) -> None:
        """``memory``: address and length of the memory that most buffers lie in; the kernel is told of it as it is used.

        Raises OSError where io_uring cannot be used, ValueError for a bound below 1.
        """
        self._queue = TransferQueue(queue_depth, max_bytes)
        self._ring = make_ring(min(4 * queue_depth, 4096))
        self._memory = _Memory(self._ring, *memory) if memory is not None else None
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self._running: dict[int, _Piece] = {}
        self._stalled: list[_Piece] = []
        self._next_token = 1
        self._completions: list[Completion] = []
        self._closed = False
        self._lost: OSError | None = None
        """why nothing can be given to the kernel any more"""

    @property
    def registered_bytes(self) -> int:
        """Memory the kernel knows."""
        return self._memory.registered_bytes if self._memory is not None else 0

    def submit(self, transfers: Sequence[Transfer]) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError("the I/O engine is closed")
            self._queue.add(transfers)
        self._start_waiting()

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        with self._polling:
            if not self._completions and not self._closed:
                self._reap(timeout_s)
            with self._lock:
                completions, self._completions = self._completions, []
        return completions

    def oldest_start(self, *, is_read: bool) -> float | None:
        with self._lock:
            return self._queue.oldest_start(is_read=is_read)

    def give_up_waiting(self, error: OSError) -> None:
        with self._lock:
            completions = [Completion(transfer, 0, error) for transfer in self._queue.take_waiting()]
            self._completions += completions
        if completions:
            self._wake()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.clear()
        self._wake()
        with self._polling:
            while self._queue.num_running:
                self._reap(None)
            self._ring.close()

    def _wake(self) -> None:
        if self._lost is None:  # else nobody waits for long
            with contextlib.suppress(OSError, ValueError):  # lost: who waits finds out; closed, since nothing runs any more
                self._ring.wake()

    def _start_waiting(self) -> None:
        if self._lost is not None:  # also what waits for those that the kernel has not ended
            self.give_up_waiting(self._lost)
        while True:
            with self._lock:
                transfer = self._queue.take()
            if transfer is None:
                return
            work = _Work(transfer)
            work.pieces = list(self._split(work))
            work.num_open = len(work.pieces)
            if not work.pieces:
                self._ended(work)
            for piece in work.pieces:
                self._start(piece)

    def _split(self, work: _Work) -> Iterator[_Piece]:
        """Each large buffer in registered memory alone, neighbours that are not together."""
        offset = work.transfer.offset
        together: list[memoryview] = []
        start = offset
        for buffer in work.transfer.buffers:
            slot = _NO_SLOT
            if self._memory is not None and len(buffer) >= _FIXED_BYTES:
                slot = self._memory.slot_of(buffer)
            if together and (slot != _NO_SLOT or len(together) == _MAX_BUFFERS_PER_PIECE):
                yield _Piece(work, start, together, _NO_SLOT)
                together, start = [], offset
            if slot != _NO_SLOT:
                yield _Piece(work, offset, [buffer], slot)
                start = offset + len(buffer)
            elif len(buffer):
                together.append(buffer)
            offset += len(buffer)
        if together:
            yield _Piece(work, start, together, _NO_SLOT)

    def _start(self, piece: _Piece) -> None:
        transfer = piece.work.transfer
        if self._lost is not None:
            self._fail(piece, self._lost)
            return
        with self._lock:
            token = self._next_token
            self._next_token += 1
            self._running[token] = piece
        try:
            self._ring.submit(token, transfer.is_read, transfer.file.fileno, piece.offset + piece.moved, piece.buffers, piece.slot)
        except OSError as error:
            self._not_started(token, error)
        except (BufferError, TypeError, ValueError) as error:  # a buffer that cannot be used
            self._not_started(token, OSError(errno.EINVAL, str(error)))

    def _not_started(self, token: int, error: OSError) -> None:
        with self._lock:
            piece = self._running.pop(token)
            is_stalled = error.errno in (errno.EAGAIN, errno.EBUSY) and not self._closed
            if is_stalled:
                self._stalled.append(piece)
        if not is_stalled:
            self._fail(piece, error)
        self._wake()

    def _reap(self, timeout_s: float | None) -> None:
        timeout_us = int(1e6 * (_WAIT_S if timeout_s is None else max(0.0, min(timeout_s, _WAIT_S))))
        with self._lock:
            stalled, self._stalled = self._stalled, []
        for piece in stalled:
            self._start(piece)
        if self._stalled:
            timeout_us = int(_STALL_S * 1e6)
        for token, result in self._wait(timeout_us):
            with self._lock:
                ended = self._running.pop(token) if token in self._running else None
            if ended is not None:  # neither a wake nor anything else that is not ours
                self._advance(ended, result)
        self._start_waiting()

    def _wait(self, timeout_us: int) -> list[tuple[int, int]]:
        try:
            return self._ring.wait(timeout_us if self._lost is None else 0)
        except OSError as error:
            self._lose(error)
        time.sleep(min(timeout_us / 1e6, _LOST_POLL_S))
        return []

    def _lose(self, error: OSError) -> None:
        if self._lost is None:
            self._lost = error
            logger.error("io_uring is lost, every transfer fails from now on: %s", error)

    def _advance(self, piece: _Piece, result: int) -> None:
        """Takes the result of a system call into account; goes on where it did not do everything."""
        is_read = piece.work.transfer.is_read
        if result < 0:
            if self._is_worth_repeating(piece, -result):
                self._start(piece)
            else:
                self._fail(piece, OSError(-result, os.strerror(-result), str(piece.work.transfer.file.path)))
            return
        piece.moved += result
        piece.num_retries = 0
        if piece.moved >= piece.num_bytes or (is_read and (not result or result % PAGE_BYTES)):
            self._over(piece)  # all of it, or the end of the file
        elif not result:
            self._fail(piece, OSError(errno.EIO, "the file took no bytes", str(piece.work.transfer.file.path)))
        else:
            piece.buffers = without_leading(piece.buffers, result)
            self._start(piece)

    def _is_worth_repeating(self, piece: _Piece, error: int) -> bool:
        piece.num_retries += 1
        if piece.num_retries > _MAX_RETRIES:
            return False
        try:
            return error in (errno.EINTR, errno.EAGAIN) or (error == errno.EINVAL and piece.work.transfer.file.give_up_direct())
        except OSError:  # its flags cannot be changed
            return False

    def _fail(self, piece: _Piece, error: OSError) -> None:
        with self._lock:
            piece.work.error = piece.work.error or error
        self._over(piece)

    def _over(self, piece: _Piece) -> None:
        with self._lock:
            piece.work.num_open -= 1
            is_last = not piece.work.num_open
        if is_last:
            self._ended(piece.work)

    def _ended(self, work: _Work) -> None:
        with self._lock:
            self._queue.finished(work.transfer)
            self._completions.append(work.completion())
        work.pieces = []  # they name the work: a cycle would keep the buffers


class _Memory:
    """Memory of which the kernel is told slot by slot, when a slot is first used."""

    def __init__(self, ring: RingCalls, address: int, num_bytes: int) -> None:
        self._ring = ring
        self._address = address
        self._num_bytes = min(num_bytes, _MAX_MEMORY_SLOTS * _MEMORY_SLOT_BYTES)
        self._lock = threading.Lock()
        self._known: set[int] = set()
        self._is_refused = False
        self.registered_bytes = 0

    def slot_of(self, buffer: memoryview) -> int:
        """The slot that holds the whole buffer, registered; ``_NO_SLOT`` where there is none."""
        if self._is_refused or buffer.readonly:
            return _NO_SLOT
        start = address_of(buffer) - self._address
        slot = start // _MEMORY_SLOT_BYTES
        if start < 0 or start + len(buffer) > min(self._num_bytes, (slot + 1) * _MEMORY_SLOT_BYTES):
            return _NO_SLOT
        if slot not in self._known:
            with self._lock:
                if slot not in self._known and not self._register(slot):
                    return _NO_SLOT
        return slot

    def _register(self, slot: int) -> bool:
        start = slot * _MEMORY_SLOT_BYTES
        num_bytes = min(_MEMORY_SLOT_BYTES, self._num_bytes - start)
        try:
            self._ring.register(slot, self._address + start, num_bytes)
        except OSError as error:
            self._is_refused = True
            logger.info("io_uring goes on without registered memory (%d bytes are): %s", self.registered_bytes, error)
            return False
        self._known.add(slot)
        self.registered_bytes += num_bytes
        return True
