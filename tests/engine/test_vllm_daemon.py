"""Real engines in processes of their own share one daemon: what one prefilled the others load, and a daemon that dies costs hits only."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from kvtier.serve.channel import Attaching
from kvtier.serve.client import ServedCache
from kvtier.testing.daemons import DaemonProcess, hello, settings
from tests.engine.harness import Result, assert_same, host, host_and_disk, loaded_tokens, run, start

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
NEARLY_ALL = 1500
"""tokens, of 1728 in full blocks, that are loaded when all eight prompts come again"""


@pytest.fixture(scope="module")
def alone() -> list[Result]:
    """What vLLM alone answers."""
    answers: list[Result] = run("repeat", rounds=[False])["rounds"][0]
    return answers


class Machine:
    """One daemon, which can be started again, and the settings that it and its engines read."""

    def __init__(self, folder: Path, *, has_disk: bool = True) -> None:
        (folder / "run").mkdir(mode=0o700)
        self.folder = folder
        self.socket = folder / "run" / "socket"
        section = {"socket": str(self.socket), "reconnect": "100ms", "deadline": "2s"}
        self.settings = host_and_disk(folder / "tier", daemon=section) if has_disk else host(daemon=section)
        self._config = folder / "kvtier.yaml"
        self._config.write_text(yaml.dump(self.settings))
        self.daemon = self.start()

    def start(self) -> DaemonProcess:
        self.daemon = DaemonProcess(self._config, self.socket)
        return self.daemon

    def open(self) -> dict[str, int]:
        """Copies, leases and pins in the daemon's books, over all engines."""
        with contextlib.closing(ServedCache(Attaching(settings(self.socket, deadline="5s"), hello("control")))) as asking:
            return {name: count for name, count in asking.verbs.snapshot({}, {}).open.items() if count}

    def between_rounds(self, number: int, action: Callable[[], object]) -> None:
        """Does something after a round of an engine and lets it go on."""
        while not (self.folder / f"done-{number}").exists():
            time.sleep(0.01)
        action()
        (self.folder / f"go-{number}").touch()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.daemon.close()


def test_a_second_engine_answers_with_the_first_ones_kv(alone: list[Result], machine: Machine) -> None:
    """Two processes, one daemon: identical tokens, and what the first one computed the second one loads from the daemon's arena."""
    first = run("repeat", kvtier=machine.settings, rounds=[False])["rounds"][0]
    second = run("repeat", kvtier=machine.settings, rounds=[False])["rounds"][0]
    assert_same(alone, first)
    assert_same(alone, second)
    assert loaded_tokens(second)["host_tokens"] > NEARLY_ALL > loaded_tokens(first)["host_tokens"]


def test_two_engines_at_the_same_time(alone: list[Result], machine: Machine) -> None:
    """While one engine is alive another one comes, loads what it stored, and goes; the first one then loads what it had."""
    results: list[Result] = []

    def first() -> None:
        results.append(run("interrupted", kvtier=machine.settings, folder=str(machine.folder), num_rounds=2))

    thread = threading.Thread(target=first)
    thread.start()
    machine.between_rounds(0, lambda: results.append(run("repeat", kvtier=machine.settings, rounds=[False])))
    machine.between_rounds(1, lambda: None)
    thread.join()
    second, first_result = results[0]["rounds"][0], results[1]["rounds"]
    for answers in (second, *first_result):
        assert_same(alone, answers)
    assert loaded_tokens(second)["host_tokens"] > NEARLY_ALL
    assert loaded_tokens(first_result[1])["host_tokens"] > NEARLY_ALL


def test_a_daemon_that_is_killed_and_started_again(alone: list[Result], machine: Machine) -> None:
    """Round by round: with a daemon, without, with a new one that has what was on disk, frozen in the middle: always the same tokens."""

    def freeze_soon() -> None:
        threading.Timer(0.3, lambda: machine.daemon.signal(signal.SIGSTOP)).start()

    def start_again() -> None:
        machine.start()
        time.sleep(1.0)

    def thaw() -> None:
        machine.daemon.signal(signal.SIGCONT)
        time.sleep(1.0)

    def act() -> None:
        machine.between_rounds(0, machine.daemon.kill)
        machine.between_rounds(1, start_again)
        machine.between_rounds(2, freeze_soon)
        machine.between_rounds(3, thaw)
        machine.between_rounds(4, lambda: None)

    thread = threading.Thread(target=act)
    thread.start()
    result = run("interrupted", kvtier=machine.settings, folder=str(machine.folder), num_rounds=5, timeout_s=400.0)
    thread.join()
    loaded = [sum(loaded_tokens(answers).values()) for answers in result["rounds"]]
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert 0 == loaded[1], loaded
    assert loaded[2] > NEARLY_ALL, loaded
    assert loaded[4] > NEARLY_ALL, loaded


