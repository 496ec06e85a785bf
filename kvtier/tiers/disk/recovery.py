"""Opens a directory: whose it is, of which format, what is in it, and which of its index can be trusted.

Damage is not an error here.  A damaged directory opens with what can be proven to be whole; only another format version,
another holder, or a place that cannot be used at all stop the start.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kvtier.errors import TierError, TierFormatError
from kvtier.io import PAGE_BYTES, AlignedFile, DirectMode, Scratch, preallocate
from kvtier.tiers.disk.format import PLACE_BYTES, SEQUENCE_KEY, pack_entry, pack_place, parse_row, record_bytes_for
from kvtier.tiers.disk.geometry import Geometry, divide
from kvtier.tiers.disk.index_file import CLEAN_NAME, INDEX_NAME, IndexFile, read_proof, replace_file, salvage, withdraw_proof
from kvtier.tiers.disk.ledger import Ledger
from kvtier.tiers.disk.lock import LOCK_NAME
from kvtier.tiers.disk.places import Entry
from kvtier.tiers.disk.resets import MARK_NAME, empty_if_marked
from kvtier.tiers.disk.scan import scan_segments
from kvtier.tiers.disk.sealing import Sealing
from kvtier.tiers.disk.segments import segment_number
from kvtier.tiers.record import FORMAT_VERSION, RecordFields, pack_text, parse_text
from kvtier.types import BlockKey

logger = logging.getLogger(__name__)

FORMAT_NAME = "format"
_FORMAT_TITLE = "kvtier disk tier"
_PROBE_NAME = "probe.new"
_NAMES = frozenset([LOCK_NAME, FORMAT_NAME, CLEAN_NAME, INDEX_NAME, MARK_NAME])
_TEMPORARY_NAMES = frozenset([_PROBE_NAME, *(f"{name}.new" for name in (FORMAT_NAME, CLEAN_NAME, INDEX_NAME))])
SEQUENCE_SLACK = 1 << 20
"""the index names a sequence number this far ahead, so that it stays above those of stores it never heard of"""

Source = Literal["new", "clean", "salvaged", "scanned"]


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a directory was opened. ``source`` says where the index came from.

    ``new``: there was nothing; ``clean``: the index proved to be the one the last close left; ``salvaged``: the last
    process did not close, a child process read the index; ``scanned``: the index was damaged, the records were read.
    """

    source: Source
    num_blocks: int
    num_lost: int
    """entries whose record cannot be there any more (a segment is gone or too short), or is encrypted where it must not be, or is not"""


@dataclass(slots=True)
class _Rows:
    """What an index said: records by ascending sequence, and the next sequence number."""

    source: Source
    records: list[RecordFields] = field(default_factory=list)
    next_sequence: int = 1


def is_own_name(name: str) -> bool:
    """Whether a file of this name in the directory belongs to the tier."""
    return name in _NAMES or name in _TEMPORARY_NAMES or segment_number(name) is not None


def read_format(directory: Path) -> int | None:
    """The segment size of a directory, None where its format file is damaged or missing. Raises TierFormatError."""
    try:
        with open(directory / FORMAT_NAME, "rb") as file:
            values = parse_text(_FORMAT_TITLE, file.read(1 << 16))
        return None if values is None else int(values["segment_bytes"])
    except TierFormatError:
        raise
    except (OSError, ValueError, KeyError):
        return None


