"""One process per directory: a lock file that names its holder, and a lock on the directory itself."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from kvtier.errors import TierBusyError, TierError
from kvtier.tiers.forks import leave_to_parent

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"
_MAX_TEXT_BYTES = 1024
_DYING_S = 2.0
"""how long the directory of a process that was killed may stay locked"""
_POLL_S = 0.01


class DirectoryLock:
    """Holds a directory until ``release``, or until the process dies.

    The locks are the kernel's (flock), so nothing is left behind by a crash; the text in the file is for people. The file may be deleted
    by whoever cleans up, and a new one would be free; the directory cannot be replaced without what is in it.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """Raises TierBusyError naming the holder, TierError where the lock file cannot be made.

        ``read_only``: leaves the file as it is, and does without it where there is none.
        """
        self._fd = self._directory_fd = -1
        path = directory / LOCK_NAME
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC if read_only else os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise TierError(f"{path} cannot be opened ({error.strerror}): make the directory writable for this user") from error
        leave_to_parent(self)
        if self._fd >= 0:
            self._lock(path)
        self._lock_directory(directory)
        if not read_only:
            self._write_holder(path)

    def _lock(self, path: Path) -> None:
        try:
            is_ours = _take(self._fd, lambda: _has_ended(self._holder()))
        except OSError as error:
            self.release()
            raise TierError(f"{path} cannot be locked ({error.strerror}): use a file system with flock") from error
        if not is_ours:
            self._refuse(path.parent, self._holder())

    def _lock_directory(self, directory: Path) -> None:
        """Who ends lets go of the file first, and who cleans up may lock a directory for a moment: both are waited for."""
        try:
            self._directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            is_ours = _take(self._directory_fd, lambda: True)
        except OSError as error:  # NFS, say: the file has to do
            logger.debug("%s is locked by its %s file alone: %s", directory, LOCK_NAME, error)
            return
        if not is_ours:
            self._refuse(directory, f"its {LOCK_NAME} file was deleted")

    def _refuse(self, directory: Path, holder: str) -> NoReturn:
        self.release()
        raise TierBusyError(f"{directory} is in use by another process ({holder}): end it, or give each process a directory of its own")

    def _holder(self) -> str:
        return os.pread(self._fd, _MAX_TEXT_BYTES, 0).decode("utf-8", "replace").strip() or "unknown"

    def _write_holder(self, path: Path) -> None:
        text = f"pid {os.getpid()} on {socket.gethostname()}: {' '.join(sys.argv)}"
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, text.encode("utf-8", "replace")[:_MAX_TEXT_BYTES], 0)
        except OSError as error:
            self.release()
            raise TierError(f"{path} cannot be written ({error.strerror}): free some space or make the directory writable") from error

    def release(self) -> None:
        """Lets the directory go, also where a forked child still has the file open. Idempotent."""
        for fd in (self._directory_fd, self._fd):  # who has got the file finds the directory free
            if fd >= 0:
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_UN)
        self.forget_in_child()

    def forget_in_child(self) -> None:
        """Closes file and directory without unlocking them: a child that shared them would keep them locked after its parent's death."""
        for fd in (self._directory_fd, self._fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._directory_fd = -1


def _take(fd: int, may_end_soon: Callable[[], bool]) -> bool:
    """Locks a file; whether nobody else keeps it. Waits a little for one who may. Raises OSError where it cannot be locked at all."""
    until = time.monotonic() + _DYING_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not may_end_soon() or time.monotonic() > until:
                return False
            time.sleep(_POLL_S)
        else:
            return True


def _has_ended(holder: str) -> bool:
    """Whether the process that the text names is gone: what it had under way in the kernel may keep its files open a little longer."""
    number, _, rest = holder.removeprefix("pid ").partition(" on ")
    if not number.isdecimal() or rest.partition(":")[0] != socket.gethostname():
        return False
    try:
        os.kill(int(number), 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, ProcessLookupError)
    return False
