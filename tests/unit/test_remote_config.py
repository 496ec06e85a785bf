"""Remote tiers by configuration: what is refused, that no secret shows, and an engine over a real server."""

from __future__ import annotations

import hashlib
import importlib.abc
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.config import Config, DiskTierConfig, ObjectTierConfig, RedisTierConfig
from kvtier.engine import CacheEngine
from kvtier.errors import ConfigError, RemoteError
from kvtier.hashing import Namespace
from kvtier.memory.arena import Arena
from kvtier.remote_tiers import open_remote
from kvtier.stats import COUNTERS
from kvtier.testing.servers import ValkeyServer
from kvtier.types import BlockKey

HOST = {"type": "host", "capacity": 4 * 12_288}
BLOCK_BYTES = 10_000
SECRET = "hidden-word"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path, "--requirepass", SECRET).start()
    yield server
    server.kill()


def refusal(**tier: object) -> str:
    """What is said of a tier's settings."""
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping({"tiers": [HOST, tier]})
    return str(caught.value)


@pytest.mark.parametrize(
    ("tier", "expected"),
    [
        ({"type": "redis"}, "tiers[1].url: missing"),
        ({"type": "redis", "url": "http://a"}, 'tiers[1].url: "http://a" is wrong (not the address of a server alone)'),
        ({"type": "redis", "url": f"redis://me:{SECRET}@host:1/0"}, 'tiers[1].url: "redis://***@host:1/0" is wrong'),
        ({"type": "redis", "url": "redis://host", "password": SECRET}, "tiers[1].password: unknown key; did you mean password_env?"),
        ({"type": "redis", "url": "redis://host", "prefix": "a"}, 'tiers[1].prefix: "a" is wrong'),
        ({"type": "redis", "url": "redis://host", "retries": 11}, "tiers[1].retries: 11 is wrong; allowed: a whole number from 0 to 10"),
        ({"type": "redis", "url": "redis://h", "password_env": "A", "password_file": "/b"}, "password_env is given too; keep one"),
        ({"type": "redis", "url": "redis://host:port/0"}, 'tiers[1].url: "redis://host:port/0" is wrong'),
        ({"type": "redis", "url": "redis://host:99999/0"}, 'tiers[1].url: "redis://host:99999/0" is wrong'),
        ({"type": "redis", "url": "redis://host:1/first"}, 'tiers[1].url: "redis://host:1/first" is wrong'),
        ({"type": "redis", "url": "redis://[::1:1/0"}, 'tiers[1].url: "redis://[::1:1/0" is wrong'),
        ({"type": "redis", "url": "redis://host:1/0?protocol=3"}, 'tiers[1].url: "redis://host:1/0?protocol=3" is wrong'),
        ({"type": "redis", "url": "redis://host", "prefix": "a//"}, 'tiers[1].prefix: "a//" is wrong'),
        ({"type": "object", "url": "s3://b", "prefix": "a/../"}, 'tiers[1].prefix: "a/../" is wrong'),
        ({"type": "object", "url": "s3//bucket"}, 'tiers[1].url: "s3//bucket" is wrong'),
        ({"type": "object", "url": "s3://b", "secret_key": SECRET}, "tiers[1].secret_key: unknown key"),
        ({"type": "object", "url": "s3://b", "endpoint": "host:1"}, 'tiers[1].endpoint: "host:1" is wrong'),
        ({"type": "object", "url": "s3://b", "endpoint": "http://"}, 'tiers[1].endpoint: "http://" is wrong'),
        ({"type": "object", "url": "s3://b", "endpoint": "http://a b:1"}, 'tiers[1].endpoint: "http://a b:1" is wrong'),
    ],
)
def test_a_wrong_setting_is_named_and_no_secret_shown(tier: dict[str, object], expected: str) -> None:
    """Where, what, and what is allowed, as for every other tier."""
    message = refusal(**tier)
    assert expected in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "url", ["redis://host", "rediss://[::1]:6380/3", "redis://10.0.0.1:1,b:2/0", "unix:///run/r.sock", "unix:///a:b?db=2"]
)
def test_addresses_of_redis(url: str) -> None:
    """Names and numbers, with and without port and database."""
    assert url == RedisTierConfig.model_validate({"type": "redis", "url": url}).url


