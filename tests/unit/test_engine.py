"""CacheEngine over the real arena and the real disk tier: bytes come back, across restarts, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvtier.config import Config
from kvtier.control.hints import Hints
from kvtier.control.planner import Planner
from kvtier.engine import CacheEngine
from kvtier.errors import ArenaError, ClosedError, ConfigError, TierBusyError
from kvtier.hashing import Namespace
from kvtier.memory.arena import Arena
from kvtier.policies.run_forest import Run, RunForest
from kvtier.testing.starts import nothing_left, refused_threads
from kvtier.tiers.disk import DiskTier
from kvtier.types import BlockKey

BLOCK_BYTES = 10_000
NAMESPACE = Namespace(model="test")


def keys_of(prompt: int, num_blocks: int) -> list[BlockKey]:
    return [BlockKey(bytes([prompt, position]) + bytes(14)) for position in range(num_blocks)]


def payload_of(key: BlockKey) -> bytes:
    """Bytes that no other key has."""
    return (hashlib.sha256(key).digest() * (BLOCK_BYTES // 32 + 1))[:BLOCK_BYTES]


class Cache:
    """An engine with its arena, as a connector would hold them."""

    def __init__(self, directory: Path, host_blocks: int, *, speed: float = 1.0, **disk: object) -> None:
        tiers: list[dict[str, object]] = [{"type": "host", "capacity": host_blocks * 12_288, "quotas": disk.pop("quotas", {})}]
        if disk.pop("use_disk", True):
            tiers.append({"type": "disk", "path": str(directory / "tier"), "capacity": "64MiB", "segment": "1MiB", **disk})
        config = Config.from_mapping({"tiers": tiers})
        self.arena = Arena.open(str(directory / f"arena-{time.monotonic_ns()}"), config.host.capacity_bytes)
        self.arena.prefault()
        self.arena.unlink()
        self.engine = CacheEngine.open(
            config, namespace=NAMESPACE, block_bytes=BLOCK_BYTES, arena=self.arena, clock=lambda: speed * time.monotonic()
        )
        while self.engine.is_growing:
            time.sleep(0.001)
            self.engine.poll()

    def store(self, keys: Sequence[BlockKey]) -> int:
        plan = self.engine.begin_store(keys, 0)
        for position, ref in zip(plan.positions, plan.slots, strict=True):
            self.arena.view(ref.slot * 4096, BLOCK_BYTES)[:] = payload_of(keys[position])
        if plan.slots:
            self.engine.commit_store(plan.job_id)
        self.engine.poll()
        return len(plan.slots)

    def load(self, keys: Sequence[BlockKey]) -> int:
        """Promotes, waits, reads and verifies; returns how many blocks came."""
        for _ in range(8):  # where room must be written down first, a promotion comes in parts
            self.engine.promote(keys)
            assert self.engine.drain(10.0)
        plan = self.engine.begin_load(keys)
        for key, ref in zip(keys, plan.slots, strict=False):
            assert payload_of(key) == bytes(self.arena.view(ref.slot * 4096, BLOCK_BYTES))
        self.engine.end_load(plan.job_id)
        return len(plan.slots)


@contextmanager
def cache(directory: Path, host_blocks: int, *, speed: float = 1.0, **disk: object) -> Iterator[Cache]:
    held = Cache(directory, host_blocks, speed=speed, **disk)
    try:
        yield held
        assert held.engine.drain(10.0)
        assert [] == held.engine.check()
        assert {0} == set(held.engine.leftovers().values())
    finally:
        held.engine.close()


def test_blocks_come_back_from_host_memory(tmp_path: Path) -> None:
    """What was committed is there at once, with its own bytes."""
    with cache(tmp_path, 16, use_disk=False) as held:
        assert 8 == held.store(keys_of(1, 8))
        assert 8 == held.engine.match(keys_of(1, 8)).ready_blocks
        assert 8 == held.load(keys_of(1, 8))


@pytest.mark.parametrize("write", ["through", "back", "on_evict"])
def test_blocks_that_left_host_memory_come_back_from_disk(tmp_path: Path, write: str) -> None:
    """Ten prompts through a host memory of two: whatever the write mode, the last ones are all still there."""
    with cache(tmp_path, 16, write=write, speed=50.0) as held:  # a write-back waits for seconds
        for prompt in range(10):
            while held.engine.match(keys_of(prompt, 8)).ready_blocks < 8:
                held.store(keys_of(prompt, 8))  # its last blocks may have to wait for a write
                assert held.engine.drain(10.0)
        assert 16 == held.engine.num_blocks()["host"]
        for prompt in (9, 8, 7, 0, 3):
            assert 8 == held.load(keys_of(prompt, 8))


def test_a_restart_finds_what_was_on_disk(tmp_path: Path) -> None:
    """A new engine on the same directory promotes the blocks of the old one."""
    with cache(tmp_path, 16) as held:
        held.store(keys_of(1, 8))
    with cache(tmp_path, 16) as held:
        assert 8 == held.engine.match(keys_of(1, 9)).hit_blocks
        assert 0 == held.engine.match(keys_of(1, 9)).ready_blocks
        assert 8 == held.load(keys_of(1, 8))


def test_damaged_blocks_are_misses(tmp_path: Path) -> None:
    """After every byte of the segments was changed nothing comes back, nothing raises, and it is counted."""
    with cache(tmp_path, 16) as held:
        held.store(keys_of(1, 8))
    for path in (tmp_path / "tier").rglob("*seg*"):
        if path.is_file():
            path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    with cache(tmp_path, 16) as held:
        assert 0 == held.load(keys_of(1, 8))
        assert 0 == held.engine.match(keys_of(1, 8)).hit_blocks


def test_reset_forgets_every_tier(tmp_path: Path) -> None:
    """After a reset nothing hits, also not after a restart."""
    with cache(tmp_path, 16) as held:
        held.store(keys_of(1, 8))
        assert held.engine.drain(10.0)
        held.engine.reset()
        assert 0 == held.engine.match(keys_of(1, 8)).hit_blocks
    with cache(tmp_path, 16) as held:
        assert 0 == held.engine.match(keys_of(1, 8)).hit_blocks


def test_forgetting_a_long_prompt_costs_each_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy holds a prompt in one piece, which is shortened from its end."""
    num_moved = 0
    split = RunForest._split

    def counted(forest: RunForest, run: Run, position: int) -> Run:
        nonlocal num_moved
        num_moved += len(run.keys) - position
        return split(forest, run, position)

    monkeypatch.setattr(RunForest, "_split", counted)
    with cache(tmp_path, 200, use_disk=False) as held:
        assert 200 == held.store(keys_of(1, 200))
        held.engine.reset()
        assert {"host": 0} == dict(held.engine.num_blocks())
    assert num_moved <= 200


