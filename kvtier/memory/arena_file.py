"""The file behind an arena: its header, who creates it, whether anybody lives on it.

Layout (native byte order; all processes run on one machine): one page of header, the table of generations (u32 per 4 KiB
page of payload), zeros up to a multiple of 2 MiB, payload.

Two locks say who is there.  Everybody who has the file mapped holds a shared ``flock`` for as long; the kernel drops it
when they die.  Creating, attaching and removing happen under an open-file-description lock on the first byte.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time

from kvtier.errors import ArenaError

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20
VERSION = 1
MAGIC = int.from_bytes(b"KVTARENA", "little")

# header fields: places of u64 words
FIELD_MAGIC, FIELD_VERSION, FIELD_CAPACITY, FIELD_PAYLOAD_OFFSET, FIELD_READY, FIELD_ERRNO, FIELD_FINAL = range(7)
HEADER_WORDS = 8
_HEADER = struct.Struct(f"={HEADER_WORDS}Q")

_SETUP_TIMEOUT_S = 30.0
_SETUP_RETRY_S = 0.005


def payload_offset_for(capacity_bytes: int) -> int:
    """Where the payload starts: behind the header and the generations, at a multiple of 2 MiB."""
    end = PAGE_BYTES + capacity_bytes // PAGE_BYTES * 4
    return -(-end // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


def open_for_setup(path: str) -> int:
    """Opens or creates the file and takes its set-up lock. The path leads to the file as long as the lock is held.

    Raises ArenaError where that cannot be done, or the lock is held by another process for half a minute.
    """
    deadline = time.monotonic() + _SETUP_TIMEOUT_S
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ArenaError(f"cannot open the arena {path}: {error.strerror}") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise ArenaError(f"{path} exists and is not a regular file of this user; choose another path or remove it")
            if try_setup_lock(fd) and leads_to(path, fd):
                return fd
            if time.monotonic() > deadline:
                raise ArenaError(f"another process has been setting up the arena {path} for {_SETUP_TIMEOUT_S:.0f} s")
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        time.sleep(_SETUP_RETRY_S)  # bounded by the deadline; only while another process creates or removes the file


def _lock_request(kind: int) -> bytes:
    """``struct flock`` for the first byte."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 1, 0)


def try_setup_lock(fd: int) -> bool:
    """Takes the set-up lock where nobody holds it. Belongs to the open file, so threads exclude one another as well."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock_request(fcntl.F_WRLCK))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def end_setup(fd: int) -> None:
    """Releases the set-up lock, also for children that were forked meanwhile."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock_request(fcntl.F_UNLCK))


def leads_to(path: str, fd: int) -> bool:
    """Whether ``path`` is the open file."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def nobody_lives(fd: int) -> bool:
    """Whether no process has the file mapped. Holds the life lock exclusively if so; call it under the set-up lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def live_on(fd: int) -> None:
    """Takes the shared life lock. It ends when the last copy of ``fd`` is closed, also by death."""
    fcntl.flock(fd, fcntl.LOCK_SH)


def is_arena_or_empty(fd: int) -> bool:
    """Whether kvtier may overwrite or delete the file."""
    head = os.pread(fd, 8, 0)
    return not head or int.from_bytes(head, "little") == MAGIC


def initialise(fd: int, path: str, capacity_bytes: int) -> None:
    """Makes a fresh arena file of zeros; only header and generations are reserved.

    Raises ArenaError where the file belongs to something else or there is not enough room.
    """
    if not is_arena_or_empty(fd):
        raise ArenaError(f"{path} exists and is not a kvtier arena; choose another path or remove it")
    payload_offset = payload_offset_for(capacity_bytes)
    os.ftruncate(fd, 0)
    check_room(path, payload_offset + capacity_bytes)
    # the header comes first, so that whatever a crash leaves is recognised as an arena
    os.pwrite(fd, _HEADER.pack(MAGIC, VERSION, capacity_bytes, payload_offset, 0, 0, 0, 0), 0)
    os.ftruncate(fd, payload_offset + capacity_bytes)
    os.posix_fallocate(fd, 0, payload_offset)


