"""A cache that was reset: the next process finds nothing of it, however this one ended."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtier.hashing import Namespace
from kvtier.testing.fake_requests import FakeRequest
from kvtier.testing.fake_system import FakeSystem, FakeSystemOptions
from kvtier.testing.tiers import load, meta_of, store, store_job, wait_for
from kvtier.tiers.base import LastingTier
from kvtier.tiers.disk import DiskTier, check_path, resets, segments
from kvtier.tiers.disk import tier as disk_tier
from kvtier.tiers.health import FIRST_BACK_OFF_S, MAX_CONSECUTIVE_FAILURES
from kvtier.types import Outcome

SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = (1 << 20) + (32 << 10) + 4 * SEGMENT_BYTES
OLD, NEW = [meta_of(1, 5000), meta_of(2, 5000)], [meta_of(3, 5000)]
MARK = "reset"


def open_tier(directory: Path) -> DiskTier:
    """The tier of these tests."""
    return DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES)


@pytest.fixture
def sync_failures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[OSError]]:
    """While it holds an error, a mark cannot be synced."""
    failures: list[OSError] = []
    sync = segments.sync_directory

    def fail_or_sync(path: Path) -> None:
        if failures:
            raise failures[0]
        sync(path)

    monkeypatch.setattr("kvtier.tiers.disk.resets.sync_directory", fail_or_sync)
    yield failures
    failures.clear()


def test_what_lasts_can_be_reset(tmp_path: Path) -> None:
    """The disk is told of a reset."""
    with contextlib.closing(open_tier(tmp_path)) as tier:
        assert isinstance(tier, LastingTier)


@pytest.mark.parametrize("end", ["close", "kill", "kill without index"])
def test_the_next_opening_is_empty(tmp_path: Path, end: str) -> None:
    """What was stored before and after a reset is gone with the process, and what comes next is kept again."""
    tier = open_tier(tmp_path)
    store(tier, OLD)
    tier.reset()
    assert 0 == tier.lookup([OLD[0].key])
    assert (Outcome.MISS,) * 2 == load(tier, OLD)
    assert (Outcome.OK,) == store(tier, NEW)
    assert (Outcome.OK,) == load(tier, NEW)
    tier.close() if end == "close" else tier.abandon()
    if end == "kill without index":
        (tmp_path / "index.mdb").unlink()
    tier = open_tier(tmp_path)
    assert ("new", 0, []) == (tier.recovery.source, tier.recovery.num_blocks, list(tier.entries()))
    assert not (tmp_path / MARK).exists()
    assert (Outcome.OK,) * 2 == store(tier, OLD)
    tier.close()
    tier = open_tier(tmp_path)
    assert ("clean", OLD) == (tier.recovery.source, list(tier.entries()))
    tier.close()


def test_a_reset_is_on_the_disk_when_it_returns(tmp_path: Path) -> None:
    """A kill right behind a reset brings nothing back."""
    tier = open_tier(tmp_path)
    store(tier, OLD)
    tier.reset()
    assert (tmp_path / MARK).exists()
    tier.abandon()
    assert [] == list(open_tier(tmp_path).entries())


def test_a_marked_directory_is_healthy(tmp_path: Path) -> None:
    """The mark belongs there."""
    tier = open_tier(tmp_path)
    store(tier, OLD)
    tier.reset()
    assert [] == tier.check()
    tier.close()
    assert [] == check_path(tmp_path)


def test_nothing_is_stored_before_the_mark_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_failures: list[OSError], caplog: pytest.LogCaptureFixture
) -> None:
    """A reset that the disk does not take is said and counted, does not wait for good, and is made up for."""
    monkeypatch.setattr(disk_tier, "RESET_WAIT_S", 0.2)
    tier = open_tier(tmp_path)
    store(tier, OLD)
    sync_failures.append(OSError(errno.EIO, os.strerror(errno.EIO)))
    began = time.monotonic()
    tier.reset()
    assert 0.2 <= time.monotonic() - began < 5
    assert {"unmarked_resets": 1} == tier.take_events()
    assert "cannot be marked as reset yet" in caplog.text
    assert (Outcome.FAILED,) == store(tier, NEW)
    assert (Outcome.MISS,) * 2 == load(tier, OLD)
    sync_failures.clear()
    _wait_until(lambda: (Outcome.OK,) == store(tier, NEW))
    tier.abandon()
    tier = open_tier(tmp_path)
    assert [] == list(tier.entries())
    tier.close()


def test_what_comes_before_the_mark_is_not_even_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no mark could be made at all, a scan of the records finds no block of the new weights."""
    monkeypatch.setattr(disk_tier, "RESET_WAIT_S", 0.05)
    monkeypatch.setattr(resets.ResetMark, "write", _fail)
    tier = open_tier(tmp_path)
    store(tier, OLD)
    tier.reset()
    others = [meta_of(number, 5000) for number in range(3, 8)]
    store(tier, others)
    tier.abandon()
    (tmp_path / "index.mdb").unlink()
    tier = open_tier(tmp_path)
    assert "scanned" == tier.recovery.source
    assert not set(others) & set(tier.entries())
    tier.close()


