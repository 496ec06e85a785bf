"""The node daemon with real sockets and a real arena: engines share blocks, and whatever one of them does the others go on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kvtier
from kvtier.cli import main
from kvtier.config import Config
from kvtier.engine import CacheEngine
from kvtier.errors import ControlError, DaemonError, QuotaError
from kvtier.hashing import Namespace
from kvtier.memory.arena_file import PAGE_BYTES
from kvtier.serve import failed_loads, frames, messages, session
from kvtier.serve.channel import Attaching
from kvtier.serve.client import ServedCache
from kvtier.serve.daemon import Daemon
from kvtier.serve.failed_loads import FailedLoads
from kvtier.serve.link import connect
from kvtier.serve.node import Node
from kvtier.testing.daemons import BLOCK_BYTES, DaemonProcess, DaemonThread, EngineWithoutModel, break_link, hello, payload_of, settings
from kvtier.testing.starts import nothing_left
from kvtier.types import BlockKey, PrefixMatch, StoreOrder

HOST_BLOCKS = 64


def keys_of(prompt: int, num_blocks: int) -> list[BlockKey]:
    return [BlockKey(prompt.to_bytes(8, "little") + position.to_bytes(8, "little")) for position in range(1, num_blocks + 1)]


def config_of(folder: Path, host_blocks: int = HOST_BLOCKS, **disk: Any) -> dict[str, Any]:
    tiers: list[dict[str, Any]] = [{"type": "host", "capacity": host_blocks * BLOCK_BYTES}]
    if disk.pop("disk", False):
        tiers.append({"type": "disk", "path": str(folder / "disk"), "capacity": "64MiB", "segment": "1MiB", **disk})
    return {"tiers": tiers}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir(mode=0o700)
    return made


class Served:
    """A daemon and its engines, all closed at the end; then nothing may be left open."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.path = folder / "socket"
        self.config = Config.from_mapping(config_of(folder, **more))
        self.thread = DaemonThread(self.config, self.path)
        self.engines: list[EngineWithoutModel] = []

    def engine(self, name: str, **more: Any) -> EngineWithoutModel:
        engine = EngineWithoutModel(self.path, name, **more)
        self.engines.append(engine)
        engine.wait_until_usable()
        return engine

    def open(self) -> dict[str, int]:
        """What is open in the daemon's books; asked as a controller would."""
        asking = ServedCache(Attaching(settings(self.path, deadline="5s"), hello("control")))
        try:
            return {name: count for name, count in asking.verbs.snapshot({}, {}).open.items() if count}
        finally:
            asking.close()

    def restart(self) -> None:
        self.thread.stop()
        self.thread = DaemonThread(self.config, self.path)

    def reattach(self, engine: EngineWithoutModel) -> None:
        """Once the engine has found the daemon again by itself, its worker maps the new arena."""
        wait_for(lambda: polled(engine)._channel.is_open)
        engine.attach_worker()
        engine.wait_until_usable()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        wait_for(lambda: not self.thread.daemon._connections)
        cache = self.thread.daemon.node.cache
        if cache is not None:
            wait_for(lambda: {0} == set(cache.leftovers().values()))
            assert [] == cache.check()
        self.thread.stop()


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    made = Served(folder)
    yield made
    made.close()


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.002)


def polled(engine: EngineWithoutModel) -> ServedCache:
    """The engine's cache after a step without anything to do."""
    engine.cache.poll(0.005)
    return engine.cache


# ---- sharing ----------------------------------------------------------------------------------------------------------


def test_what_one_engine_stored_another_one_loads(served: Served) -> None:
    """Blocks that one engine has committed are hits of the other, with their own bytes."""
    first, second = served.engine("first"), served.engine("second")
    keys = keys_of(1, 20)
    assert PrefixMatch(0, 0) == second.cache.match(keys)
    assert 20 == first.store(keys)
    assert PrefixMatch(20, 20) == second.cache.match(iter(keys))
    assert 20 == second.load(keys)
    assert 0 == second.store(keys), "what is there is not stored again"


def test_a_prompt_longer_than_one_question(folder: Path) -> None:
    """The keys of a long prompt go in several frames; the answer is one run."""
    served = Served(folder, host_blocks=400)
    engine = served.engine("engine")
    keys = keys_of(1, 300)
    assert 300 == engine.store(keys)
    assert [PrefixMatch(length, length) for length in (128, 129, 300)] == [engine.cache.match(keys[:length]) for length in (128, 129, 300)]
    assert PrefixMatch(300, 300) == engine.cache.match(keys + keys_of(2, 200))
    served.close()


def test_a_block_is_readable_only_when_committed(served: Served) -> None:
    """Between the plan and the commit nobody finds it; a store that was aborted never is found."""
    first, second = served.engine("first"), served.engine("second")
    plan = first.cache.begin_store(keys_of(1, 2), 0)
    assert 0 == second.cache.match(keys_of(1, 2)).hit_blocks
    assert 0 == len(second.cache.begin_store(keys_of(1, 2), 0).slots), "nor stores it at the same time"
    first.cache.abort_store(plan.job_id)
    first.cache.poll()
    wait_for(lambda: not served.open())
    assert 0 == second.cache.match(keys_of(1, 2)).hit_blocks


