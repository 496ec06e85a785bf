"""A place on disk is written only when nothing of an earlier record is left in its pages, however the segment was divided before."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.io import PAGE_BYTES
from kvtier.testing.tiers import assert_right_bytes, load, load_job, meta_of, store, store_job, wait_for
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk.format import record_bytes_for
from kvtier.tiers.disk.geometry import divide
from kvtier.tiers.disk.index_file import IndexFile
from kvtier.tiers.disk.ledger import Ledger
from kvtier.tiers.disk.pending import PendingRead, PendingStore
from kvtier.tiers.disk.places import Entry
from kvtier.tiers.disk.record_io import PreparedRun, RecordBuffer, RecordIO
from kvtier.types import BlockMeta, Outcome, TransferJob

SEGMENT_BYTES = 32 << 10
SIZES = (100, 8000, 28000)
"""four, two and one to a segment; no two slot sizes share a grid"""


def capacity_for(num_segments: int) -> int:
    """Capacity of exactly that many segments."""
    return (1 << 20) + (32 << 10) + num_segments * SEGMENT_BYTES


def pages(entry: Entry) -> set[int]:
    """The pages of a record."""
    return set(range(entry.place, entry.place + record_bytes_for(entry.num_bytes) // PAGE_BYTES))


class LedgerMachine(RuleBasedStateMachine):
    """The ledger with I/O that takes as long as Hypothesis likes: at no moment may two operations, or a write and the index, meet."""

    num_segments = 2

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(divide(capacity_for(self.num_segments), SEGMENT_BYTES), max_in_flight_bytes=1 << 20)
        self.writing: list[PendingStore] = []
        self.reading: list[PendingRead] = []
        self.written: list[PendingStore] = []
        """in their segment, not in the index file"""
        self.index_file: dict[int, Entry] = {}
        self.jobs: dict[int, TransferJob] = {}

    def launch(self) -> None:
        """What the tier's threads would take over."""
        turns = self.ledger.turns
        writes, turns.runnable = turns.runnable, []
        reads, self.ledger.reads = self.ledger.reads, []
        for write in writes:
            mine = pages(write.entry)
            under_way = [other.entry for other in (*self.writing, *self.written)] + [read.entry for read in self.reading]
            assert all(mine.isdisjoint(pages(entry)) for entry in under_way), "two operations in one page"
            assert all(mine.isdisjoint(pages(entry)) for entry in self.index_file.values()), "the index file names a record in these pages"
            self.writing.append(write)
        self.reading += reads

    def submit(self, job: TransferJob) -> None:
        """Hands a job in."""
        self.jobs[job.job_id] = job
        self.ledger.begin(job, is_online=True)
        self.launch()

    @rule(numbers=st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True), size=st.sampled_from(SIZES), is_store=st.booleans())
    def job(self, numbers: list[int], size: int, is_store: bool) -> None:
        metas = [meta_of(number + 100 * SIZES.index(size), size) for number in numbers]
        job_id = len(self.jobs)
        self.submit(store_job(job_id, metas) if is_store else load_job(job_id, metas))

    @rule(numbers=st.sets(st.integers(0, 11), min_size=1), sizes=st.sets(st.sampled_from(range(len(SIZES))), min_size=1))
    def remove(self, numbers: set[int], sizes: set[int]) -> None:
        self.ledger.remove([meta_of(number + 100 * size, SIZES[size]).key for number in numbers for size in sizes])
        self.launch()

    @precondition(lambda self: self.writing)
    @rule(choice=st.integers(0, 100), works=st.sampled_from([True, True, True, False]))
    def write_ends(self, choice: int, works: bool) -> None:
        write = self.writing.pop(choice % len(self.writing))
        if not works:
            self.ledger.store_failed(write, Outcome.FAILED, "injected")
        elif not self.ledger.needs_no_entry(write):
            self.written.append(write)
        self.launch()

    @precondition(lambda self: self.reading)
    @rule(choice=st.integers(0, 100), works=st.sampled_from([True, True, True, False]))
    def read_ends(self, choice: int, works: bool) -> None:
        read = self.reading.pop(choice % len(self.reading))
        if not works:
            self.ledger.forget_corrupt(read)
        self.ledger.read_done(read, Outcome.OK if works else Outcome.CORRUPT, None if works else "injected")
        self.launch()

    @rule(num_stores=st.integers(0, 8), num_deletions=st.integers(0, 8), works=st.sampled_from([True, True, True, False]))
    def commit(self, num_stores: int, num_deletions: int, works: bool) -> None:
        stores, self.written = self.written[:num_stores], self.written[num_stores:]
        places = list(self.ledger.turns.undeleted)[:num_deletions]
        if works:
            for place in places:
                self.index_file.pop(place, None)
            self.index_file.update({write.entry.place: write.entry for write in stores})
            self.ledger.committed(stores, places)
        else:
            for write in stores:
                self.ledger.store_failed(write, Outcome.FAILED, "injected")
            self.ledger.undelete_failed("injected")
        self.launch()

    @invariant()
    def index_file_is_consistent(self) -> None:
        """No two rows of the index file share a page; it names every readable block."""
        taken: set[int] = set()
        for entry in self.index_file.values():
            assert taken.isdisjoint(pages(entry))
            taken |= pages(entry)
        for entry in self.ledger.index.values():
            assert entry is self.index_file[entry.place]

    def teardown(self) -> None:
        """Once all I/O has ended and the index file has caught up, every job has its result and nothing is kept."""
        if sys.exc_info()[0] is not None:
            return  # a step failed: a second failure would only hide it
        while self.ledger.num_jobs or self.ledger.turns.undeleted:
            before = len(self.ledger.results), len(self.ledger.turns.undeleted)
            while self.writing:
                self.write_ends(0, True)
            while self.reading:
                self.read_ends(0, True)
            self.commit(1 << 20, 1 << 20, True)
            progress = len(self.ledger.results), len(self.ledger.turns.undeleted)
            assert before != progress or self.writing or self.reading, "stuck"
        assert self.jobs.keys() == {result.job_id for result in self.ledger.results}
        assert len(self.jobs) == len(self.ledger.results)
        assert [] == self.ledger.check()
        assert {entry.place: entry for entry in self.ledger.index.values()} == self.index_file


