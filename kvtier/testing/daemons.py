"""Daemons and engines for tests: a daemon in a thread or a process, and engines without a model that copy real bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtier.config import Config, DaemonConfig
from kvtier.errors import DaemonError
from kvtier.memory.arena import Arena
from kvtier.memory.arena_file import PAGE_BYTES
from kvtier.serve.channel import Attaching
from kvtier.serve.client import ServedCache
from kvtier.serve.daemon import Daemon
from kvtier.serve.link import Link, connect
from kvtier.serve.messages import Hello, Mapped
from kvtier.types import BlockKey, SlotRef

BLOCK_BYTES = 8192
NAMESPACE: dict[str, int | str] = {"model": "test"}


def payload_of(key: bytes) -> bytes:
    """The only right content of a block."""
    return (hashlib.sha256(key).digest() * (BLOCK_BYTES // 32))[:BLOCK_BYTES]


def hello(role: Any, engine: str = "", **more: Any) -> Hello:
    """What an engine of the tests says first."""
    fields: dict[str, Any] = {"instance": f"{engine}-{time.monotonic_ns()}", "namespace": NAMESPACE, "block_bytes": BLOCK_BYTES}
    return Hello(role, engine, **{**fields, "block_tokens": 16, **more})


def settings(path: Path, **more: Any) -> DaemonConfig:
    """The ``daemon`` section of an engine in a test; patient, for a busy machine."""
    section = {"socket": str(path), "deadline": "5s", **more}
    return Config.from_mapping({"tiers": [{"type": "host", "capacity": 1 << 20}], "daemon": section}).daemon


class DaemonThread:
    """A daemon that a thread of this process runs. ``stop`` it."""

    def __init__(self, config: Config, path: Path) -> None:
        self.daemon = Daemon(config, path)
        self.problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the daemon as SIGTERM would. Raises what it died of."""
        self.daemon.stop()
        self._thread.join(30.0)
        assert not self._thread.is_alive(), "the daemon hangs"
        if self.problem is not None:
            raise self.problem

    def _run(self) -> None:
        try:
            self.daemon.run()
        except BaseException as error:
            self.problem = error
            raise


class DaemonProcess:
    """A daemon in a process of its own, by the command line. Close it."""

    def __init__(self, config_file: Path, path: Path) -> None:
        command = [sys.executable, "-m", "kvtier", "serve", "--config", str(config_file), "--socket", str(path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
        self.log = config_file.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 30
        while not is_listening(path):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the daemon does not start"
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to it."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9. Idempotent."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """SIGTERM, and waits. Idempotent."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


def is_listening(path: Path) -> bool:
    """Whether a daemon answers there: a stranger is told so."""
    try:
        connect(path, hello("control"), 5.0).close()
    except DaemonError as error:
        return "waits for a scheduler" in str(error)
    return True


def break_link(link: Link) -> None:
    """Ends a connection as the network would."""
    with contextlib.suppress(OSError):  # it has ended
        link._socket.shutdown(socket.SHUT_RDWR)


class EngineWithoutModel:
    """One scheduler and one worker of an engine: plans by a daemon, copies between bytes that follow from the keys and the arena."""

    worker: Link | None = None
    arena: Arena | None = None

    def __init__(self, path: Path, name: str, *, has_worker: bool = True, **more: Any) -> None:
        self._path, self._name = path, name
        self.cache = ServedCache(Attaching(settings(path, **more), hello("scheduler", name), num_workers=1))
        if has_worker:
            self.attach_worker()

    def attach_worker(self) -> None:
        """Maps the arena of the daemon that there is, in place of an earlier one."""
        self.detach_worker()
        self.attach_worker_of(self._path, self._name)

    def attach_worker_of(self, path: Path, name: str) -> None:
        """Becomes the worker of an engine, whose scheduler may be elsewhere and may still be on its way."""
        deadline = time.monotonic() + 20
        while self.worker is None:
            try:
                self.worker = connect(path, hello("worker", name), 5.0)
            except DaemonError:
                assert time.monotonic() < deadline, "no daemon"
                time.sleep(0.01)
        self.arena = Arena.open(self.worker.welcome.arena_path, self.worker.welcome.arena_bytes, huge_pages=False)
        assert not self.arena.created
        self.worker.tell(Mapped())
        self.worker.flush()

    def detach_worker(self) -> None:
        """Ends the worker's mapping and connection."""
        if self.arena is not None:
            self.arena.close()
        if self.worker is not None:
            self.worker.close()
        self.worker = self.arena = None

    def wait_until_usable(self, timeout_s: float = 20.0) -> None:
        """Polls until the daemon has said that the worker is there, and all host memory."""
        deadline = time.monotonic() + timeout_s
        while not self.cache.is_usable or self.cache.is_growing:
            assert time.monotonic() < deadline, "no session"
            self.cache.poll(0.005)
            time.sleep(0.001)

    def write(self, keys: Sequence[BlockKey], slots: Sequence[SlotRef]) -> None:
        """The worker's part of a store."""
        assert self.arena is not None
        for key, ref in zip(keys, slots, strict=True):
            self.arena.view(ref.slot * PAGE_BYTES, BLOCK_BYTES)[:] = payload_of(key)

    def is_right(self, keys: Sequence[BlockKey], slots: Sequence[SlotRef]) -> list[bool]:
        """The worker's part of a load: which blocks have their own bytes. One that got a new tenant says so by its generation."""
        assert self.arena is not None
        found = []
        for key, ref in zip(keys, slots, strict=False):
            is_same = bytes(self.arena.view(ref.slot * PAGE_BYTES, BLOCK_BYTES)) == payload_of(key)
            found.append(is_same or int(self.arena.generations[ref.slot]) != ref.generation)
        return found

    def store(self, keys: Sequence[BlockKey]) -> int:
        """A whole store. Returns how many blocks were new."""
        plan = self.cache.begin_store(keys, 0)
        if plan.slots:
            self.write([keys[position] for position in plan.positions], plan.slots)
            self.cache.commit_store(plan.job_id)
        self.cache.poll()
        return len(plan.slots)

    def load(self, keys: Sequence[BlockKey]) -> int:
        """A whole load of what is in host memory. Returns how many blocks came; raises AssertionError for one that is wrong."""
        plan = self.cache.begin_load(keys)
        assert all(self.is_right(keys, plan.slots)), "wrong KV"
        self.cache.end_load(plan.job_id)
        self.cache.poll()
        return len(plan.slots)

    def close(self) -> None:
        """Ends both."""
        self.detach_worker()
        self.cache.close()
