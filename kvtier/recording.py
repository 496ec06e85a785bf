"""A recording of what an engine asked of kvtier and what it got: written while serving, read by the simulator.

JSON lines. The first is an object (see ``Recorder``); each further one a list that begins with its kind and the time in seconds:

* ``["ask", t, request, prompt tokens, first block, limit block, ready, promised, place, blocks]``  how much of a prompt can be brought;
  again whenever the answer has changed. ``blocks``: those of the request, from ``place`` on, that no line before has named, as runs.
* ``["start", t, request, first block, blocks to load, job]``  the engine takes them (job 0: it loads nothing)
* ``["store", t, request, first block, end block, job, place, blocks]``  blocks that are full after this step (job 0: nothing was stored)
* ``["end", t, [[job, [failed, ...]], ...]]``  copies that are done, in order
* ``["evict", t, tier, blocks]``  blocks that left a tier, in order
* ``["finish", t, request, generated tokens]``, ``["reset", t]``, ``["lost", t, lines]``

Requests and blocks are numbered in the order in which they appear; runs are ``[first number, count, first number, count, ...]``. No prompt,
token or key is written.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from kvtier.types import BlockKey

_LOG = logging.getLogger(__name__)

VERSION = 1
HEADER = "kvtier_recording"
"""key of the version in the first line"""
MAX_WAITING = 200_000
"""lines that may wait for the writer; more are counted and lost"""
_PERIOD_S = 0.25


class Blocks(NamedTuple):
    """Blocks in a line: written as runs."""

    keys: Sequence[BlockKey]


class Recorder:
    """Appends lines to a file, from a thread of its own. ``add`` never waits and never raises.

    Args:
        path: the file; where there is one, the first free of ``path.1``, ``path.2``, ... is taken.
        header: what the simulator must know: sizes, settings.
        max_bytes: when the file has grown to this size, recording ends.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, max_bytes: int) -> None:
        self.num_lost = 0
        """lines that were not written, because of an error or because the writer is too slow; read by the thread that adds"""
        self.path: Path | None = None
        self._lines: deque[tuple[Any, ...]] = deque()
        self._numbers: dict[bytes, int] = {}
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_told_lost = 0
        self._is_closing = threading.Event()
        self._file = self._open(path)
        self._write(json.dumps({HEADER: VERSION, **header}))
        self._thread = threading.Thread(target=self._run, name="kvtier-record", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def is_open(self) -> bool:
        """Whether lines still reach the file."""
        return self._file is not None

    def add(self, *line: Any) -> None:
        """Takes a line; keys in it as :class:`Blocks`, which must not change afterwards."""
        if self._file is None:
            return
        if len(self._lines) >= MAX_WAITING:
            self.num_lost += 1
        else:
            self._lines.append(line)

    def close(self) -> None:
        """Writes what waits and closes the file. Idempotent."""
        atexit.unregister(self.close)
        self._is_closing.set()
        self._thread.join()
        self._drain()
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                _LOG.warning("the recording %s may miss its end: %s", self.path, error)

    def _open(self, path: Path) -> IO[str] | None:
        for number in range(1000):
            name = path.with_name(f"{path.name}.{number}") if number else path
            try:
                file = name.open("x", encoding="ascii")
            except FileExistsError:
                continue
            except OSError as error:
                _LOG.warning("nothing is recorded: %s: %s", name, error.strerror)
                self.num_lost += 1
                return None
            self.path = name
            return file
        _LOG.warning("nothing is recorded: %s and a thousand names like it are taken", path)
        return None

    def _run(self) -> None:
        while not self._is_closing.wait(_PERIOD_S):
            self._drain()

    def _drain(self) -> None:
        while self._lines and self._file is not None:
            line = self._lines.popleft()
            if self.num_lost > self._num_told_lost:
                self._write(json.dumps(["lost", line[1], self.num_lost - self._num_told_lost]))
                self._num_told_lost = self.num_lost
            self._write(json.dumps([self._runs(item.keys) if isinstance(item, Blocks) else item for item in line], separators=(",", ":")))
        if self._file is not None:
            self._attempt(self._file.flush)

    def _runs(self, keys: Sequence[BlockKey]) -> list[int]:
        numbers = self._numbers
        runs: list[int] = []
        for key in keys:
            number = numbers.setdefault(key, len(numbers))
            if runs and number == runs[-2] + runs[-1]:
                runs[-1] += 1
            else:
                runs += (number, 1)
        return runs

    def _write(self, text: str) -> None:
        file = self._file
        if file is None:
            return
        self._attempt(lambda: file.write(text + "\n"))
        self._num_bytes += len(text) + 1
        if self._num_bytes >= self._max_bytes:
            _LOG.info("the recording %s has reached its size and ends", self.path)
            self._attempt(file.close)
            self._file = None

    def _attempt(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            _LOG.warning("recording ends: %s: %s", self.path, error.strerror)
            self.num_lost += 1 + len(self._lines)
            self._lines.clear()
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