class NarrowLedgerMachine(LedgerMachine):
    """One segment: it is divided anew all the time."""

    num_segments = 1


STEPS = settings(max_examples=100, stateful_step_count=40, deadline=None, report_multiple_bugs=False, phases=set(Phase) - {Phase.explain})
TestLedger = LedgerMachine.TestCase
TestLedger.settings = STEPS
TestNarrowLedger = NarrowLedgerMachine.TestCase
TestNarrowLedger.settings = STEPS


def open_tier(directory: Path) -> DiskTier:
    """One segment."""
    return DiskTier(directory, capacity_for(1), segment_bytes=SEGMENT_BYTES, durable=False)


SMALL = [meta_of(number, 100) for number in range(4)]
LARGE = [meta_of(9, 28000)]


class Barrier:
    """Makes a method wait until it is let through, and counts who came."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.arrived = threading.Semaphore(0)
        self.opened = threading.Event()
        real = getattr(owner, name)

        def method(*arguments: Any) -> Any:
            self.arrived.release()
            assert self.opened.wait(30)
            return real(*arguments)

        patch.setattr(owner, name, method)


def remove_and_wait(tier: DiskTier, meta: BlockMeta) -> None:
    """Removes a block and waits until the index file knows: its place is free, whatever is at the others."""
    tier.remove([meta.key])
    deadline = time.monotonic() + 30
    while tier._ledger.turns.undeleted:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_crash_before_the_deletions_are_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger record is not written over smaller ones that the index file still names, though the place itself was free long ago."""
    tier = open_tier(tmp_path)
    assert {Outcome.OK} == set(store(tier, SMALL))
    remove_and_wait(tier, SMALL[0])

    def commit(*arguments: object) -> None:
        raise OSError("the crash comes before this")

    with monkeypatch.context() as patch:
        patch.setattr(IndexFile, "commit", commit)
        tier.remove([meta.key for meta in SMALL[1:]])
        assert (Outcome.FAILED,) == store(tier, LARGE)
        tier.abandon()
    tier = open_tier(tmp_path)
    assert SMALL[1:] == list(tier.entries())
    assert [] == tier.check()
    tier.close()