def test_a_disk_that_was_given_up_is_marked_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark is tried at once, whatever else waits for the disk to come back."""
    monkeypatch.setattr(disk_tier, "RESET_WAIT_S", FIRST_BACK_OFF_S / 2)
    tier = open_tier(tmp_path)
    store(tier, OLD)
    for _ in range(MAX_CONSECUTIVE_FAILURES):
        tier._health.writes.failed(OSError(errno.EIO, os.strerror(errno.EIO)))
    tier.remove([OLD[0].key])
    time.sleep(0.2)  # the removal's entry lingers now
    tier.reset()
    assert {} == tier.take_events()
    tier.abandon()
    tier = open_tier(tmp_path)
    assert [] == list(tier.entries())
    tier.close()


def test_a_store_under_way_during_a_reset_is_not_found(tmp_path: Path) -> None:
    """Blocks on their way to the disk are forgotten as well."""
    tier = open_tier(tmp_path)
    tier.submit(store_job(1, OLD))
    tier.reset()
    wait_for(tier)
    assert [] == list(tier.entries())
    assert (Outcome.OK,) * 2 == store(tier, OLD)
    assert (Outcome.OK,) * 2 == load(tier, OLD)
    tier.close()


def test_close_with_a_mark_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_failures: list[OSError]) -> None:
    """It returns."""
    monkeypatch.setattr(disk_tier, "RESET_WAIT_S", 0.05)
    tier = open_tier(tmp_path)
    sync_failures.append(OSError(errno.EIO, os.strerror(errno.EIO)))
    tier.reset()
    tier.close()
    tier.reset()  # of a closed one: nothing happens


@pytest.mark.parametrize("num_done", range(4))
def test_an_interrupted_emptying_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_done: int) -> None:
    """The mark goes last."""
    tier = open_tier(tmp_path)
    store(tier, [meta_of(number, 30000) for number in range(5)])
    tier.reset()
    store(tier, NEW)
    tier.close()
    done: list[object] = []
    unlink = os.unlink

    def interrupted(path: str) -> None:
        if len(done) == num_done:
            raise KeyboardInterrupt
        done.append(path)
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resets.empty_if_marked(tmp_path, durable=True)
    assert (tmp_path / MARK).exists()
    tier = open_tier(tmp_path)
    assert "new" == tier.recovery.source
    tier.close()


def _ask(system: FakeSystem, name: str) -> FakeRequest:
    request = system.engine.submit(name, [(31 + place) % 89 for place in range(60)], 4)
    system.settle()
    return request


def _kill(system: FakeSystem, tier: DiskTier) -> None:
    tier.abandon()
    system.cache._tiers = ()
    system.close()


@pytest.mark.parametrize("weights", [1, 2], ids=["checkpoint's weights", "new weights"])
@pytest.mark.parametrize("is_killed", [False, True])
def test_an_engine_with_new_weights_is_started_anew(tmp_path: Path, weights: int, is_killed: bool) -> None:
    """Blocks from before and after new weights, then an engine with either: it computes its prompt."""
    tier = open_tier(tmp_path / "disk")
    system = FakeSystem(tmp_path, Namespace(model="fake"), FakeSystemOptions(), tiers=[tier])
    _ask(system, "old")
    assert system.engine.reset(new_weights=True)
    _ask(system, "new")
    system.cache.drain(5)
    _kill(system, tier) if is_killed else system.close()
    tier = open_tier(tmp_path / "disk")
    system = FakeSystem(tmp_path, Namespace(model="fake"), FakeSystemOptions(), tiers=[tier])
    system.engine.weights = weights
    request = _ask(system, "next")
    assert (0, request.expected_output()) == (request.num_loaded_tokens, request.output)
    system.close()


def _fail(_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
