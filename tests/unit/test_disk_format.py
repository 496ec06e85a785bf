"""The bytes on disk are those of docs/reference/format.md, for ever."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvtier.codecs import CodecId, is_known_codec
from kvtier.errors import TierFormatError
from kvtier.testing.tiers import meta_of, payload_of, store
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk.format import ENTRY, HEADER_BYTES, is_row_intact, pack_entry, pack_place, pack_sequence, parse_row, record_bytes_for
from kvtier.tiers.disk.segments import segment_name, segment_number
from kvtier.tiers.record import Header, RecordFields, header_mismatch, pack_header, pack_text, parse_header, parse_text
from kvtier.types import BlockKey, Outcome

KEY, PARENT, NAMESPACE = BlockKey(b"k" * 16), BlockKey(b"p" * 16), b"n" * 16
FIELDS = RecordFields(KEY, PARENT, NAMESPACE, 5000, 77, 1234567)


def header_page(fields: RecordFields = FIELDS) -> bytearray:
    """A header page as kvtier writes it."""
    page = bytearray(b"\xee" * HEADER_BYTES)
    pack_header(memoryview(page), fields, b"c" * 16)
    return page


def test_header_bytes() -> None:
    """The header, spelled out field by field."""
    expected = b"KVTIERBK" + struct.pack("<HBBI", 1, 0, 1, 0) + NAMESPACE + KEY + PARENT
    expected += struct.pack("<QQQQ", 5000, 5000, 77, 1234567) + b"c" * 16
    expected += bytes(4088 - len(expected))
    expected += xxhash.xxh3_64_digest(expected)
    assert expected == bytes(header_page())


def test_a_record_on_disk(tmp_path: Path) -> None:
    """The records of a tier: header page, payload, zeros to the end of the page (nothing of other blocks), zeros after the last one."""
    segment_bytes = 64 << 10
    tier = DiskTier(tmp_path, (1 << 20) + (32 << 10) + segment_bytes, segment_bytes=segment_bytes, io_threads=1)
    metas = [meta_of(4, 8192), meta_of(5, 5000)]
    for meta in metas:
        assert (Outcome.OK,) == store(tier, [meta])
    tier.close()
    content = (tmp_path / "segment-000000.kv").read_bytes()
    assert segment_bytes == len(content)
    for place, meta in zip((0, 3), metas, strict=True):
        record = content[place * 4096 : (place + 3) * 4096]
        header = parse_header(memoryview(record)[:4096])
        assert isinstance(header, Header)
        expected = RecordFields(meta.key, meta.parent, bytes(range(16)), meta.num_bytes, header.fields.sequence, place)
        assert expected == header.fields
        payload = payload_of(meta.key, meta.num_bytes)
        assert payload == record[4096 : 4096 + meta.num_bytes]
        assert xxhash.xxh3_128_digest(payload) == header.payload_checksum
        assert not any(record[4096 + meta.num_bytes :])
    assert not any(content[6 * 4096 :])


@given(position=st.integers(0, HEADER_BYTES - 1), mask=st.integers(1, 255))
def test_every_header_byte_counts(position: int, mask: int) -> None:
    """No byte of the header page can change unnoticed."""
    page = header_page()
    page[position] ^= mask
    assert isinstance(parse_header(memoryview(page)), str)


def test_headers_of_other_versions_and_codecs_are_unreadable() -> None:
    """A valid checksum does not make an unknown version or codec readable."""
    for offset, value, word in ((8, b"\x02\x00", "version 2"), (10, b"\x09", "codec 9"), (72, b"\x01", "codec 0")):
        page = header_page()
        page[offset : offset + len(value)] = value
        page[4088:] = xxhash.xxh3_64_digest(page[:4088])
        problem = parse_header(memoryview(page))
        assert isinstance(problem, str)
        assert word in problem


@pytest.mark.parametrize("name", ["key", "namespace", "num_bytes", "place", "sequence"])
def test_headers_of_other_blocks_are_refused(name: str) -> None:
    """Each identifying field of a header is compared with what the index promised."""
    header = parse_header(memoryview(header_page()))
    assert isinstance(header, Header)
    assert None is header_mismatch(header, FIELDS)
    values = {field: getattr(FIELDS, field) for field in ("key", "parent", "namespace", "num_bytes", "sequence", "place")}
    values[name] = values[name] + 1 if isinstance(values[name], int) else b"x" * 16
    assert name in str(header_mismatch(header, RecordFields(**values)))


def test_index_entry_bytes() -> None:
    """The index entry, spelled out; its checksum covers the place."""
    expected = KEY + PARENT + NAMESPACE + struct.pack("<IIQBB6x", 5000, 5000, 77, 0, 1)
    expected += xxhash.xxh3_64_digest((1234567).to_bytes(8, "big") + expected)
    assert 80 == ENTRY.size == len(expected)
    assert expected == pack_entry(FIELDS)
    assert (1234567).to_bytes(8, "big") == pack_place(1234567)


@given(position=st.integers(0, 87), mask=st.integers(1, 255))
def test_every_index_byte_counts(position: int, mask: int) -> None:
    """No byte of an index row can change unnoticed."""
    row = bytearray(pack_place(FIELDS.place) + pack_entry(FIELDS))
    assert is_row_intact(bytes(row))
    assert FIELDS == parse_row(bytes(row))
    row[position] ^= mask
    assert not is_row_intact(bytes(row))


def test_no_parent_is_not_a_parent_of_zeros() -> None:
    """A block without parent and one whose parent key is zero differ."""
    for parent in (None, BlockKey(bytes(16))):
        fields = RecordFields(KEY, parent, NAMESPACE, 1, 1, 1)
        header = parse_header(memoryview(header_page(fields)))
        assert isinstance(header, Header)
        assert parent == header.fields.parent
        assert fields == parse_row(pack_place(1) + pack_entry(fields))


def test_sequence_row() -> None:
    """The row of the next sequence number holds it ten times."""
    assert (77).to_bytes(8, "little") * 10 == pack_sequence(77)
    assert is_row_intact(b"\xff" * 8 + pack_sequence(77))
    assert not is_row_intact(b"\xff" * 8 + pack_sequence(77)[:-1] + b"\x01")


def test_text_files() -> None:
    """Title, values, checksum; a damaged one is None, one of another version an error even if all else differs."""
    content = pack_text("title", {"format": "1", "segment_bytes": "65536"})
    body = b"title\nformat: 1\nsegment_bytes: 65536\n"
    assert body + b"checksum: " + xxhash.xxh3_64_hexdigest(body).encode() + b"\n" == content
    assert {"format": "1", "segment_bytes": "65536"} == parse_text("title", content)
    assert None is parse_text("other title", content)
    for position in range(len(content)):
        assert None is parse_text("title", content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert None is parse_text("title", content[:position])
    for body in (b"", b"\n", b"\xff"):  # a checksum that is right, over no title
        assert None is parse_text("title", body + f"checksum: {xxhash.xxh3_64_hexdigest(body)}\n".encode())
    with pytest.raises(TierFormatError, match="version 3"):
        parse_text("title", pack_text("title", {"format": "3"}))


def test_record_sizes() -> None:
    """A record is a header page and whole pages of payload."""
    assert [8192, 8192, 12288] == [record_bytes_for(num_bytes) for num_bytes in (1, 4096, 4097)]


def test_segment_names() -> None:
    """Names and numbers of segments belong together one to one."""
    assert "segment-000012.kv" == segment_name(12)
    assert [12, 1234567] == [segment_number(segment_name(number)) for number in (12, 1234567)]
    for name in ("segment-12.kv", "segment-0000012.kv", "segment-000012.kv.new", "segment-.kv", "x"):
        assert None is segment_number(name)


def test_codec_ids() -> None:
    """Codec ids never change."""
    assert {"RAW": 0, "AES_GCM": 1, "AES_GCM_APART": 2} == {codec.name: codec.value for codec in CodecId}
    assert [True, True, True, False] == [is_known_codec(number) for number in range(4)]
