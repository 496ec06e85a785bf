"""Starts that fail: a limit on processes, and whether anything is left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def refused_threads(name: str) -> Iterator[None]:
    """Threads of this name cannot be started."""
    start = threading.Thread.start

    def start_or_refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with mock.patch.object(threading.Thread, "start", start_or_refuse):
        yield


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Fails where the block leaves a thread or a descriptor behind."""
    gc.collect()
    threads, num_open = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert set() == set(threading.enumerate()) - threads
    assert len(os.listdir("/proc/self/fd")) <= num_open
