"""The worker half: bytes go where the message says, and what cannot be copied is reported, never raised."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.connectors.messages import MoveJob, StepMessage, WorkerReport
from kvtier.connectors.slot_part import SlotPart
from kvtier.connectors.worker import WorkerHalf
from kvtier.copy.base import Movers
from kvtier.copy.cpu import NativeCopier
from kvtier.memory.arena import Arena
from kvtier.testing.copiers import FaultyCopier
from kvtier.testing.fake_kv import FakeKVMemory

PAGE = 4096
NUM_SLOTS = 8


class Rig:
    """Workers with KV memory and an arena of their own; block ``b`` of rank ``r`` is filled with ``100 * r + b``."""

    def __init__(
        self, directory: Path, *, num_ranks: int = 1, blocks_per_slot: int = 1, num_polls: int = 0, stores_at_end: bool = False
    ) -> None:
        self.arena = Arena.open(str(directory / "arena"), NUM_SLOTS * PAGE, huge_pages=False)
        self.memory = FakeKVMemory(num_ranks=num_ranks, num_layers=2, num_blocks=16, block_tokens=4)
        self.copiers = []
        self.workers = []
        for rank in range(num_ranks):
            for block_id in range(16):
                self.memory.ranks[rank][:, block_id, :] = 100 * rank + block_id
            inner = NativeCopier(self.memory.layout(rank), arena_address=self.arena.address, arena_bytes=self.arena.capacity_bytes)
            copier = FaultyCopier(inner, num_polls=num_polls)
            self.copiers.append(copier)
            self.workers.append(
                WorkerHalf(
                    self.arena,
                    Movers(copier),
                    SlotPart(rank, num_ranks, self.memory.engine_block_bytes, blocks_per_slot),
                    stores_at_end=stores_at_end,
                    strict=True,
                )
            )
        self.worker = self.workers[0]
        self.worker.report()

    def job(self, job_id: int, block_ids: tuple[int, ...], slots: tuple[int, ...], **more: object) -> MoveJob:
        """A job whose generations are right now."""
        generations = tuple(int(self.arena.generations[slot]) for slot in slots)
        return MoveJob(job_id, f"r{job_id}", block_ids, slots, generations, **more)  # type: ignore[arg-type]

    def step(self, message: StepMessage) -> WorkerReport:
        """A whole step on all ranks."""
        report = WorkerReport()
        for worker in self.workers:
            worker.before_overwrite(message)
            worker.begin_step(message)
            worker.start_loads()
            worker.wait_for_loads()
            worker.start_stores()
            worker.finish()
            report.merge(worker.report())
        return report

    def content(self, block_id: int, rank: int = 0) -> set[int]:
        """The values in a block."""
        return set(np.unique(self.memory.ranks[rank][:, block_id, :]).tolist())


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.worker.close()


def test_a_block_goes_out_and_comes_back(rig: Rig) -> None:
    """What a store put into a slot a load brings into any other block."""
    assert {7: 1} == rig.step(StepMessage(stores=(rig.job(7, (3, 5), (0, 1)),))).done
    assert {8: 1} == rig.step(StepMessage(loads=(rig.job(8, (10, 11), (1, 0)),))).done
    assert ({5}, {3}) == (rig.content(10), rig.content(11))
    assert set() == rig.worker.failed_block_ids()


def test_every_rank_has_its_own_part_of_a_slot(tmp_path: Path) -> None:
    """Two ranks store into the same slots and get back their own bytes; the job is done twice."""
    rig = Rig(tmp_path, num_ranks=2, blocks_per_slot=2)
    assert 2 == rig.step(StepMessage(stores=(rig.job(1, (1, 2, 3, 4), (0, 1)),))).done[1]
    rig.step(StepMessage(loads=(rig.job(2, (9, 10, 11, 12), (0, 1)),)))
    assert [{1}, {2}, {3}, {4}] == [rig.content(block_id, 0) for block_id in (9, 10, 11, 12)]
    assert [{101}, {102}, {103}, {104}] == [rig.content(block_id, 1) for block_id in (9, 10, 11, 12)]


def test_a_load_may_begin_in_the_middle_of_a_slot(tmp_path: Path) -> None:
    """``first_index`` skips engine blocks of the first slot; the last slot may be used in part."""
    rig = Rig(tmp_path, blocks_per_slot=3)
    rig.step(StepMessage(stores=(rig.job(1, (1, 2, 3, 4, 5, 6), (4, 2)),)))
    rig.step(StepMessage(loads=(rig.job(2, (10, 11), (4, 2), first_index=2),)))
    assert [{3}, {4}] == [rig.content(block_id) for block_id in (10, 11)]


def test_blocks_that_nobody_filled_are_reported_again(rig: Rig) -> None:
    """Whoever read them in the step has to compute them."""
    rig.step(StepMessage(unfilled=(3, 4)))
    assert {3, 4} == rig.worker.failed_block_ids()
    rig.step(StepMessage())
    assert set() == rig.worker.failed_block_ids()


def test_a_slot_with_a_new_tenant_is_not_loaded(rig: Rig) -> None:
    """The generation is compared before the copy: no byte moves, the blocks are reported, the others come."""
    rig.step(StepMessage(stores=(rig.job(1, (1, 2), (0, 1)),)))
    job = rig.job(2, (10, 11), (0, 1))
    rig.arena.generations[0] += 1
    report = rig.step(StepMessage(loads=(job,)))
    assert ({2: 1}, {2: {0}}, 1) == (report.done, report.failed, report.num_stale)
    assert ({10}, {2}) == (rig.content(10), rig.content(11))
    assert {10} == rig.worker.failed_block_ids()
    assert set() == rig.worker.failed_block_ids()


def test_a_new_tenant_during_the_copy_fails_the_load(tmp_path: Path) -> None:
    """The generation is compared again after the copy: what was read meanwhile may be anything."""
    rig = Rig(tmp_path, num_polls=3)
    job = rig.job(2, (10, 11), (0, 1))
    rig.worker.begin_step(StepMessage(async_loads=(job,)))
    assert set() == rig.worker.finish().received
    rig.arena.generations[1] += 1
    while not (received := rig.worker.finish().received):
        pass
    assert ({"r2"}, {11}) == (received, rig.worker.failed_block_ids())
    assert {2: {1}} == rig.worker.report().failed


def test_a_slot_with_a_new_tenant_is_not_overwritten(rig: Rig) -> None:
    """A store whose slot belongs to somebody else by now writes nothing and fails."""
    rig.step(StepMessage(stores=(rig.job(1, (1,), (0,)),)))
    job = rig.job(2, (2,), (0,))
    rig.arena.generations[0] += 1
    assert {2: {0}} == rig.step(StepMessage(stores=(job,))).failed
    rig.step(StepMessage(loads=(rig.job(3, (10,), (0,)),)))
    assert {1} == rig.content(10)


def test_missing_blocks_fail_without_a_copy(rig: Rig) -> None:
    """Blocks that were promised and have no slot are reported as failed; the job ends."""
    report = rig.step(StepMessage(loads=(rig.job(4, (), (), missing=(6, 7)),)))
    assert ({4: 1}, {6, 7}) == (report.done, rig.worker.failed_block_ids())


@pytest.mark.parametrize("fault", ["start", "end"])
def test_a_failing_copier_fails_its_job_alone(rig: Rig, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    """An error of the copier becomes failed blocks of one job, is counted and logged; the step goes on."""
    rig.step(StepMessage(stores=(rig.job(1, (1, 2), (0, 1)),)))
    rig.copiers[0].load_faults.extend([fault, "none", fault])
    report = rig.step(StepMessage(loads=(rig.job(2, (10,), (0,)), rig.job(3, (11,), (1,)), rig.job(4, (12,), (1,)))))
    assert ({2: 1, 3: 1, 4: 1}, {2: {0}, 4: {0}}, 2) == (report.done, report.failed, report.num_errors)
    assert {10, 12} == rig.worker.failed_block_ids()
    assert {2} == rig.content(11)
    assert 1 == len([record for record in caplog.records if record.levelno == logging.ERROR])


def test_blocks_beyond_the_memory_fail(rig: Rig) -> None:
    """Nonsense in a message is a failed job, not an exception in the step."""
    report = rig.step(StepMessage(stores=(rig.job(1, (999,), (0,)),)))
    assert ({1: 1}, {1: {0}}) == (report.done, report.failed)


def test_async_loads_are_received_when_they_are_over(tmp_path: Path) -> None:
    """``received`` names a request once, in the step in which its bytes are there and its failures are known."""
    rig = Rig(tmp_path, num_polls=3)
    rig.step(StepMessage(stores=(rig.job(1, (1, 2), (0, 1)),)))
    while 1 not in rig.step(StepMessage()).done:
        pass
    rig.copiers[0].load_faults.extend(["none", "end"])
    rig.worker.begin_step(StepMessage(async_loads=(rig.job(2, (10,), (0,)), rig.job(3, (11,), (1,), missing=(12,)))))
    received = [rig.worker.finish().received for _ in range(2)]
    assert [set(), set()] == received
    assert set() == rig.worker.failed_block_ids()
    assert {"r2", "r3"} == rig.worker.finish().received
    assert {11, 12} == rig.worker.failed_block_ids()
    assert {1} == rig.content(10)
    assert set() == rig.worker.finish().received


def test_a_sync_load_with_an_async_copier_is_waited_for(tmp_path: Path) -> None:
    """After ``wait_for_loads`` the bytes are in the blocks, however slow the copier is."""
    rig = Rig(tmp_path, num_polls=1000)
    rig.step(StepMessage(stores=(rig.job(1, (1,), (0,)),)))
    rig.worker.before_overwrite(StepMessage(preempted=("r1",)))
    rig.worker.begin_step(StepMessage(loads=(rig.job(2, (10,), (0,)),)))
    rig.worker.start_loads()
    rig.worker.wait_for_loads()
    assert {1} == rig.content(10)


def test_overwriting_waits_for_the_stores_of_preempted_requests_only(tmp_path: Path) -> None:
    """``before_overwrite`` ends the copies that read blocks of preempted requests, and no others."""
    rig = Rig(tmp_path, num_polls=1000)
    assert {} == rig.step(StepMessage(stores=(rig.job(1, (1,), (0,)), rig.job(2, (2,), (1,))))).done
    rig.worker.before_overwrite(StepMessage(preempted=("r2",)))
    rig.memory.ranks[0][:, 2, :] = 77
    assert {2: 1} == rig.worker.report().done
    rig.worker.close()
    assert {1: 1} == rig.worker.report().done
    rig.worker.begin_step(StepMessage(loads=(rig.job(3, (10, 11), (0, 1)),)))
    rig.worker.finish()
    assert ({1}, {2}) == (rig.content(10), rig.content(11))


def test_held_requests_are_sent_when_their_stores_are_over(tmp_path: Path) -> None:
    """``sent`` names a held request when none of its stores runs any more: at once where none does."""
    rig = Rig(tmp_path, num_polls=3)
    rig.worker.begin_step(StepMessage(stores=(rig.job(1, (1,), (0,)),)))
    assert set() == rig.worker.finish().sent
    rig.worker.begin_step(StepMessage(held=("r1", "r9")))
    assert {"r9"} == rig.worker.finish().sent
    assert {"r1"} == rig.worker.finish().sent
    assert set() == rig.worker.finish().sent


def test_finish_does_what_was_left_out(rig: Rig) -> None:
    """A step in which the engine calls nothing but ``begin_step`` and ``finish`` moves everything, once."""
    rig.worker.begin_step(StepMessage(stores=(rig.job(1, (1,), (0,)),)))
    rig.worker.finish()
    rig.worker.finish()
    assert {1: 1} == rig.worker.report().done
    rig.worker.begin_step(StepMessage(async_loads=(rig.job(2, (10,), (0,)),)))
    assert {"r2"} == rig.worker.finish().received
    assert {1} == rig.content(10)


def test_stores_wait_for_what_is_computed_behind_the_report(tmp_path: Path) -> None:
    """With ``stores_at_end``: what is in the blocks when ``start_stores`` is called is stored, and the next step reports it."""
    rig = Rig(tmp_path, stores_at_end=True)
    job = rig.job(1, (3,), (0,))
    rig.worker.begin_step(StepMessage(stores=(job,), loads=(rig.job(2, (5,), (1,)),)))
    rig.worker.finish()
    assert {2: 1} == rig.worker.report().done, "loads do not wait"
    has_some = [rig.worker.has_stores_to_start]
    rig.memory.ranks[0][:, 3, :] = 77
    rig.worker.start_stores()
    assert [True, False] == [*has_some, rig.worker.has_stores_to_start]
    report = rig.step(StepMessage(loads=(rig.job(3, (10,), (0,)),)))
    assert ({1: 1, 3: 1}, {}) == (report.done, report.failed)
    assert {77} == rig.content(10)


def test_stores_of_a_step_that_did_not_end_have_failed(tmp_path: Path) -> None:
    """Nobody waits for them for good, and nothing is copied later from blocks that others have by then."""
    rig = Rig(tmp_path, stores_at_end=True)
    rig.worker.begin_step(StepMessage(stores=(rig.job(1, (3, 4), (0, 1)),)))
    rig.worker.finish()
    rig.worker.report()
    report = rig.step(StepMessage(stores=(rig.job(2, (5,), (2,)),)))
    assert ({1: 1, 2: 1}, {1: {0, 1}}) == (report.done, report.failed)


def test_the_first_report_says_that_the_arena_is_mapped(tmp_path: Path) -> None:
    """Each worker counts as attached exactly once."""
    rig = Rig(tmp_path, num_ranks=2)
    assert [1, 0] == [rig.workers[1].report().attached for _ in range(2)]


def test_reports_add_up() -> None:
    """Merging counts workers per job and unites failed positions; an empty report is false."""
    one = WorkerReport({1: 1, 2: 1}, {1: {0}}, attached=1, step=7)
    two = WorkerReport({1: 1}, {1: {3}, 2: {1}}, num_stale=2, num_errors=1, step=7)
    assert WorkerReport({1: 2, 2: 1}, {1: {0, 3}, 2: {1}}, 1, 2, 1, step=7) == one.merge(two)
    assert not WorkerReport()
    kinds: tuple[tuple[str, Any], ...] = (("done", {1: 1}), ("attached", 1), ("num_stale", 1), ("num_errors", 1), ("step", 1))
    assert all(WorkerReport(**{name: value}) for name, value in kinds)


def test_messages_can_be_pickled(rig: Rig) -> None:
    """Messages and reports cross process borders unchanged."""
    message = StepMessage((rig.job(1, (1,), (0,)),), (rig.job(2, (2,), (1,), missing=(5,)),), (), ("r1",), ("r2",))
    assert message == pickle.loads(pickle.dumps(message))
    report = WorkerReport({1: 1}, {1: {0}}, 1)
    assert report == pickle.loads(pickle.dumps(report))


def test_a_rank_outside_the_workers_is_refused(rig: Rig) -> None:
    """A wrong rank would write into another rank's part."""
    with pytest.raises(ValueError, match="rank 2 is not one of 2 workers"):
        SlotPart(2, 2, 64)


@pytest.mark.parametrize("busy", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_loads_beside_computing_are_not_timed(tmp_path: Path, busy: tuple[int, ...]) -> None:
    """On a device they are ordered behind it: their time would be that of the engine's steps, and loads would be refused as slow."""
    rig = Rig(tmp_path, num_polls=3)
    rig.step(StepMessage(stores=(rig.job(1, (3,), (0,)),)))
    load = rig.job(2, (9,), (0,))
    reports = [rig.step(StepMessage(async_loads=() if number else (load,), is_busy=number in busy)) for number in range(3)]
    assert [{}, {}, {2: 1}] == [{job_id: 1 for job_id in report.done if job_id == 2} for report in reports]
    assert (0 if busy else 1) == sum(len(report.load_times) for report in reports)
    sync = rig.step(StepMessage(loads=(rig.job(3, (10,), (0,)),), is_busy=True))
    assert 1 == len(sync.load_times), "its step waits for it"
    rig.worker.close()
