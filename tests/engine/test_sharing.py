"""Engines of the real vLLM that share a store, in processes of their own, and a store that goes wrong while an engine uses it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.testing.faults import FAULTS, FaultyValkey
from kvtier.testing.servers import MooncakeMaster, S3Server, ValkeyServer
from kvtier.tiers.remote import Deadline
from tests.engine.faulty_store import serve_faults
from tests.engine.harness import Result, assert_same, host, loaded_tokens, made_once, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
NEARLY_ALL = 1500
"""tokens, of 1728 in full blocks"""
PROMOTE_WAIT_S = 1.0
SLACK_S = 30.0
"""for a machine that does other things too"""


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[Result]:
    """What vLLM alone answers."""
    folder = made_once(
        tmp_path_factory, worker_id, "alone", lambda path: (path / "out.json").write_text(json.dumps(run("repeat", rounds=[False])))
    )
    answers: list[Result] = json.loads((folder / "out.json").read_text())["rounds"][0]
    return answers


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path).start()
    yield server
    server.kill()


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    server = S3Server(tmp_path).start()
    yield server
    server.kill()


def redis_tier(url: str, **more: object) -> Result:
    return {"type": "redis", "url": url, "connect_timeout": "500ms", "stall_timeout": "500ms", "total_timeout": "2s", **more}


def with_tier(tier: Result) -> Result:
    """kvtier's settings with a store below host memory."""
    settings = host()
    settings["tiers"].append(tier)
    return settings


def assert_shared(settings: Result, name: str, alone: list[Result], environment: dict[str, str] | None = None) -> None:
    """A first engine computes everything, a second one, started after the first has ended, loads nearly everything from the store."""
    settings["connector"]["promote_wait"] = "20s"  # a busy machine's store may be slower than the default
    first = run("repeat", kvtier=settings, rounds=[False], environment=environment)
    second = run("repeat", kvtier=settings, rounds=[False, True], environment=environment)
    for answers in (*first["rounds"], *second["rounds"]):
        assert_same(alone, answers)
    found = loaded_tokens(second["rounds"][0])
    assert sum(found.values()) > NEARLY_ALL
    assert found["disk_tokens"] > NEARLY_ALL // 2, "the second of two prompts finds the document in host memory"
    assert second["metrics"]["vllm:external_prefix_cache_hits"] > NEARLY_ALL
    counters = second["counters"]
    assert counters[f"{name}.probed_blocks"] == counters[f"{name}.loaded_blocks"] > 20
    assert 0 < counters[f"{name}.probes"] <= 8 + 1, "each prompt asks once"
    assert f"{name}.probed_blocks" not in first["counters"]
    assert counters[f"{name}.stored_blocks"] < first["counters"][f"{name}.stored_blocks"] // 2, "what is there is not written again"


def test_two_engines_share_redis(valkey: ValkeyServer, alone: list[Result]) -> None:
    """What one engine prefilled another loads through Valkey: the same tokens, and prefill is skipped."""
    assert_shared(with_tier(redis_tier(valkey.unix_url)), "redis", alone)


def test_two_engines_share_a_bucket(s3: S3Server, alone: list[Result]) -> None:
    """The same through S3."""
    tier = {"type": "object", "url": f"s3://{s3.bucket}", "endpoint": s3.endpoint, "region": "us-east-1", "access_key": "any"}
    assert_shared(with_tier({**tier, "secret_key_env": "KVTIER_TEST_SECRET"}), "object", alone, {"KVTIER_TEST_SECRET": "any"})


def test_two_engines_share_mooncake(tmp_path: Path, alone: list[Result]) -> None:
    """The same through a Mooncake Store, whose memory is that of a third process."""
    mooncake = pytest.importorskip("kvtier.tiers.mooncake", reason="Mooncake does not load", exc_type=ImportError)
    master = MooncakeMaster(tmp_path).start()
    member = mooncake.MooncakeClient(mooncake.MooncakeAccess(master=master.url.partition("//")[2], segment_bytes=512 << 20))
    try:
        member.ping(Deadline(60.0))
        assert_shared(with_tier({"type": "mooncake", "url": master.url, "total_timeout": "20s"}), "mooncake", alone)
    finally:
        member.close()
        master.kill()


def test_chunks_are_shared_too(valkey: ValkeyServer) -> None:
    """Chunks that one engine computed another one takes from Valkey, in other orders: with everything computed anew the same tokens."""
    expected = run("blended_briefly")["answers"]
    settings = {**with_tier(redis_tier(valkey.unix_url)), "blend": {"enabled": True}}
    for stores in (True, False):
        answers = run("blended_briefly", kvtier=settings, stores=stores)["answers"]
        assert_same(expected, answers)
        assert all(answer["loaded"]["blend"]["tokens"] > 100 for answer in answers)


def test_a_store_that_goes_wrong(alone: list[Result], tmp_path: Path) -> None:
    """Every fault of the server: each request completes with the same tokens, in bounded time; then hits are back without a restart."""
    orders = tmp_path / "orders"
    orders.mkdir()
    with FaultyValkey(tmp_path) as store:
        threading.Thread(target=serve_faults, args=(orders, store), daemon=True).start()
        settings = with_tier(redis_tier(store.url))
        settings["connector"]["promote_wait"] = PROMOTE_WAIT_S
        result = run("faulty_store", kvtier=settings, store=str(orders), faults=list(FAULTS), timeout_s=500.0)
    expected = alone[2:4]
    computed_s = result["computed"]["seconds"]
    for fault in FAULTS:
        during, after = result[fault]["during"], result[fault]["after"]
        for asked in during:
            assert_same(expected, asked["answers"])
            assert asked["seconds"] < 2 * computed_s + 2 * PROMOTE_WAIT_S + SLACK_S, fault
        assert_same(expected, after["answers"])
        assert loaded_tokens(after["answers"])["disk_tokens"] > 0, f"no hits after {fault}"
    counted = {fault: _sum([asked["counters"] for asked in result[fault]["during"]]) for fault in FAULTS}
    seconds = {fault: [asked["seconds"] for asked in result[fault]["during"]] for fault in FAULTS} | {"computed": [computed_s]}
    (tmp_path / "counted.json").write_text(json.dumps({"counted": counted, "seconds": seconds}))
    for fault, event in (
        ("slow", "timeouts"),
        ("garbage", "protocol_errors"),
        ("frozen", "timeouts"),
        ("auth", "auth_errors"),
        ("cut", "connect_errors"),
        ("killed", "connect_errors"),
    ):
        assert counted[fault].get(f"redis.{event}", 0) > 0, (fault, counted[fault])
    for fault in ("garbage", "frozen", "auth", "cut", "killed"):
        assert counted[fault].get("redis.offline", 0) > 0, (fault, counted[fault])
    assert loaded_tokens(result["full"]["during"][0]["answers"])["disk_tokens"] > 0, "a full server is still read"


def _sum(each: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(one.get(name, 0) for one in each) for name in {name for one in each for name in one}}