def test_a_load_under_way_when_its_segment_is_divided_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that was handed in before the removal gets its bytes: what is stored into the segment next waits for it."""
    tier = open_tier(tmp_path)
    assert {Outcome.OK} == set(store(tier, SMALL))
    remove_and_wait(tier, SMALL[0])
    job = load_job(1, SMALL[1:])
    with monkeypatch.context() as patch:
        reads, writes = Barrier(patch, RecordIO, "prepare_read"), Barrier(patch, RecordIO, "prepare_write")
        writes.opened.set()
        tier.submit(job)
        assert reads.arrived.acquire(timeout=30)
        tier.remove([meta.key for meta in SMALL[1:]])
        tier.submit(store_job(2, LARGE))
        assert not writes.arrived.acquire(timeout=0.2), "the write came before the read ended"
        reads.opened.set()
        results = {result.job_id: result for result in wait_for(tier, 2)}
    assert ((Outcome.OK,) * 3, (Outcome.OK,)) == (results[1].outcomes, results[2].outcomes)
    assert_right_bytes(job, results[1])
    assert (Outcome.OK,) == load(tier, LARGE)
    tier.close()


def test_a_store_under_way_when_its_segment_is_divided_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removed block that is still being written cannot tear the larger one that was acknowledged in its segment."""
    tier = open_tier(tmp_path)
    assert {Outcome.OK} == set(store(tier, SMALL[:1]))
    with monkeypatch.context() as patch:
        writes = Barrier(patch, RecordIO, "prepare_write")
        tier.submit(store_job(1, SMALL[1:]))
        assert writes.arrived.acquire(timeout=30)
        remove_and_wait(tier, SMALL[0])
        tier.remove([meta.key for meta in SMALL[1:]])
        tier.submit(store_job(2, LARGE))
        assert not writes.arrived.acquire(timeout=0.2), "the second write came before the first ended"
        writes.opened.set()
        results = {result.job_id: result.outcomes for result in wait_for(tier, 2)}
    assert {1: (Outcome.OK,) * 3, 2: (Outcome.OK,)} == results
    assert (Outcome.OK,) == load(tier, LARGE)
    assert [] == tier.check()
    tier.close()


def test_nothing_is_launched_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What becomes runnable after a thread took what there was, and before it launched that, is launched by one of them only."""
    tier = open_tier(tmp_path)
    launch = tier._launch
    written: list[int] = []
    real_prepare = RecordIO.prepare_write

    def prepare_write(records_io: RecordIO, records: Sequence[RecordBuffer]) -> PreparedRun:
        written.extend(record.fields.place for record in records)
        return real_prepare(records_io, records)

    def interrupted(writes: list[PendingStore], reads: list[PendingRead]) -> None:
        monkeypatch.setattr(tier, "_launch", launch)
        tier.submit(store_job(2, SMALL))
        launch(writes, reads)

    monkeypatch.setattr(RecordIO, "prepare_write", prepare_write)
    monkeypatch.setattr(tier, "_launch", interrupted)
    tier.submit(load_job(1, SMALL))
    results = {result.job_id: result.outcomes for result in wait_for(tier, 2)}
    assert {1: (Outcome.MISS,) * 4, 2: (Outcome.OK,) * 4} == results
    tier.close()
    assert [0, 2, 4, 6] == sorted(written)
