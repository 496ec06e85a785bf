"""One process per directory: a lock file that names its holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
import weakref
from pathlib import Path

from kvtier.errors import TierBusyError, TierError

LOCK_NAME = "lock"
_MAX_TEXT_BYTES = 1024
_DYING_S = 2.0
"""how long the directory of a process that was killed may stay locked"""
_POLL_S = 0.01

_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


class DirectoryLock:
    """Holds a directory until ``release``, or until the process dies.

    The lock is the kernel's (flock), so nothing is left behind by a crash; the text in the file is for people.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        """Raises TierBusyError naming the holder, TierError where the lock file cannot be made.

        ``read_only``: leaves the file as it is, and does without it where there is none.
        """
        self._fd = -1
        path = directory / LOCK_NAME
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC if read_only else os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return
        except OSError as error:
            raise TierError(f"{path} cannot be opened ({error.strerror}): make the directory writable for this user") from error
        self._lock(path)
        _held.add(self)
        if not read_only:
            self._write_holder(path)

    def _lock(self, path: Path) -> None:
        until = time.monotonic() + _DYING_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._fd, _MAX_TEXT_BYTES, 0).decode("utf-8", "replace").strip() or "unknown"
                if not _has_ended(holder) or time.monotonic() > until:
                    self.release()
                    raise TierBusyError(
                        f"{path.parent} is in use by another process ({holder}): end it, or give each process a directory of its own"
                    ) from None
                time.sleep(_POLL_S)
            except OSError as error:
                self.release()
                raise TierError(f"{path} cannot be locked ({error.strerror}): use a file system with flock") from error
            else:
                return

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
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            self.forget()

    def forget(self) -> None:
        """Closes the file without unlocking it: what a forked child does with its parent's lock. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


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


def _forget_in_child() -> None:
    # A forked child shares the open file and would keep the directory locked after its parent's death.
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_in_child)
