"""A real Valkey that a test started, and what can go wrong with it, from the process of the engine that uses it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Self

FAULTS = ("slow", "garbage", "frozen", "auth", "full", "cut", "killed")


class StoreWithFaults:
    """Tells the process that owns the server and the proxy (``serve_faults``), through files, and waits until it is done."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell("stop", "")

    def begin(self, fault: str) -> None:
        """From now on."""
        self._tell("begin", fault)

    def end(self, fault: str) -> None:
        """All is well again."""
        self._tell("end", fault)

    def _tell(self, verb: str, fault: str) -> None:
        self._number += 1
        order = self._directory / f"{self._number}.order"
        draft = order.with_suffix(".draft")
        draft.write_text(json.dumps([verb, fault]))
        draft.rename(order)
        while not order.with_suffix(".done").exists():
            time.sleep(0.01)


def serve_faults(directory: Path, server: Any, proxy: Any) -> None:
    """Makes the faults that the other process orders, until it says stop. ``server``: a ValkeyServer; ``proxy``: a FaultProxy before it."""
    number = 1
    while True:
        order = directory / f"{number}.order"
        if not order.exists():
            time.sleep(0.005)
            continue
        verb, fault = json.loads(order.read_text())
        if verb != "stop":
            _make(fault, server, proxy, is_on=verb == "begin")
        order.with_suffix(".done").touch()
        if verb == "stop":
            return
        number += 1


def _make(fault: str, server: Any, proxy: Any, *, is_on: bool) -> None:
    if fault == "slow":
        proxy.bytes_per_s = 1e6 if is_on else None
    elif fault == "garbage":
        proxy.garbage = b"\x00garbage\r\n" * 100 if is_on else None
    elif fault == "cut":
        proxy.is_refusing = is_on
    elif fault == "frozen":
        (server.freeze if is_on else server.thaw)()
    elif fault == "killed":
        (server.kill if is_on else server.start)()
    elif fault == "auth":
        password = "another-secret" if is_on else ""
        _command(server, "CONFIG", "SET", "requirepass", password, password="" if is_on else "another-secret")
        proxy.is_refusing = True  # those who are in would stay in
        time.sleep(0.2)
        proxy.is_refusing = False
    elif fault == "full":
        _command(server, "CONFIG", "SET", "maxmemory", "1mb" if is_on else "0")
    else:
        raise ValueError(fault)


def _command(server: Any, *arguments: str, password: str = "") -> None:
    import redis  # noqa: PLC0415 - only where a server is driven

    with redis.Redis(unix_socket_path=str(server.socket_path), password=password or None) as client:
        client.execute_command(*arguments)
