"""Rebuilds the index from the records themselves: the second net, for when the index file is damaged or gone.

Reads every segment as a whole and believes a record only if header and payload verify.  May bring back blocks that
were removed and not overwritten yet: their bytes are right, and keys name content, so this is harmless (after a reset they would not be:
``resets``).
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from kvtier.io import PAGE_BYTES
from kvtier.tiers.disk.format import HEADER_BYTES, record_bytes_for
from kvtier.tiers.disk.segments import segment_name
from kvtier.tiers.record import MAGIC, RecordFields, parse_header, payload_checksum

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20


def scan_segments(directory: Path, num_segments: int, segment_bytes: int) -> list[RecordFields]:
    """Every whole record, one per key (the newest). A segment that cannot be read counts as empty."""
    newest: dict[bytes, RecordFields] = {}
    content = mmap.mmap(-1, segment_bytes)
    for segment in range(num_segments):
        path = directory / segment_name(segment)
        try:
            size_bytes = _read(path, memoryview(content))
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning("%s cannot be read, its blocks are lost: %s", path, error)
            continue
        for fields in _records(memoryview(content)[:size_bytes], segment * (segment_bytes // PAGE_BYTES), segment_bytes):
            rival = newest.get(fields.key)
            if rival is None or rival.sequence < fields.sequence:
                newest[fields.key] = fields
    return list(newest.values())


def _read(path: Path, memory: memoryview) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        total = 0
        while total < len(memory):
            done = os.preadv(fd, [memory[total : total + _CHUNK_BYTES]], total)
            if not done:
                break
            total += done
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return total
    finally:
        os.close(fd)


def _records(content: memoryview, first_place: int, segment_bytes: int) -> Iterable[RecordFields]:
    """The whole records of a segment that belong to its present division into slots.

    A segment that changed its record size may still hold whole records of the earlier division; its newest record
    tells which one is valid, because a segment is divided anew only when it is empty.
    """
    found = []
    offset = 0
    while offset + HEADER_BYTES <= len(content):
        fields = _record_at(content, offset, first_place + offset // PAGE_BYTES)
        if fields is None:
            offset += PAGE_BYTES
        else:
            found.append(fields)
            offset += record_bytes_for(fields.num_bytes)  # what lies inside is its payload, whatever it looks like
    if not found:
        return []
    record_bytes = record_bytes_for(max(found, key=lambda fields: fields.sequence).num_bytes)
    slots = range(0, segment_bytes - record_bytes + 1, record_bytes)
    return [f for f in found if record_bytes_for(f.num_bytes) == record_bytes and (f.place - first_place) * PAGE_BYTES in slots]


def _record_at(content: memoryview, offset: int, place: int) -> RecordFields | None:
    if content[offset : offset + len(MAGIC)] != MAGIC:
        return None
    header = parse_header(content[offset : offset + HEADER_BYTES])
    if isinstance(header, str) or header.fields.place != place:
        return None
    payload = content[offset + HEADER_BYTES : offset + HEADER_BYTES + header.fields.num_bytes]
    if len(payload) != header.fields.num_bytes or offset + record_bytes_for(header.fields.num_bytes) > len(content):
        return None
    return header.fields if payload_checksum(payload) == header.payload_checksum else None