def test_a_capacity_below_one_block_is_refused(tmp_path: Path) -> None:
    """The error names the field, the value and what is allowed."""
    config = Config.from_mapping({"tiers": [{"type": "host", "capacity": 8192}]})
    with pytest.raises(ConfigError, match=r"tiers\[0\].capacity.*8192.*at least 12288"):
        CacheEngine.open(config, namespace=NAMESPACE, block_bytes=BLOCK_BYTES)


def open_by_itself(directory: Path) -> CacheEngine:
    """An engine with host memory of its own and a disk."""
    disk = {"type": "disk", "path": str(directory), "capacity": "16MiB", "segment": "1MiB"}
    config = Config.from_mapping({"tiers": [{"type": "host", "capacity": "4MiB"}, disk]})
    return CacheEngine.open(config, namespace=NAMESPACE, block_bytes=BLOCK_BYTES)


def test_a_start_without_its_disk_keeps_no_host_memory(tmp_path: Path) -> None:
    """The directory is somebody else's: nothing of the engine that was not to be is left."""
    with contextlib.closing(DiskTier(tmp_path, 16 << 20, segment_bytes=1 << 20)), nothing_left(), pytest.raises(TierBusyError):
        open_by_itself(tmp_path)


def test_a_start_without_a_thread_keeps_no_host_memory(tmp_path: Path) -> None:
    """The host memory cannot be prepared."""
    with nothing_left(), refused_threads("kvtier-prefault"), pytest.raises(ArenaError, match="can't start new thread"):
        open_by_itself(tmp_path)


@pytest.mark.parametrize("late", [(Planner, "recover"), (Hints, "__init__"), (CacheEngine, "_adopt")])
def test_a_start_that_fails_late_closes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: tuple[type, str]) -> None:
    """Whatever goes wrong: it comes out as it is, host memory and tiers are closed, and the next start works."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such luck")

    with nothing_left():
        with monkeypatch.context() as patch:
            patch.setattr(*late, fail)
            with pytest.raises(RuntimeError, match="no such luck"):
                open_by_itself(tmp_path)
        open_by_itself(tmp_path).close()


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    """Polling after close is a programming error; closing twice is not."""
    held = Cache(tmp_path, 16, use_disk=False)
    held.engine.close()
    held.engine.close()
    with pytest.raises(ClosedError):
        held.engine.poll()


def test_segments_below_one_block_are_refused(tmp_path: Path) -> None:
    """A disk that could never take a block is a mistake in the settings, found at start; the directory is free again."""
    disk = {"type": "disk", "path": str(tmp_path), "capacity": "16MiB", "segment": "64KiB"}
    config = Config.from_mapping({"tiers": [{"type": "host", "capacity": "1MiB"}, disk]})
    for block_bytes in (64 << 10, 100_000):
        with pytest.raises(ConfigError, match=rf"tiers\[1\]\.segment: 65536 bytes hold no block; .* {block_bytes} bytes"):
            CacheEngine.open(config, namespace=Namespace(model="test"), block_bytes=block_bytes)
    CacheEngine.open(config, namespace=Namespace(model="test"), block_bytes=32 << 10).close()


def test_quotas_of_the_configuration_are_kept(tmp_path: Path) -> None:
    """A tenant that has less than its quota loses nothing to another one that fills host memory."""
    with cache(tmp_path, 16, use_disk=False, quotas={"small": 4 * BLOCK_BYTES}) as held:
        for prompt, tenant in ((1, "small"), *((number, "large") for number in range(2, 8))):
            plan = held.engine.begin_store(keys_of(prompt, 4), 0, tenant)
            held.engine.commit_store(plan.job_id)
        assert 4 == held.engine.match(keys_of(1, 4)).ready_blocks
        assert 0 == held.engine.match(keys_of(2, 4)).ready_blocks
