"""The values in a remote store: names, headers, and what a value must prove before it is trusted. docs/reference/format.md."""

from __future__ import annotations

from typing import NamedTuple

from kvtier.tiers.record import FORMAT_VERSION, RecordFields, header_mismatch, pack_header, parse_header, payload_checksum
from kvtier.types import BlockKey, BlockMeta, Outcome

HEADER_BYTES = 128
FORMAT_TITLE = "kvtier remote store"
FORMAT_NAME = "format"


class Verdict(NamedTuple):
    """What a value proved to be. ``event`` names what is to be counted beside the outcome."""

    outcome: Outcome
    error: str | None = None
    event: str | None = None


GOOD = Verdict(Outcome.OK)


def name_of(prefix: str, namespace: bytes, key: BlockKey) -> str:
    """The name of a block: the namespace (which a tenant's salt is part of) and the whole key."""
    return f"{prefix}{namespace.hex()}/{key.hex()}"


def key_of(prefix: str, name: str) -> tuple[bytes, BlockKey] | None:
    """Namespace and key of a block's name; None for other names."""
    namespace, separator, key = name.removeprefix(prefix).partition("/")
    try:
        parts = bytes.fromhex(namespace), BlockKey(bytes.fromhex(key))
    except ValueError:
        return None
    is_block = separator and name.startswith(prefix) and len(parts[0]) == len(parts[1]) == 16
    return parts if is_block else None


def header_of(meta: BlockMeta, namespace: bytes, payload: memoryview) -> bytes:
    """The header of a block's value. Reads the payload once."""
    header = bytearray(HEADER_BYTES)
    pack_header(memoryview(header), _fields(meta, namespace), payload_checksum(payload))
    return bytes(header)


def verify(header: memoryview, payload: memoryview, meta: BlockMeta, namespace: bytes) -> Verdict:
    """Whether a value is the block that was asked for, whole."""
    found = parse_header(header)
    if isinstance(found, str):
        return Verdict(Outcome.CORRUPT, found, "damaged_records")
    mismatch = header_mismatch(found, _fields(meta, namespace))
    if mismatch is not None:
        return Verdict(Outcome.CORRUPT, mismatch, "foreign_records")
    if payload_checksum(payload) != found.payload_checksum:
        return Verdict(Outcome.CORRUPT, "the payload's checksum is wrong", "damaged_records")
    return GOOD


def _fields(meta: BlockMeta, namespace: bytes) -> RecordFields:
    return RecordFields(meta.key, meta.parent, namespace, meta.num_bytes, 0, 0)


__all__ = ["FORMAT_NAME", "FORMAT_TITLE", "FORMAT_VERSION", "GOOD", "HEADER_BYTES", "Verdict", "header_of", "key_of", "name_of", "verify"]