def verify(fd: int, path: str, capacity_bytes: int) -> None:
    """Raises ArenaError where the file is not an arena of this version and capacity."""
    head = os.pread(fd, _HEADER.size, 0)
    fields = _HEADER.unpack(head) if len(head) == _HEADER.size else (0,) * HEADER_WORDS
    if fields[FIELD_MAGIC] != MAGIC:
        raise ArenaError(f"{path} is in use and is not a kvtier arena; choose another path")
    if fields[FIELD_VERSION] != VERSION:
        raise ArenaError(f"the arena {path} has format {fields[FIELD_VERSION]}, this kvtier has {VERSION}; use one version everywhere")
    if fields[FIELD_CAPACITY] != capacity_bytes:
        raise ArenaError(
            f"the arena {path} exists with {fields[FIELD_CAPACITY]} bytes and is in use, but {capacity_bytes} were asked for; "
            "give all processes the same host capacity or another path"
        )
    expected_bytes = payload_offset_for(capacity_bytes) + capacity_bytes
    if os.fstat(fd).st_size != expected_bytes:
        raise ArenaError(f"the arena {path} has {os.fstat(fd).st_size} bytes instead of {expected_bytes}; something cut it off")


def take_over(fd: int, path: str, capacity_bytes: int, *, is_alone: bool) -> None:
    """Makes the caller the creator of a file that a dead process left, with all that is in it.

    Raises ArenaError where somebody lives on it, or it is not an arena of this version and capacity.
    """
    if not is_alone:
        raise ArenaError(f"the arena {path} is still in use; nobody can take it over")
    verify(fd, path, capacity_bytes)
    os.pwrite(fd, struct.pack("=2Q", 0, 0), 8 * FIELD_ERRNO)


def is_lived_on(path: str) -> bool:
    """Whether a process has the file mapped."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not nobody_lives(fd)
    finally:
        os.close(fd)


def check_room(path: str, num_bytes: int) -> None:
    """Raises ArenaError, saying how to mend it, where file system or memory have less than ``num_bytes`` left."""
    directory = os.path.dirname(os.path.abspath(path))
    space = os.statvfs(directory)
    # a tmpfs without a limit says that it has no blocks at all
    if space.f_blocks and space.f_bavail * space.f_frsize < num_bytes:
        raise ArenaError(
            f"the arena needs {to_words(num_bytes)} in {directory}, where {to_words(space.f_bavail * space.f_frsize)} of "
            f"{to_words(space.f_blocks * space.f_frsize)} are free: lower the host tier's capacity, or enlarge it "
            f"(mount -o remount,size=SIZE {directory}; docker run --shm-size=SIZE)"
        )
    memory_bytes = available_memory_bytes()
    if memory_bytes is not None and memory_bytes < num_bytes:
        raise ArenaError(
            f"the arena needs {to_words(num_bytes)} of memory, but only {to_words(memory_bytes)} are available: "
            "lower the host tier's capacity or give the machine or container more memory"
        )


def available_memory_bytes() -> int | None:
    """What this machine and container could give now, swap included; None where the kernel does not say."""
    limits: list[int] = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        limits.append(values["MemAvailable"] + values.get("SwapFree", 0))
    except (OSError, KeyError):
        pass
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limits.append(int(file.read()))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return min(limits, default=None)


def remove_stale(directory: str, prefix: str) -> list[str]:
    """Deletes arena files called ``prefix``... on which no process lives any more; returns their paths.

    Never touches a live arena, one that is being set up, another user's, or a file that is not an arena.
    """
    removed: list[str] = []
    try:
        names = sorted(name for name in os.listdir(directory) if name.startswith(prefix))
    except FileNotFoundError:
        return removed
    for name in names:
        path = os.path.join(directory, name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # another user's, a directory, or gone meanwhile
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or not try_setup_lock(fd) or not leads_to(path, fd):
                continue
            if nobody_lives(fd) and is_arena_or_empty(fd):
                os.unlink(path)
                removed.append(path)
        except OSError:
            continue
        finally:
            os.close(fd)
    return removed


def to_words(num_bytes: int) -> str:
    """A size for a message: ``512 bytes``, ``1.5 GiB``."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{num_bytes} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
