"""Engines on one daemon are killed with -9 under load: no lease is left, no block is corrupt, and the engine beside them goes on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from kvtier.serve.channel import Attaching
from kvtier.serve.client import ServedCache
from kvtier.testing import serve_victim
from kvtier.testing.daemons import BLOCK_BYTES, DaemonProcess, EngineWithoutModel, hello, settings
from kvtier.testing.serve_victim import NUM_PROMPTS, victim_keys

NUM_KILLS = 50
HOST_BLOCKS = 200
"""of 480 different ones: slots change hands all the time"""
DEADLINE_S = 2.0


class Survivor:
    """An engine that stores and loads all the time, in a thread, and verifies every block that it loads."""

    def __init__(self, path: Path) -> None:
        self.engine = EngineWithoutModel(path, "survivor", deadline=DEADLINE_S)
        self.engine.wait_until_usable()
        self.num_loaded = self.num_stored = 0
        self.longest_s = 0.0
        """that a step took, copies and everything"""
        self.problem: BaseException | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self._thread.join(30.0)
        if self.problem is not None:
            raise self.problem

    def _run(self) -> None:
        choose = random.Random(5)
        try:
            while not self._is_stopping:
                keys = victim_keys(choose.randrange(NUM_PROMPTS))
                start = time.monotonic()
                self.engine.cache.promote(keys)
                self.num_loaded += self.engine.load(keys)
                self.num_stored += self.engine.store(keys)
                self.longest_s = max(self.longest_s, time.monotonic() - start)
                time.sleep(0.001)
        except BaseException as error:  # noqa: BLE001 - thread boundary: the test raises it
            self.problem = error


def start_victim(path: Path, name: str, seed: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, serve_victim.__file__, str(path), name, str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


@pytest.mark.slow  # a scheduler and a worker are started fifty times
@pytest.mark.timeout(900)
def test_engines_are_killed_fifty_times(tmp_path: Path) -> None:
    """50 kills in the middle of copies, by workers that go on writing for a while: the rule of this module."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    tiers = [
        {"type": "host", "capacity": HOST_BLOCKS * BLOCK_BYTES},
        {"type": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB", "segment": "1MiB", "durable": False},
    ]
    config = folder / "kvtier.yaml"
    config.write_bytes(msgspec.json.encode({"tiers": tiers}))
    path = folder / "socket"
    with contextlib.closing(DaemonProcess(config, path)):
        survivor = Survivor(path)
        try:
            kill_victims(path, survivor)
        finally:
            survivor.stop()
        inspect(path, survivor)


def kill_victims(path: Path, survivor: Survivor) -> None:
    choose = random.Random(3)
    coming = start_victim(path, "victim-0", 0)
    for number in range(NUM_KILLS):
        victim = coming
        coming = start_victim(path, f"victim-{number + 1}", number + 1)
        try:
            assert victim.stdout is not None
            assert b"open\n" == victim.stdout.readline(), f"victim {number}, exit status {victim.poll()}"
            time.sleep(choose.uniform(0.0, 0.2))
            assert victim.poll() is None, f"exit status {victim.poll()}: {serve_victim.WRONG} means wrong KV"
        finally:
            end(victim if survivor.problem is None else coming)
        assert survivor.problem is None
    end(coming)


def end(victim: subprocess.Popen[bytes]) -> None:
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert victim.stdout is not None
    victim.stdout.close()


def inspect(path: Path, survivor: Survivor) -> None:
    asking = ServedCache(Attaching(settings(path, deadline="5s"), hello("control")))
    until = time.monotonic() + 10.0
    while (left := {name: count for name, count in asking.verbs.snapshot({}, {}).open.items() if count}) and time.monotonic() < until:
        time.sleep(0.1)
    assert {} == left
    assert [] == asking.check()
    for prompt in range(NUM_PROMPTS):  # every block that anybody left
        survivor.num_loaded += survivor.engine.load(victim_keys(prompt))
    assert 0 == survivor.engine.cache.stats["daemon.timeouts"], "it was kept waiting longer than the deadline"
    assert [1, 0] == [survivor.engine.cache.stats[name] for name in ("daemon.sessions", "daemon.lost")]
    assert survivor.num_loaded > 1000
    assert survivor.num_stored > 100
    print(f"{survivor.num_loaded} blocks loaded, {survivor.num_stored} stored, longest step {1000 * survivor.longest_s:.1f} ms")  # noqa: T201 - shown by pytest -s
    asking.close()
    survivor.engine.close()
