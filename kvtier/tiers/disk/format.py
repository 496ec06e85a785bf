"""The bytes on disk: record headers, index entries and the small text files. docs/reference/format.md is the specification.

Everything here is pure: bytes in, values out.  All integers are little-endian except the keys of the index, which are
big-endian so that LMDB keeps them in the order of their places.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from kvtier.codecs import CodecId, is_known_codec
from kvtier.errors import TierFormatError
from kvtier.io import PAGE_BYTES, round_up_to_page
from kvtier.types import KEY_BYTES, BlockKey

FORMAT_VERSION = 1
MAGIC = b"KVTIERBK"
HEADER_BYTES = PAGE_BYTES
NO_PARENT = bytes(KEY_BYTES)

_FLAG_HAS_PARENT = 1
_HEADER = struct.Struct("<8sHBBI16s16s16sQQQQ16s")
"""magic, version, codec, flags, reserved, namespace, key, parent, payload bytes, stored bytes, sequence, place, payload checksum"""
_CHECKED_BYTES = HEADER_BYTES - 8
_HEADER_PADDING = bytes(_CHECKED_BYTES - _HEADER.size)

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


class RecordFields(NamedTuple):
    """Everything a record header says of its block, the payload's checksum apart."""

    key: BlockKey
    parent: BlockKey | None
    namespace: bytes
    num_bytes: int
    sequence: int
    place: int
    """page number of the header, counted over all segments"""
    codec_id: int = CodecId.RAW

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record."""
        return record_bytes_for(self.num_bytes)


@dataclass(frozen=True, slots=True)
class Header:
    """A header whose own checksum was right."""

    fields: RecordFields
    payload_checksum: bytes


def pack_header(page: memoryview, fields: RecordFields, payload_checksum: bytes) -> None:
    """Fills a header page."""
    stored_bytes = fields.num_bytes
    packed = _HEADER.pack(
        MAGIC, FORMAT_VERSION, fields.codec_id, 0 if fields.parent is None else _FLAG_HAS_PARENT, 0,
        fields.namespace, fields.key, NO_PARENT if fields.parent is None else fields.parent,
        fields.num_bytes, stored_bytes, fields.sequence, fields.place, payload_checksum,
    )  # fmt: skip
    page[: _HEADER.size] = packed
    page[_HEADER.size : _CHECKED_BYTES] = _HEADER_PADDING
    page[_CHECKED_BYTES:HEADER_BYTES] = xxhash.xxh3_64_digest(page[:_CHECKED_BYTES])


def parse_header(page: memoryview) -> Header | str:
    """The header in ``page``, or in words why there is none that this version can read."""
    if page[: len(MAGIC)] != MAGIC:
        return "no record starts here"
    if xxhash.xxh3_64_digest(page[:_CHECKED_BYTES]) != page[_CHECKED_BYTES:HEADER_BYTES]:
        return "the header's checksum is wrong"
    _, version, codec_id, flags, _, namespace, key, parent, num_bytes, stored_bytes, sequence, place, checksum = _HEADER.unpack_from(page)
    if version != FORMAT_VERSION:
        return f"the record is of format version {version}"
    if not is_known_codec(codec_id) or stored_bytes != num_bytes:
        return f"codec {codec_id} with {stored_bytes} stored bytes for {num_bytes} is unknown"
    has_parent = bool(flags & _FLAG_HAS_PARENT)
    fields = RecordFields(BlockKey(key), BlockKey(parent) if has_parent else None, namespace, num_bytes, sequence, place, codec_id)
    return Header(fields, checksum)


def header_mismatch(found: Header, expected: RecordFields) -> str | None:
    """Why a valid header is not the one the index promised, or None where it is."""
    for name in ("key", "namespace", "num_bytes", "place", "sequence", "codec_id"):
        if getattr(found.fields, name) != getattr(expected, name):
            return f"the record's {name} is not the one the index names"
    return None


def payload_checksum(payload: memoryview) -> bytes:
    """xxh3-128 of the payload in canonical byte order. Releases the interpreter lock for large payloads."""
    return xxhash.xxh3_128_digest(payload)


def pack_entry(fields: RecordFields) -> bytes:
    """The index entry of a record (stored under ``pack_place(fields.place)``)."""
    unchecked = ENTRY.pack(
        fields.key, NO_PARENT if fields.parent is None else fields.parent, fields.namespace,
        fields.num_bytes, fields.num_bytes, fields.sequence, fields.codec_id, 0 if fields.parent is None else _FLAG_HAS_PARENT, b"",
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
    if not is_known_codec(codec_id) or stored_bytes != num_bytes:
        return f"codec {codec_id} is unknown"
    place = int.from_bytes(row[:PLACE_BYTES], "big")
    has_parent = bool(flags & _FLAG_HAS_PARENT)
    return RecordFields(BlockKey(key), BlockKey(parent) if has_parent else None, namespace, num_bytes, sequence, place, codec_id)


def pack_text(title: str, values: dict[str, str]) -> bytes:
    """A small text file: the title, ``name: value`` lines and a checksum line over what is before it."""
    text = "".join([f"{title}\n", *(f"{name}: {value}\n" for name, value in values.items())])
    return f"{text}checksum: {xxhash.xxh3_64_hexdigest(text.encode())}\n".encode()


def parse_text(title: str, content: bytes) -> dict[str, str] | None:
    """The values of a small text file, or None where it is damaged. Raises TierFormatError for another format version."""
    body, separator, checksum = content.rpartition(b"checksum: ")
    if not separator or checksum != xxhash.xxh3_64_hexdigest(body).encode() + b"\n":
        return None
    lines = body.decode("utf-8", "replace").splitlines()
    values = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    if lines[0] != title:
        return None
    version = values.get("format", "")
    if version != str(FORMAT_VERSION):
        raise TierFormatError(
            f"the directory is of disk format version {version}, this kvtier reads version {FORMAT_VERSION}: "
            "use the kvtier version that wrote it, or empty the directory (its blocks will be computed again)"
        )
    return values
