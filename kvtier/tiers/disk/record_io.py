"""Reads and writes runs of records that lie side by side, one transfer each, and verifies what it reads.

Holds no state but working memory: what is where and who waits for it is the ledger's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.codecs import TAG_BYTES
from kvtier.io import PAGE_BYTES, AlignedFile, Scratch, is_page_aligned, round_up_to_page
from kvtier.tiers.disk.format import HEADER_BYTES, record_bytes_for
from kvtier.tiers.disk.sealing import Sealing
from kvtier.tiers.disk.segments import SegmentFiles
from kvtier.tiers.record import RecordFields, header_mismatch, pack_header, parse_header, payload_checksum, seal_of
from kvtier.types import Outcome

_PAGE_MASK = PAGE_BYTES - 1
_MAX_IDLE_SCRATCHES = 16


@dataclass(frozen=True, slots=True)
class RecordBuffer:
    """A record and the memory of its payload."""

    fields: RecordFields
    buffer: memoryview


@dataclass(frozen=True, slots=True)
class ReadVerdict:
    """What a read found. ``problem`` is None where the buffer holds the payload; it is undefined otherwise."""

    problem: str | None = None
    outcome: Outcome = Outcome.OK


class PreparedRun:
    """Records that lie side by side, with the transfer that moves them. Its file and memory are held until ``finish``."""

    __slots__ = ("buffers", "file", "offset", "parts", "records", "scratch", "segment")

    def __init__(self, records: Sequence[RecordBuffer], segment: int, offset: int, file: AlignedFile, scratch: Scratch) -> None:
        self.records = records
        self.segment = segment
        self.offset = offset
        self.file = file
        self.scratch = scratch
        self.buffers: list[memoryview] = []
        """what is moved, from ``offset`` on"""
        self.parts: list[_Incoming] = []


class RecordIO:
    """Moves records between segment files and buffers. Thread-safe. Methods raise OSError."""

    def __init__(self, files: SegmentFiles, pages_per_segment: int, sealing: Sealing) -> None:
        self.sealing = sealing
        self._files = files
        self._pages_per_segment = pages_per_segment
        self._scratches: deque[Scratch] = deque(maxlen=_MAX_IDLE_SCRATCHES)

    def segment_of(self, place: int) -> int:
        """The segment in which a place lies."""
        return place // self._pages_per_segment

    def prepare_write(self, records: Sequence[RecordBuffer]) -> PreparedRun:
        """Makes the bytes to write for records that lie side by side in one segment, in ascending order."""
        run = self._prepare(records, create=True)
        try:
            for record in records:
                header = run.scratch.take(HEADER_BYTES)
                run.buffers.append(header)
                if self.sealing.is_encrypted:
                    run.buffers.append(self._sealed(header, record, run.scratch))
                    continue
                pack_header(header, record.fields, payload_checksum(record.buffer))
                run.buffers += _outgoing(record.buffer, run.scratch, is_direct=run.file.is_direct)
        except BaseException:
            self.release(run)
            raise
        return run

    def prepare_read(self, records: Sequence[RecordBuffer]) -> PreparedRun:
        """Makes room for reading records that lie side by side in one segment, in ascending order."""
        run = self._prepare(records, create=False)
        is_direct, is_encrypted = run.file.is_direct, self.sealing.is_encrypted
        for record in records:
            if is_encrypted:
                run.parts.append(_incoming_sealed(record.buffer, run.scratch, run.buffers))
            else:
                run.parts.append(_incoming(record.buffer, run.scratch, run.buffers, is_direct=is_direct))
        return run

    def verify(self, run: PreparedRun, num_read: int) -> list[ReadVerdict]:
        """Verifies each record of a run of which ``num_read`` bytes were read."""
        verdicts = []
        end = 0
        for record, part in zip(run.records, run.parts, strict=True):
            end += record_bytes_for(record.fields.num_bytes)
            if num_read < end:
                verdicts.append(ReadVerdict(f"segment {run.segment} ends before the record does", Outcome.CORRUPT))
                continue
            verdicts.append(self._verdict(record, part))
        return verdicts

    def release(self, run: PreparedRun) -> None:
        """Gives back what a run holds. Nothing may use its buffers any more."""
        self._files.give_back(run.segment)
        self._scratches.append(run.scratch)

    def read(self, records: Sequence[RecordBuffer]) -> list[ReadVerdict]:
        """Reads records that lie side by side in one segment, in ascending order, and verifies each."""
        run = self.prepare_read(records)
        try:
            return self.verify(run, run.file.readv(run.buffers, run.offset))
        finally:
            self.release(run)

    def _sealed(self, header: memoryview, record: RecordBuffer, scratch: Scratch) -> memoryview:
        """The payload encrypted, as whole pages; fills the header page as well."""
        num_bytes = len(record.buffer)
        pages = scratch.take(round_up_to_page(num_bytes + TAG_BYTES))
        seal = self.sealing.seal(record.fields, record.buffer, pages[: num_bytes + TAG_BYTES])
        stored = pages[: round_up_to_page(num_bytes)]
        stored[num_bytes:] = bytes(len(stored) - num_bytes)
        pack_header(header, record.fields, payload_checksum(stored[:num_bytes]), seal)
        return stored

    def _verdict(self, record: RecordBuffer, part: _Incoming) -> ReadVerdict:
        """What was read; brings the payload to where it belongs."""
        header = parse_header(part.header)
        if isinstance(header, str):
            return ReadVerdict(header, Outcome.CORRUPT)
        expected = record.fields
        if self.sealing.is_encrypted and not self.sealing.is_ours(header.fields):
            self.sealing.count("other_key_records")
            return ReadVerdict("the block was encrypted with another key, or not at all", Outcome.MISS)
        if not self.sealing.is_encrypted:
            part.finish(record.buffer)
            expected = expected._replace(key_id=header.fields.key_id)  # without a key nobody knows which one it was
        mismatch = header_mismatch(header, expected)
        if mismatch is not None:
            return ReadVerdict(mismatch, Outcome.CORRUPT)
        num_bytes = expected.num_bytes
        stored = part.pages[:num_bytes] if self.sealing.is_encrypted else record.buffer
        if payload_checksum(stored) != header.payload_checksum:
            return ReadVerdict("the payload's checksum is wrong", Outcome.CORRUPT)
        if self.sealing.is_encrypted:
            room = part.pages[: num_bytes + TAG_BYTES]
            if not self.sealing.open(header.fields, seal_of(part.header), room, record.buffer):
                self.sealing.count("forged_records")
                return ReadVerdict("the payload was not encrypted by one of us", Outcome.CORRUPT)
        return ReadVerdict()

    def _prepare(self, records: Sequence[RecordBuffer], *, create: bool) -> PreparedRun:
        segment, page = divmod(records[0].fields.place, self._pages_per_segment)
        file = self._files.acquire(segment, create=create)
        try:
            scratch = self._scratches.pop()
        except IndexError:
            scratch = Scratch()
        more = PAGE_BYTES if self.sealing.is_encrypted else 0
        scratch.reset(sum(record_bytes_for(record.fields.num_bytes) + more for record in records))
        return PreparedRun(records, segment, page * PAGE_BYTES, file, scratch)


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


def _incoming_sealed(payload: memoryview, scratch: Scratch, vector: list[memoryview]) -> _Incoming:
    """All of the record beside the payload's own memory, with room for the tag."""
    header = scratch.take(HEADER_BYTES)
    pages = scratch.take(round_up_to_page(len(payload) + TAG_BYTES))
    vector += [header, pages[: round_up_to_page(len(payload))]]
    return _Incoming(header, pages, 0)
