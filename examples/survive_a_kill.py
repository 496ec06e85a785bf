"""A process stores blocks on disk and is killed; another one finds them. No engine is needed.

python examples/survive_a_kill.py [DIRECTORY]
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvtier import CacheEngine, Config, KeyChain, Namespace
from kvtier.memory.arena import Arena

PAGE_BYTES = 4096
BLOCK_TOKENS = 16
BLOCK_BYTES = 64 << 10
PROMPT = list(range(1000, 1320))
NAMESPACE = Namespace(model="example", block_tokens=BLOCK_TOKENS)
KEYS = KeyChain(NAMESPACE.digest, BLOCK_TOKENS).update(PROMPT, len(PROMPT))


def content(position: int) -> bytes:
    """Stands for the KV that an engine computed."""
    return position.to_bytes(2, "little") * (BLOCK_BYTES // 2)


@contextmanager
def cache_on(directory: Path) -> Iterator[tuple[CacheEngine, Arena]]:
    """A cache with a host tier and a disk tier, ready for use."""
    tiers = [{"type": "host", "capacity": "16MiB"}, {"type": "disk", "path": str(directory), "capacity": "64MiB", "segment": "4MiB"}]
    arena = Arena.open(f"/dev/shm/kvtier-example-{os.getpid()}", 16 << 20)
    arena.prefault()
    arena.unlink()  # the mapping stays; a killed process leaves nothing behind
    cache = CacheEngine.open(Config.from_mapping({"tiers": tiers}), namespace=NAMESPACE, block_bytes=BLOCK_BYTES, arena=arena)
    while cache.is_growing:
        time.sleep(0.01)
        cache.poll()
    try:
        yield cache, arena
    finally:
        cache.close()
        arena.close()


def store_and_die(directory: Path) -> None:
    """Stores a prompt's blocks, waits until the disk has acknowledged them, and is killed."""
    with cache_on(directory) as (cache, arena):
        plan = cache.begin_store(KEYS, 0)
        for position, slot in zip(plan.positions, plan.slots, strict=True):
            arena.view(slot.slot * PAGE_BYTES, BLOCK_BYTES)[:] = content(position)
        cache.commit_store(plan.job_id)
        cache.drain(10.0)
        print(f"process {os.getpid()}: {cache.stats['disk.stored_blocks']} blocks on disk, now kill -9", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def find_again(directory: Path) -> int:
    """Opens the directory of the dead process, brings the blocks back to host memory; how many are what they were."""
    with cache_on(directory) as (cache, arena):
        match = cache.match(KEYS)
        print(f"process {os.getpid()}: {match.hit_blocks} of {len(KEYS)} blocks found, {match.ready_blocks} of them in host memory")
        cache.promote(KEYS)
        cache.drain(10.0)
        load = cache.begin_load(KEYS)
        same = sum(arena.view(slot.slot * PAGE_BYTES, BLOCK_BYTES) == content(position) for position, slot in enumerate(load.slots))
        cache.end_load(load.job_id)
    print(f"process {os.getpid()}: {same} blocks loaded from disk, byte for byte the same")
    return same


def main(directory: Path) -> int:
    """0 where every block survived."""
    child = os.fork()
    if child == 0:
        store_and_die(directory)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return 0 if find_again(directory) == len(KEYS) else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path(scratch) / "tier"))
