"""Another library's figures on the same work, in the same run: ``kvtier.bench.lmcache`` in a process of its own, round by round.

Where the library is not installed, or fails, there are no figures and the benchmark goes on; a failure is said in one line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

NAME = "lmcache"
PROGRAM = (sys.executable, "-m", "kvtier.bench.lmcache")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LMCACHE_LOG_LEVEL": "ERROR", "LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
ANSWER_LIMIT_S = 300.0
"""a peer that needs longer for its preparation or for one round is stopped"""
WARM_UP = 2
SCALE = {"us": 1e6, "ms": 1e3, "s": 1.0}


class Peer:
    """A peer at one piece of work. Not thread-safe; a context manager, which ends the process.

    Each call of ``run`` lets it do one round of a case; the first ``WARM_UP`` of them do not count. Where it is absent or has failed,
    ``run`` does nothing and there are no figures.
    """

    def __init__(self, work: str, **params: object) -> None:
        self._work = work
        self._seconds: dict[str, list[float]] = {}
        self._process: subprocess.Popen[str] | None = None
        if importlib.util.find_spec(NAME) is None:
            return
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [*PROGRAM, work, json.dumps(params)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    @property
    def is_running(self) -> bool:
        """There is a process that answers."""
        return self._process is not None

    def run(self, case: str) -> float:
        """One round of a case, in seconds; 0 where there is no peer."""
        if self._process is None:
            return 0.0
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(case + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says that it has ended
        answer = self._answer()
        if answer is None:
            return 0.0
        self._seconds.setdefault(case, []).append(float(answer))
        return float(answer)

    def rounds(self, case: str, count: int) -> Peer:
        """``count`` rounds of a case after those that warm up. Returns the peer."""
        for _ in range(count + WARM_UP):
            self.run(case)
        return self

    def seconds(self, case: str) -> float | None:
        """The median of a case; ``None`` where there is none."""
        counted = self._seconds.get(case, [])[WARM_UP:] or self._seconds.get(case, [])
        return statistics.median(counted) if counted else None

    def time(self, case: str, unit: str) -> Mapping[str, float]:
        """The ``peers`` of a record of times, in its unit."""
        return self._figure(case, lambda seconds: SCALE[unit] * seconds)

    def rate(self, case: str, num_bytes: int) -> Mapping[str, float]:
        """The ``peers`` of a record of rates in GB/s."""
        return self._figure(case, lambda seconds: num_bytes / seconds / 1e9)

    def _figure(self, case: str, convert: Callable[[float], float]) -> Mapping[str, float]:
        seconds = self.seconds(case)
        return {} if seconds is None else {NAME: convert(seconds)}

    def _answer(self) -> str | None:
        """The next line; where none comes the peer has failed and its figures are dropped."""
        assert self._process is not None
        assert self._process.stdout is not None
        timer = threading.Timer(ANSWER_LIMIT_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if line:
            return line.strip()
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or [f"ended with status {self._process.returncode}"]
        print(f"{NAME} gave no figures for {self._work}: {said[-1]}", file=sys.stderr)
        self._stop()
        self._seconds.clear()
        return None

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._errors.close()
            self._process = None