def test_pinned_blocks_stay_until_their_engine_goes(served: Served) -> None:
    """A pin keeps its blocks while others store more than there is room for; it ends with its session."""
    first, second = served.engine("first"), served.engine("second")
    first.store(keys_of(1, 8))
    first.cache.pin(keys_of(1, 8))
    for prompt in range(2, 40):
        second.store(keys_of(prompt, 8))
    assert 8 == second.cache.match(keys_of(1, 8)).ready_blocks
    first.close()
    for prompt in range(40, 80):
        second.store(keys_of(prompt, 8))
    assert 0 == second.cache.match(keys_of(1, 8)).ready_blocks


def test_a_reset_engine_sees_nothing_and_the_other_everything(served: Served) -> None:
    """After ``reset`` (its weights may have changed) an engine shares nothing more, in either direction, and finds what it stores then."""
    first, second = served.engine("first"), served.engine("second")
    first.store(keys_of(1, 4))
    under_way = first.cache.begin_store(keys_of(2, 4), 0)
    first.cache.reset()
    first.write(keys_of(2, 4), under_way.slots)
    first.cache.commit_store(under_way.job_id)
    assert [0, 0] == [first.cache.match(keys_of(prompt, 4)).hit_blocks for prompt in (1, 2)]
    assert [4, 0] == [second.cache.match(keys_of(prompt, 4)).hit_blocks for prompt in (1, 2)]
    second.store(keys_of(3, 4))
    assert 0 == first.cache.match(keys_of(3, 4)).hit_blocks
    assert 4 == first.store(keys_of(5, 4))
    assert 4 == first.load(keys_of(5, 4))
    assert 0 == second.cache.match(keys_of(5, 4)).hit_blocks


def test_events_of_all_engines(served: Served) -> None:
    """An engine that asked for events hears of blocks that others store."""
    cache = ServedCache(Attaching(settings(served.path), hello("scheduler", "listener", wants_events=True)))
    other = served.engine("other")
    other.store(keys_of(1, 3))
    heard: list[Any] = []
    while len(heard) < 3:
        cache.poll(0.01)
        heard += cache.take_events()
    assert [(True, "host")] * 3 == [(event.stored, event.tier) for event in heard]
    assert set(keys_of(1, 3)) == {event.meta.key for event in heard}
    cache.close()


# ---- engines that die -------------------------------------------------------------------------------------------------


def test_slots_of_a_dead_scheduler_wait_for_its_worker(served: Served) -> None:
    """A worker that outlives its scheduler may still write: its slots get no new tenant before it has gone, and nothing is leaked then."""
    doomed, other = served.engine("doomed"), served.engine("other")
    other.store(keys_of(1, 4))
    storing, loading = doomed.cache.begin_store(keys_of(2, 30), 0), doomed.cache.begin_load(keys_of(1, 4))
    taken = {ref.slot for ref in storing.slots}
    doomed.cache.close()
    wait_for(lambda: served.thread.daemon._members["doomed"].scheduler == 0)
    given = {ref.slot for prompt in range(3, 30) for ref in other.cache.begin_store(keys_of(prompt, 8), 0).slots}
    assert given
    assert not given & taken
    assert served.open()["stores"] > 1
    assert 4 == served.open()["leases"]
    for copy in list(other.cache._copies):
        other.cache.abort_store(copy)
    other.cache.poll()
    doomed.write(keys_of(2, 30), storing.slots)
    assert all(doomed.is_right(keys_of(1, 4), loading.slots))
    doomed.detach_worker()
    wait_for(lambda: not served.open())
    assert 0 == other.cache.match(keys_of(2, 1)).hit_blocks


def test_an_engine_of_two_workers(served: Served) -> None:
    """Nothing is copied before both have mapped the arena; a dead scheduler's slots wait for both to go."""
    served.engine("other")
    cache = ServedCache(Attaching(settings(served.path), hello("scheduler", "pair"), num_workers=2))
    workers = [connect(served.path, hello("worker", "pair"), 5.0) for _ in range(2)]
    workers[0].tell(messages.Mapped())
    workers[0].flush()
    assert not cache.wait_until_usable(0.3)
    assert not cache.begin_store(keys_of(1, 4), 0).slots
    workers[1].tell(messages.Mapped())
    workers[1].flush()
    assert cache.wait_until_usable(20.0)
    assert 4 == len(cache.begin_store(keys_of(1, 4), 0).slots)
    cache.close()
    wait_for(lambda: served.thread.daemon._members["pair"].scheduler == 0)
    workers[0].close()
    wait_for(lambda: len(served.thread.daemon._members["pair"].workers) == 1)
    assert {"stores": 1} == served.open()
    workers[1].close()
    wait_for(lambda: not served.open())
    assert "pair" not in served.thread.daemon._members


