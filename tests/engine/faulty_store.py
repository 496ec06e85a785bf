"""A real Valkey that a test started, and what can go wrong with it, from the process of the engine that uses it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from kvtier.testing.faults import FaultyValkey


class StoreWithFaults:
    """Tells the process that owns the store (``serve_faults``), through files, and waits until it is done."""

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


def serve_faults(directory: Path, store: FaultyValkey) -> None:
    """Makes the faults that the other process orders, until it says stop."""
    number = 1
    while True:
        order = directory / f"{number}.order"
        if not order.exists():
            time.sleep(0.005)
            continue
        verb, fault = json.loads(order.read_text())
        if verb != "stop":
            (store.begin if verb == "begin" else store.end)(fault)
        order.with_suffix(".done").touch()
        if verb == "stop":
            return
        number += 1
