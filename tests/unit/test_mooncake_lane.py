"""Mooncake's lane: so many calls at once and no more, reads before writes, nobody waits beyond a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from kvtier.tiers.remote import Deadline

pytest.importorskip("kvtier.tiers.mooncake", reason="Mooncake does not load", exc_type=ImportError)
from kvtier.tiers.mooncake.lane import Lane


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


@contextmanager
def held(lane: Lane) -> Iterator[None]:
    """A place is taken."""
    with lane.place(Deadline(5.0), is_read=False) as is_in:
        assert is_in
        yield


def enter(pool: ThreadPoolExecutor, lane: Lane, order: list[str], name: str, seconds: float = 20.0) -> Future[bool]:
    """Somebody enters for a moment, as soon as possible; returns once he waits. Reads are those whose names begin so."""
    waiting = threading.Event()

    def visit() -> bool:
        deadline = Deadline(seconds)
        waiting.set()
        with lane.place(deadline, is_read=name.startswith("read")) as is_in:
            if is_in:
                order.append(name)
            return is_in

    visitor = pool.submit(visit)
    waiting.wait()
    time.sleep(0.05)
    return visitor


def test_reads_go_before_writes_that_came_first(pool: ThreadPoolExecutor) -> None:
    """Whoever waits gets in when the place is free, reads first."""
    lane, order = Lane(1), list[str]()
    with held(lane):
        visitors = [enter(pool, lane, order, name) for name in ("write 1", "read 1", "write 2", "read 2")]
        assert [] == order
    assert [True] * 4 == [visitor.result() for visitor in visitors]
    assert {"read 1", "read 2"} == set(order[:2])
    assert {"write 1", "write 2"} == set(order[2:])


def test_no_more_at_once_than_there_are_places(pool: ThreadPoolExecutor) -> None:
    """Two of three get in."""
    lane, order = Lane(3), list[str]()
    with held(lane), held(lane):
        assert enter(pool, lane, order, "write 1").result()
        with held(lane):
            assert not enter(pool, lane, order, "read 1", 0.02).result()
    assert ["write 1"] == order


def test_a_read_that_gave_up_keeps_nobody_waiting(pool: ThreadPoolExecutor) -> None:
    """A write behind it gets in although no place has become free since."""
    lane, order = Lane(1), list[str]()
    with held(lane):
        write = enter(pool, lane, order, "write 1")
        assert not enter(pool, lane, order, "read 1", 0.02).result()
    assert write.result()


def test_a_closed_lane_lets_nobody_in(pool: ThreadPoolExecutor) -> None:
    """Who waits is told at once; who is in may stay."""
    lane, order = Lane(1), list[str]()
    with held(lane):
        visitor = enter(pool, lane, order, "read 1")
        lane.close()
        assert not visitor.result(5.0)
    assert not enter(pool, lane, order, "write 1").result(5.0)
