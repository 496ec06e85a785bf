"""Which block lies in which slot of an arena: a file beside it in shared memory, for whoever takes the arena over after a crash.

Layout (native byte order): one page of header, then an entry of 128 bytes for each slot. Entries and header carry a digest of their own,
so one that a crash cut short counts as empty. A process that dies has written what it wrote, in its order; a machine that dies has no
shared memory left. So nothing is ever synced.

Whoever has the table open holds an exclusive ``flock`` on it, which the kernel drops when the process dies: nobody else takes it over or
removes it. Workers hold a lock on the arena alone, so a table without one belongs to nobody, whoever still has the arena mapped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from kvtier.errors import ArenaError
from kvtier.types import KEY_BYTES, BlockKey, BlockMeta

SUFFIX = ".slots"
"""behind the path of the arena"""
VERSION = 1
IDENTITY_BYTES = 16
CHECKSUM_BYTES = 16
MAX_TENANT_BYTES = 52
_MAGIC = b"KVTSLOTS"
_PAGE_BYTES = 4096
_DIGEST_BYTES = 8
_NO_DIGEST = bytes(_DIGEST_BYTES)
_HEADER = struct.Struct(f"={_DIGEST_BYTES}s8sIIQ{IDENTITY_BYTES}s")
"""digest, magic, version, bytes of an entry, bytes of a slot, identity"""
_ENTRY = struct.Struct(f"={_DIGEST_BYTES}sIIBB2x{KEY_BYTES}s{KEY_BYTES}sQ{CHECKSUM_BYTES}s{MAX_TENANT_BYTES}s")
"""digest, generation, slot, whether there is a parent, bytes of the tenant's name, key, parent, bytes of the block, checksum, tenant"""
_GENERATION = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class SlotEntry:
    """A block in a slot: valid as long as the slot has this generation and its bytes this checksum."""

    meta: BlockMeta
    tenant: str
    generation: int
    checksum: bytes


class SlotTable:
    """The table of one arena, mapped. One thread.

    Args:
        path: of the arena
        capacity_bytes: of the arena
        slot_bytes: of each slot, a multiple of 4096: blocks of one size only
        identity: of the model and layout; a table of another one is not opened

    Raises:
        ArenaError: from :meth:`create`: there is no room.
    """

    def __init__(self, path: str, fd: int, capacity_bytes: int, slot_bytes: int) -> None:
        """Maps the open file, which it closes. Use :meth:`create` or :meth:`open`."""
        self.path = path
        self._slot_pages = slot_bytes // _PAGE_BYTES
        self._num_slots = capacity_bytes // slot_bytes + 1
        try:
            self._mapping = mmap.mmap(fd, _file_bytes(capacity_bytes, slot_bytes))
        finally:
            os.close(fd)

    @classmethod
    def create(cls, arena_path: str, capacity_bytes: int, slot_bytes: int, identity: bytes) -> Self:
        """A new, empty table."""
        path = arena_path + SUFFIX
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Reserved now: a file system that is full when a page is touched kills the process.
                os.posix_fallocate(fd, 0, _file_bytes(capacity_bytes, slot_bytes))
                os.pwrite(fd, _header(slot_bytes, identity), 0)
            except OSError:
                os.close(fd)
                os.unlink(path)
                raise
            return cls(path, fd, capacity_bytes, slot_bytes)
        except OSError as error:
            raise ArenaError(f"cannot make the table of slots {path}: {error.strerror}") from error

    @classmethod
    def open(cls, arena_path: str, capacity_bytes: int, slot_bytes: int, identity: bytes) -> Self | None:
        """The table that is there; None where there is none of this user, version, size and identity, or somebody has it open."""
        path = arena_path + SUFFIX
        try:
            fd = _open_unused(path)
        except OSError:
            return None
        is_same = os.pread(fd, _HEADER.size, 0) == _header(slot_bytes, identity)
        if not is_same or os.fstat(fd).st_size != _file_bytes(capacity_bytes, slot_bytes):
            os.close(fd)
            return None
        return cls(path, fd, capacity_bytes, slot_bytes)

    def write(self, slot: int, entry: SlotEntry) -> None:
        """Notes who lives in a slot. Raises ValueError for a tenant whose name is too long."""
        tenant = entry.tenant.encode()
        if len(tenant) > MAX_TENANT_BYTES:
            raise ValueError(f"a tenant's name of {len(tenant)} bytes; allowed: {MAX_TENANT_BYTES}")
        key, parent, num_bytes = entry.meta
        fields = (entry.generation, slot, parent is not None, len(tenant), key, parent or b"", num_bytes, entry.checksum, tenant)
        packed = _ENTRY.pack(_NO_DIGEST, *fields)[_DIGEST_BYTES:]
        at = self._offset(slot)
        self._mapping[at : at + _ENTRY.size] = _digest(packed) + packed

    def erase(self, slot: int) -> None:
        """Nobody is known to live in a slot."""
        at = self._offset(slot)
        self._mapping[at : at + _DIGEST_BYTES] = _NO_DIGEST

    def holds(self, slot: int, generation: int) -> bool:
        """Whether there is an entry for a slot in this generation."""
        at = self._offset(slot)
        is_there = self._mapping[at : at + _DIGEST_BYTES] != _NO_DIGEST
        return is_there and generation == _GENERATION.unpack_from(self._mapping, at + _DIGEST_BYTES)[0]

    def entries(self) -> Iterator[tuple[int, SlotEntry]]:
        """The entries that are whole, with their slots."""
        for place in range(self._num_slots):
            at = _PAGE_BYTES + place * _ENTRY.size
            packed = self._mapping[at : at + _ENTRY.size]
            if packed[:_DIGEST_BYTES] == _NO_DIGEST or _digest(packed[_DIGEST_BYTES:]) != packed[:_DIGEST_BYTES]:
                continue
            _, generation, slot, has_parent, tenant_bytes, key, parent, num_bytes, checksum, tenant = _ENTRY.unpack(packed)
            meta = BlockMeta(BlockKey(key), BlockKey(parent) if has_parent else None, num_bytes)
            if slot // self._slot_pages == place:
                yield slot, SlotEntry(meta, tenant[:tenant_bytes].decode(), generation, checksum)

    def unlink(self) -> None:
        """Removes the file's name. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Unmaps it. Idempotent."""
        self._mapping.close()

    def _offset(self, slot: int) -> int:
        return _PAGE_BYTES + slot // self._slot_pages * _ENTRY.size


def remove_unused(path: str) -> None:
    """Removes a table that nobody has open. Raises OSError where the path leads to anything else; BlockingIOError: somebody has it open."""
    fd = _open_unused(path)
    try:
        os.unlink(path)
    finally:
        os.close(fd)


def _open_unused(path: str) -> int:
    """Opens a regular file of this user that nobody has open, and locks it. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "it is not a regular file of this user", path)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _file_bytes(capacity_bytes: int, slot_bytes: int) -> int:
    return _PAGE_BYTES + (capacity_bytes // slot_bytes + 1) * _ENTRY.size


def _header(slot_bytes: int, identity: bytes) -> bytes:
    packed = _HEADER.pack(_NO_DIGEST, _MAGIC, VERSION, _ENTRY.size, slot_bytes, identity)[_DIGEST_BYTES:]
    return _digest(packed) + packed


def _digest(packed: bytes) -> bytes:
    digest = hashlib.blake2b(packed, digest_size=_DIGEST_BYTES).digest()
    return digest if digest != _NO_DIGEST else b"\1" * _DIGEST_BYTES
