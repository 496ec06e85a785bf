"""Blocks on disk encrypted: what the files show, what another key finds, what a forger gets, and the tier's contract as ever."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.codecs.aes_gcm import Cipher
from kvtier.config import Config
from kvtier.engine import CacheEngine
from kvtier.errors import ConfigError
from kvtier.hashing import Namespace
from kvtier.io import EngineKind
from kvtier.testing.disk_machine import STEPS, DiskMachine
from kvtier.testing.tiers import NAMESPACE, TierContract, load, meta_of, payload_of, store
from kvtier.tiers.base import Tier
from kvtier.tiers.disk import DiskTier, check_path
from kvtier.tiers.disk.format import HEADER_BYTES, record_bytes_for
from kvtier.tiers.record import pack_header, parse_header, payload_checksum, seal_of
from kvtier.types import Outcome

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = (1 << 20) + (32 << 10) + 6 * SEGMENT_BYTES
SIZES = (1, 100, 4068, 4080, 4095, 4096, 4097, 8192, 20000)
"""with room for the tag behind the payload's last page, without, and with a part of it"""


def open_tier(directory: Path, key: bytes | None = KEY, io_engine: EngineKind = "auto", *, direct: bool = True) -> DiskTier:
    """A tier that encrypts with a key, or not."""
    sealer = None if key is None else Cipher(key)
    options = {"direct_io": "auto" if direct else "off", "io_engine": io_engine, "sealer": sealer}
    return DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, durable=False, **options)  # type: ignore[arg-type]


class TestContract(TierContract):
    """The contract of every tier, encrypted, past the page cache."""

    is_persistent = True

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(directory)


class TestContractOnThreads(TierContract):
    """The same in the page cache, without io_uring."""

    is_persistent = True

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(directory, io_engine="threads", direct=False)


class EncryptedDiskMachine(DiskMachine):
    """Any sequence of stores, loads, removals, crashes and losses of the index, encrypted."""

    sealer = Cipher(KEY)


@pytest.fixture(autouse=True, scope="module")
def parent_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where pytest cleans up."""
    EncryptedDiskMachine.parent_directory = tmp_path_factory.mktemp("disk-machine")


TestEncryptedDisk = EncryptedDiskMachine.TestCase
TestEncryptedDisk.settings = STEPS


def segments_of(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.glob("segment-*.kv")))


@pytest.mark.parametrize("io_engine", ["auto", "threads"])
@pytest.mark.parametrize("direct", [True, False])
def test_the_files_show_nothing(tmp_path: Path, io_engine: EngineKind, direct: bool) -> None:
    """Payloads of every size come back; no part of one is in the segments, nor its checksum; the same block looks different each time."""
    seen = []
    metas = [meta_of(number, num_bytes) for number, num_bytes in enumerate(SIZES)]
    for name in ("a", "b"):
        tier = open_tier(tmp_path / name, io_engine=io_engine, direct=direct)
        assert {Outcome.OK} == set(store(tier, metas))
        assert {Outcome.OK} == set(load(tier, metas))
        assert [] == tier.check()
        tier.close()
        seen.append(segments_of(tmp_path / name))
        assert [] == check_path(tmp_path / name), "every byte can be checked without the key"
    for meta in metas[2:]:
        plain = payload_of(meta.key, meta.num_bytes)
        for content in seen:
            assert not any(plain[at : at + 16] in content for at in range(0, meta.num_bytes - 16, 512))
            assert payload_checksum(memoryview(plain)) not in content
    at = record_bytes_for(SIZES[0]) + HEADER_BYTES  # the first block is a single byte, which may be the same by chance
    assert seen[0][at : at + 4000] != seen[1][at : at + 4000]
    tier = open_tier(tmp_path / "a")
    assert len(metas) == tier.lookup([meta.key for meta in metas])
    assert {Outcome.OK} == set(load(tier, metas))
    tier.close()


def test_the_end_of_the_last_page_is_zero(tmp_path: Path) -> None:
    """The tag, which passes there, does not stay."""
    tier = open_tier(tmp_path)
    store(tier, [meta_of(1, 100)])
    tier.close()
    page = segments_of(tmp_path)[HEADER_BYTES : 2 * HEADER_BYTES]
    assert page[100:] == bytes(HEADER_BYTES - 100)
    assert any(page[:100])


@pytest.mark.parametrize("has_index", [True, False])
def test_another_key_is_a_miss(tmp_path: Path, has_index: bool) -> None:
    """Counted by a name of its own; the block is stored anew with the key that there is now."""
    tier = open_tier(tmp_path)
    metas = [meta_of(number, 5000) for number in range(3)]
    store(tier, metas)
    tier.close()
    if not has_index:
        os.unlink(tmp_path / "index.mdb")
    other = open_tier(tmp_path, OTHER_KEY)
    assert (Outcome.MISS,) * 3 == load(other, metas)
    assert {"other_key_records": 3} == other.take_events()
    assert {Outcome.OK} == set(store(other, metas))
    assert {Outcome.OK} == set(load(other, metas))
    assert {} == other.take_events()
    other.close()


@pytest.mark.parametrize(("before", "after"), [(None, KEY), (KEY, None)])
@pytest.mark.parametrize("has_index", [True, False])
def test_with_and_without_a_key(tmp_path: Path, before: bytes | None, after: bytes | None, has_index: bool) -> None:
    """Who encrypts finds nothing that is not encrypted, and the other way round; counted when the directory is opened."""
    tier = open_tier(tmp_path, before)
    metas = [meta_of(number, 5000) for number in range(3)]
    store(tier, metas)
    tier.close()
    if not has_index:
        os.unlink(tmp_path / "index.mdb")
    tier = open_tier(tmp_path, after)
    assert (0, 3) == (tier.recovery.num_blocks, tier.recovery.num_lost)
    assert {"other_key_records": 3} == tier.take_events()
    assert {Outcome.MISS} == set(load(tier, metas))
    assert {Outcome.OK} == set(store(tier, metas))
    tier.close()
    tier = open_tier(tmp_path, after)
    assert {Outcome.OK} == set(load(tier, metas))
    assert [] == tier.check()
    tier.close()
    assert [] == check_path(tmp_path)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed tier with two blocks of 5000 bytes."""
    directory = tmp_path_factory.mktemp("sealed")
    tier = open_tier(directory, direct=False)
    store(tier, [meta_of(0, 5000), meta_of(1, 5000)])
    tier.close()
    return directory


