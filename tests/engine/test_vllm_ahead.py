"""vLLM's asynchronous scheduling, the default on CUDA: a step is ordered before the one before it has been answered."""

from __future__ import annotations

from collections import Counter

import pytest
from vllm.v1.outputs import KVConnectorOutput

from kvtier.connectors import scheduler
from kvtier.connectors.running import RunningCopy
from kvtier.connectors.worker import WorkerHalf
from kvtier.control.estimates import Estimates
from tests.engine.rig import Rig, host, prompt

pytestmark = [pytest.mark.engine, pytest.mark.every_version]
STEP_S = 1.0


class Clock:
    """A second passes before the answer to a step that computes."""

    def __init__(self, rig: Rig, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        hear = rig._hear

        def hear_late() -> None:
            self.now += STEP_S if rig._unheard[0][0].total_num_scheduled_tokens else 0.0
            hear()

        patch.setattr(rig, "_hear", hear_late)
        patch.setattr(rig.connector._half.half._meter, "_clock", self)

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


def late_loads(patch: pytest.MonkeyPatch, num_asked: int) -> None:
    """Loads are over when they are asked for the ``num_asked``-th time, as on a device."""
    is_over, asked = WorkerHalf._is_over, Counter[int]()

    def is_over_late(half: WorkerHalf, copy: RunningCopy) -> bool:
        asked[copy.job.job_id] += 1
        return asked[copy.job.job_id] >= num_asked and is_over(half, copy)

    patch.setattr(WorkerHalf, "_is_over", is_over_late)


@pytest.mark.parametrize("num_asked", [1, 3])
@pytest.mark.parametrize("are_all_answered", [False, True])
def test_computing_is_timed_beside_empty_steps(monkeypatch: pytest.MonkeyPatch, num_asked: int, are_all_answered: bool) -> None:
    """Steps in which requests wait for their loads are under way when the one that computes is ordered; its time is its own.

    Else computing would seem to take no time, and loads be refused as slower. vLLM answers each such step where it has several workers, and
    where it has one those that have something to say.
    """
    if are_all_answered:
        monkeypatch.setattr(KVConnectorOutput, "is_empty", lambda _: False)
    rig = Rig(host(), runs_ahead=True)
    clock = Clock(rig, monkeypatch)
    late_loads(monkeypatch, num_asked)
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(Estimates, "computed", lambda _, num_tokens, __, seconds: seen.append((num_tokens, seconds)))
    for number in range(3):
        rig.ask(f"first {number}", prompt(number, 100))
        assert 96 == rig.ask(f"second {number}", [*prompt(number, 100), *range(60)])
    assert [100, 64] * 3 == [num_tokens for num_tokens, _ in seen]
    assert all(seconds == pytest.approx(STEP_S, rel=0.01) for _, seconds in seen)
    assert clock.now >= 6 * STEP_S
    rig.close()


def test_a_step_that_is_under_way_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing more to compute vLLM orders an empty step while the last one runs: its answer is not held up for writes to a tier."""
    rig = Rig(host(), runs_ahead=True)
    half = rig.connector._half.half
    waits: list[tuple[bool, float]] = []
    poll = half._engine.poll

    def note(timeout_s: float = 0.0) -> None:
        waits.append((any(output.total_num_scheduled_tokens for output, _ in rig._unheard), timeout_s))
        poll()

    monkeypatch.setattr(half._engine, "poll", note)
    monkeypatch.setattr(type(half._engine), "busy", property(lambda _: len(waits) < 20))
    rig.add("a", prompt(1))
    rig.run()
    assert (False, scheduler.IDLE_WAIT_S) in waits
    assert [] == [timeout_s for is_computing, timeout_s in waits if is_computing and timeout_s]
    rig.close()


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_that_step_together_do_not_wait_for_tiers(size: int) -> None:
    """Of data-parallel engines none computes before all of them step."""
    rig = Rig(host(), parallel={"data_parallel_size": size})
    assert (0.0 if size > 1 else scheduler.IDLE_WAIT_S) == rig.connector._half.half._idle_wait_s
    rig.close()
