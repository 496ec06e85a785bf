"""The bytes on disk beside those of :mod:`kvtier.tiers.record`: pages and index entries, as in docs/reference/format.md.

Everything here is pure: bytes in, values out.  All integers are little-endian except the keys of the index, which are
big-endian so that LMDB keeps them in the order of their places.
"""

from __future__ import annotations

import struct

import xxhash

from kvtier.codecs import CodecId
from kvtier.io import PAGE_BYTES, round_up_to_page
from kvtier.tiers.record import FLAG_HAS_PARENT, NO_PARENT, RecordFields
from kvtier.types import BlockKey

HEADER_BYTES = PAGE_BYTES

ENTRY = struct.Struct("<16s16s16sIIQBB6x8s")
"""key, parent, namespace, payload bytes, stored bytes, sequence, codec, flags, checksum over the place and all before it"""
PLACE_BYTES = 8
ROW_BYTES = PLACE_BYTES + ENTRY.size
SEQUENCE_KEY = b"\xff" * PLACE_BYTES
"""index entry that holds a sequence number above all that were ever given out, repeated in all its 80 bytes"""


def record_bytes_for(num_bytes: int) -> int:
    """Size of the record that holds a payload of ``num_bytes``: one header page and whole pages of payload."""
    return HEADER_BYTES + round_up_to_page(num_bytes)


def pack_place(place: int) -> bytes:
    """A place (page number counted over all segments) as a key of the index."""
    return place.to_bytes(PLACE_BYTES, "big")


def pack_entry(fields: RecordFields) -> bytes:
    """The index entry of a record (stored under ``pack_place(fields.place)``)."""
    unchecked = ENTRY.pack(
        fields.key, NO_PARENT if fields.parent is None else fields.parent, fields.namespace,
        fields.num_bytes, fields.num_bytes, fields.sequence, fields.codec_id, 0 if fields.parent is None else FLAG_HAS_PARENT, b"",
    )[:-8]  # fmt: skip
    return unchecked + xxhash.xxh3_64_digest(pack_place(fields.place) + unchecked)


def pack_sequence(sequence: int) -> bytes:
    """The entry under ``SEQUENCE_KEY``."""
    return sequence.to_bytes(8, "little") * (ENTRY.size // 8)


def is_row_intact(row: bytes) -> bool:
    """Whether an index row (key and entry) is one that was written as a whole."""
    if row.startswith(SEQUENCE_KEY):
        return row[PLACE_BYTES:] == row[PLACE_BYTES : PLACE_BYTES + 8] * (ENTRY.size // 8)
    return xxhash.xxh3_64_digest(row[:-8]) == row[-8:]


def parse_row(row: bytes) -> RecordFields | str:
    """The record that an intact index row names, or why this version cannot read it."""
    key, parent, namespace, num_bytes, stored_bytes, sequence, codec_id, flags, _ = ENTRY.unpack_from(row, PLACE_BYTES)
    if codec_id not in (CodecId.RAW, CodecId.AES_GCM_APART) or stored_bytes != num_bytes:
        return f"codec {codec_id} is not for disks"
    place = int.from_bytes(row[:PLACE_BYTES], "big")
    has_parent = bool(flags & FLAG_HAS_PARENT)
    return RecordFields(BlockKey(key), BlockKey(parent) if has_parent else None, namespace, num_bytes, sequence, place, codec_id)