@settings(max_examples=60, deadline=None)
@given(st.integers(0, HEADER_BYTES + 4999), st.integers(1, 255), st.booleans())
def test_nothing_can_be_changed(sealed: Path, position: int, difference: int, has_checksums: bool) -> None:
    """A changed byte anywhere in a record, with checksums made right by whoever changed it, never becomes a block."""
    directory = sealed.parent / "changed"
    shutil.copytree(sealed, directory)
    try:
        record = bytearray(segments_of(directory)[: record_bytes_for(5000)])
        seal = HEADER_BYTES - 3976 <= position < HEADER_BYTES - 3948
        record[position] ^= difference
        if has_checksums and (seal or position >= HEADER_BYTES):
            original = parse_header(memoryview(segments_of(directory))[:HEADER_BYTES])
            assert not isinstance(original, str)
            page = memoryview(record)[:HEADER_BYTES]
            pack_header(page, original.fields, payload_checksum(memoryview(record)[HEADER_BYTES : HEADER_BYTES + 5000]), seal_of(page))
        with open(directory / "segment-000000.kv", "r+b") as file:
            file.write(record)
        tier = open_tier(directory, direct=False)
        assert (Outcome.CORRUPT, Outcome.OK) == load(tier, [meta_of(0, 5000), meta_of(1, 5000)])
        is_forged = has_checksums and (seal or position >= HEADER_BYTES)
        assert ({"forged_records": 1} if is_forged else {}) == tier.take_events()
        tier.close()
    finally:
        shutil.rmtree(directory)


def test_a_block_cannot_stand_for_another(sealed: Path) -> None:
    """A payload put into another block's record, with a right header and checksums, is not opened."""
    directory = sealed.parent / "swapped"
    shutil.copytree(sealed, directory)
    content = bytearray(segments_of(directory))
    size = record_bytes_for(5000)
    header = parse_header(memoryview(content)[:HEADER_BYTES])
    assert not isinstance(header, str)
    content[HEADER_BYTES:size] = content[size + HEADER_BYTES : 2 * size]
    seal = seal_of(memoryview(content)[size : size + HEADER_BYTES])
    stored = memoryview(content)[HEADER_BYTES : HEADER_BYTES + 5000]
    pack_header(memoryview(content)[:HEADER_BYTES], header.fields, payload_checksum(stored), seal)
    (directory / "segment-000000.kv").write_bytes(bytes(content))
    tier = open_tier(directory)
    assert (Outcome.CORRUPT, Outcome.OK) == load(tier, [meta_of(0, 5000), meta_of(1, 5000)])
    assert {"forged_records": 1} == tier.take_events()
    tier.close()


def test_tenants_have_keys_of_their_own(tmp_path: Path) -> None:
    """The key of a namespace, which a tenant's salt is part of, does not open what another one sealed, whatever the header says."""
    cipher = Cipher(KEY)
    payload, room = memoryview(bytearray(b"p" * 100)), memoryview(bytearray(116))
    nonce = cipher.seal_into(payload, room, NAMESPACE, b"context")
    out = memoryview(bytearray(100))
    assert cipher.open_with(nonce, room, out, NAMESPACE, b"context")
    assert not cipher.open_with(nonce, room, out, NAMESPACE[::-1], b"context")
    assert not cipher.open_with(nonce, room, out, NAMESPACE, b"another")


def test_the_setting_reaches_the_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is read from the variable when the cache is opened, and what was found in another key is in the statistics."""
    monkeypatch.setenv("KVTIER_TEST_KEY", KEY.hex())
    disk = {"type": "disk", "path": str(tmp_path / "disk"), "capacity": "32MiB", "segment": "1MiB", "encryption_key_env": "KVTIER_TEST_KEY"}

    def run(**more: str) -> dict[str, int]:
        config = Config.from_mapping({"tiers": [{"type": "host", "capacity": "1MiB"}, disk | more]})
        cache = CacheEngine.open(config, namespace=Namespace(model="test"), block_bytes=4096)
        while cache.is_growing:
            cache.poll()
        plan = cache.begin_store([meta_of(1, 4096).key], 0)
        if plan.slots:
            cache.commit_store(plan.job_id)
        assert cache.drain(20.0)
        counters = cache.stats.snapshot()
        cache.close()
        return counters

    assert 1 == run()["disk.stored_blocks"]
    assert 0 == run()["disk.other_key_records"]
    monkeypatch.delenv("KVTIER_TEST_KEY")
    with pytest.raises(ConfigError, match="tier disk: encryption_key_env: the environment variable KVTIER_TEST_KEY is not set"):
        run()
    monkeypatch.setenv("KVTIER_TEST_KEY", "short")
    with pytest.raises(ConfigError, match="tier disk: the encryption key of KVTIER_TEST_KEY is not a key"):
        run()
    with pytest.raises(ConfigError, match="encryption_key_env is given too; keep one"):
        run(encryption_key_file="/dev/null")
    del disk["encryption_key_env"]
    assert 1 == run()["disk.other_key_records"]