def test_what_one_engine_cannot_copy_others_keep(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed loads of an engine whose copies fail cost nobody a block. It is not promised them again for a while, then once more."""
    monkeypatch.setattr(failed_loads, "FIRST_WAIT_S", 0.5)
    broken, other = served.engine("broken"), served.engine("other")
    keys = keys_of(1, 8)
    other.store(keys)
    for _ in range(2):
        load = broken.cache.begin_load(keys)
        assert 8 == len(load.slots)
        broken.cache.end_load(load.job_id, {2, 3})
        assert PrefixMatch(2, 2) == broken.cache.match(keys)
        assert 2 == broken.cache.promote(keys)
        assert PrefixMatch(0, 0) == broken.cache.match(keys[2:])
        assert 2 == broken.load(keys)
        assert 0 == broken.store(keys), "they are there all the same"
        assert 8 == other.load(keys)
        wait_for(lambda: broken.cache.match(keys).ready_blocks == 8)
    assert 8 == broken.load(keys)
    with contextlib.closing(kvtier.connect(served.path)) as controller:
        assert 4 == controller.stats().result(10.0).counters["load.failed_blocks"]


def test_what_fails_again_is_kept_back_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as long each time, up to a bound, and from the beginning once it was loaded; no more keys than a bound are known."""
    now = 0.0
    failed = FailedLoads(lambda: now)
    key, other = keys_of(1, 2)
    for wait_s in (10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0, 3600.0, 3600.0):
        failed.add([key])
        now += wait_s - 1.0
        assert [other] == failed.loadable([other, key])
        now += 1.0
        assert [other, key] == failed.loadable([other, key])
    failed.discard([key])
    failed.add([key])
    now += 10.0
    assert [key] == failed.loadable([key])
    monkeypatch.setattr(failed_loads, "MAX_KEYS", 4)
    many = keys_of(2, 6)
    failed.add(many)
    assert many[:2] == failed.loadable(many)


def test_a_worker_that_outlives_its_scheduler_is_none_of_the_next_ones(served: Served) -> None:
    """The next scheduler of that name has no worker before its own has mapped the arena; then nothing keeps it."""
    killed = served.engine("engine")
    other = served.engine("other")
    other.store(keys_of(1, 4))
    killed.cache.close()
    started_again = EngineWithoutModel(served.path, "engine", has_worker=False)
    served.engines.append(started_again)
    assert not started_again.cache.wait_until_usable(0.3)
    assert not started_again.cache.begin_load(keys_of(1, 4)).slots
    started_again.attach_worker()
    started_again.wait_until_usable()
    assert 4 == started_again.load(keys_of(1, 4))
    killed.detach_worker()
    wait_for(lambda: len(served.thread.daemon._members["engine"].workers) == 1)
    assert polled(started_again).is_usable


def test_a_worker_may_come_before_the_scheduler_before_has_gone(served: Served) -> None:
    """One that is dying keeps its connection for a while. The new worker says which start of the engine it belongs to."""
    dying = ServedCache(Attaching(settings(served.path), hello("scheduler", "engine", launch="1"), num_workers=1))
    workers = [connect(served.path, hello("worker", "engine", launch=launch), 5.0) for launch in ("1", "2", "")]
    for worker in workers:
        worker.tell(messages.Mapped())
        worker.flush()
    assert dying.wait_until_usable(20.0)
    dying.close()
    wait_for(lambda: served.thread.daemon._members["engine"].scheduler == 0)
    num_ready = []
    for launch in ("2", "3", ""):
        with contextlib.closing(ServedCache(Attaching(settings(served.path), hello("scheduler", "engine", launch=launch)))):
            num_ready.append(served.thread.daemon._members["engine"].num_ready)
        wait_for(lambda: served.thread.daemon._members["engine"].scheduler == 0)
    assert [1, 0, 0] == num_ready
    for worker in workers:
        worker.close()


def test_copies_go_on_when_the_scheduler_comes_back(served: Served) -> None:
    """A session that was lost and found again: its copies count for nothing, and their slots are free once the worker has reported them."""
    engine = served.engine("engine", reconnect="10ms")
    engine.store(keys_of(1, 4))
    load, store = engine.cache.begin_load(keys_of(1, 4)), engine.cache.begin_store(keys_of(2, 4), 0)
    forgotten = engine.cache.begin_store(keys_of(3, 4), 0)
    link = engine.cache._channel._link
    assert link is not None
    break_link(link)
    engine.cache.commit_store(forgotten.job_id)
    wait_for(lambda: polled(engine).is_usable)
    assert {"stores": 1, "loads": 1, "leases": 4} == served.open()
    engine.cache.end_load(load.job_id)
    engine.cache.commit_store(store.job_id)
    engine.cache.poll()
    wait_for(lambda: not served.open())
    assert [4, 0, 0] == [engine.cache.match(keys_of(prompt, 4)).hit_blocks for prompt in (1, 2, 3)]
    assert 2 == engine.cache.stats["daemon.void_copies"]


def test_two_engines_of_one_name(served: Served) -> None:
    """The second one is told who has the name; once the first has gone it may come."""
    first = served.engine("twin")
    with pytest.raises(DaemonError, match=f"engine 'twin' is attached already, by process {os.getpid()}"):
        EngineWithoutModel(served.path, "twin")
    first.close()
    served.engine("twin")


# ---- a daemon that dies ------------------------------------------------------------------------------------------------


def start_daemon(folder: Path, **more: Any) -> DaemonProcess:
    config_file = folder / "kvtier.yaml"
    config_file.write_bytes(msgspec.json.encode(config_of(folder) | more))
    return DaemonProcess(config_file, folder / "socket")


def open_in(folder: Path) -> dict[str, int]:
    """What is open in the books of a daemon in a process of its own."""
    with contextlib.closing(ServedCache(Attaching(settings(folder / "socket", deadline="5s"), hello("control")))) as asking:
        return {name: count for name, count in asking.verbs.snapshot({}, {}).open.items() if count}


def left_in_memory(folder: Path) -> list[str]:
    """Files of the daemons of a socket."""
    prefix = Node(Config.from_mapping(config_of(folder)), folder / "socket")._prefix
    return sorted(name.removeprefix(prefix) for name in os.listdir("/dev/shm") if name.startswith(prefix))


@pytest.mark.parametrize("lets_go", ["at once", "later", "never"])
def test_a_killed_daemon_leaves_its_host_memory_to_the_next(folder: Path, lets_go: str) -> None:
    """kill -9: the next one has every block whose checksum was known, verified, once no worker has the memory mapped; one that never lets
    go costs the blocks, after 5 s.
    """
    daemon = start_daemon(folder)
    engine = EngineWithoutModel(folder / "socket", "engine", reconnect="10ms", deadline="5s")
    engine.wait_until_usable()
    keys = keys_of(1, 8)
    engine.store(keys)
    engine.store(keys_of(2, 8))
    engine.cache.verbs.clear((0,), None)
    engine.store(keys)
    wait_for(lambda: not open_in(folder))
    uncommitted = engine.cache.begin_store(keys_of(3, 4), 0)
    daemon.kill()
    old = engine.arena
    assert old is not None
    engine.arena = None
    if lets_go == "at once":
        old.close()
    daemon = start_daemon(folder)
    timer = threading.Timer(1.0, old.close) if lets_go == "later" else None
    if timer is not None:
        timer.start()
    assert PrefixMatch(0, 0) == engine.cache.match(keys)
    wait_for(lambda: polled(engine)._channel.is_open)
    engine.attach_worker()
    engine.wait_until_usable()
    engine.cache.commit_store(uncommitted.job_id)
    wait_for(lambda: not open_in(folder))
    num_kept = 0 if lets_go == "never" else 8
    assert [num_kept, 0, 0] == [engine.cache.match(keys_of(prompt, 8)).ready_blocks for prompt in (1, 2, 3)]
    assert num_kept == engine.load(keys)
    engine.store(keys_of(4, 30))
    assert 30 == engine.load(keys_of(4, 30))
    if lets_go == "never":
        old.close()
    engine.close()
    daemon.close()
    assert [] == [name for name in left_in_memory(folder) if not name.endswith(old.path[-16:])]


def test_host_memory_of_another_model_is_not_taken_over(folder: Path) -> None:
    """Nor with ``adopt: false``; what was left is removed."""
    for prompt, more, num_kept in ((1, {}, 8), (2, {"daemon": {"adopt": False}}, 0)):
        daemon = start_daemon(folder)
        engine = EngineWithoutModel(folder / "socket", "engine", deadline="5s")
        engine.wait_until_usable()
        assert 8 == engine.store(keys_of(prompt, 8))
        wait_for(lambda: not open_in(folder))
        daemon.kill()
        engine.close()
        daemon = start_daemon(folder, **more)
        engine = EngineWithoutModel(folder / "socket", "engine", deadline="5s")
        engine.wait_until_usable()
        wait_for(lambda: not open_in(folder))
        assert num_kept == engine.cache.match(keys_of(prompt, 8)).ready_blocks
        engine.close()
        daemon.kill()
    daemon = start_daemon(folder)
    other = ServedCache(Attaching(settings(folder / "socket"), hello("scheduler", "other", namespace={"model": "other"})))
    assert 2 == len(left_in_memory(folder)), "an arena and its table, both new"
    assert {"host": 0} == dict(other.num_blocks())
    other.close()
    daemon.close()
    assert [] == left_in_memory(folder)


def test_a_restarted_daemon_has_what_was_on_disk(folder: Path) -> None:
    """Without a daemon everything is a miss; the engine finds the new one by itself, which has what the old one wrote down."""
    served = Served(folder, disk=True)
    engine = served.engine("engine", reconnect="10ms")
    keys = keys_of(1, 8)
    engine.store(keys)
    wait_for(lambda: not served.open())
    load, store = engine.cache.begin_load(keys), engine.cache.begin_store(keys_of(2, 4), 0)
    served.thread.stop()
    assert PrefixMatch(0, 0) == engine.cache.match(keys)
    assert () == engine.cache.begin_load(keys).slots
    assert 4 == engine.cache.begin_store(keys_of(3, 4), 0).num_refused
    served.thread = DaemonThread(served.config, served.path)
    served.reattach(engine)
    engine.cache.end_load(load.job_id)
    engine.cache.commit_store(store.job_id)
    assert PrefixMatch(8, 0) == engine.cache.match(keys)
    assert 8 == engine.cache.promote(keys)
    wait_for(lambda: polled(engine).match(keys).ready_blocks == 8)
    assert 8 == engine.load(keys)
    assert [2, 1] == [engine.cache.stats[name] for name in ("daemon.sessions", "daemon.lost")]
    served.close()


@pytest.mark.parametrize("call", ["match", "promote", "begin_load", "begin_store", "hint"])
def test_a_frozen_daemon_costs_one_deadline(folder: Path, call: str) -> None:
    """SIGSTOP: the first call ends by the deadline with a miss, the next ones at once; with SIGCONT hits are back without a restart."""
    config_file = folder / "kvtier.yaml"
    config_file.write_bytes(msgspec.json.encode(config_of(folder)))
    path = folder / "socket"
    daemon = DaemonProcess(config_file, path)
    engine = EngineWithoutModel(path, "engine", deadline="100ms", reconnect="20ms", attach_timeout="200ms")
    engine.wait_until_usable()
    keys = keys_of(1, 4)
    engine.store(keys)
    assert 4 == engine.cache.match(keys).ready_blocks
    from kvtier.control.hints import SessionOver  # noqa: PLC0415

    calls: dict[str, Callable[[], object]] = {
        "match": lambda: engine.cache.match(keys).hit_blocks,
        "promote": lambda: engine.cache.promote(keys),
        "begin_load": lambda: len(engine.cache.begin_load(keys).slots),
        "begin_store": lambda: len(engine.cache.begin_store(keys_of(2, 4), 0).slots),
        "hint": lambda: engine.cache.hint(SessionOver("a")),
    }
    daemon.signal(signal.SIGSTOP)
    assert not calls[call]()
    assert 1 == engine.cache.stats["daemon.timeouts"]
    for each in calls.values():
        assert not each()
    engine.cache.touch(keys)
    engine.cache.poll()
    assert not engine.cache.is_usable
    daemon.signal(signal.SIGCONT)
    wait_for(lambda: polled(engine).is_usable)
    assert 4 == engine.load(keys)
    assert 1 == engine.cache.stats["daemon.timeouts"]
    engine.close()
    daemon.close()
    assert not path.exists()


# ---- who may come --------------------------------------------------------------------------------------------------------


def test_another_model_is_refused_and_both_are_named(served: Served) -> None:
    """One daemon serves one model in one layout; the error names both."""
    served.engine("first")
    other = hello("scheduler", "second", namespace={"model": "other", "block_tokens": 32})
    with pytest.raises(DaemonError, match=r"serves blocks of 16 tokens and 8192 bytes of model=test.*this engine has .*model=other"):
        ServedCache(Attaching(settings(served.path), other))
    with pytest.raises(DaemonError, match=r"8192 bytes of model=test.*16 tokens and 4096 bytes of model=test"):
        ServedCache(Attaching(settings(served.path), hello("scheduler", "second", block_bytes=4096)))
    served.engine("second")


def test_host_memory_too_small_for_a_block_is_an_error_of_the_engine(served: Served) -> None:
    """What is wrong with the daemon's settings for this model is told to the engine; the daemon lives."""
    with pytest.raises(DaemonError, match=r"tiers\[0\].capacity: .* bytes hold no block"):
        ServedCache(Attaching(settings(served.path), hello("scheduler", "large", block_bytes=1 << 30)))
    served.engine("small")


def test_versions_that_differ_are_both_named(served: Served) -> None:
    """Either side refuses another version of the protocol and says which is which."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(served.path))
        sock.sendall(struct.pack("<8sI", b"KVTIER\0\0", 99))
        received = b""
        while piece := sock.recv(4096):
            received += piece
    assert struct.pack("<8sI", b"KVTIER\0\0", messages.PROTOCOL) == received[: frames.PREAMBLE_BYTES]
    inbox = frames.Inbox(frames.FRAMES_FROM_DAEMON)
    inbox.feed(received[frames.PREAMBLE_BYTES :])
    (refused,) = inbox.frames()
    assert isinstance(refused, messages.Refused)
    assert f"the engine speaks version 99 of the protocol, this daemon version {messages.PROTOCOL}" in refused.message


def test_an_old_daemon_is_named_by_the_engine(folder: Path) -> None:
    """An engine that meets a daemon of another version says both versions."""
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(struct.pack("<8sI", b"KVTIER\0\0", 7))
                peer.recv(65536)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DaemonError, match=f"the daemon speaks version 7 of the protocol, this engine version {messages.PROTOCOL}"):
            connect(path, hello("scheduler", "engine"), 5.0)
        thread.join()


def test_no_daemon(folder: Path) -> None:
    """The error names the socket and what to do."""
    with pytest.raises(DaemonError, match=r"socket: No such file or directory. Is `kvtier serve` running there"):
        ServedCache(Attaching(settings(folder / "socket"), hello("scheduler", "engine")))


def test_only_this_user_gets_in(folder: Path) -> None:
    """The socket is 0600 in a directory that must be 0700; else neither side starts."""
    served = Served(folder)
    assert 0o600 == served.path.stat().st_mode & 0o777
    with pytest.raises(DaemonError, match=f"another daemon, process {os.getpid()}, serves on"):
        Daemon(served.config, served.path)
    folder.chmod(0o755)
    with pytest.raises(DaemonError, match=r"has mode 755 and owner .*; allowed: 700"):
        ServedCache(Attaching(settings(served.path), hello("scheduler", "engine")))
    with pytest.raises(DaemonError, match="has mode 755"):
        Daemon(served.config, folder / "other")
    folder.chmod(0o700)
    served.close()


def test_a_daemon_that_cannot_start_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither socket nor lock nor descriptors: the next one starts."""
    path = folder / "socket"
    config = Config.from_mapping(config_of(folder))

    def fail(*_: object, **__: object) -> None:
        raise OSError("no such luck")

    with nothing_left():
        with monkeypatch.context() as patch:
            patch.setattr(Node, "__init__", fail)
            with pytest.raises(OSError, match="no such luck"):
                Daemon(config, path)
        assert not path.exists()
        Daemon(config, path).close()


@pytest.mark.parametrize("what", ["file", "link", "folder"])
def test_nothing_but_a_socket_makes_room_for_the_socket(folder: Path, what: str) -> None:
    """Whatever else lies there, by a mistake in the path, stays; a dead daemon's socket does not."""
    path = folder / "socket"
    target = folder / "target"
    target.write_text("precious")
    if what == "file":
        path.write_text("precious")
    elif what == "link":
        path.symlink_to(target)
    else:
        path.mkdir()
    with pytest.raises(DaemonError, match=f"{path} is there and is no socket"):
        Daemon(Config.from_mapping(config_of(folder)), path)
    assert path.exists()
    assert "precious" == target.read_text()
    path.rmdir() if what == "folder" else path.unlink()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    Daemon(Config.from_mapping(config_of(folder)), path).close()


def test_a_peer_of_another_user_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says who connects; another user gets nothing."""
    monkeypatch.setattr("kvtier.serve.daemon.peer_of", lambda _: (1, os.geteuid() + 1))
    with pytest.raises(DaemonError, match=r"closed the connection|reset|Broken pipe"):
        connect(served.path, hello("scheduler", "engine"), 5.0)


@pytest.mark.parametrize(
    ("settings_of_file", "arguments", "reason"),
    [
        ({"tiers": [{"type": "host", "capacity": "1MiB"}]}, [], "daemon.socket is null and there is no --socket"),
        ({"tiers": [{"type": "gpu", "capacity": "1MiB"}, {"type": "host", "capacity": "1MiB"}]}, ["--socket", "s"], "tiers[0].type is gpu"),
        ({"tiers": []}, ["--socket", "s"], "there is no tier of type host"),
        (
            {"tiers": [{"type": "host", "capacity": "1MiB"}]},
            ["--socket", "/proc/nothing/s"],
            "the directory /proc/nothing of the daemon's socket",
        ),
        ({"tiers": [{"type": "host", "capacity": "1MiB"}]}, ["--socket", "x" * 120], "allowed: 107"),
    ],
)
def test_what_the_command_line_refuses(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings_of_file: dict[str, Any],
    arguments: list[str],
    reason: str,
) -> None:
    """Exit status 2 and what is wrong, before anything is opened."""
    monkeypatch.chdir(folder)
    (folder / "kvtier.yaml").write_bytes(msgspec.json.encode(settings_of_file))
    assert 2 == main(["serve", "--config", "kvtier.yaml", *arguments])
    assert reason in capsys.readouterr().err


# ---- the stores of a step ------------------------------------------------------------------------------------------------


def test_the_stores_of_a_step_are_one_question(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many orders travel in one frame, each gets its own answer; more than a frame holds travel in several."""
    engine = served.engine("a")
    asked: list[messages.Frame] = []
    channel = engine.cache._channel
    call = channel.call

    def noted(make: Callable[[int], messages.Frame], kind: Any) -> Any:
        asked.append(make(0))
        return call(lambda number: msgspec.structs.replace(asked[-1], call=number), kind)

    monkeypatch.setattr(channel, "call", noted)
    orders = [StoreOrder(keys_of(prompt, 2), 0) for prompt in range(1, 6)]
    plans = engine.cache.begin_stores([*orders, orders[0]])
    assert [2, 2, 2, 2, 2, 0] == [len(plan.slots) for plan in plans]
    assert 10 == len({ref.slot for plan in plans for ref in plan.slots})
    assert [messages.BeginStores] == [type(frame) for frame in asked]
    for order, plan in zip(orders, plans, strict=False):
        engine.write(order.keys, plan.slots)
        engine.cache.commit_store(plan.job_id)
    assert [2] * 5 == [engine.load(order.keys) for order in orders]
    asked.clear()
    monkeypatch.setattr(messages, "MAX_KEYS", 7)
    plans = engine.cache.begin_stores([StoreOrder(keys_of(prompt, 2), 0) for prompt in range(10, 15)])
    assert [2, 2, 1] == [len(frame.stores) for frame in asked if isinstance(frame, messages.BeginStores)]
    assert [2] * 5 == [len(plan.slots) for plan in plans]
    for plan in plans:
        engine.cache.abort_store(plan.job_id)


def test_what_follows_a_broken_store_is_asked_again(served: Served) -> None:
    """A store behind a block that is nowhere ends the answer, in a daemon as in the engine's process: orders keep their order."""
    engine = served.engine("a")
    orders = [StoreOrder(keys_of(1, 2), 0), StoreOrder(keys_of(2, 2), 1), StoreOrder(keys_of(3, 2), 0)]
    embedded = CacheEngine.open(served.config, namespace=Namespace(model="test"), block_bytes=BLOCK_BYTES)
    for cache in (engine.cache, embedded):
        plans = cache.begin_stores(orders)
        assert [False, True] == [plan.broken for plan in plans]
        cache.abort_store(plans[0].job_id)
    embedded.close()


# ---- hostile peers -------------------------------------------------------------------------------------------------------


def encoded(*sent: messages.Frame) -> bytes:
    return frames.preamble() + b"".join(map(frames.encode, sent))


HELLO = hello("scheduler", "hostile")
KEY = bytes(16)
HOSTILE: dict[str, bytes] = {
    "noise": b"GET / HTTP/1.1\r\n\r\n" * 10,
    "long frame": frames.preamble() + struct.pack("<I", 1 << 31),
    "not msgpack": frames.preamble() + struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
    "nested": frames.preamble() + struct.pack("<I", 100_000) + b"\x91" * 100_000,
    "no Hello": encoded(messages.Match(1, KEY)),
    "two Hellos": encoded(HELLO, HELLO),
    "strange namespace": encoded(hello("scheduler", "hostile", namespace={"color": "red"})),
    "half a key": encoded(HELLO, messages.Match(1, b"123")),
    "a key twice": encoded(HELLO, messages.BeginStores(1, (messages.Store(1, b"", KEY * 2, "", True),))),
    "a store of nothing": encoded(HELLO, messages.BeginStores(1, (messages.Store(1, KEY, b"", "", True),))),
    "no store": encoded(HELLO, messages.BeginStores(1, ())),
    "two stores of one number": encoded(HELLO, messages.BeginStores(1, (messages.Store(1, b"", KEY, "", True),) * 2)),
    "an end without a beginning": encoded(HELLO, messages.EndLoad(7, (), ())),
    "the other kind of end": encoded(HELLO, messages.BeginLoad(1, 1, KEY), messages.EndStore(1, (), False)),
    "blocks that a load does not have": encoded(HELLO, messages.BeginLoad(1, 1, KEY), messages.EndLoad(1, (5,), ())),
    "a job twice": encoded(HELLO, messages.BeginLoad(1, 1, KEY), messages.BeginLoad(2, 1, KEY)),
    "a pin twice": encoded(HELLO, messages.Pin(1, KEY, None), messages.Pin(1, KEY, None)),
    "negative": encoded(HELLO, messages.Unpin(-1)),
    "a hint of nothing": encoded(HELLO, messages.TakeHint(1, "ToolCall", {"color": "red"})),
    "a workflow of nothing": encoded(HELLO, messages.TakeHint(1, "Workflow", {"graph": 3, "running": []})),
    "an unknown tier": encoded(HELLO, messages.Verb(1, "clear", tiers=(9,))),
    "a strange quota": encoded(HELLO, messages.Verb(1, "set_quota", tiers=(0,), text="a", number=1.5)),
    "copies of a worker": encoded(hello("worker", "hostile"), messages.BeginLoad(1, 1, KEY)),
    "copies of a controller": encoded(hello("control"), messages.BeginLoad(1, 1, KEY)),
    "a question to nobody": encoded(HELLO, messages.Probe(1, b"", KEY, "", ("redis",))),
    "a question for nothing": encoded(HELLO, messages.Probe(1, KEY, b"", "", None)),
    "a scheduler without a name": encoded(hello("scheduler", "")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_peer_that_breaks_the_rules_loses_its_connection(served: Served, case: str) -> None:
    """Its connection is closed and what it held is given back; the others do not notice."""
    engine = served.engine("honest")
    engine.store(keys_of(1, 4))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(served.path))
        sock.settimeout(10.0)
        sock.sendall(HOSTILE[case])
        received = b""
        try:
            while piece := sock.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
    assert len(received) >= frames.PREAMBLE_BYTES
    assert 4 == engine.load(keys_of(1, 4))
    wait_for(lambda: not served.open())


@pytest.mark.parametrize("most", [session.MAX_COUNT, 2 * session.MAX_GROWTH + 5])
def test_counters_of_a_broken_peer_stay_numbers(served: Served, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Whatever it says that it has counted, the control API answers."""
    monkeypatch.setattr(session, "MAX_COUNT", most)
    huge = (1 << 63) - 1
    served.engine("honest")
    link, controller = connect(served.path, hello("control"), 5.0), kvtier.connect(served.path)
    counted = 0

    def is_counted() -> bool:
        return controller.stats().result(10.0).counters["lookup.hit_blocks"] == counted

    for _ in range(4):
        link.tell(messages.Poll(0.0, {"lookup.hit_blocks": huge}, ((huge, huge, 5e-324), (1, huge, 1e9)) * 5))
        link.flush()
        counted = min(counted + session.MAX_GROWTH, most)
        wait_for(is_counted)
    controller.close()
    link.close()


def test_counters_of_another_version_are_left_out(served: Served) -> None:
    """An engine that counts what its daemon does not, or leaves to itself, keeps its session."""
    served.engine("honest")
    link, controller = connect(served.path, hello("control"), 5.0), kvtier.connect(served.path)
    before = controller.stats().result(10.0).counters
    link.tell(messages.Poll(0.0, {"lookup.blocks": 1, "disk.corrupt_blocks": 5, "of.tomorrow": 3}, ()))
    link.flush()
    wait_for(lambda: controller.stats().result(10.0).counters["daemon.unknown_counters"] == 2)
    after = controller.stats().result(10.0).counters
    assert {"lookup.blocks": 1, "daemon.unknown_counters": 2} == {name: n - before[name] for name, n in after.items() if n != before[name]}
    link.flush()
    controller.close()
    link.close()


def test_random_bytes_never_end_the_daemon(served: Served) -> None:
    """A thousand damaged streams of frames: each is refused or understood."""
    import random  # noqa: PLC0415

    engine = served.engine("honest")
    engine.store(keys_of(1, 4))
    choose = random.Random(11)
    good = encoded(HELLO, messages.Match(1, KEY), messages.Pin(1, KEY, 5.0), messages.BeginLoad(2, 1, KEY), messages.Poll(0.0, {}, ()))
    for _ in range(1000):
        damaged = bytearray(good)
        for _ in range(choose.randrange(1, 4)):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(served.path))
            try:
                sock.sendall(damaged[: choose.randrange(1, len(damaged) + 1)])
            except BrokenPipeError:
                continue
    assert 4 == engine.load(keys_of(1, 4))
    wait_for(lambda: not served.open())


def test_more_connections_than_descriptors(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Those that are there are served, one line says so, and who waited gets in once others go."""
    engine = served.engine("honest")
    engine.store(keys_of(1, 4))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    peers = [socket.socket(socket.AF_UNIX) for _ in range(40)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(peer.fileno() for peer in peers) + 5, limits[1]))
    try:
        for peer in peers:
            peer.connect(str(served.path))
        for _ in range(50):
            assert 4 == engine.load(keys_of(1, 4))
        assert 1 == sum("no descriptor is left" in line for line in caplog.messages)
    finally:
        for peer in peers:
            peer.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    wait_for(lambda: not served.open())


def test_a_peer_that_does_not_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are not kept for ever: it loses its connection."""
    monkeypatch.setattr(frames, "MAX_QUEUED_BYTES", 100_000)
    engine = served.engine("honest")
    engine.store(keys_of(1, 8))
    question = frames.encode(messages.Verb(1, "snapshot"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(served.path))
        sock.sendall(encoded(hello("control")))
        sock.settimeout(10.0)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            sock.sendall(question * 100_000)
    assert 8 == engine.load(keys_of(1, 8))


# ---- control -------------------------------------------------------------------------------------------------------------


def test_the_control_api_over_a_daemon(folder: Path) -> None:
    """The same verbs as beside an engine; what the daemon refuses is the same error."""
    served = Served(folder, disk=True)
    engine = served.engine("engine")
    keys = keys_of(1, 8)
    engine.store(keys)
    controller = kvtier.connect(served.path)
    assert Namespace(model="test") == controller.namespace
    wait_for(lambda: controller.stats().result().num_blocks == {"host": 8, "disk": 8})
    found = controller.lookup(keys=keys).result()
    assert (8, 128, {"host", "disk"}) == (found.hit_blocks, found.hit_tokens, set(found.tiers))
    assert (True, {"host": True, "disk": True}) == ((health := controller.health(check_books=True).result()).ok, dict(health.online))
    pinned = controller.pin(keys=keys, ttl_s=600.0).result()
    assert 8 == pinned.num_blocks
    with pytest.raises(QuotaError, match="are pinned already"):
        controller.pin(keys=(engine.store(keys_of(2, 30)), keys_of(2, 30))[1]).result()
    controller.unpin(pinned).result()
    assert 8 == controller.clear(tier="host").result().num_blocks - 30
    assert 8 == controller.prefetch(keys=keys).result(10.0).ready_blocks
    controller.set_policy("host", "lru").result()
    assert {"a": 8192} == controller.quota("a", tier="host", num_bytes=8192).result()
    with pytest.raises(ControlError, match="shared"):
        controller.move(keys=keys, from_tier="host", to_tier="disk").result()
    assert controller.evict(keys=keys, tier="all").result().num_blocks
    assert 0 == engine.cache.match(keys).hit_blocks
    controller.close()
    served.close()


def test_a_controllers_pins_end_with_it(served: Served) -> None:
    """Nothing that a controller kept is left when it goes."""
    engine = served.engine("engine")
    engine.store(keys_of(1, 4))
    controller = kvtier.connect(served.path)
    controller.pin(keys=keys_of(1, 4)).result()
    wait_for(lambda: {"pins": 1} == served.open())  # the stored blocks are recorded in the background
    controller.close()
    wait_for(lambda: not served.open())


def test_blocks_are_as_large_as_the_tests_say(served: Served) -> None:
    """Payloads of neighbouring slots do not overlap, or the tests above would prove little."""
    engine = served.engine("engine")
    plan = engine.cache.begin_store(keys_of(1, 2), 0)
    assert BLOCK_BYTES // PAGE_BYTES == abs(plan.slots[0].slot - plan.slots[1].slot)
    assert payload_of(keys_of(1, 2)[0]) != payload_of(keys_of(1, 2)[1])
    engine.cache.abort_store(plan.job_id)
    engine.cache.poll()
