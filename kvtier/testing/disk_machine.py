"""The disk tier against a dict, with crashes: any sequence of stores, loads, removals, crashes and reopenings.

Between two waits the machine hands in several jobs and removals without looking, so that they meet in the tier's threads.

Two things a crash may do that look like losses and are none.  A store may crowd out blocks of another size the moment it is
handed in (``JobResult.dropped``): they are gone although the process dies before anybody could poll that result, because
their places were given away.  And what was removed or crowded out may be there again, because the index file learns of
it a little later.  What is readable at the moment of the crash survives it, acknowledged or not.

After a reset the next opening finds nothing, however the process ended and whatever became of the index.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtier.codecs import Sealer
from kvtier.io import DirectMode
from kvtier.testing.tiers import assert_right_bytes, load_job, meta_of, store_job, wait_for
from kvtier.tiers.disk import DiskTier, check_path
from kvtier.tiers.disk.format import record_bytes_for
from kvtier.types import BlockKey, BlockMeta, JobKind, JobResult, Outcome, TransferJob

SEGMENT_BYTES = 32 << 10
CAPACITY_BYTES = (1 << 20) + (32 << 10) + 4 * SEGMENT_BYTES
"""four segments: room for 16 of the small blocks, 8 of the middle or 4 of the large ones"""
_SIZES = (100, 8000, 28000)

STEPS = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
"""No shrinking: the tier's threads have a say in what fails, so a shorter sequence is tried hundreds of times in vain, and the
test would end by its timeout instead of with the steps that failed."""

numbers = st.lists(st.integers(0, 23), min_size=1, max_size=8, unique=True)


def disk_meta(number: int) -> BlockMeta:
    """A block whose size follows from its number: most are small."""
    return meta_of(number, _SIZES[(0, 0, 0, 1, 0, 2)[number % 6]])


class DiskMachine(RuleBasedStateMachine):
    """After every wait the tier holds exactly what it acknowledged; after every crash at least that, and nothing torn."""

    durable = False
    """syncing, and going past the page cache, changes nothing that a process could see, and costs most of the time"""
    sealer: Sealer | None = None
    """encrypts payloads"""
    parent_directory: Path | None = None
    """where the directories are made; one that is cleaned up by others, too, lest a test that is ended by force leave some behind"""

    @initialize()
    def start(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kvtier-disk-machine-", dir=self.parent_directory))
        self.present: dict[BlockKey, BlockMeta] = {}
        """acknowledged and not removed"""
        self.uncertain: dict[BlockKey, BlockMeta] = {}
        """what a crash may bring back: removed or crowded out since the last clean state, or never acknowledged"""
        self.leftover: dict[BlockKey, BlockMeta] = {}
        """what the loss of the index may bring back: anything that was ever there"""
        self.submitted: list[TransferJob | list[BlockKey]] = []
        """jobs and removals since the last wait"""
        self.next_job_id = 0
        self.is_reset = False
        self.open()

    def open(self) -> None:
        """Opens the tier in its directory."""
        direct_io: DirectMode = "auto" if self.durable else "off"
        self.tier = DiskTier(
            self.directory,
            CAPACITY_BYTES,
            segment_bytes=SEGMENT_BYTES,
            direct_io=direct_io,
            durable=self.durable,
            sealer=self.sealer,
        )

    @rule(numbers=numbers)
    def store(self, numbers: list[int]) -> None:
        self.submit(store_job(self.next_job_id, [disk_meta(number) for number in numbers]))

    @rule(numbers=numbers)
    def load(self, numbers: list[int]) -> None:
        self.submit(load_job(self.next_job_id, [disk_meta(number) for number in numbers]))

    @rule(numbers=numbers)
    def remove(self, numbers: list[int]) -> None:
        keys = [disk_meta(number).key for number in numbers]
        self.tier.remove(keys)
        assert 0 == self.tier.lookup(keys[:1])
        self.submitted.append(keys)

    @rule()
    def reset(self) -> None:
        keys = [disk_meta(number).key for number in range(24)]
        self.tier.reset()
        assert 0 == sum(self.tier.lookup([key]) for key in keys)
        self.submitted.append(keys)
        self.is_reset = True

    @rule()
    def wait(self) -> None:
        jobs = self.submitted_jobs()
        results = {result.job_id: result for result in wait_for(self.tier, len(jobs))} if jobs else {}
        assert {job.job_id for job in jobs} == results.keys()
        rejected = {
            block.meta.key
            for job in jobs
            for block, outcome in zip(job.blocks, results[job.job_id].outcomes, strict=True)
            if outcome is Outcome.REJECTED
        }
        for step in self.submitted:
            if isinstance(step, TransferJob):
                self.replay(step, results[step.job_id], rejected)
            else:
                self.forget(step)
        self.submitted = []
        assert self.present == {meta.key: meta for meta in self.tier.entries()}

    @rule()
    def close_and_reopen(self) -> None:
        self.wait()
        self.tier.close()
        assert [] == check_path(self.directory)
        source = "new" if self.is_reset else "clean"
        self.forget_for_good_after_a_reset()
        self.open()
        assert source == self.tier.recovery.source
        assert self.present == {meta.key: meta for meta in self.tier.entries()}
        self.leftover |= self.uncertain
        self.uncertain = {}

    @rule(lose_index=st.sampled_from([False, False, False, True]))
    def crash_and_reopen(self, lose_index: bool) -> None:
        self.settle_what_is_certain()
        self.tier.abandon()
        self.submitted = []
        if lose_index:
            (self.directory / "index.mdb").unlink()
        self.forget_for_good_after_a_reset()
        self.open()
        self.reconcile(self.uncertain | self.leftover if lose_index else self.uncertain)

    def forget_for_good_after_a_reset(self) -> None:
        """The process has ended: where there was a reset, nothing of the directory may come back."""
        if self.is_reset:
            self.present, self.uncertain, self.leftover = {}, {}, {}
        self.is_reset = False

    def settle_what_is_certain(self) -> None:
        """Right before a crash: what is readable is certain. What is not was removed, or crowded out by a store of another size."""
        readable = {meta.key: meta for meta in self.tier.entries()}
        assert readable.keys() <= self.present.keys() | self.uncertain.keys()
        stored = [block.meta for job in self.submitted_jobs() if job.kind is JobKind.STORE for block in job.blocks]
        crowding = {record_bytes_for(meta.num_bytes) for meta in stored}
        removed = {key for step in self.submitted if not isinstance(step, TransferJob) for key in step}
        for meta in [meta for key, meta in self.present.items() if key not in readable]:
            assert meta.key in removed or crowding - {record_bytes_for(meta.num_bytes)}, "a block vanished for no reason"
            self.forget([meta.key])
        self.present = readable

    def submitted_jobs(self) -> list[TransferJob]:
        """The jobs since the last wait."""
        return [step for step in self.submitted if isinstance(step, TransferJob)]

    def reconcile(self, possible: dict[BlockKey, BlockMeta]) -> None:
        """After a crash: all that was certain is there, the rest is whole or gone."""
        found = {meta.key: meta for meta in self.tier.entries()}
        assert self.present.items() <= found.items(), "a block that was readable is lost"
        assert found.keys() <= self.present.keys() | possible.keys(), "a block appeared that nobody stored"
        assert [] == self.tier.check()
        self.present = found
        if found:
            job = load_job(self.next_job_id, list(found.values()))
            self.next_job_id += 1
            self.tier.submit(job)
            (result,) = wait_for(self.tier)
            assert {Outcome.OK} == set(result.outcomes)
            assert_right_bytes(job, result)

    def submit(self, job: TransferJob) -> None:
        """Hands a job in without waiting."""
        self.next_job_id += 1
        self.tier.submit(job)
        self.submitted.append(job)
        for block in job.blocks:
            if block.meta.key not in self.present:
                self.uncertain.setdefault(block.meta.key, block.meta)

    def replay(self, job: TransferJob, result: JobResult, rejected: set[BlockKey]) -> None:
        """Compares a result with what the dict says at this point of the order."""
        self.forget(result.dropped)
        assert_right_bytes(job, result)
        for block, outcome in zip(job.blocks, result.outcomes, strict=True):
            key = block.meta.key
            if job.kind is JobKind.STORE:
                assert outcome in ((Outcome.OK,) if key in self.present else (Outcome.OK, Outcome.REJECTED))
                if outcome is Outcome.OK:
                    self.present[key] = block.meta
            elif key in self.present:
                assert outcome is Outcome.OK
            else:
                # A store that was crowded out while it was under way is REJECTED, and loads that waited for it got its bytes.
                assert outcome is Outcome.MISS or (outcome is Outcome.OK and key in rejected)

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """Removed, but a crash may bring it back until the removal is known to be on disk."""
        for key in keys:
            if key in self.present:
                self.uncertain[key] = self.present.pop(key)

    @invariant()
    def keeps_to_its_capacity(self) -> None:
        """The files together never exceed the capacity."""
        if hasattr(self, "directory"):
            with os.scandir(self.directory) as entries:
                assert sum(entry.stat().st_size for entry in list(entries)) <= CAPACITY_BYTES

    def teardown(self) -> None:
        """The directory is healthy at the end of every sequence, and then gone."""
        if not hasattr(self, "directory"):
            return
        try:
            # After a failed step the model knows nothing any more; a second failure would only hide the first.
            if hasattr(self, "tier") and sys.exc_info()[0] is None:
                self.wait()
                assert [] == self.tier.check()
                self.tier.close()
                assert [] == check_path(self.directory)
        finally:
            if hasattr(self, "tier"):
                self.tier.abandon()
            shutil.rmtree(self.directory)
