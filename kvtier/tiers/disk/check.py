"""fsck: what is wrong with a directory, without changing it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from kvtier.errors import TierError
from kvtier.io import PAGE_BYTES
from kvtier.tiers.disk.format import SEQUENCE_KEY, parse_row, record_bytes_for
from kvtier.tiers.disk.index_file import CLEAN_NAME, INDEX_NAME, read_proof, salvage
from kvtier.tiers.disk.lock import DirectoryLock
from kvtier.tiers.disk.record_io import RecordBuffer, RecordIO
from kvtier.tiers.disk.recovery import FORMAT_NAME, is_own_name, read_format
from kvtier.tiers.disk.sealing import Sealing
from kvtier.tiers.disk.segments import SegmentFiles, segment_name
from kvtier.tiers.record import RecordFields
from kvtier.types import Damage


def check_path(path: str | Path) -> list[Damage]:
    """Verifies a directory that no process has open: the index, every record, every payload. Empty = healthy. Changes nothing.

    Raises TierError where there is no disk tier, TierBusyError where a process has it open, TierFormatError where
    another version wrote it.
    """
    directory = Path(path)
    if not (directory / FORMAT_NAME).exists() and not (directory / INDEX_NAME).exists():
        raise TierError(f"{directory} holds no kvtier disk tier: give the path of a disk tier's directory")
    lock = DirectoryLock(directory, read_only=True)
    try:
        found = check_names(directory, None)
        segment_bytes = read_format(directory)
        if segment_bytes is None:
            return [*found, Damage(FORMAT_NAME, "damaged or missing: the size of the segments is unknown, records were not checked")]
        if read_proof(directory) is False:
            found.append(Damage(INDEX_NAME, f"not the index that the {CLEAN_NAME} file vouches for"))
        rows = salvage(directory)
        if rows is None:
            return [*found, Damage(INDEX_NAME, "damaged or missing: the next opening will rebuild it from the records")]
        records, unreadable = _parse(rows)
        found += unreadable + _overlaps(records, segment_bytes // PAGE_BYTES)
        files = SegmentFiles(directory, segment_bytes, writable=False)
        try:
            found += check_records(RecordIO(files, segment_bytes // PAGE_BYTES, Sealing()), records)
        finally:
            files.close()
        return found
    finally:
        lock.release()


def check_names(directory: Path, capacity_bytes: int | None) -> list[Damage]:
    """Files that do not belong here, and whether all together keep to the capacity."""
    found = []
    total_bytes = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if is_own_name(entry.name):
                    total_bytes += entry.stat().st_size
                else:
                    found.append(Damage(entry.name, "no file of kvtier's"))
    except OSError as error:
        found.append(Damage(str(directory), f"cannot be listed: {error}"))
    if capacity_bytes is not None and total_bytes > capacity_bytes:
        found.append(Damage(str(directory), f"{total_bytes} bytes in files, above the capacity of {capacity_bytes}"))
    return found


def check_records(records_io: RecordIO, records: Iterable[RecordFields]) -> list[Damage]:
    """Reads and verifies records one by one."""
    found = []
    memory = memoryview(mmap.mmap(-1, PAGE_BYTES))
    for fields in sorted(records, key=lambda fields: fields.place):
        if len(memory) < fields.num_bytes:
            memory = memoryview(mmap.mmap(-1, fields.num_bytes))
        where = segment_name(records_io.segment_of(fields.place))
        try:
            problem = records_io.read([RecordBuffer(fields, memory[: fields.num_bytes])])[0].problem
        except OSError as error:
            problem = str(error)
        if problem is not None:
            found.append(Damage(where, problem, fields.key))
    return found


def _parse(rows: list[bytes]) -> tuple[list[RecordFields], list[Damage]]:
    records, found = [], []
    for row in rows:
        if row.startswith(SEQUENCE_KEY):
            continue
        record = parse_row(row)
        if isinstance(record, str):
            found.append(Damage(INDEX_NAME, record))
        else:
            records.append(record)
    return records, found


def _overlaps(records: list[RecordFields], pages_per_segment: int) -> list[Damage]:
    """Records that share pages or cross a segment's end, keys in two places."""
    found = []
    next_free = 0
    keys = set()
    for record in sorted(records, key=lambda record: record.place):
        pages = record_bytes_for(record.num_bytes) // PAGE_BYTES
        if record.place < next_free:
            found.append(Damage(INDEX_NAME, f"two records share place {record.place}", record.key))
        if record.place % pages_per_segment + pages > pages_per_segment:
            found.append(Damage(INDEX_NAME, f"the record at place {record.place} crosses the end of its segment", record.key))
        if record.key in keys:
            found.append(Damage(INDEX_NAME, "the key has two records", record.key))
        keys.add(record.key)
        next_free = record.place + pages
    return found
