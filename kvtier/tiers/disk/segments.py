"""The segment files: opened on demand, made on the first write, a bounded number open at a time."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from kvtier.io import AlignedFile, DirectMode, preallocate

_MAX_OPEN_FILES = 64
_NAME = re.compile(r"segment-(\d{6,})\.kv")


def segment_name(segment: int) -> str:
    """File name of a segment."""
    return f"segment-{segment:06d}.kv"


def segment_number(name: str) -> int | None:
    """The inverse of ``segment_name``; None for any other file."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and segment_name(int(match[1])) == name else None


def sync_directory(path: Path) -> None:
    """Makes names that were created, renamed or removed in a directory survive a power cut. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class SegmentFiles:
    """All segment files of one directory. Thread-safe. Methods raise OSError."""

    def __init__(
        self, directory: Path, segment_bytes: int, *, direct: DirectMode = "auto", durable: bool = True, writable: bool = True
    ) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._direct = direct
        self._durable = durable
        self._writable = writable
        self._lock = threading.Lock()
        self._creating = threading.Lock()
        self._files: dict[int, AlignedFile] = {}
        """least recently borrowed first"""
        self._num_borrowed: dict[int, int] = {}
        self._made: set[int] = set()
        """segments known to have their full length"""

    def path(self, segment: int) -> Path:
        """Where a segment lies."""
        return self._directory / segment_name(segment)

    @contextlib.contextmanager
    def borrow(self, segment: int, *, create: bool = False) -> Iterator[AlignedFile]:
        """The open file of a segment, kept open for the ``with`` block. See ``acquire``."""
        file = self.acquire(segment, create=create)
        try:
            yield file
        finally:
            self.give_back(segment)

    def acquire(self, segment: int, *, create: bool = False) -> AlignedFile:
        """The open file of a segment, kept open until it is given back.

        ``create`` makes it (or restores its length) where needed; without it a missing file is FileNotFoundError.
        """
        if create and segment not in self._made:
            self._make(segment)
        try:
            return self._acquire(segment)
        except FileNotFoundError:
            if not create:
                raise
            self._made.discard(segment)  # someone deleted it
            self._make(segment)
            return self._acquire(segment)

    def give_back(self, segment: int) -> None:
        """Ends what ``acquire`` began."""
        with self._lock:
            left = self._num_borrowed.pop(segment) - 1
            if left:
                self._num_borrowed[segment] = left

    def sync(self, segment: int) -> None:
        """Returns when the segment's bytes survive a power cut."""
        with self.borrow(segment) as file:
            file.sync()

    def close(self) -> None:
        """Closes all files. None may be borrowed."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def open_file(self, path: Path) -> AlignedFile:
        """Opens one file; tests put their fault injection here."""
        return AlignedFile(path, direct=self._direct, writable=self._writable)

    def _make(self, segment: int) -> None:
        with self._creating:
            if segment in self._made:
                return
            if preallocate(self.path(segment), self._segment_bytes) and self._durable:
                sync_directory(self._directory)
            self._made.add(segment)

    def _acquire(self, segment: int) -> AlignedFile:
        with self._lock:
            file = self._files.pop(segment, None)
            if file is None:
                file = self.open_file(self.path(segment))
                self._close_idle()
            self._files[segment] = file
            self._num_borrowed[segment] = self._num_borrowed.get(segment, 0) + 1
            return file

    def _close_idle(self) -> None:
        idle = [segment for segment in self._files if segment not in self._num_borrowed]
        for segment in idle[: max(0, len(self._files) - _MAX_OPEN_FILES + 1)]:
            self._files.pop(segment).close()
