"""Blocks in remote stores encrypted: what the store sees, what another key sees, what a forger gets; and where secrets must not appear."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.codecs.aes_gcm import Cipher, parse_key
from kvtier.config import Config, ObjectTierConfig, RedisTierConfig
from kvtier.errors import ConfigError, KVTierError
from kvtier.remote_tiers import open_remote
from kvtier.testing.remote import PREFIX, MemoryClient, MemoryStore, wait_for_probe
from kvtier.testing.servers import ValkeyServer
from kvtier.testing.tiers import NAMESPACE, TierContract, load, meta_of, payload_of, store
from kvtier.tiers.base import Tier
from kvtier.tiers.record import pack_header, parse_header, payload_checksum
from kvtier.tiers.remote import RemoteSettings, RemoteTier
from kvtier.tiers.remote.records import HEADER_BYTES, name_of
from kvtier.types import Outcome, ProbeJob

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))


def open_tier(memory: MemoryStore, key: bytes | None = KEY) -> RemoteTier:
    """A tier that encrypts with a key, or not."""
    settings = RemoteSettings(prefix=PREFIX, retries=0, threads=2)
    return RemoteTier(MemoryClient(memory), name="remote", settings=settings, sealer=None if key is None else Cipher(key))


class TestContract(TierContract):
    """The contract of every tier, encrypted."""

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(MemoryStore())


def test_the_store_sees_nothing() -> None:
    """No part of a block is in the value, the same block is another value each time, and those with the key find and load it."""
    memories = [MemoryStore(), MemoryStore()]
    meta = meta_of(1, 4096)
    values = []
    for memory in memories:
        tier = open_tier(memory)
        store(tier, [meta])
        values.append(memory.values[name_of(PREFIX, NAMESPACE, meta.key)])
        tier.close()
    plain = payload_of(meta.key, meta.num_bytes)
    assert not any(plain[start : start + 16] in value for value in values for start in range(0, 4096, 16))
    assert payload_checksum(memoryview(plain)) not in values[0]
    assert values[0] != values[1]
    other = open_tier(memories[0])
    assert (4096,) == wait_for_probe(other, ProbeJob(1, NAMESPACE, (meta.key,))).num_bytes
    assert (Outcome.OK,) == load(other, [meta])
    other.close()


@pytest.mark.parametrize("key", [OTHER_KEY, None])
def test_another_key_is_a_miss(key: bytes | None) -> None:
    """Counted by a name of its own; the value stays for those whose it is."""
    memory = MemoryStore()
    mine, other = open_tier(memory), open_tier(memory, key)
    metas = [meta_of(1, 500)]
    store(mine, metas)
    held = dict(memory.values)
    assert (Outcome.MISS,) == load(other, metas)
    assert 1 == other.take_events()["foreign_records" if key is None else "other_key_records"]
    assert held == memory.values
    assert (Outcome.OK,) == load(mine, metas)
    for tier in (mine, other):
        tier.close()


def test_what_is_not_encrypted_is_not_taken() -> None:
    """A tier with a key does not believe values without one, whatever length they have."""
    memory = MemoryStore()
    plain, sealed = open_tier(memory, None), open_tier(memory)
    store(plain, [meta_of(1, 528), meta_of(2, 500)])
    assert (Outcome.MISS, Outcome.MISS) == load(sealed, [meta_of(1, 500), meta_of(2, 500)])
    events = sealed.take_events()
    assert (1, 1) == (events["other_key_records"], events["foreign_records"])
    for tier in (plain, sealed):
        tier.close()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, HEADER_BYTES + 28 + 99), st.integers(1, 255), st.booleans())
def test_nothing_can_be_changed(position: int, difference: int, has_checksums: bool) -> None:
    """A changed byte anywhere, with checksums made right by whoever changed it, never becomes a block (``load`` compares the bytes)."""
    memory = MemoryStore()
    tier = open_tier(memory)
    meta = meta_of(1, 100)
    store(tier, [meta])
    name = name_of(PREFIX, NAMESPACE, meta.key)
    value = bytearray(memory.values[name])
    value[position] ^= difference
    if has_checksums:
        original = parse_header(memoryview(memory.values[name])[:HEADER_BYTES])
        assert not isinstance(original, str)
        stored = memoryview(value)[HEADER_BYTES:]
        if position >= HEADER_BYTES:
            pack_header(memoryview(value)[:HEADER_BYTES], original.fields, payload_checksum(stored))
    memory.values[name] = bytes(value)
    assert load(tier, [meta])[0] in (Outcome.CORRUPT, Outcome.MISS)
    events = tier.take_events()
    assert has_checksums <= (position < HEADER_BYTES or events.get("forged_records", 0) == 1)
    tier.close()


def test_a_block_cannot_stand_for_another() -> None:
    """A value put under another name with a right header and checksums, and one of another namespace, are not opened."""
    memory = MemoryStore()
    tier = open_tier(memory)
    first, second = meta_of(1, 100), meta_of(2, 100)
    store(tier, [first, second])
    names = [name_of(PREFIX, NAMESPACE, meta.key) for meta in (first, second)]
    header = memory.values[names[0]][:HEADER_BYTES]
    found = parse_header(memoryview(header))
    assert not isinstance(found, str)
    payload = memory.values[names[1]][HEADER_BYTES:]
    forged = bytearray(HEADER_BYTES)
    pack_header(memoryview(forged), found.fields, payload_checksum(memoryview(payload)))
    memory.values[names[0]] = bytes(forged) + payload
    assert (Outcome.CORRUPT, Outcome.OK) == load(tier, [first, second])
    assert 1 == tier.take_events()["forged_records"]
    tier.close()


@given(st.binary(max_size=200), st.binary(min_size=16, max_size=16), st.binary(max_size=40), st.binary(min_size=32, max_size=32))
def test_sealed_is_opened_by_the_same_alone(payload: bytes, namespace: bytes, context: bytes, key: bytes) -> None:
    """Key, namespace and context must be those it was sealed with."""
    cipher = Cipher(key)
    sealed = memoryview(cipher.seal(memoryview(payload), namespace, context))
    room = memoryview(bytearray(len(payload)))
    assert cipher.open_into(sealed, room, namespace, context)
    assert payload == bytes(room)
    other = bytes([key[0] ^ 1]) + key[1:]
    assert not Cipher(other).open_into(sealed, room, namespace, context)
    assert not cipher.open_into(sealed, room, namespace[::-1] + b"x", context)
    assert not cipher.open_into(sealed, room, namespace, context + b"x")
    assert Cipher(other).key_id != cipher.key_id


def test_keys_as_they_are_written_down() -> None:
    """Hexadecimal and Base64, with space around; anything else is refused without being shown."""
    assert KEY == parse_key(f" {KEY.hex()}\n") == parse_key(base64.b64encode(KEY).decode())
    for wrong in ("", "geheim", "0" * 63, "zz" * 32, base64.b64encode(KEY[:31]).decode()):
        with pytest.raises(ValueError, match="not a key") as caught:
            parse_key(wrong)
        assert not wrong or wrong not in str(caught.value)


# ---- where secrets must not appear ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A server that wants a password that nobody here has."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"), "--requirepass", "what-nobody-knows").start()
    yield server
    server.kill()


secrets = st.text("abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789+/=_-", min_size=12, max_size=44).map(
    lambda text: f"s3cr3t{text}"
)


@settings(max_examples=25, deadline=None)
@given(secret=secrets, is_file=st.booleans())
def test_secrets_appear_nowhere(server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory, secret: str, is_file: bool) -> None:
    """Not in settings as they are shown, not in errors or their causes, not in the log, not in any representation."""
    path = tmp_path_factory.mktemp("secret") / "file"
    path.write_text(secret + "\n")
    os.environ["KVTIER_TEST_SECRET"] = secret
    source = {"file": str(path)} if is_file else {"env": "KVTIER_TEST_SECRET"}

    def named(*names: str) -> dict[str, str]:
        return {f"{name}_{how}": where for name in names for how, where in source.items()}

    redis = {"type": "redis", "url": server.tcp_url, **named("password", "encryption_key")}
    bucket = {"type": "object", "url": "s3://b", "endpoint": "http://127.0.0.1:1", "access_key": "me", **named("secret_key")}
    config = Config.from_mapping({"tiers": [{"type": "host", "capacity": "1MiB"}, redis, bucket]})
    seen = [repr(config), str(config.model_dump())]
    log = logging.getLogger()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        for section in config.lower:
            assert isinstance(section, (RedisTierConfig, ObjectTierConfig))
            plain = section.model_copy(update={"encryption_key_env": None, "encryption_key_file": None, "connect_timeout_s": 0.5})
            for each in (section, plain, plain.model_copy(update={"required": False})):
                with contextlib.suppress(KVTierError):
                    tier = open_remote(each)
                    seen += [repr(tier), repr(tier._client), str(tier.take_events()), repr(vars(tier._client))]
                    tier.close()
                with pytest.raises(KVTierError) as caught:
                    open_remote(each.model_copy(update={"required": True}))
                seen += [str(caught.value), repr(caught.value), repr(caught.value.__cause__)]
    finally:
        log.removeHandler(handler)
    assert not [text for text in (*seen, *records) if secret in text]


def test_a_key_that_is_none_is_named_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable and what a key is."""
    monkeypatch.setenv("KVTIER_TEST_SECRET", "too-short")
    section = RedisTierConfig(url="redis://127.0.0.1:1/0", encryption_key_env="KVTIER_TEST_SECRET")
    with pytest.raises(ConfigError, match=r"tier redis: the encryption key of KVTIER_TEST_SECRET is not a key: 32 bytes"):
        open_remote(section)
