"""A disk that misbehaves under a whole CacheEngine: nothing raises, nothing wrong comes back, and the counters say what happened."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvtier.config import Config
from kvtier.engine import CacheEngine
from kvtier.hashing import Namespace
from kvtier.io import EngineKind
from kvtier.io.ring_engine import NativeRing
from kvtier.memory.arena import Arena
from kvtier.testing.tiers import key_of, payload_of
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.health import FIRST_BACK_OFF_S, MAX_CONSECUTIVE_FAILURES
from kvtier.types import BlockKey

BLOCK_BYTES = 10_000
SLOT_BYTES = 12_288
HOST_BLOCKS = 8
ENGINES: list[EngineKind] = ["threads", "io_uring"]
CHAINS = [[key_of(100 * chain + position) for position in range(HOST_BLOCKS)] for chain in range(4)]


class Clock:
    """Real time and an offset to move it on."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.offset_s


class Cache:
    """An engine over a host memory of eight blocks and a real disk tier."""

    def __init__(self, directory: Path, io_engine: EngineKind) -> None:
        config = Config.from_mapping({"tiers": [{"type": "host", "capacity": HOST_BLOCKS * SLOT_BYTES, "policy": "lru"}]})
        self.arena = Arena.open(str(directory / f"arena-{time.monotonic_ns()}"), config.host.capacity_bytes)
        self.arena.prefault()
        self.arena.unlink()
        self.clock = Clock()
        tier = DiskTier(directory / "tier", 4 << 20, segment_bytes=1 << 20, durable=False, io_engine=io_engine, clock=self.clock)
        namespace = Namespace(model="test")
        self.engine = CacheEngine.open(
            config, namespace=namespace, block_bytes=BLOCK_BYTES, arena=self.arena, clock=self.clock, tiers=[tier]
        )
        self.settle()
        while self.engine.is_growing:
            time.sleep(0.001)
            self.engine.poll()

    def settle(self) -> None:
        """Until nothing is under way."""
        assert self.engine.drain(10.0)

    def store(self, keys: list[BlockKey]) -> None:
        """Stores a prompt's blocks and waits until what can be written is."""
        plan = self.engine.begin_store(keys, 0)
        for position, ref in zip(plan.positions, plan.slots, strict=True):
            self.arena.view(ref.slot * 4096, BLOCK_BYTES)[:] = payload_of(keys[position], BLOCK_BYTES)
        if plan.slots:
            self.engine.commit_store(plan.job_id)
        self.settle()

    def load(self, keys: list[BlockKey]) -> int:
        """Promotes, waits, verifies every byte; returns how many blocks came."""
        self.engine.promote(keys)
        self.settle()
        plan = self.engine.begin_load(keys)
        for key, ref in zip(keys, plan.slots, strict=False):
            assert payload_of(key, BLOCK_BYTES) == bytes(self.arena.view(ref.slot * 4096, BLOCK_BYTES))
        self.engine.end_load(plan.job_id)
        return len(plan.slots)

    def count(self, name: str) -> int:
        """A counter of the disk tier."""
        return int(self.engine.stats.snapshot().get(f"disk.{name}", 0))


@contextmanager
def cache(directory: Path, io_engine: EngineKind = "threads") -> Iterator[Cache]:
    """A cache whose engine is sound at the end and then closed."""
    held = Cache(directory, io_engine)
    try:
        yield held
        held.settle()
        assert [] == held.engine.check()
        assert {0} == set(held.engine.leftovers().values())
    finally:
        held.engine.close()


def break_disk(patch: pytest.MonkeyPatch, engine: EngineKind, direction: str, error: int = errno.EBADF) -> None:
    """From now on every transfer of a ``direction`` (``read``, ``write``) ends with an error; the kernel's own on a ring (EBADF)."""

    def call(*arguments: object) -> int:
        raise OSError(error, os.strerror(error))

    def submit(ring: NativeRing, token: int, is_read: bool, fd: int, *arguments: Any) -> None:
        plain_submit(ring, token, is_read, -1 if is_read == (direction == "read") else fd, *arguments)

    plain_submit = NativeRing.submit
    if engine == "threads":
        patch.setattr(os, {"read": "preadv", "write": "pwritev"}[direction], call)
    else:
        patch.setattr(NativeRing, "submit", submit)


