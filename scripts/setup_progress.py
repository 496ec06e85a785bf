"""What a person sees while ``bootstrap.py`` works: the steps, their times, and on failure what to do. Standard library only."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self  # an older Python lacks it, and must get as far as the message that it is too old

HEARTBEAT_S = 30.0
REPAINT_S = 0.5
NUM_LOG_LINES = 20

# Pattern in a failed step's log -> what the person can do about it. The first that matches is printed.
REMEDIES = (
    (
        r"(No matching distribution found for|Could not find a version that satisfies the requirement) torch==",
        "pip finds no CPU build of torch here. Name an index that has it, the one that PyTorch's install page names for CPU builds:\n"
        "    make KVTIER_TORCH_INDEX=<that index> demo\n"
        "or download its wheel into a folder and set PIP_FIND_LINKS to that folder.",
    ),
    (
        r"this torch is a CUDA build",
        "there is no GPU, but pip installed torch for CUDA. Remove .venv* and set KVTIER_TORCH_INDEX to the index that PyTorch's install\n"
        "page names for CPU builds; or set KVTIER_DEVICE=cuda if there is a GPU after all.",
    ),
    (
        r"No space left on device",
        "the disk is full. The set-up needs about 6 GiB where the checkout lies, and some in the temporary folder (TMPDIR).",
    ),
    (
        r"ensurepip is not available|No module named ensurepip|No module named venv",
        "install Python's venv module (Debian, Ubuntu: apt install python3-venv).",
    ),
    (r"Python\.h: No such file", "install Python's headers (Debian, Ubuntu: apt install python3-dev)."),
    (
        r"(?i)command '.*(gcc|g\+\+|cc|c\+\+|clang).* (failed|returned non-zero)",
        "the native extension does not build with this compiler: see the log; another one can be named with CXX=...",
    ),
    (
        r"NewConnectionError|Temporary failure in name resolution|ReadTimeout|Connection(Reset)?Error|Max retries exceeded|ProxyError",
        "the package index could not be reached. Check the network (or pip's settings), then run the command again: it goes on from here.",
    ),
    (
        r"No matching distribution found",
        "pip's index does not have this package for this Python and platform. Try another Python: make PYTHON=python3.11 ...",
    ),
)


class SetupError(Exception):
    """The set-up cannot go on. The message says what failed and what to do."""


def advice_for(log: Path) -> str:
    """The end of the log, where the whole of it is, and the first remedy that fits."""
    text = log.read_text(errors="replace")
    text = text[text.rfind("\n$ ") + 1 :]  # the last command's part
    tail = "\n".join("    | " + line for line in text.splitlines()[-NUM_LOG_LINES:])
    remedy = next(
        (remedy for pattern, remedy in REMEDIES if re.search(pattern, text)),
        "read the end of the log above; a second run goes on from here.",
    )
    return f"{tail}\nThe whole log: {log}\nWhat to do: {remedy}"


class Progress:
    """Prints each task when it starts and when it ends; between, a living line on a terminal, else a line every 30 s.

    Several threads may run tasks at once. Use as a context manager.
    """

    def __init__(self) -> None:
        self.num_tasks = 0
        self._live = sys.stdout.isatty()
        self._lock = threading.Lock()
        self._running: dict[str, tuple[float, Path]] = {}
        self._stop = threading.Event()
        self._painter = threading.Thread(target=self._paint, name="setup-progress", daemon=True)

    def __enter__(self) -> Self:
        self._painter.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._painter.join()

    @contextmanager
    def task(self, title: str, log: Path) -> Iterator[None]:
        """Shows ``title`` as running for as long as the block does."""
        started_s = time.monotonic()
        with self._lock:
            if not self.num_tasks:
                self._print(f"Setting up inside the checkout (only the first time; logs in {log.parent})")
            self.num_tasks += 1
            self._running[title] = (started_s, log)
            if not self._live:
                self._print(f"  {title} ...")
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            with self._lock:
                del self._running[title]
                self._print(f"  {title:<64} {outcome} {time.monotonic() - started_s:4.0f} s")

    def _print(self, line: str) -> None:
        print(("\r\033[K" if self._live else "") + line, flush=True)

    def _paint(self) -> None:
        while not self._stop.wait(REPAINT_S if self._live else HEARTBEAT_S):
            with self._lock:
                running = [f"{title} {time.monotonic() - since:.0f} s{doing(log)}" for title, (since, log) in self._running.items()]
                if running and self._live:
                    print("\r\033[K  " + " | ".join(running)[:150], end="", flush=True)
                elif running:
                    self._print("  ... " + " | ".join(running))


def doing(log: Path) -> str:
    """What pip is at, out of its log: the package's name, or nothing."""
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 4096))
        tail = file.read().decode(errors="replace")
    if tail.rfind("Installing collected packages") > tail.rfind("Collecting"):
        return ", unpacking"
    collecting = re.findall(r"^Collecting ([\w.-]+)", tail, re.MULTILINE)
    return ", " + collecting[-1] if collecting else ""