def test_order_and_defaults() -> None:
    """Remote tiers stand after the disk, Redis before objects; what is printed reads back."""
    redis, bucket = {"type": "redis", "url": "unix:///run/redis"}, {"type": "object", "url": "s3://bucket/a"}
    config = Config.from_mapping({"tiers": [HOST, redis, bucket]})
    assert ["redis", "object"] == [tier.type for tier in config.lower]
    for tiers, message in (([bucket, redis], "must stand before"), ([redis, redis], "a second tier of type redis")):
        with pytest.raises(ConfigError, match=message):
            Config.from_mapping({"tiers": [HOST, *tiers]})
    text = config.effective()
    for name in ("password", "secret"):
        assert not [line for line in text.splitlines() if name in line and "null" not in line]


@pytest.mark.parametrize(
    "tier",
    [
        *({"type": "redis", "url": "redis://h", key: SECRET} for key in ("encryption_key", "passwd", "auth", "aws_key")),
        *(
            {"type": "redis", "url": url}
            for url in (f"redis://:{SECRET}/x@h:1", f"redis://u:a {SECRET}@h", f"redis://h:1/0?password={SECRET}", f"u:{SECRET}@h:1")
        ),
        {"type": "object", "url": f"az://c/p?sig={SECRET}"},
        {"type": "object", "url": "s3://b", "endpoint": f"http://u:{SECRET}/y@h"},
        {"type": "mooncake", "url": "mooncake://h:1", "metadata": f"http://u:{SECRET}@h/m"},
    ],
)
def test_no_refusal_shows_a_secret(tier: dict[str, object]) -> None:
    """Whatever shape a secret was written in where none belongs."""
    with pytest.raises(ConfigError) as error:
        Config.from_mapping({"tiers": [{"type": "host", "capacity": "1GiB"}, tier]})
    assert SECRET not in str(error.value)


def test_secrets_come_from_variables_or_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read when the tier is opened; what is missing is named."""
    monkeypatch.delenv("KVTIER_TEST_SECRET", raising=False)
    by_variable = RedisTierConfig.model_validate({"type": "redis", "url": "redis://h", "password_env": "KVTIER_TEST_SECRET"})
    with pytest.raises(ConfigError, match="password_env: the environment variable KVTIER_TEST_SECRET is not set"):
        by_variable.password()
    monkeypatch.setenv("KVTIER_TEST_SECRET", SECRET)
    assert SECRET == by_variable.password()
    file = tmp_path / "secret"
    by_file = ObjectTierConfig.model_validate({"type": "object", "url": "s3://b", "secret_key_file": str(file)})
    with pytest.raises(ConfigError, match=r"secret_key_file: .*secret: No such file"):
        by_file.secret_key()
    file.write_text(SECRET + "\n")
    assert SECRET == by_file.secret_key()
    assert SECRET not in repr(by_file) + repr(by_variable)


def test_a_server_that_is_not_there() -> None:
    """An error that names it, or a tier that comes in later."""
    settings = {"type": "redis", "url": "redis://127.0.0.1:1/0", "username": "me", "password_env": "PATH"}
    with pytest.raises(RemoteError, match=r"redis://127.0.0.1:1/0 \(user me\)"):
        open_remote(RedisTierConfig.model_validate(settings))
    tier = open_remote(RedisTierConfig.model_validate({**settings, "required": False}))
    assert not tier.online
    tier.close()


@pytest.mark.parametrize("tier", [{"type": "redis", "url": "redis://a..b:1/0"}, {"type": "mooncake", "url": "mooncake://a..b:1"}])
def test_a_host_that_can_be_none(tier: dict[str, object]) -> None:
    """A typing error in its name is like a server that is not there: by setting an error, or a start without the tier."""
    if tier["type"] == "mooncake":
        pytest.importorskip("kvtier.tiers.mooncake", reason="Mooncake does not load", exc_type=ImportError)
    for required in (True, False):
        section = Config.from_mapping({"tiers": [HOST, {**tier, "required": required}]}).lower[0]
        assert not isinstance(section, DiskTierConfig)
        if required:
            with pytest.raises(RemoteError, match=r"a\.\.b:1"):
                open_remote(section)
        else:
            opened = open_remote(section)
            assert not opened.online
            opened.close()


def test_several_servers_take_a_sentinel() -> None:
    """Said with the address, when it is opened."""
    with pytest.raises(ConfigError, match="tier redis: url: 'redis://a:1,b:2/0' is wrong"):
        open_remote(RedisTierConfig.model_validate({"type": "redis", "url": "redis://a:1,b:2/0"}))


def test_every_event_has_a_counter() -> None:
    """An event without a name in the table would be an error in the engine's step."""
    names = {name.partition(".")[2] for name in COUNTERS if name.startswith("redis.")}
    assert {"timeouts", "connect_errors", "auth_errors", "protocol_errors", "server_errors", "retries", "refusals"} <= names
    assert {"hedged_reads", "shared_loads", "damaged_records", "foreign_records", "failed_removals", "probes", "probed_blocks"} <= names