def test_damaged_blocks_are_counted(tmp_path: Path) -> None:
    """Every byte of the segments changed between two runs: each block is one miss and one count, and can be stored again."""
    with cache(tmp_path) as held:
        held.store(CHAINS[0])
        assert HOST_BLOCKS == held.count("stored_blocks")
    for path in (tmp_path / "tier").glob("segment-*.kv"):
        path.write_bytes(path.read_bytes().translate(bytes(range(255, -1, -1))))
    with cache(tmp_path) as held:
        assert HOST_BLOCKS == held.engine.match(CHAINS[0]).hit_blocks
        assert 0 == held.load(CHAINS[0])
        assert HOST_BLOCKS == held.count("corrupt_blocks")
        assert 0 == held.engine.match(CHAINS[0]).hit_blocks
        held.store(CHAINS[0])
        held.store(CHAINS[1])  # host memory now holds this one alone
        assert HOST_BLOCKS == held.load(CHAINS[0])
        assert HOST_BLOCKS == held.count("corrupt_blocks")


def test_segments_deleted_under_an_open_tier_are_counted(tmp_path: Path) -> None:
    """The segment files vanish while the tier is open but not their descriptors' blocks in the index: misses, counted."""
    with cache(tmp_path) as held:
        held.store(CHAINS[0])
    with cache(tmp_path) as held:  # has no segment open yet
        for path in (tmp_path / "tier").glob("segment-*.kv"):
            path.unlink()
        assert 0 == held.load(CHAINS[0])
        assert HOST_BLOCKS == held.count("missing_blocks")
        held.store(CHAINS[0])
        held.store(CHAINS[1])
        assert HOST_BLOCKS == held.load(CHAINS[0])


@pytest.mark.parametrize(("io_engine", "error"), [("threads", errno.ENOSPC), ("threads", errno.EIO), ("io_uring", errno.EBADF)])
def test_a_disk_that_takes_no_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, io_engine: EngineKind) -> None:
    """Writes fail: counted, the tier goes offline once and its blocks are misses; after the back-off it stores and loads again."""
    with cache(tmp_path, io_engine) as held:
        held.store(CHAINS[0])
        with monkeypatch.context() as patch:
            break_disk(patch, io_engine, "write", error)
            chain = [[key_of(1000 * (number + 1) + position) for position in range(2)] for number in range(MAX_CONSECUTIVE_FAILURES + 1)]
            for keys in chain:
                held.store(keys)
            assert 1 == held.count("offline")
            assert 2 * MAX_CONSECUTIVE_FAILURES <= held.count("failed_blocks")
            assert 0 == held.engine.match(CHAINS[0]).hit_blocks
            assert 0 == held.load(CHAINS[0])
        held.clock.offset_s += FIRST_BACK_OFF_S
        held.settle()
        assert HOST_BLOCKS == held.engine.match(CHAINS[0]).hit_blocks
        assert HOST_BLOCKS == held.load(CHAINS[0])
        held.store(CHAINS[2])
        held.store(CHAINS[3])
        assert HOST_BLOCKS == held.load(CHAINS[2])
        assert 1 == held.count("offline")


@pytest.mark.parametrize("io_engine", ENGINES)
def test_a_disk_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, io_engine: EngineKind) -> None:
    """Reads fail: misses, counted, one count of offline; what was not asked for meanwhile is there again after the back-off."""
    with cache(tmp_path, io_engine) as held:
        for keys in CHAINS:
            held.store(keys)
        with monkeypatch.context() as patch:
            break_disk(patch, io_engine, "read")
            for key in CHAINS[0][:MAX_CONSECUTIVE_FAILURES]:
                assert 0 == held.load([key])
            assert MAX_CONSECUTIVE_FAILURES == held.count("failed_blocks")
            assert 1 == held.count("offline")
            assert 0 == held.engine.match(CHAINS[1]).hit_blocks
            assert 0 == held.load(CHAINS[1])
        held.clock.offset_s += FIRST_BACK_OFF_S
        held.settle()
        assert HOST_BLOCKS == held.load(CHAINS[1])
        assert MAX_CONSECUTIVE_FAILURES == held.count("failed_blocks")
