"""The header in front of every payload that leaves memory, and the small text files. docs/reference/format.md is the specification.

Everything here is pure: bytes in, values out.  All integers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from kvtier.codecs import KEY_ID_BYTES, NO_KEY, CodecId, is_known_codec, overhead_of
from kvtier.errors import TierFormatError
from kvtier.types import KEY_BYTES, BlockKey

FORMAT_VERSION = 1
MAGIC = b"KVTIERBK"
NO_PARENT = bytes(KEY_BYTES)
FLAG_HAS_PARENT = 1

_HEADER = struct.Struct(f"<8sHBBI16s16s16sQQQQ16s{KEY_ID_BYTES}s")
"""magic, version, codec, flags, reserved, namespace, key, parent, payload bytes, stored bytes, sequence, place, checksum, key id"""
_IDENTITY_BYTES = 96
"""of a header, before the checksum of what is stored"""
_CHECKSUM_BYTES = 8
MIN_HEADER_BYTES = _HEADER.size + _CHECKSUM_BYTES
SEAL_BYTES = 28
"""nonce and tag"""


class RecordFields(NamedTuple):
    """Everything a record header says of its block, the payload's checksum apart."""

    key: BlockKey
    parent: BlockKey | None
    namespace: bytes
    num_bytes: int
    sequence: int
    place: int
    """page number of the header, counted over all segments; 0 in a remote store, and so is ``sequence``"""
    codec_id: int = CodecId.RAW
    key_id: bytes = NO_KEY
    """of what the payload is encrypted with"""


@dataclass(frozen=True, slots=True)
class Header:
    """A header whose own checksum was right."""

    fields: RecordFields
    payload_checksum: bytes


def pack_header(page: memoryview, fields: RecordFields, payload_checksum: bytes, seal: bytes = b"") -> None:
    """Fills a header of any size from ``MIN_HEADER_BYTES`` on: the fields, the seal, zeros, and last the checksum over all of it.

    ``seal``: nonce and tag of a payload whose codec keeps them in the header, ``SEAL_BYTES`` long.
    """
    packed = _pack(fields, payload_checksum) + seal
    checked = len(page) - _CHECKSUM_BYTES
    page[: len(packed)] = packed
    page[len(packed) : checked] = bytes(checked - len(packed))
    page[checked:] = xxhash.xxh3_64_digest(page[:checked])


def parse_header(page: memoryview) -> Header | str:
    """The header in ``page``, or in words why there is none that this version can read."""
    if page[: len(MAGIC)] != MAGIC:
        return "no record starts here"
    if not is_whole(page):
        return "the header's checksum is wrong"
    (
        _, version, codec_id, flags, _, namespace, key, parent, num_bytes, stored_bytes, sequence, place, checksum, key_id
    ) = _HEADER.unpack_from(page)  # fmt: skip
    if version != FORMAT_VERSION:
        return f"the record is of format version {version}"
    if not is_known_codec(codec_id) or stored_bytes != num_bytes + overhead_of(codec_id):
        return f"codec {codec_id} with {stored_bytes} stored bytes for {num_bytes} is unknown"
    has_parent = bool(flags & FLAG_HAS_PARENT)
    fields = RecordFields(BlockKey(key), BlockKey(parent) if has_parent else None, namespace, num_bytes, sequence, place, codec_id, key_id)
    return Header(fields, checksum)


def is_whole(page: memoryview) -> bool:
    """Whether ``page`` is a header as it was written, by whatever version."""
    checked = len(page) - _CHECKSUM_BYTES
    return page[: len(MAGIC)] == MAGIC and xxhash.xxh3_64_digest(page[:checked]) == page[checked:]


def seal_of(page: memoryview) -> bytes:
    """Nonce and tag in a header that has them."""
    return bytes(page[_HEADER.size : _HEADER.size + SEAL_BYTES])


def identity_bytes(fields: RecordFields) -> bytes:
    """All that a header says of its block, for binding an encrypted payload to it."""
    return _pack(fields, b"")[:_IDENTITY_BYTES]


def _pack(fields: RecordFields, checksum: bytes) -> bytes:
    return _HEADER.pack(
        MAGIC, FORMAT_VERSION, fields.codec_id, 0 if fields.parent is None else FLAG_HAS_PARENT, 0,
        fields.namespace, fields.key, NO_PARENT if fields.parent is None else fields.parent,
        fields.num_bytes, fields.num_bytes + overhead_of(fields.codec_id), fields.sequence, fields.place, checksum, fields.key_id,
    )  # fmt: skip


def header_mismatch(found: Header, expected: RecordFields) -> str | None:
    """Why a valid header is not the one the index promised, or None where it is."""
    for name in ("key", "namespace", "num_bytes", "place", "sequence", "codec_id", "key_id"):
        if getattr(found.fields, name) != getattr(expected, name):
            return f"the record's {name} is not the one the index names"
    return None


def payload_checksum(payload: memoryview) -> bytes:
    """xxh3-128 of the payload in canonical byte order. Releases the interpreter lock for large payloads."""
    return xxhash.xxh3_128_digest(payload)


def pack_text(title: str, values: dict[str, str]) -> bytes:
    """A small text file: the title, ``name: value`` lines and a checksum line over what is before it."""
    text = "".join([f"{title}\n", *(f"{name}: {value}\n" for name, value in values.items())])
    return f"{text}checksum: {xxhash.xxh3_64_hexdigest(text.encode())}\n".encode()


def parse_text(title: str, content: bytes, what: str = "directory") -> dict[str, str] | None:
    """The values of a small text file, or None where it is damaged. Raises TierFormatError for another format version.

    ``what``: the place that the file speaks for, for the message.
    """
    body, separator, checksum = content.rpartition(b"checksum: ")
    if not separator or checksum != xxhash.xxh3_64_hexdigest(body).encode() + b"\n":
        return None
    lines = body.decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != title:
        return None
    values = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    version = values.get("format", "")
    if version != str(FORMAT_VERSION):
        raise TierFormatError(
            f"the {what} is of format version {version}, this kvtier reads version {FORMAT_VERSION}: "
            f"use the kvtier version that wrote it, or empty the {what} (its blocks will be computed again)"
        )
    return values
