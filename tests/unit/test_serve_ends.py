"""How engines part from a daemon, in order and not, and how they get back to it."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvtier.config import Config
from kvtier.memory.arena import Arena
from kvtier.serve import attachment
from kvtier.serve.attachment import ServedArena
from kvtier.serve.channel import Attaching
from kvtier.serve.client import ServedCache
from kvtier.serve.link import Link, Reconnector
from kvtier.testing.daemons import BLOCK_BYTES, DaemonProcess, DaemonThread, EngineWithoutModel, hello, settings
from kvtier.testing.starts import refused_threads
from kvtier.types import BlockKey

NUM_SLOTS = 8


def keys_of(name: str, count: int = NUM_SLOTS) -> list[BlockKey]:
    return [BlockKey(hashlib.sha256(f"{name}{number}".encode()).digest()[:16]) for number in range(count)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a daemon's socket."""
    tmp_path.chmod(0o700)
    return tmp_path / "socket"


@pytest.fixture
def daemon(path: Path) -> Iterator[DaemonThread]:
    """With room for as many blocks as a test stores at once."""
    running = DaemonThread(Config.from_mapping({"tiers": [{"type": "host", "capacity": NUM_SLOTS * BLOCK_BYTES}]}), path)
    yield running
    running.stop()


def wait_until(condition: Callable[[], object], step: Callable[[], object] = lambda: None) -> None:
    """Does something again and again until a condition holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        step()
        time.sleep(0.005)


class Worker:
    """A worker between steps, whose copies end when the test says so."""

    def __init__(self, path: Path, name: str, prepare: Callable[[Arena], None] | None = None) -> None:
        self.has_arena = False
        self.num_prepared = 0
        self.prepare_problems: list[Exception] = []
        self.detach_problems: list[Exception] = []
        self.copies_have_ended = threading.Event()
        self.copies_have_ended.set()
        self.is_detaching = threading.Event()
        self.mapped: Arena | None = None
        section = settings(path, reconnect="10ms")
        self.served = ServedArena(section, hello("worker", name), self, prepare or self._prepare, release=lambda _: None)

    def attach(self, arena: Arena, arena_id: str, prepared: None) -> None:
        self.has_arena, self.mapped = True, arena

    def detach(self) -> None:
        self.is_detaching.set()
        if self.detach_problems:
            raise self.detach_problems.pop()
        assert self.copies_have_ended.wait(20)
        assert self.mapped is not None
        assert not self.mapped._closed, "copies went on into memory that was not there any more"
        self.has_arena = False

    def step(self) -> None:
        self.served.enter()
        self.served.leave()

    def _prepare(self, arena: Arena) -> None:
        self.num_prepared += 1
        if self.prepare_problems:
            raise self.prepare_problems.pop()


def wait_for_arena(engine: ServedCache, worker: Worker) -> None:
    """Steps until the engine may copy."""

    def step() -> None:
        engine.poll()
        worker.step()

    wait_until(lambda: engine.is_usable and worker.has_arena, step)


@pytest.mark.usefixtures("daemon")
def test_a_worker_that_closes_keeps_its_slots_until_its_copies_have_ended(path: Path) -> None:
    """Nobody gets a slot that is still being written, also where the worker's engine has said goodbye."""
    engine = ServedCache(Attaching(settings(path), hello("scheduler", "A"), num_workers=1))
    worker = Worker(path, "A")
    wait_for_arena(engine, worker)
    other = EngineWithoutModel(path, "B")
    other.wait_until_usable()
    assert NUM_SLOTS == len(engine.begin_store(keys_of("a"), 0).slots)
    worker.copies_have_ended.clear()
    engine.close()
    closing = threading.Thread(target=worker.served.close)
    closing.start()
    assert worker.is_detaching.wait(20)
    for _ in range(20):
        assert 0 == other.store(keys_of("b"))
        time.sleep(0.01)
    worker.copies_have_ended.set()
    closing.join(20)
    wait_until(lambda: NUM_SLOTS == other.store(keys_of("b")))
    assert NUM_SLOTS == other.load(keys_of("b"))
    other.close()


