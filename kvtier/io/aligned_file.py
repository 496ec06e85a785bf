"""Files read and written in whole pages, past the page cache where the file system allows it.

KV blocks are large and read at most once before they live in host memory again: caching them twice only pushes other
things out of memory.  ``O_DIRECT`` avoids that and the copy, at the price of page-aligned positions, lengths and memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

PAGE_BYTES = 4096
"""unit of positions, lengths and memory addresses; at least the logical block size of any current disk"""

_MAX_BUFFERS_PER_CALL = 1000
"""below the kernel's IOV_MAX of 1024"""

DirectMode = Literal["auto", "on", "off"]
"""``auto``: O_DIRECT, or the page cache where the file system refuses; ``on``: refusal is an error; ``off``: page cache"""


def round_up_to_page(num_bytes: int) -> int:
    """Smallest multiple of the page size that is not below ``num_bytes``."""
    return (num_bytes + PAGE_BYTES - 1) & -PAGE_BYTES


def is_page_aligned(buffer: memoryview) -> bool:
    """Whether the buffer starts at a page border. Read-only buffers count as unaligned: their address cannot be asked cheaply."""
    if buffer.readonly or not buffer.nbytes:
        return False
    return address_of(buffer) % PAGE_BYTES == 0


def address_of(buffer: memoryview) -> int:
    """Where a writable buffer that is not empty starts."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def preallocate(path: Path, size_bytes: int) -> bool:
    """Makes the file exactly ``size_bytes`` long with its blocks reserved; returns whether the file is new.

    A file that was created here is removed again when there is no room for it.  Raises OSError.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        is_new = True
    except FileExistsError:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        is_new = False
    try:
        if os.fstat(fd).st_size > size_bytes:
            os.ftruncate(fd, size_bytes)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(fd, size_bytes)  # a file system without reservation: "full" then shows up at a write
    except OSError:
        if is_new:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
    finally:
        os.close(fd)
    return is_new


class AlignedFile:
    """One open file. Positions and buffers given to it are multiples of ``PAGE_BYTES``.

    ``readv`` and ``writev`` may be called from several threads at once.  Where ``is_direct`` is true the buffers' memory
    must be page-aligned as well.
    """

    __slots__ = ("_direct", "_fd", "_may_give_up", "path")

    def __init__(self, path: Path, *, direct: DirectMode = "auto", writable: bool = True) -> None:
        """Opens an existing file. Raises OSError (EINVAL where ``direct="on"`` is refused)."""
        self.path = path
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self._direct = direct != "off"
        try:
            self._fd = os.open(path, flags | (os.O_DIRECT if self._direct else 0))
        except OSError as error:
            if not (direct == "auto" and error.errno == errno.EINVAL):
                raise
            self._direct = False
            self._fd = os.open(path, flags)
        self._may_give_up = self._direct and direct == "auto"

    @property
    def is_direct(self) -> bool:
        """Whether I/O still goes past the page cache."""
        return self._direct

    @property
    def fileno(self) -> int:
        """The open descriptor."""
        return self._fd

    @property
    def size_bytes(self) -> int:
        """Length of the file now."""
        return os.fstat(self._fd).st_size

    def writev(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Writes all buffers one after the other from ``offset``. Raises OSError; then any part may have been written."""
        remaining = list(buffers)
        while remaining:
            done = self._call(os.pwritev, remaining, offset)
            if done <= 0:
                raise OSError(errno.EIO, "the file took no bytes", str(self.path))
            offset += done
            remaining = without_leading(remaining, done)

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills the buffers one after the other from ``offset``; returns the bytes read, fewer only at the end of the file."""
        remaining = list(buffers)
        total = 0
        while remaining:
            done = self._call(os.preadv, remaining, offset + total)
            total += done
            if done <= 0 or done % PAGE_BYTES:
                break  # end of file
            remaining = without_leading(remaining, done)
        return total

    def sync(self) -> None:
        """Returns when everything written so far survives a power cut. Raises OSError."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Closes the descriptor. No call may be running. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def give_up_direct(self) -> bool:
        """After EINVAL: goes through the page cache from now on if it may. Returns whether it is worth trying again."""
        if not self._may_give_up:
            return False
        if self._direct:
            # Some file systems accept O_DIRECT at open and refuse the first transfer.
            logger.info("%s: the file system refuses direct I/O, using the page cache", self.path)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            self._direct = False
        return True

    def _call(self, function: object, buffers: list[memoryview], offset: int) -> int:
        batch = buffers[:_MAX_BUFFERS_PER_CALL]
        try:
            return int(function(self._fd, batch, offset))  # type: ignore[operator]
        except OSError as error:
            if error.errno != errno.EINVAL or not self.give_up_direct():
                raise
        return int(function(self._fd, batch, offset))  # type: ignore[operator]


def without_leading(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of the buffers after ``num_bytes`` were transferred."""
    for index, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[index + 1 :]]
        num_bytes -= len(buffer)
    return []


class Scratch:
    """Page-aligned working memory of one thread, handed out in page multiples until ``reset``."""

    __slots__ = ("_memory", "_used")

    def __init__(self) -> None:
        self._memory = memoryview(b"")
        self._used = 0

    def reset(self, num_bytes: int) -> None:
        """Takes everything back and makes sure that ``num_bytes`` can be handed out."""
        self._used = 0
        if len(self._memory) < num_bytes:
            self._memory = memoryview(mmap.mmap(-1, round_up_to_page(num_bytes)))

    def take(self, num_bytes: int) -> memoryview:
        """The next ``num_bytes`` (a multiple of the page size). The contents are arbitrary."""
        start = self._used
        self._used += num_bytes
        if self._used > len(self._memory):
            raise ValueError(f"{num_bytes} bytes asked for, {len(self._memory) - start} left")
        return self._memory[start : self._used]
