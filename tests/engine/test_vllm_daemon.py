"""Real engines in processes of their own share one daemon: what one prefilled the others load, and a daemon that dies costs hits only."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from kvtier.testing.daemons import DaemonProcess
from tests.engine.harness import Result, assert_same, host_and_disk, loaded_tokens, run

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

    def __init__(self, folder: Path) -> None:
        (folder / "run").mkdir(mode=0o700)
        self.folder = folder
        self.socket = folder / "run" / "socket"
        self.settings = host_and_disk(folder / "tier", daemon={"socket": str(self.socket), "reconnect": "100ms", "deadline": "2s"})
        self._config = folder / "kvtier.yaml"
        self._config.write_text(yaml.dump(self.settings))
        self.daemon = self.start()

    def start(self) -> DaemonProcess:
        self.daemon = DaemonProcess(self._config, self.socket)
        return self.daemon

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