def test_chunks_are_shared_too(machine: Machine) -> None:
    """Chunks that one engine computed are put together by the next one, also after the daemon was killed: they lie on its disk by then."""
    expected = run("blended_briefly")["answers"]
    settings = {**machine.settings, "blend": {"enabled": True}}
    for stores in (True, False, False):
        answers = run("blended_briefly", kvtier=settings, stores=stores)["answers"]
        assert_same(expected, answers)
        assert all(answer["loaded"]["blend"]["tokens"] > 100 for answer in answers)
        if not stores:
            machine.daemon.kill()
            machine.start()


def test_a_killed_daemon_leaves_its_host_memory_to_the_next(alone: list[Result], tmp_path: Path) -> None:
    """Without a disk: what a real engine stored in the host memory of a daemon that was killed, it loads from the next one."""
    machine = Machine(tmp_path, has_disk=False)

    def start_again() -> None:
        machine.start()
        time.sleep(2.0)

    def act() -> None:
        wait_for((machine.folder / "done-0").exists)
        wait_for(lambda: not machine.open())
        machine.between_rounds(0, machine.daemon.kill)
        machine.between_rounds(1, start_again)
        machine.between_rounds(2, lambda: None)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    try:
        result = run("interrupted", kvtier=machine.settings, folder=str(machine.folder), num_rounds=3, timeout_s=400.0)
    finally:
        machine.daemon.close()
    loaded = [loaded_tokens(answers)["host_tokens"] for answers in result["rounds"]]
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert 0 == loaded[1], loaded
    assert loaded[2] > NEARLY_ALL, loaded


NUM_KILLS = 3
RECLAIMED_S = 10.0


def test_an_engine_is_killed_beside_another(machine: Machine) -> None:
    """kill -9 in the middle of its requests, while another engine works too: what it held is given back, what it committed the other one
    loads, and that one has the same tokens and is never kept waiting longer than the deadline.
    """
    turns = [number for kill in range(NUM_KILLS) for number in (NUM_KILLS + kill, kill)]
    alone = run("in_turns", sets=turns)["rounds"]
    results: list[Result] = []

    def survive() -> None:
        results.append(run("in_turns", kvtier=machine.settings, sets=turns, folder=str(machine.folder), timeout_s=500.0))

    survivor = threading.Thread(target=survive, daemon=True)
    survivor.start()
    for kill in range(NUM_KILLS):
        ready = machine.folder / f"ready-{kill}"
        victim = start(machine.folder, "endless", kvtier=machine.settings, set=kill, ready=str(ready))
        wait_for(lambda ready=ready, victim=victim: ready.exists() or victim.process.exitcode is not None)  # type: ignore[misc]
        (machine.folder / f"go-{2 * kill}").touch()
        time.sleep(0.3 * (kill + 1))  # what it is doing by then is different each time
        victim.kill()
        wait_for(lambda kill=kill: (machine.folder / f"done-{2 * kill}").exists())  # type: ignore[misc]
        wait_for(lambda: not machine.open(), RECLAIMED_S)
        (machine.folder / f"go-{2 * kill + 1}").touch()
        wait_for(lambda kill=kill: (machine.folder / f"done-{2 * kill + 1}").exists())  # type: ignore[misc]
    survivor.join()
    (result,) = results
    for expected, answers in zip(alone, result["rounds"], strict=True):
        assert_same(expected, answers)
    for answers in result["rounds"][1::2]:
        assert loaded_tokens(answers)["host_tokens"] > 0.8 * sum(answer["prompt_tokens"] for answer in answers)
    counters = result["counters"]
    assert [0, 0] == [counters.get(f"daemon.{name}", 0) for name in ("timeouts", "lost")], "it was kept waiting longer than the deadline"
    assert NUM_KILLS + 1 <= counters["daemon.sessions"]


def wait_for(condition: Callable[[], object], timeout_s: float = 240.0) -> None:
    """Fails where that does not come to pass in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.01)
