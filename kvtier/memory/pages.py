"""Getting the pages of a shared mapping from the kernel before anyone needs them."""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np

_MADV_REMOVE = 9
_MADV_HUGEPAGE = 14
_MADV_DONTDUMP = 16
_MADV_POPULATE_WRITE = 23
_PAGE_BYTES = 4096
_SHMEM_ENABLED_PATH = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"

# through ctypes, because mmap.madvise holds the GIL while the kernel clears pages
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def populate(address: int, num_bytes: int, fd: int, file_offset: int) -> int:
    """Reserves pages of the file mapped at ``address`` and maps them writable. Contents stay as they are.

    Returns 0 or an errno (ENOSPC: the file system is full); never dies by a signal.  Releases the GIL.
    """
    if not _libc.madvise(address, num_bytes, _MADV_POPULATE_WRITE):
        return 0
    code = ctypes.get_errno()
    if code == errno.EINVAL:  # before Linux 5.14
        return populate_by_touch(address, num_bytes, fd, file_offset)
    # EFAULT stands for the signal that a touch would have raised
    return errno.ENOSPC if code == errno.EFAULT else code


def populate_by_touch(address: int, num_bytes: int, fd: int, file_offset: int) -> int:
    """What :func:`populate` does, by means every kernel has: reserve in the file, then read a byte of every page."""
    try:
        os.posix_fallocate(fd, file_offset, num_bytes)
    except OSError as error:
        return error.errno or errno.EIO
    bytes_there = memoryview((ctypes.c_ubyte * num_bytes).from_address(address)).cast("B")
    np.frombuffer(bytes_there, dtype=np.uint8)[::_PAGE_BYTES].max()
    return 0


def drop_pages(address: int, num_bytes: int) -> None:
    """Gives pages of a shared mapping back to the file system; they read as zeros afterwards. Best effort."""
    _libc.madvise(address, num_bytes, _MADV_REMOVE)


def leave_out_of_core_dumps(address: int, num_bytes: int) -> None:
    """A crash of the engine must not write the whole arena to disk. Best effort."""
    _libc.madvise(address, num_bytes, _MADV_DONTDUMP)


def use_huge_pages(address: int, num_bytes: int, path: str) -> bool:
    """Asks for 2 MiB pages where the kernel and the file system of ``path`` allow them; says whether they do."""
    return huge_pages_allowed(path) and not _libc.madvise(address, num_bytes, _MADV_HUGEPAGE)


def huge_pages_allowed(path: str) -> bool:
    """Whether files of ``path``'s file system may have huge pages.

    For a mounted tmpfs the mount option ``huge=`` decides (``mount -o remount,huge=advise /dev/shm``), unless
    ``shmem_enabled`` says ``deny`` or ``force`` for all.
    """
    try:
        with open(_SHMEM_ENABLED_PATH, encoding="ascii") as file:
            setting = file.read()
        if "[deny]" in setting or "[force]" in setting:
            return "[force]" in setting
        device = os.stat(path).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            mounts = file.read().splitlines()
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts:
        mount, _, source = line.partition(" - ")
        options = source.split(" ")[-1].split(",")
        if mount.split(" ")[2] == wanted:
            return source.startswith("tmpfs ") and any(f"huge={word}" in options for word in ("always", "within_size", "advise"))
    return False
