"""The values in a remote store: names, headers, and what a value must prove before it is trusted. docs/reference/format.md."""

from __future__ import annotations

from typing import NamedTuple

from kvtier.codecs import NO_KEY, CodecId, Sealer, overhead_of
from kvtier.tiers.record import (
    FORMAT_VERSION,
    RecordFields,
    header_mismatch,
    identity_bytes,
    is_whole,
    pack_header,
    parse_header,
    payload_checksum,
)
from kvtier.tiers.remote.client import Get
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


class Records:
    """How a tier writes its values: as they are, or encrypted. Thread-safe."""

    def __init__(self, sealer: Sealer | None = None) -> None:
        self._sealer = sealer
        self._codec_id = CodecId.RAW if sealer is None else CodecId.AES_GCM
        self.overhead_bytes = HEADER_BYTES + overhead_of(self._codec_id)
        """by how much a value is longer than its block"""

    def pack(self, meta: BlockMeta, namespace: bytes, payload: memoryview) -> tuple[bytes, memoryview]:
        """Header and stored payload of a block's value. Reads the payload once."""
        fields = self._fields(meta, namespace)
        stored = payload if self._sealer is None else memoryview(self._sealer.seal(payload, namespace, identity_bytes(fields)))
        header = bytearray(HEADER_BYTES)
        pack_header(memoryview(header), fields, payload_checksum(stored))
        return bytes(header), stored

    def room_for(self, payload: memoryview) -> memoryview:
        """Where the stored payload is to be read to: the block's own memory where it is stored as it is."""
        return payload if self._sealer is None else memoryview(bytearray(len(payload) + overhead_of(self._codec_id)))

    def verify(self, get: Get, payload: memoryview, meta: BlockMeta, namespace: bytes, checksum: bytes | None = None) -> Verdict:
        """Whether what was read is the block that was asked for, whole; then ``payload`` holds it. ``checksum``: see ``Reply``."""
        found = parse_header(get.header)
        if isinstance(found, str):
            if is_whole(get.header):  # others may read it
                return Verdict(Outcome.MISS, found, "other_version_records")
            return Verdict(Outcome.CORRUPT, found, "damaged_records")
        expected = self._fields(meta, namespace)
        if (found.fields.codec_id, found.fields.key_id) != (expected.codec_id, expected.key_id):
            return Verdict(Outcome.MISS, "the block was encrypted with another key, or not at all", "other_key_records")
        mismatch = header_mismatch(found, expected)
        if mismatch is not None:
            return Verdict(Outcome.CORRUPT, mismatch, "foreign_records")
        if (checksum or payload_checksum(get.payload)) != found.payload_checksum:
            return Verdict(Outcome.CORRUPT, "the payload's checksum is wrong", "damaged_records")
        if self._sealer is not None and not self._sealer.open_into(get.payload, payload, namespace, identity_bytes(found.fields)):
            return Verdict(Outcome.CORRUPT, "the payload was not encrypted by one of us", "forged_records")
        return GOOD

    def _fields(self, meta: BlockMeta, namespace: bytes) -> RecordFields:
        key_id = NO_KEY if self._sealer is None else self._sealer.key_id
        return RecordFields(meta.key, meta.parent, namespace, meta.num_bytes, 0, 0, self._codec_id, key_id)


__all__ = ["FORMAT_NAME", "FORMAT_TITLE", "FORMAT_VERSION", "GOOD", "HEADER_BYTES", "Records", "Verdict", "key_of", "name_of"]