def prepare_directory(directory: Path) -> None:
    """Makes the directory. Raises TierError."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise TierError(f"{directory} cannot be made ({error.strerror}): choose a path this user may write") from error


def settle_geometry(directory: Path, capacity_bytes: int, segment_bytes: int, *, durable: bool) -> Geometry:
    """The division of the capacity, with the segment size of what the directory holds already. Raises TierError."""
    try:
        empty_if_marked(directory, durable=durable)
    except OSError as error:
        raise _unusable(directory, error) from error
    found = read_format(directory)
    if found is not None and found != segment_bytes:
        if _is_empty(directory):
            found = None  # of a start that failed, say: it binds nobody
        else:
            logger.warning("%s keeps its segments of %d bytes (configured: %d); empty it to change that", directory, found, segment_bytes)
    geometry = divide(capacity_bytes, found or segment_bytes)
    try:
        _trim(directory, geometry)
        _require_space(directory, capacity_bytes)
        if found is None:
            content = pack_text(_FORMAT_TITLE, {"format": str(FORMAT_VERSION), "segment_bytes": str(segment_bytes)})
            replace_file(directory / FORMAT_NAME, content, durable=durable)
    except TierError:
        raise
    except OSError as error:
        raise _unusable(directory, error) from error
    return geometry


def probe(directory: Path, direct: DirectMode) -> None:
    """Tries to write a page the way segments are written. Raises TierError."""
    path = directory / _PROBE_NAME
    try:
        preallocate(path, PAGE_BYTES)
        try:
            file = AlignedFile(path, direct=direct)
            try:
                scratch = Scratch()
                scratch.reset(PAGE_BYTES)
                file.writev([scratch.take(PAGE_BYTES)], 0)
            finally:
                file.close()
        finally:
            path.unlink()
    except OSError as error:
        if direct == "on" and error.errno == errno.EINVAL:
            raise TierError(
                f"{directory} cannot be written with direct I/O ({error.strerror}): set direct_io to auto, or choose another file system"
            ) from error
        raise _unusable(directory, error) from error


def recover(directory: Path, geometry: Geometry, ledger: Ledger, *, durable: bool) -> tuple[Recovery, IndexFile]:
    """Fills an empty ledger with the blocks of the directory and opens an index file to go on with. Raises TierError."""
    try:
        rows, index = _read_index(directory, geometry, durable=durable)
        num_lost = _leave_out_others(ledger, rows) + _fill(ledger, rows, directory, geometry)
        if index is None:
            index = rebuild_index(directory, geometry, records_of(ledger.index, ledger.sealing), ledger.next_sequence, durable=durable)
            ledger.committed([], list(ledger.turns.undeleted))
    except OSError as error:
        raise _unusable(directory, error) from error
    recovery = Recovery(rows.source, len(ledger.index), num_lost)
    level = logging.INFO if rows.source in ("new", "clean") and not num_lost else logging.WARNING
    logger.log(level, "%s: %d blocks (%s), %d lost", directory, recovery.num_blocks, recovery.source, num_lost)
    return recovery, index


def records_of(index: Mapping[BlockKey, Entry], sealing: Sealing) -> list[RecordFields]:
    """The records that an index in RAM names."""
    return [sealing.fields(key, entry) for key, entry in list(index.items())]


def rebuild_index(directory: Path, geometry: Geometry, records: list[RecordFields], next_sequence: int, *, durable: bool) -> IndexFile:
    """Writes a new index file that names these records. Raises OSError."""
    records.sort(key=lambda fields: fields.place)
    rows = (pack_place(fields.place) + pack_entry(fields) for fields in records)
    return IndexFile.create(directory, geometry.index_bytes, rows, next_sequence + SEQUENCE_SLACK, durable=durable)


def _read_index(directory: Path, geometry: Geometry, *, durable: bool) -> tuple[_Rows, IndexFile | None]:
    """What the index says, and the index file itself where it can be trusted."""
    index_path = directory / INDEX_NAME
    has_segments = bool(segment_sizes(directory))
    if not index_path.exists() and not has_segments:
        withdraw_proof(directory, durable=durable)
        return _Rows("new"), None
    is_proven = read_proof(directory)
    withdraw_proof(directory, durable=durable)
    if is_proven and index_path.stat().st_size == geometry.index_bytes:
        index = IndexFile.open_proven(directory, geometry.index_bytes, durable=durable)
        return _parse(index.rows(), "clean"), index
    rows = None if is_proven is False else salvage(directory)
    if rows is not None:
        return _parse(rows, "clean" if is_proven else "salvaged"), None
    logger.warning("%s: the index is damaged, reading all records instead", directory)
    found = scan_segments(directory, geometry.num_segments, geometry.segment_bytes)
    found.sort(key=lambda fields: fields.sequence)
    return _Rows("scanned", found, found[-1].sequence + 1 if found else 1), None


def _parse(rows: list[bytes], source: Source) -> _Rows:
    result = _Rows(source)
    if rows and rows[-1].startswith(SEQUENCE_KEY):
        last = rows.pop()
        result.next_sequence = int.from_bytes(last[PLACE_BYTES : PLACE_BYTES + 8], "little")
    for row in rows:
        record = parse_row(row)
        if isinstance(record, RecordFields):
            result.records.append(record)
    result.records.sort(key=lambda record: record.sequence)
    return result


def _leave_out_others(ledger: Ledger, rows: _Rows) -> int:
    """Forgets records that are encrypted and the tier has no key, or the other way round. Returns how many."""
    sealing = ledger.sealing
    ours = [record for record in rows.records if sealing.is_ours(record)]
    others = [record for record in rows.records if not sealing.is_ours(record)]
    for record in others:
        ledger.turns.delete_later(record.place)
    ledger.next_sequence = max((record.sequence + 1 for record in others), default=1)
    sealing.count("other_key_records", len(others))
    rows.records = ours
    return len(others)


def _fill(ledger: Ledger, rows: _Rows, directory: Path, geometry: Geometry) -> int:
    """Adopts every record that can be there; returns how many cannot. Oldest first, so that ``entries()`` is in order."""
    sizes = segment_sizes(directory)
    known: dict[BlockKey, BlockKey] = {}
    num_lost = 0
    for record in _newest_first_wins(rows.records):
        segment, page = divmod(record.place, geometry.pages_per_segment)
        end = page * PAGE_BYTES + record_bytes_for(record.num_bytes)
        if end > sizes.get(segment, 0) or not ledger.places.adopt(record.key, record.place, record.num_bytes):
            ledger.turns.delete_later(record.place)
            num_lost += 1
            continue
        ledger.turns.adopt(record.place, record.num_bytes)
        key = known.setdefault(record.key, record.key)
        parent = None if record.parent is None else known.setdefault(record.parent, record.parent)
        ledger.index[key] = Entry(record.place, record.num_bytes, record.sequence, parent, ledger.shared_namespace(record.namespace))
    last = rows.records[-1].sequence + 1 if rows.records else 1
    ledger.next_sequence = max(ledger.next_sequence, rows.next_sequence, last)
    return num_lost


def _newest_first_wins(records: list[RecordFields]) -> Iterable[RecordFields]:
    """The records without older ones of the same key. An index that kvtier wrote has none; a forged one might."""
    newest = {record.key: record for record in records}
    return records if len(newest) == len(records) else sorted(newest.values(), key=lambda record: record.sequence)


def segment_sizes(directory: Path) -> dict[int, int]:
    """Lengths of the segment files that are there."""
    sizes = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            segment = segment_number(entry.name)
            if segment is not None:
                sizes[segment] = entry.stat().st_size
    return sizes


def _is_empty(directory: Path) -> bool:
    """Whether there are no blocks, and no index that could name any."""
    return not (directory / INDEX_NAME).exists() and not segment_sizes(directory)


def _trim(directory: Path, geometry: Geometry) -> None:
    """Removes what the capacity has no room for: leftovers, segments above the last one, bytes after a segment's end."""
    with os.scandir(directory) as entries:
        for entry in entries:
            segment = segment_number(entry.name)
            if entry.name in _TEMPORARY_NAMES or (segment is not None and segment >= geometry.num_segments):
                os.unlink(entry.path)
            elif segment is not None and entry.stat().st_size > geometry.segment_bytes:
                os.truncate(entry.path, geometry.segment_bytes)


def _require_space(directory: Path, capacity_bytes: int) -> None:
    with os.scandir(directory) as entries:
        present = sum(entry.stat().st_blocks * 512 for entry in entries if is_own_name(entry.name))
    disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    if present + free < capacity_bytes:
        raise TierError(
            f"{directory}: the capacity of {capacity_bytes} bytes does not fit, only {present + free} bytes are there "
            f"({present} of them kvtier's already): lower the capacity or free some space"
        )


def _unusable(directory: Path, error: Exception) -> TierError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TierError(f"{directory} has no room for what the tier needs to start ({error}): free some space or raise the quota")
    with contextlib.suppress(OSError):
        if not os.access(directory, os.W_OK):
            return TierError(f"{directory} cannot be written by this user ({error}): change its owner or mode, or choose another path")
    return TierError(f"{directory} cannot be used ({error}): check the disk and the directory's permissions")
