"""More prompts than host memory holds, with real bytes: the newest ones are there, whole."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np

from kvtier.config import Config
from kvtier.engine import CacheEngine
from kvtier.hashing import Namespace
from kvtier.memory.arena import Arena
from kvtier.types import BlockKey

MIB = 1 << 20
CAPACITY = 1024 * MIB
PROMPTS = 24
PROMPT_BYTES = 128 * MIB
BLOCK_BYTES = 2 * MIB
BLOCKS = PROMPT_BYTES // BLOCK_BYTES
PAGE = 4096


def keys_of(prompt: int) -> list[BlockKey]:
    return [BlockKey(prompt.to_bytes(4) + position.to_bytes(4) + bytes(8)) for position in range(BLOCKS)]


def pattern_of(prompt: int, position: int) -> np.ndarray:
    """A block's bytes: no two blocks have a page in common."""
    pages = np.arange(BLOCK_BYTES // PAGE, dtype=np.uint64)
    return np.broadcast_to(pages[:, None] + ((prompt << 40) + (position << 20)), (len(pages), PAGE // 8))


def test_the_newest_prompts_stay(tmp_path: Path) -> None:
    """24 prompts of 128 MiB stored back to back into 1 GiB: each is stored whole, and the newest 8 hit, with their own bytes.

    Takes a second or two: three gigabytes are written and one is read.
    """
    config = Config.from_mapping({"tiers": [{"type": "host", "capacity": CAPACITY, "policy": "lru"}]})
    # A container may have next to no shared memory; a file does as well, only slower.
    folder = Path("/dev/shm") if shutil.disk_usage("/dev/shm").free > 2 * CAPACITY else tmp_path
    arena = Arena.open(str(folder / f"kvtier-test-{time.monotonic_ns()}"), CAPACITY)
    arena.unlink()
    arena.prefault()
    arena.wait_prefaulted(60.0)
    engine = CacheEngine.open(config, namespace=Namespace(model="test"), block_bytes=BLOCK_BYTES, arena=arena)
    try:
        engine.poll()
        memory = np.frombuffer(arena.buffer, dtype=np.uint64).reshape(-1, PAGE // 8)
        for prompt in range(PROMPTS):
            store(engine, memory, prompt)
        hits = [engine.match(keys_of(prompt)).ready_blocks for prompt in range(PROMPTS)]
        num_newest = CAPACITY // PROMPT_BYTES
        assert [0] * (PROMPTS - num_newest) + [BLOCKS] * num_newest == hits
        for prompt in range(PROMPTS - num_newest, PROMPTS):
            plan = engine.begin_load(keys_of(prompt))
            assert BLOCKS == len(plan.slots)
            for position, ref in enumerate(plan.slots):
                assert np.array_equal(pattern_of(prompt, position), memory[ref.slot : ref.slot + BLOCK_BYTES // PAGE])
            engine.end_load(plan.job_id)
        del memory
        assert [] == engine.check()
    finally:
        engine.close()


def store(engine: CacheEngine, memory: np.ndarray, prompt: int) -> None:
    """Stores a prompt as a connector would. All of it must be taken."""
    plan = engine.begin_store(keys_of(prompt), 0)
    assert (BLOCKS, 0) == (len(plan.slots), plan.num_refused)
    for position, ref in zip(plan.positions, plan.slots, strict=True):
        memory[ref.slot : ref.slot + BLOCK_BYTES // PAGE] = pattern_of(prompt, position)
    engine.commit_store(plan.job_id)
    engine.poll()
