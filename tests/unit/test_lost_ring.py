"""A ring that is lost while transfers run: no buffer changes hands before the kernel has let go of it, and nobody waits for ever."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.io import PAGE_BYTES, AlignedFile, Completion, Transfer
from kvtier.io.ring_engine import RingEngine
from kvtier.testing.io_engines import pages
from kvtier.testing.tiers import NAMESPACE, load, meta_of, payload_of, store
from kvtier.tiers.disk import DiskTier, mover
from kvtier.types import BlockIO, JobKind, Outcome, TransferJob
from tests.unit.test_io_engines import lose, needs_ring, ring_fds

_STRAY = 1 << 40


class KernelRing:
    """A ring whose transfers end when the test says so. ``lose`` takes the descriptor away; completions still come."""

    def __init__(self) -> None:
        self.running: dict[int, tuple[bool, Sequence[memoryview]]] = {}
        self.is_lost = False
        self.is_closed = False
        self._completions: list[tuple[int, int]] = []

    def submit(self, token: int, is_read: bool, fd: int, offset: int, buffers: Sequence[memoryview], slot: int) -> None:
        if self.is_lost:
            raise OSError(errno.EBADF, "lost")
        self.running[token] = is_read, buffers

    def wait(self, timeout_us: int) -> list[tuple[int, int]]:
        found, self._completions = self._completions, []
        if self.is_lost and not found:
            raise OSError(errno.EBADF, "lost")
        if not found:
            time.sleep(min(timeout_us, 1000) / 1e6)
        return found

    def end(self, choice: int, result_pages: int) -> None:
        """The kernel ends one of those that run; a read fills its buffers, of which it may have done a part only."""
        token = sorted(self.running)[choice % len(self.running)]
        is_read, buffers = self.running.pop(token)
        num_bytes = sum(map(len, buffers))
        done = num_bytes if not result_pages else min(num_bytes, result_pages * PAGE_BYTES)
        if is_read:
            for buffer in buffers:
                buffer[:] = b"k" * len(buffer)
        self._completions.append((token, done))

    def stray(self) -> None:
        """A completion of something that the engine knows nothing of."""
        self._completions.append((_STRAY, 0))

    def wake(self) -> None:
        if self.is_lost:
            raise OSError(errno.EBADF, "lost")

    def register(self, slot: int, address: int, num_bytes: int) -> None: ...

    def close(self) -> None:
        assert not self.running, "the ring goes while the kernel writes"
        self.is_closed = True


class LostRing(RuleBasedStateMachine):
    """Each transfer ends once, after the kernel has ended its part of it. What the kernel was not given ends once the ring is lost."""

    @initialize(depth=st.integers(1, 3))
    def open(self, depth: int) -> None:
        """An engine on the ring."""
        self.ring = KernelRing()
        self.engine = RingEngine(depth, 1 << 20, make_ring=lambda _: self.ring)
        self.file = AlignedFile(Path(os.devnull), direct="off")
        self.transfers: dict[int, Transfer] = {}
        self.num_submitted = 0

    @rule(is_read=st.booleans(), num_pages=st.integers(1, 4))
    def submit(self, is_read: bool, num_pages: int) -> None:
        """One more transfer, each with memory of its own."""
        self.num_submitted += 1
        transfer = Transfer(self.file, is_read, 0, [pages(num_pages * PAGE_BYTES)], self.num_submitted)
        self.transfers[self.num_submitted] = transfer
        self.engine.submit([transfer])

    @precondition(lambda self: self.ring.running)
    @rule(choice=st.integers(0, 9), num_pages=st.integers(0, 2))
    def end(self, choice: int, num_pages: int) -> None:
        """The kernel ends something."""
        self.ring.end(choice, num_pages)

    @rule()
    def stray(self) -> None:
        """A completion of nothing."""
        self.ring.stray()

    @rule()
    def lose(self) -> None:
        """The descriptor is gone, which the engine notices when nothing is there to be found."""
        self.ring.is_lost = True
        for _ in range(3):
            self.poll()

    @rule()
    def poll(self) -> None:
        """Takes what has ended."""
        for completion in self.engine.poll(0):
            del self.transfers[completion.transfer.owner]
            in_kernel = {id(buffer.obj) for _, buffers in self.ring.running.values() for buffer in buffers}
            assert not in_kernel & {id(buffer.obj) for buffer in completion.transfer.buffers}, "the kernel still has a buffer"
            assert completion.error is None or self.ring.is_lost

    @invariant()
    def waits_for_the_kernel_alone(self) -> None:
        """What is not the kernel's has failed."""
        if self.ring.is_lost:
            self.poll()
            self.poll()
            assert len(self.transfers) == len(self.ring.running)

    def teardown(self) -> None:
        """All of it ends sooner or later, and then the ring may go."""
        self.poll()
        while self.transfers:
            if self.ring.running:
                self.ring.end(0, 0)
            self.poll()
        self.engine.close()
        assert self.ring.is_closed
        self.file.close()


TestLostRing = LostRing.TestCase
TestLostRing.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@needs_ring
def test_a_read_that_ends_after_the_ring_was_lost(tmp_path: Path) -> None:
    """Its job is reported when the disk has answered, not before, and the tier goes on: it refuses, and closes."""
    before = ring_fds()
    tier = DiskTier(tmp_path, 8 << 20, segment_bytes=1 << 20, io_engine="io_uring", direct_io="off")
    metas = [meta_of(number, 5000) for number in range(2)]
    assert {Outcome.OK} == set(store(tier, metas))
    reading, writing = os.pipe()
    file = tier._files.acquire(0)
    os.dup2(reading, file.fileno)  # a disk that is late
    buffer = bytearray(b"B" * 5000)
    tier.submit(TransferJob(1, JobKind.LOAD, NAMESPACE, (BlockIO(metas[0], memoryview(buffer)),)))
    deadline = time.monotonic() + 20
    while tier._mover.engine.oldest_start(is_read=True) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for fd in ring_fds() - before:
        lose(fd)
    assert [] == tier.poll(3.5)
    assert b"B" * 5000 == buffer
    record = (tmp_path / "segment-000000.kv").read_bytes()[: 3 * PAGE_BYTES]
    os.write(writing, record)
    (result,) = tier.poll(20)
    assert (Outcome.OK,) == result.outcomes
    assert payload_of(metas[0].key, 5000) == bytes(buffer)
    assert (Outcome.FAILED,) == store(tier, [meta_of(9, 5000)])
    tier._files.give_back(0)
    tier.close()
    os.close(reading)
    os.close(writing)


def test_an_engine_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The thread that hears of transfers outlives whatever goes wrong in the engine, which is logged once."""
    monkeypatch.setattr(mover, "_PAUSE_S", 0.001)
    tier = DiskTier(tmp_path, 8 << 20, segment_bytes=1 << 20, io_engine="threads")
    engine, real = tier._mover.engine, tier._mover.engine.poll
    num_errors = itertools.count()

    def poll(timeout_s: float | None = None) -> list[Completion]:
        if next(num_errors) < 5:
            raise KeyError("nobody expected this")
        return real(timeout_s)

    monkeypatch.setattr(engine, "poll", poll)
    assert {Outcome.OK} == set(store(tier, [meta_of(1, 5000)]))  # one more call comes back from the real one
    assert {Outcome.OK} == set(store(tier, [meta_of(2, 5000)]))
    assert {Outcome.OK} == set(load(tier, [meta_of(1, 5000), meta_of(2, 5000)]))
    assert next(num_errors) > 5
    assert 1 == caplog.messages.count("unexpected error in the I/O engine")
    tier.close()
