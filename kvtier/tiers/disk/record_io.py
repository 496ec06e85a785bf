"""Reads and writes runs of records that lie side by side, one system call each, and verifies what it reads.

Holds no state but working memory: what is where and who waits for it is the ledger's business.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.io import PAGE_BYTES, Scratch, is_page_aligned
from kvtier.tiers.disk.format import HEADER_BYTES, RecordFields, header_mismatch, pack_header, parse_header, payload_checksum
from kvtier.tiers.disk.segments import SegmentFiles

_PAGE_MASK = PAGE_BYTES - 1


@dataclass(frozen=True, slots=True)
class RecordBuffer:
    """A record and the memory of its payload."""

    fields: RecordFields
    buffer: memoryview


@dataclass(frozen=True, slots=True)
class ReadVerdict:
    """What a read found. ``problem`` is None where the buffer holds the payload; it is undefined otherwise."""

    problem: str | None = None


class RecordIO:
    """Moves records between segment files and buffers. Thread-safe. Methods raise OSError."""

    def __init__(self, files: SegmentFiles, pages_per_segment: int) -> None:
        self._files = files
        self._pages_per_segment = pages_per_segment
        self._local = threading.local()

    def segment_of(self, place: int) -> int:
        """The segment in which a place lies."""
        return place // self._pages_per_segment

    def write(self, records: Sequence[RecordBuffer]) -> None:
        """Writes records that lie side by side in one segment, in ascending order."""
        segment, offset = self._locate(records)
        with self._files.borrow(segment, create=True) as file:
            scratch = self._scratch(records)
            vector: list[memoryview] = []
            for record in records:
                header = scratch.take(HEADER_BYTES)
                pack_header(header, record.fields, payload_checksum(record.buffer))
                vector.append(header)
                vector += _outgoing(record.buffer, scratch, is_direct=file.is_direct)
            file.writev(vector, offset)

    def read(self, records: Sequence[RecordBuffer]) -> list[ReadVerdict]:
        """Reads records that lie side by side in one segment, in ascending order, and verifies each."""
        segment, offset = self._locate(records)
        with self._files.borrow(segment) as file:
            scratch = self._scratch(records)
            vector: list[memoryview] = []
            parts = [_incoming(record.buffer, scratch, vector, is_direct=file.is_direct) for record in records]
            num_read = file.readv(vector, offset)
        verdicts = []
        end = 0
        for record, part in zip(records, parts, strict=True):
            end += record.fields.record_bytes
            if num_read < end:
                verdicts.append(ReadVerdict(f"segment {segment} ends before the record does"))
                continue
            part.finish(record.buffer)
            verdicts.append(ReadVerdict(_problem(part.header, record)))
        return verdicts

    def _locate(self, records: Sequence[RecordBuffer]) -> tuple[int, int]:
        segment, page = divmod(records[0].fields.place, self._pages_per_segment)
        return segment, page * PAGE_BYTES

    def _scratch(self, records: Sequence[RecordBuffer]) -> Scratch:
        """This thread's working memory, large enough to stage all records as a whole."""
        scratch: Scratch | None = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = self._local.scratch = Scratch()
        scratch.reset(sum(record.fields.record_bytes for record in records))
        return scratch


def _outgoing(payload: memoryview, scratch: Scratch, *, is_direct: bool) -> list[memoryview]:
    """The payload as whole pages: in place where it may be, the rest copied."""
    whole = len(payload) & ~_PAGE_MASK if not is_direct or is_page_aligned(payload) else 0
    vector = [payload[:whole]] if whole else []
    rest = len(payload) - whole
    if rest:
        pages = scratch.take((rest + _PAGE_MASK) & ~_PAGE_MASK)
        pages[:rest] = payload[whole:]
        pages[rest:] = bytes(len(pages) - rest)
        vector.append(pages)
    return vector


@dataclass(frozen=True, slots=True)
class _Incoming:
    """Where a record's bytes arrive: header page, and the pages from which the end of the payload must be copied."""

    header: memoryview
    pages: memoryview
    whole: int

    def finish(self, payload: memoryview) -> None:
        rest = len(payload) - self.whole
        if rest:
            payload[self.whole :] = self.pages[:rest]


def _incoming(payload: memoryview, scratch: Scratch, vector: list[memoryview], *, is_direct: bool) -> _Incoming:
    header = scratch.take(HEADER_BYTES)
    vector.append(header)
    whole = len(payload) & ~_PAGE_MASK if not is_direct or is_page_aligned(payload) else 0
    if whole:
        vector.append(payload[:whole])
    pages = scratch.take((len(payload) - whole + _PAGE_MASK) & ~_PAGE_MASK)
    if len(pages):
        vector.append(pages)
    return _Incoming(header, pages, whole)


def _problem(header_page: memoryview, record: RecordBuffer) -> str | None:
    header = parse_header(header_page)
    if isinstance(header, str):
        return header
    mismatch = header_mismatch(header, record.fields)
    if mismatch is not None:
        return mismatch
    if payload_checksum(record.buffer) != header.payload_checksum:
        return "the payload's checksum is wrong"
    return None
