"""The contract of an I/O engine as tests to subclass, and a ring of system calls that go wrong as told.

::

    class TestMyEngine(IoEngineContract):
        def make_engine(self, queue_depth: int = 4, max_bytes: int = 1 << 20) -> IoEngine:
            return MyEngine(queue_depth, max_bytes)
"""

from __future__ import annotations

import errno
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvtier.errors import ClosedError
from kvtier.io import PAGE_BYTES, AlignedFile, Completion, DirectMode, IoEngine, Scratch, Transfer, preallocate

_DEADLINE_S = 30.0
_PATIENCE_US = 1_000_000


def pages(num_bytes: int, fill: bytes = b"") -> memoryview:
    """Page-aligned memory, filled with repetitions of ``fill`` if any is given."""
    scratch = Scratch()
    scratch.reset(num_bytes)
    memory = scratch.take(num_bytes)
    if fill:
        memory[:] = (fill * (num_bytes // len(fill) + 1))[:num_bytes]
    return memory


@contextmanager
def open_file(path: Path, num_bytes: int, direct: DirectMode = "auto", *, writable: bool = True) -> Iterator[AlignedFile]:
    """A file of that length."""
    preallocate(path, num_bytes)
    file = AlignedFile(path, direct=direct, writable=writable)
    try:
        yield file
    finally:
        file.close()


def completions_of(engine: IoEngine, count: int) -> list[Completion]:
    """Polls until that many completions came. Fails after half a minute."""
    found: list[Completion] = []
    deadline = time.monotonic() + _DEADLINE_S
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {len(found)} of {count} completions came"
        found += engine.poll(1.0)
    return found


class IoEngineContract(ABC):
    """What :class:`~kvtier.io.transfers.IoEngine` promises."""

    @abstractmethod
    def make_engine(self, queue_depth: int = 4, max_bytes: int = 1 << 20) -> IoEngine:
        """An engine."""

    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        """Past the page cache; see ``check_round_trip``."""
        self.check_round_trip(tmp_path, "auto")

    def test_what_was_written_is_read_through_the_page_cache(self, tmp_path: Path) -> None:
        """See ``check_round_trip``."""
        self.check_round_trip(tmp_path, "off")

    def check_round_trip(self, tmp_path: Path, direct: DirectMode) -> None:
        """Bytes arrive at their places, from several buffers of different lengths, more than fit at once, each transfer once."""
        engine = self.make_engine(queue_depth=3)
        lengths = (4096, 12288, 4096, 300 << 10)

        def buffers(number: int) -> list[memoryview]:
            return [pages(length, bytes([number, index])) for index, length in enumerate(lengths)]

        size = sum(lengths)
        with open_file(tmp_path / "file", 20 * size, direct) as file:
            writes = [Transfer(file, False, number * size, buffers(number), number) for number in range(20)]
            engine.submit(writes[:7])
            engine.submit(writes[7:])
            found = completions_of(engine, 20)
            assert Counter(range(20)) == Counter(completion.transfer.owner for completion in found)
            assert {(size, None)} == {(completion.num_bytes, completion.error) for completion in found}
            reads = [Transfer(file, True, write.offset, [pages(size)], write.owner) for write in writes]
            engine.submit(reads)
            assert {(size, None)} == {(completion.num_bytes, completion.error) for completion in completions_of(engine, 20)}
            for write, read in zip(writes, reads, strict=True):
                assert b"".join(write.buffers) == bytes(read.buffers[0])
            assert [] == engine.poll(0)
            engine.close()

    def test_many_buffers(self, tmp_path: Path) -> None:
        """A transfer may have more buffers than one system call takes."""
        engine = self.make_engine(max_bytes=64 << 20)
        memory, back = pages(1500 * PAGE_BYTES, os.urandom(5000)), pages(1500 * PAGE_BYTES)
        borders = range(0, len(memory), PAGE_BYTES)
        with open_file(tmp_path / "file", len(memory)) as file:
            for is_read, view in ((False, memory), (True, back)):
                engine.submit([Transfer(file, is_read, 0, [view[start : start + PAGE_BYTES] for start in borders])])
                (completion,) = completions_of(engine, 1)
                assert (len(memory), None) == (completion.num_bytes, completion.error)
            engine.close()
        assert memory == back

    def test_nothing_to_move(self, tmp_path: Path) -> None:
        """A transfer without bytes ends like any other."""
        engine = self.make_engine()
        with open_file(tmp_path / "file", PAGE_BYTES) as file:
            engine.submit([Transfer(file, True, 0, []), Transfer(file, True, 0, [pages(PAGE_BYTES)])])
            assert {0, PAGE_BYTES} == {completion.num_bytes for completion in completions_of(engine, 2)}
            engine.close()

    def test_the_end_of_the_file(self, tmp_path: Path) -> None:
        """A read across the end of the file tells how much there was; that is no error."""
        engine = self.make_engine()
        with open_file(tmp_path / "file", 3 * PAGE_BYTES) as file:
            buffers = [pages(PAGE_BYTES), pages(2 * PAGE_BYTES), pages(PAGE_BYTES)]
            engine.submit([Transfer(file, True, PAGE_BYTES, buffers), Transfer(file, True, 64 * PAGE_BYTES, buffers)])
            found = completions_of(engine, 2)
            assert [(0, None), (2 * PAGE_BYTES, None)] == sorted((completion.num_bytes, completion.error) for completion in found)
            engine.close()

    def test_errors_are_completions(self, tmp_path: Path) -> None:
        """A transfer that fails says why, and the others are not disturbed."""
        engine = self.make_engine()
        with open_file(tmp_path / "file", PAGE_BYTES) as file, open_file(tmp_path / "file", PAGE_BYTES, writable=False) as closed:
            engine.submit(
                [
                    Transfer(closed, False, 0, [pages(PAGE_BYTES)], "not writable"),
                    Transfer(file, True, 0, [pages(PAGE_BYTES).toreadonly()], "read into constants"),
                    Transfer(file, False, 0, [pages(PAGE_BYTES)], "good"),
                ]
            )
            errors = {completion.transfer.owner: completion.error for completion in completions_of(engine, 3)}
            assert errors["good"] is None
            assert isinstance(errors["not writable"], OSError)
            assert errno.EBADF == errors["not writable"].errno
            assert isinstance(errors["read into constants"], OSError)
            engine.close()

    def test_a_full_disk(self) -> None:
        """Where there is no room a write fails with ENOSPC."""
        engine = self.make_engine()
        file = AlignedFile(Path("/dev/full"), direct="off")
        engine.submit([Transfer(file, False, 0, [pages(PAGE_BYTES)])])
        (completion,) = completions_of(engine, 1)
        assert completion.error is not None
        assert errno.ENOSPC == completion.error.errno
        engine.close()
        file.close()

    def test_unaligned_memory(self, tmp_path: Path) -> None:
        """What direct I/O refuses goes through the page cache where that is allowed."""
        engine = self.make_engine()
        memory = pages(3 * PAGE_BYTES, b"abc")
        with open_file(tmp_path / "file", PAGE_BYTES) as file:
            engine.submit([Transfer(file, False, 0, [memory[1 : 1 + PAGE_BYTES]]), Transfer(file, False, 0, [memory[1 : 1 + PAGE_BYTES]])])
            assert {None} == {completion.error for completion in completions_of(engine, 2)}
            assert memory[1 : 1 + PAGE_BYTES] == (tmp_path / "file").read_bytes()
            engine.close()

    def test_polling_waits_no_longer_than_asked(self) -> None:
        """Without work ``poll`` comes back with nothing, after its time-out at the latest."""
        engine = self.make_engine()
        assert [] == engine.poll(0)
        assert [] == engine.poll(0.02)
        engine.close()

    def test_buffers_are_let_go(self, tmp_path: Path) -> None:
        """The engine keeps no buffer of a transfer whose completion was polled and dropped."""
        engine = self.make_engine()
        owner = bytearray(1 << 19)
        memory = memoryview(owner)
        with open_file(tmp_path / "file", 1 << 19, "off") as file:
            engine.submit([Transfer(file, False, 0, [memory[: 1 << 18], memory[1 << 18 :]])])
            completions_of(engine, 1)
            memory.release()
            deadline = time.monotonic() + _DEADLINE_S
            while _is_exported(owner):
                assert time.monotonic() < deadline, "somebody keeps a buffer"
                time.sleep(0.001)
            engine.close()

    def test_closing(self, tmp_path: Path) -> None:
        """``close`` wakes who polls, waits for what runs, and ends submitting; twice is fine."""
        engine = self.make_engine(queue_depth=1)
        with open_file(tmp_path / "file", 1 << 20) as file:
            woken: list[list[Completion]] = []
            poller = threading.Thread(target=lambda: woken.append(engine.poll()), daemon=True)
            poller.start()
            time.sleep(0.01)
            engine.close()
            poller.join(_DEADLINE_S)
            assert [[]] == woken
            engine.close()
            assert [] == engine.poll()
            assert _refuses(ClosedError, lambda: engine.submit([Transfer(file, True, 0, [pages(PAGE_BYTES)])]))

    def test_closing_with_work(self, tmp_path: Path) -> None:
        """Nothing is moved any more after ``close``, whatever was submitted before."""
        engine = self.make_engine(queue_depth=2)
        with open_file(tmp_path / "file", 64 << 16) as file:
            buffers = [pages(1 << 16) for _ in range(64)]
            engine.submit([Transfer(file, False, 0, [pages(64 << 16, b"x")])])
            completions_of(engine, 1)
            engine.submit([Transfer(file, True, number << 16, [buffer]) for number, buffer in enumerate(buffers)])
            engine.close()
            for buffer in buffers:
                buffer[:] = bytes(len(buffer))
            time.sleep(0.02)
            assert {bytes(1 << 16)} == {bytes(buffer) for buffer in buffers}
            assert len(engine.poll()) <= 64

    def test_giving_up_what_waits(self, tmp_path: Path) -> None:
        """What has not started ends with the error; the age of what runs is known."""
        engine = self.make_engine(queue_depth=1)
        with open_file(tmp_path / "file", 20 << 16) as file:
            assert (None, None) == (engine.oldest_start(is_read=True), engine.oldest_start(is_read=False))
            before = time.monotonic()
            engine.submit([Transfer(file, number % 2 == 1, number << 16, [pages(1 << 16)], number) for number in range(20)])
            start = engine.oldest_start(is_read=True)
            assert start is None or before <= start <= time.monotonic()
            engine.give_up_waiting(OSError(errno.ECANCELED, "given up"))
            found = completions_of(engine, 20)
            assert Counter(range(20)) == Counter(completion.transfer.owner for completion in found)
            assert {completion.error.errno for completion in found if completion.error is not None} <= {errno.ECANCELED}
            assert {1 << 16} >= {completion.num_bytes for completion in found if completion.error is None}
            assert (None, None) == (engine.oldest_start(is_read=True), engine.oldest_start(is_read=False))
            engine.close()

    def test_impossible_bounds(self) -> None:
        """An engine that could never move anything is not made."""
        for bounds in ((0, 1), (1, 0)):
            assert _refuses(ValueError, lambda bounds=bounds: self.make_engine(*bounds))  # type: ignore[misc]

    def test_from_many_threads(self, tmp_path: Path) -> None:
        """Several threads may submit while one polls."""
        engine = self.make_engine()
        with open_file(tmp_path / "file", 4 * 50 * PAGE_BYTES) as file:

            def submit(lane: int) -> None:
                for number in range(50):
                    place = 50 * lane + number
                    engine.submit([Transfer(file, False, place * PAGE_BYTES, [pages(PAGE_BYTES, bytes([place]))], place)])

            threads = [threading.Thread(target=submit, args=(lane,)) for lane in range(4)]
            for thread in threads:
                thread.start()
            assert list(range(200)) == sorted(completion.transfer.owner for completion in completions_of(engine, 200))
            for thread in threads:
                thread.join()
            engine.close()
            assert b"".join(bytes([place]) * PAGE_BYTES for place in range(200)) == (tmp_path / "file").read_bytes()


def _refuses(kind: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def _is_exported(owner: bytearray) -> bool:
    """Whether a memoryview of it is alive: then its length cannot change."""
    try:
        owner.append(0)
    except BufferError:
        return True
    return False


class FaultyRing:
    """A ring whose transfers go as ``decide`` says when they are waited for: it is told how many bytes there are to move.

    It answers how many to move now, a negative errno, or ``None`` to let the submission itself fail with EBUSY.
    """

    def __init__(self, decide: Callable[[int], int | None], *, refuses_memory: bool = False) -> None:
        self._decide = decide
        self._refuses_memory = refuses_memory
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, bool, int, int, Sequence[memoryview], int]] = []
        self._is_woken = False
        self.registered: dict[int, tuple[int, int]] = {}
        self.slots: list[int] = []
        """of all submissions"""
        self.most_waiting = 0
        self.is_closed = False

    def submit(self, token: int, is_read: bool, fd: int, offset: int, buffers: Sequence[memoryview], slot: int) -> None:
        if is_read and any(buffer.readonly for buffer in buffers):
            raise BufferError("a buffer cannot be written to")
        decision = self._decide(sum(map(len, buffers)))
        if decision is None:
            raise OSError(errno.EBUSY, "busy")
        with self._changed:
            self._changed.notify()
            self.slots.append(slot)
            self._waiting.append((token, is_read, fd, offset, buffers, decision))
            self.most_waiting = max(self.most_waiting, len(self._waiting))

    def wait(self, timeout_us: int) -> list[tuple[int, int]]:
        assert not self.is_closed
        with self._changed:
            is_patient = not 0 <= timeout_us < _PATIENCE_US  # here the engine has nothing else to do
            timeout_s = _DEADLINE_S if is_patient else timeout_us / 1e6
            has_something = self._changed.wait_for(lambda: self._waiting or self._is_woken, timeout_s)
            assert has_something or not is_patient, "nothing ended this wait"
            waiting, self._waiting = self._waiting, []
            self._is_woken = False
        return [(entry[0], self._move(*entry[1:4], entry[4], entry[5])) for entry in waiting]

    def wake(self) -> None:
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    def register(self, slot: int, address: int, num_bytes: int) -> None:
        if self._refuses_memory:
            raise OSError(errno.ENOMEM, "not that much")
        self.registered[slot] = (address, num_bytes)

    def close(self) -> None:
        assert not self._waiting
        self.is_closed = True

    @staticmethod
    def _move(is_read: bool, fd: int, offset: int, buffers: Sequence[memoryview], decision: int) -> int:
        if decision < 0:
            return decision
        some = []
        for buffer in buffers:
            some.append(buffer[:decision])
            decision -= len(some[-1])
        try:
            return (os.preadv if is_read else os.pwritev)(fd, some, offset)
        except OSError as error:
            return -(error.errno or errno.EIO)
