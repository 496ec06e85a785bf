"""The mark of a directory whose blocks are of this process alone: after a reset nobody else may find what is in it.

A reset says that the weights may be others under the name of the model.  What was stored before belongs to the old ones, what is stored
from then on to the new ones, and which of them the next process has nobody knows.  So a reset leaves a mark in the directory, and the
next opening empties a directory that has one.  Removals alone would not do: they reach the index file a little later, and a scan of the
records brings back what was removed.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from kvtier.tiers.disk.index_file import CLEAN_NAME, INDEX_NAME
from kvtier.tiers.disk.segments import segment_number, sync_directory

logger = logging.getLogger(__name__)

MARK_NAME = "reset"


class ResetMark:
    """Whether the directory of an open tier is to have the mark, and has it. Called with the tier's lock held, but for ``write``."""

    def __init__(self, directory: Path, lock: threading.Lock, *, durable: bool) -> None:
        self._settled = threading.Condition(lock)
        self.is_due = False
        """it is to be written, and nothing may be stored before"""
        self._is_written = False
        self._path = directory / MARK_NAME
        self._durable = durable

    def ask(self) -> None:
        """Has it written, where it is not there yet."""
        self.is_due = not self._is_written

    def write(self) -> None:
        """Makes the file; on return it survives the process, if durable also a power cut. Without the lock. Raises OSError."""
        os.close(os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))  # empty: it takes nothing of the capacity
        if self._durable:
            sync_directory(self._path.parent)

    def written(self) -> None:
        """``write`` has returned."""
        self._is_written = True
        self.is_due = False
        self._settled.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Waits until none is due; whether that was reached. Lets the lock go meanwhile."""
        return self._settled.wait_for(lambda: not self.is_due, timeout_s)


def empty_if_marked(directory: Path, *, durable: bool) -> bool:
    """Removes every block of a directory that has the mark, then the mark; whether it had one. Raises OSError.

    The mark goes last: where this is interrupted, the next opening goes on with it.
    """
    mark = directory / MARK_NAME
    if not mark.exists():
        return False
    with os.scandir(directory) as entries:
        doomed = [entry.path for entry in entries if entry.name in (CLEAN_NAME, INDEX_NAME) or segment_number(entry.name) is not None]
    for path in doomed:
        os.unlink(path)
    if durable:
        sync_directory(directory)
    mark.unlink()
    logger.info("%s was emptied: its cache was reset, and with which weights its blocks were computed is not known", directory)
    return True