@pytest.mark.usefixtures("daemon")
def test_a_worker_that_cannot_end_its_copies_keeps_what_they_use(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The memory stays mapped and the daemon hears of no end, until it works."""
    engine = ServedCache(Attaching(settings(path), hello("scheduler", "A"), num_workers=1))
    worker = Worker(path, "A")
    wait_for_arena(engine, worker)
    worker.detach_problems = [RuntimeError("the device is lost")] * 3
    worker.served.close()
    assert not worker.has_arena
    assert 1 == caplog.text.count("does not let go")
    engine.close()


@pytest.mark.usefixtures("daemon")
def test_what_was_said_last_arrives(path: Path) -> None:
    """The blocks of an engine's last step are there for others when it has closed."""
    first, second = EngineWithoutModel(path, "A"), EngineWithoutModel(path, "B")
    first.wait_until_usable()
    second.wait_until_usable()
    plan = first.cache.begin_store(keys_of("a"), 0)
    first.write(keys_of("a"), plan.slots)
    first.cache.commit_store(plan.job_id)
    first.close()
    assert NUM_SLOTS == second.load(keys_of("a"))
    second.close()


@pytest.fixture
def frozen(path: Path) -> Iterator[tuple[DaemonProcess, EngineWithoutModel]]:
    """An engine with more to say than fits into a socket, and a daemon that does not read."""
    file = path.with_name("config.yaml")
    file.write_text("tiers:\n  - {type: host, capacity: 1MiB}\n")
    running = DaemonProcess(file, path)
    engine = EngineWithoutModel(path, "A", deadline="2s")
    engine.wait_until_usable()
    running.signal(signal.SIGSTOP)
    for _ in range(3):
        engine.cache.touch(keys_of("a", 60_000))
    yield running, engine
    running.signal(signal.SIGCONT)
    engine.close()
    running.close()


def test_a_poll_that_waits_goes_on_sending(frozen: tuple[DaemonProcess, EngineWithoutModel]) -> None:
    """And does not keep a processor busy with waiting for it."""
    running, engine = frozen
    threading.Timer(0.3, lambda: running.signal(signal.SIGCONT)).start()
    used_s = time.thread_time()
    engine.cache.poll(1.5)
    assert time.thread_time() - used_s < 0.2
    link = engine.cache._channel._link
    assert link is not None
    assert not link._outbox


def test_closing_waits_for_a_frozen_daemon_no_longer_than_for_an_answer(frozen: tuple[DaemonProcess, EngineWithoutModel]) -> None:
    """What it would have been told goes with the session."""
    _, engine = frozen
    began = time.monotonic()
    engine.cache.close()
    assert 1.5 < time.monotonic() - began < 8


def test_an_arena_that_cannot_be_prepared_is_tried_again(path: Path, daemon: DaemonThread, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever was raised: a library's error about a device, say."""
    engine = ServedCache(Attaching(settings(path), hello("scheduler", "A"), num_workers=1))
    worker = Worker(path, "A")
    worker.prepare_problems = [RuntimeError("out of pages to lock")]
    wait_for_arena(engine, worker)
    assert worker.num_prepared <= 2
    assert "out of pages to lock" in caplog.text or worker.num_prepared == 1
    worker.served.close()
    engine.close()


def test_what_never_works_is_tried_seldom(path: Path, daemon: DaemonThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt may reserve much memory."""
    monkeypatch.setattr(attachment, "LONGEST_PAUSE_S", 5.0)
    engine = ServedCache(Attaching(settings(path), hello("scheduler", "A"), num_workers=1))
    worker = Worker(path, "A")
    worker.prepare_problems = [RuntimeError("no device")] * 100
    time.sleep(1)
    assert worker.num_prepared <= 2
    worker.served.close()
    engine.close()


def _refusing_sockets(monkeypatch: pytest.MonkeyPatch) -> list[OSError]:
    """No socket can be made while the list holds an error."""
    problems: list[OSError] = []

    def make_or_refuse(family: int, kind: int) -> socket.socket:
        if problems:
            raise problems[0]
        return socket.socket(family, kind)

    names = SimpleNamespace(socket=make_or_refuse, AF_UNIX=socket.AF_UNIX, SOCK_STREAM=socket.SOCK_STREAM)
    monkeypatch.setattr("kvtier.serve.link.socket", names)
    return problems


def test_a_shortage_of_descriptors_passes(path: Path, daemon: DaemonThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that lost the daemon while it had none left gets it back afterwards."""
    engine = EngineWithoutModel(path, "A", reconnect="10ms")
    engine.wait_until_usable()
    link = engine.cache._channel._link
    assert link is not None
    problems = _refusing_sockets(monkeypatch)
    problems.append(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    link.close()
    engine.cache.poll()
    assert not engine.cache._channel.is_open
    time.sleep(0.1)
    problems.clear()
    wait_until(lambda: engine.cache._channel.is_open, engine.cache.poll)
    engine.close()


def test_an_attempt_that_fails_as_nobody_foresaw_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    """It is said once."""
    problems: list[Exception] = [ZeroDivisionError("x")] * 5
    link = object.__new__(Link)

    def attempt() -> Link:
        if problems:
            raise problems.pop()
        return link

    reconnector = Reconnector(attempt, 0.001)
    reconnector.start()
    wait_until(lambda: reconnector.take() is link)
    assert 1 == caplog.text.count("ZeroDivisionError: x")


def test_a_thread_that_cannot_begin_does_so_later() -> None:
    """Losing the daemon raises nothing into the engine's step, also where the system gives out no threads."""
    link = object.__new__(Link)
    reconnector = Reconnector(lambda: link, 0.001)
    with refused_threads("kvtier-reconnect"):
        reconnector.start()
        assert reconnector.take() is None
    wait_until(lambda: reconnector.take() is link)
    time.sleep(0.02)
    assert reconnector.take() is None


def test_a_worker_waits_for_the_memory_of_a_daemon_no_longer_than_the_daemon_lives(path: Path) -> None:
    """It was killed while it reserved host memory, of which a worker that registers memory with a device wants all."""
    file = path.with_name("config.yaml")
    file.write_text("tiers:\n  - {type: host, capacity: 1MiB}\n")
    daemon = DaemonProcess(file, path)
    engine = ServedCache(Attaching(settings(path, reconnect="10ms"), hello("scheduler", "A"), num_workers=1))
    is_waiting, num_waits = threading.Event(), 0

    def prepare(arena: Arena) -> None:
        nonlocal num_waits
        num_waits += 1
        if num_waits == 1:
            assert arena.wait_prefaulted(60)
            arena._finished = threading.Event()  # as if there were more to come
            is_waiting.set()
        assert arena.wait_prefaulted(60)

    worker = Worker(path, "A", prepare)
    assert is_waiting.wait(20)
    time.sleep(0.3)
    daemon.kill()
    daemon = DaemonProcess(file, path)
    wait_for_arena(engine, worker)
    assert 2 == num_waits
    worker.served.close()
    engine.close()
    daemon.close()


def test_closing_does_not_wait_for_a_daemon_that_does_not_answer(path: Path) -> None:
    """A worker that has mapped nothing has nothing to let go of."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    worker = Worker(path, "A")
    time.sleep(0.2)
    began = time.monotonic()
    worker.served.close()
    assert time.monotonic() - began < 5
    listener.close()
