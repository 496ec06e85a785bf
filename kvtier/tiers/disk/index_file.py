"""The durable index: an LMDB file from places to index entries, and who may trust it.

Keys are places, not block keys: a place has at most one tenant, so a new tenant's entry replaces the old one by itself,
blocks stored together share index pages, and the file cannot name two blocks in one place.

LMDB trusts what it maps.  Therefore this process maps a file only if it wrote every byte of it: a new one, or one whose
digest is that of the ``clean`` file that the last close left.  Any other file is read by ``salvage`` in a child process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lmdb
import xxhash

from kvtier.errors import TierFormatError
from kvtier.io import preallocate
from kvtier.tiers.disk.format import ENTRY, PLACE_BYTES, ROW_BYTES, SEQUENCE_KEY, is_row_intact, pack_place, pack_sequence
from kvtier.tiers.disk.segments import sync_directory
from kvtier.tiers.record import FORMAT_VERSION, pack_text, parse_text

logger = logging.getLogger(__name__)

INDEX_NAME = "index.mdb"
CLEAN_NAME = "clean"
_NEW_SUFFIX = ".new"
_CLEAN_TITLE = "kvtier disk tier closed cleanly"
_SALVAGE_TIMEOUT_S = 120.0
_CHUNK_BYTES = 1 << 20


class IndexFileError(OSError):
    """LMDB refused something. After it the file is to be given up and made anew."""


@contextlib.contextmanager
def _lmdb_errors_as_os_errors() -> Iterator[None]:
    try:
        yield
    except lmdb.Error as error:
        raise IndexFileError(f"LMDB: {error}") from error


class IndexFile:
    """An LMDB file that this process vouches for. Used by one thread at a time. Methods raise OSError."""

    def __init__(self, environment: lmdb.Environment, path: Path, *, durable: bool) -> None:
        self._environment = environment
        self._path = path
        self._durable = durable

    @property
    def directory(self) -> Path:
        """Where the file lies."""
        return self._path.parent

    @property
    def is_durable(self) -> bool:
        """Whether commits survive a power cut."""
        return self._durable

    @classmethod
    @_lmdb_errors_as_os_errors()
    def create(cls, directory: Path, map_bytes: int, rows: Iterable[bytes], next_sequence: int, *, durable: bool) -> IndexFile:
        """A new file with these rows (ascending places), complete before it takes the place of an older one."""
        path = directory / INDEX_NAME
        new_path = directory / (INDEX_NAME + _NEW_SUFFIX)
        new_path.unlink(missing_ok=True)
        environment = _open(new_path, map_bytes, durable=durable)
        try:
            with environment.begin(write=True) as transaction:
                cursor = transaction.cursor()
                cursor.putmulti(((row[:PLACE_BYTES], row[PLACE_BYTES:]) for row in rows), append=True)
                cursor.put(SEQUENCE_KEY, pack_sequence(next_sequence))
            preallocate(new_path, map_bytes)  # so that the index itself never meets a full disk
            if durable:  # else a power cut may leave anything here, and the next opening will see that it is not vouched for
                environment.sync(True)
            os.rename(new_path, path)
            if durable:
                sync_directory(directory)
        except BaseException:
            environment.close()
            new_path.unlink(missing_ok=True)
            raise
        return cls(environment, path, durable=durable)

    @classmethod
    @_lmdb_errors_as_os_errors()
    def open_proven(cls, directory: Path, map_bytes: int, *, durable: bool) -> IndexFile:
        """Opens the file that ``read_proof`` found to be right. The proof must have been withdrawn before."""
        path = directory / INDEX_NAME
        return cls(_open(path, map_bytes, durable=durable), path, durable=durable)

    @_lmdb_errors_as_os_errors()
    def rows(self) -> list[bytes]:
        """All rows, places ascending, the row of the sequence number last."""
        with self._environment.begin() as transaction:
            return [key + value for key, value in transaction.cursor()]

    @_lmdb_errors_as_os_errors()
    def commit(self, deleted_places: Sequence[int], entries: Sequence[tuple[int, bytes]], next_sequence: int) -> None:
        """Forgets places and adds entries, all or nothing; on return it survives the process, if durable also a power cut."""
        with self._environment.begin(write=True) as transaction:
            for place in deleted_places:
                transaction.delete(pack_place(place))
            items = [(pack_place(place), entry) for place, entry in sorted(entries)]
            items.append((SEQUENCE_KEY, pack_sequence(next_sequence)))
            transaction.cursor().putmulti(items)

    @_lmdb_errors_as_os_errors()
    def close(self, *, leave_proof: bool) -> None:
        """Closes the file and, if asked, leaves the ``clean`` file that lets the next opening trust it."""
        try:
            used_bytes = self._settled_bytes() if leave_proof else 0
        finally:
            self._environment.close()
        if leave_proof:
            _write_proof(self._path, used_bytes, durable=self._durable)

    def _settled_bytes(self) -> int:
        """How much of the file is in use. If durable, all of it is on the disk then."""
        used_bytes: int = (self._environment.info()["last_pgno"] + 1) * self._environment.stat()["psize"]
        if self._durable:
            self._environment.sync(True)
        return used_bytes


def _open(path: Path, map_bytes: int, *, durable: bool) -> lmdb.Environment:
    # lock=False: the directory's own lock admits one process, and one thread at a time uses the file.
    return lmdb.open(str(path), subdir=False, lock=False, map_size=map_bytes, sync=durable, metasync=durable, readahead=False, mode=0o600)


def _digest(path: Path, num_bytes: int) -> str | None:
    """xxh3-128 of the first bytes of a file, or None where it is shorter."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while num_bytes:
            chunk = file.read(min(num_bytes, _CHUNK_BYTES))
            if not chunk:
                return None
            digest.update(chunk)
            num_bytes -= len(chunk)
    return digest.hexdigest()