def test_an_engine_over_redis(tmp_path: Path, server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no longer fits host memory comes back from the server, and is a miss when the server is gone."""
    monkeypatch.setenv("KVTIER_TEST_SECRET", SECRET)
    tier = {"type": "redis", "url": server.unix_url, "password_env": "KVTIER_TEST_SECRET", "retries": 0}
    config = Config.from_mapping({"tiers": [HOST, tier]})
    arena = Arena.open(str(tmp_path / "arena"), config.host.capacity_bytes)
    arena.prefault()
    engine = CacheEngine.open(config, namespace=Namespace(model="test"), block_bytes=BLOCK_BYTES, arena=arena)
    while engine.is_growing:
        time.sleep(0.001)
        engine.poll()
    keys = [BlockKey(bytes([number]) + bytes(15)) for number in range(8)]
    for start in (0, 4):
        plan = engine.begin_store(keys[start : start + 4], 0)
        for position, ref in zip(plan.positions, plan.slots, strict=True):
            arena.view(ref.slot * 4096, BLOCK_BYTES)[:] = payload_of(keys[start + position])
        engine.commit_store(plan.job_id)
        assert engine.drain(10.0)
    assert {"host": 4, "redis": 8} == engine.num_blocks()
    assert 4 == engine.promote(keys[:4])
    assert engine.drain(10.0)
    loaded = engine.begin_load(keys[:4])
    assert [payload_of(key) for key in keys[:4]] == [bytes(arena.view(ref.slot * 4096, BLOCK_BYTES)) for ref in loaded.slots]
    engine.end_load(loaded.job_id)
    server.kill()
    while engine.match(keys[4:]).hit_blocks:
        engine.promote(keys[4:])
        assert engine.drain(10.0)
    assert engine.stats["redis.failed_blocks"] + engine.stats["redis.offline"] >= 1
    assert engine.stats["redis.connect_errors"] >= 1
    assert [] == engine.check()
    engine.close()


def payload_of(key: BlockKey) -> bytes:
    """Bytes that no other key has."""
    return (hashlib.sha256(key).digest() * (BLOCK_BYTES // 32 + 1))[:BLOCK_BYTES]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'mooncake'"), "which is not installed (No module named 'mooncake')"),
        (ImportError("libx.so.1: cannot open shared object file"), "which is installed but does not load: libx.so.1"),
    ],
)
def test_an_extra_that_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch, error: ImportError, said: str) -> None:
    """Two remedies, so two messages."""
    section = Config.from_mapping({"tiers": [HOST, {"type": "mooncake", "url": "mooncake://a:1"}]}).lower[0]
    assert not isinstance(section, DiskTierConfig)

    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "kvtier.tiers.mooncake":
                raise error

    monkeypatch.delitem(sys.modules, "kvtier.tiers.mooncake", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ConfigError, match=re.escape("kvtier[mooncake]")) as caught:
        open_remote(section)
    assert said in str(caught.value)
