"""Whole engines on a daemon, without a model: both halves, real copies, every byte of KV checked, while the daemon comes and goes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvtier.config import Config
from kvtier.connectors.messages import MoveJob
from kvtier.connectors.requests import DefaultSettings, Geometry
from kvtier.connectors.scheduler import SchedulerHalf
from kvtier.connectors.slot_part import SlotPart
from kvtier.connectors.tenancy import Tenancy
from kvtier.connectors.worker import WorkerHalf
from kvtier.copy.base import Movers
from kvtier.copy.cpu import NativeCopier
from kvtier.hashing import Namespace
from kvtier.memory.arena import Arena
from kvtier.serve.attachment import ServedArena
from kvtier.serve.channel import Attaching
from kvtier.serve.client import ServedCache
from kvtier.testing.copiers import FaultyCopier
from kvtier.testing.daemons import DaemonThread, break_link, hello, settings
from kvtier.testing.fake_engine import FakeEngine
from kvtier.testing.fake_kv import FakeKVMemory

BLOCK_TOKENS = 4
NAMESPACE = {"model": "fake"}


class ServedEngine:
    """An engine as a connector puts it together. ``num_polls``: its copies are asynchronous and take so many steps."""

    def __init__(self, path: Path, name: str, *, num_polls: int = 0, async_load: bool = False) -> None:
        self.memory = FakeKVMemory(num_ranks=1, num_layers=2, num_blocks=40, block_tokens=BLOCK_TOKENS)
        block_bytes = self.memory.engine_block_bytes
        more = {"namespace": NAMESPACE, "block_bytes": block_bytes, "block_tokens": BLOCK_TOKENS}
        section = settings(path, reconnect="10ms", deadline="5s")
        self.cache = ServedCache(Attaching(section, hello("scheduler", name, **more), num_workers=1))
        digest = Namespace(model="fake").digest
        geometry = Geometry(digest, BLOCK_TOKENS, BLOCK_TOKENS, num_workers=1, host_blocks=64)
        half = SchedulerHalf(self.cache, geometry, DefaultSettings(async_load=async_load), stores_are_async=num_polls > 0, strict=True)
        self.worker = WorkerHalf(None, Movers(), SlotPart(0, 1, block_bytes), strict=True)
        self._num_polls = num_polls
        self.num_attached = 0
        self.released: list[tuple[bool, bool]] = []
        """whether the arena was still mapped, and the worker still had it, when a copier was let go of"""
        self._arenas: dict[FaultyCopier, Arena] = {}
        self.served = ServedArena(section, hello("worker", name, namespace={}), self, self._copier, release=self._release)
        self.engine = FakeEngine(half, [self.worker], self.memory, token_budget=24)
        assert self.cache.wait_until_usable(20.0)

    def _copier(self, arena: Arena) -> FaultyCopier:
        copier = NativeCopier(self.memory.layout(0), arena_address=arena.address, arena_bytes=arena.capacity_bytes)
        faulty = FaultyCopier(copier, num_polls=self._num_polls)
        self._arenas[faulty] = arena
        return faulty

    def _release(self, copier: FaultyCopier) -> None:
        self.released.append((not self._arenas[copier]._closed, self.worker._copier is copier))

    def attach(self, arena: Arena, arena_id: str, prepared: FaultyCopier) -> None:
        self.num_attached += 1
        self.worker.attach(arena, Movers(prepared), arena_id)

    def detach(self) -> None:
        self.worker.detach()

    def step(self) -> None:
        self.served.enter()
        self.engine.step()
        self.served.leave()

    def settle(self) -> None:
        for _ in range(500):
            if not self.engine.requests and not self.engine.half.has_pending_work:
                return
            self.step()
        raise AssertionError("it does not come to an end")

    def loaded(self) -> int:
        return sum(request.num_loaded_tokens for request in self.engine.finished.values())

    def close(self) -> None:
        self.served.close()
        self.worker.close()
        self.engine.half.close()


def prompt(number: int, length: int = 20) -> list[int]:
    return [number * 100 + position for position in range(length)]


def ask(engine: ServedEngine, name: str, number: int) -> int:
    """Runs a request to its end; how many of its tokens were loaded."""
    request = engine.engine.submit(name, prompt(number), 3)
    engine.settle()
    assert request.expected_output() == request.output
    return request.num_loaded_tokens


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.002)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    return folder / "socket"


CONFIG = Config.from_mapping({"tiers": [{"type": "host", "capacity": 64 * 4096}]})


def test_one_engine_loads_what_another_one_computed(path: Path) -> None:
    """The halves of the connector are those of an embedded cache; only the cache below them is another."""
    daemon = DaemonThread(CONFIG, path)
    first, second = ServedEngine(path, "first"), ServedEngine(path, "second")
    assert [0, 16, 0] == [ask(first, "a", 1), ask(second, "b", 1), ask(second, "c", 2)]
    assert 16 == ask(first, "d", 2)
    assert 0 == first.cache.stats["connector.errors"]
    for engine in (first, second):
        engine.close()
    daemon.stop()


def test_an_idle_worker_lets_go_of_a_lost_arena(path: Path) -> None:
    """Between steps the old mapping is given up and the new one is made without a step; the next step uses it."""
    daemon = DaemonThread(CONFIG, path)
    engine = ServedEngine(path, "engine")
    ask(engine, "a", 1)
    daemon.stop()
    wait_for(lambda: engine.worker._copier is None)
    engine.cache.poll()
    assert not engine.cache.is_usable
    daemon = DaemonThread(CONFIG, path)
    assert engine.cache.wait_until_usable(20.0)
    assert [0, 16] == [ask(engine, "b", 1), ask(engine, "c", 1)]
    assert 2 == engine.num_attached
    assert [(True, False)] == engine.released
    engine.close()
    daemon.stop()


def test_what_was_never_attached_is_let_go_of_too(path: Path) -> None:
    """The daemon goes before a step takes the arena: what was made for it is released, while the arena is still mapped."""
    daemon = DaemonThread(CONFIG, path)
    engine = ServedEngine(path, "engine")
    daemon.stop()
    wait_for(lambda: engine.released)
    assert [(True, False)] == engine.released
    assert 0 == engine.num_attached
    engine.close()


def test_a_worker_in_the_middle_of_a_step_keeps_its_arena(path: Path) -> None:
    """What a step copies goes to the old mapping, which nobody else has; it is given up behind the step."""
    daemon = DaemonThread(CONFIG, path)
    engine = ServedEngine(path, "engine")
    ask(engine, "a", 1)
    engine.served.enter()
    daemon.stop()
    time.sleep(0.05)
    assert engine.worker._copier is not None
    engine.served.leave()
    wait_for(lambda: engine.worker._copier is None)
    engine.close()


def test_without_a_daemon_everything_is_computed(path: Path) -> None:
    """Every request ends with the right tokens, also those whose loads and stores were under way."""
    daemon = DaemonThread(CONFIG, path)
    engine = ServedEngine(path, "engine", num_polls=3, async_load=True)
    ask(engine, "a", 1)
    waiting = [engine.engine.submit(f"loading {number}", prompt(1), 2) for number in range(3)]
    storing = engine.engine.submit("storing", prompt(2), 2)
    for _ in range(2):
        engine.step()
    daemon.stop()
    engine.settle()
    for request in (*waiting, storing):
        assert request.expected_output() == request.output
    assert 0 == ask(engine, "alone", 1)
    assert engine.cache.stats["daemon.missed_calls"]
    engine.close()


def verify(engine: ServedEngine) -> None:
    """All that it has answered was right, and some of it was loaded."""
    engine.settle()
    for request in engine.engine.finished.values():
        if request.weights is not None and len(request.output) == request.max_new_tokens:
            assert request.expected_output() == request.output
    assert engine.loaded()
    engine.close()


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_events_gives_the_right_tokens(path: Path, seed: int) -> None:
    """Two engines, requests that share prompts, a daemon that is restarted, connections that break, weights that change: no wrong KV."""
    choose = random.Random(seed)
    daemon = DaemonThread(CONFIG, path)
    is_async = bool(seed % 2)
    engines = [ServedEngine(path, name, num_polls=2 * is_async, async_load=is_async) for name in ("first", "second")]
    names = iter(range(1 << 30))
    for _ in range(600):
        engine = choose.choice(engines)
        event = choose.random()
        if event < 0.25 and len(engine.engine.requests) < 6:
            engine.engine.submit(f"r{next(names)}", prompt(choose.randrange(6), choose.randrange(5, 40)), choose.randrange(1, 6))
        elif event < 0.27 and engine.engine.requests:
            engine.engine.abort(choose.choice(list(engine.engine.requests)))
        elif event < 0.28:
            engine.engine.reset(new_weights=True)
        elif event < 0.30:
            link = engine.cache._channel._link
            if link is not None:
                break_link(link)
        elif event < 0.315:
            stopping = threading.Thread(target=daemon.stop)
            stopping.start()
            while stopping.is_alive():
                engine.step()
            daemon = DaemonThread(CONFIG, path)
        elif event < 0.35:
            for one in engines:
                one.cache.poll()
                assert one.cache.wait_until_usable(20.0)
        else:
            engine.step()
    for engine in engines:
        verify(engine)
    cache = daemon.daemon.node.cache
    wait_for(lambda: not daemon.daemon._connections)
    wait_for(lambda: cache is None or {0} == set(cache.leftovers().values()))  # a connection is gone before what it held is given back
    daemon.stop()


def test_slots_of_another_arena_are_never_copied() -> None:
    """A worker that has mapped another arena than the orders are for, or none, copies nothing, whatever the generations say."""
    job = MoveJob(1, "a", (5, 6), (0, 2), (3, 3))
    generations = np.full(4, 3, np.uint32)
    assert [set(), {0, 1}] == [Tenancy(generations, "one").stale_positions(job, arena_id, 1) for arena_id in ("one", "two")]
    assert {0, 1} == Tenancy(None, "").stale_positions(job, "", 1)