def _write_proof(path: Path, used_bytes: int, *, durable: bool) -> None:
    digest = _digest(path, used_bytes)
    values = {"format": str(FORMAT_VERSION), "index_bytes": str(used_bytes), "index_xxh3_128": str(digest)}
    replace_file(path.with_name(CLEAN_NAME), pack_text(_CLEAN_TITLE, values), durable=durable)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def replace_file(path: Path, content: bytes, *, durable: bool) -> None:
    """Puts a small file in place as a whole. Raises OSError."""
    new_path = path.with_name(path.name + _NEW_SUFFIX)
    with open(new_path, "wb", buffering=0, opener=_private) as file:
        file.write(content)
        if durable:
            os.fsync(file.fileno())
    os.rename(new_path, path)
    if durable:
        sync_directory(path.parent)


def read_proof(directory: Path) -> bool | None:
    """Whether the index is byte for byte what the last close left; None where there was no clean close to ask."""
    try:
        with open(directory / CLEAN_NAME, "rb") as file:
            values = parse_text(_CLEAN_TITLE, file.read(1 << 16))
        if values is None:
            return None
        return _digest(directory / INDEX_NAME, int(values["index_bytes"])) == values["index_xxh3_128"]
    except (OSError, ValueError, KeyError, TierFormatError):
        return None if not (directory / CLEAN_NAME).exists() else False


def withdraw_proof(directory: Path, *, durable: bool) -> None:
    """Removes the ``clean`` file: from now on the index changes. Raises OSError."""
    (directory / CLEAN_NAME).unlink(missing_ok=True)
    if durable:
        sync_directory(directory)


def salvage(directory: Path) -> list[bytes] | None:
    """The rows of an index that nobody vouches for, each verified, or None where it cannot be read as a whole."""
    path = directory / INDEX_NAME
    if not path.exists() or not sys.executable or hasattr(sys, "frozen"):
        return None  # in a frozen application the executable is the application, not Python
    package_directory = str(Path(lmdb.__file__).parent.parent)
    script = str(Path(__file__).with_name("salvage.py"))
    command = [sys.executable, "-I", "-S", script, package_directory, str(path), str(PLACE_BYTES), str(ENTRY.size)]
    try:
        child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SALVAGE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("%s could not be read in a child process: %s", path, error)
        return None
    if child.returncode != 0 or len(child.stdout) < 8:
        logger.warning("%s is damaged: the process that read it ended with status %d", path, child.returncode)
        return None
    num_rows = int.from_bytes(child.stdout[-8:], "little")
    content = child.stdout[:-8]
    rows = [content[start : start + ROW_BYTES] for start in range(0, len(content), ROW_BYTES)]
    if len(rows) != num_rows or not all(map(is_row_intact, rows)):
        logger.warning("%s is damaged: not all of its entries are whole", path)
        return None
    return rows
