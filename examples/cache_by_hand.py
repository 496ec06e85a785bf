"""The cache without any engine: what a connector does, step by step. Runs in a second.

python examples/cache_by_hand.py
"""

from __future__ import annotations

import tempfile
import time

from kvtier import CacheEngine, Config, KeyChain, Namespace

BLOCK_TOKENS = 16
BLOCK_BYTES = 64 * 1024
NAMESPACE = Namespace(model="my-model", block_tokens=BLOCK_TOKENS)


def open_cache(directory: str) -> CacheEngine:
    """Host memory of 256 blocks over a disk of 256 MiB."""
    config = Config.from_mapping(
        {
            "tiers": [
                {"type": "host", "capacity": "16MiB"},
                {"type": "disk", "path": directory, "capacity": "256MiB", "segment": "8MiB"},
            ]
        }
    )
    cache = CacheEngine.open(config, namespace=NAMESPACE, block_bytes=BLOCK_BYTES)
    while cache.is_growing:
        time.sleep(0.01)
        cache.poll()
    return cache


def main() -> None:
    """Stores a prompt, closes the cache, opens it again and loads the prompt's blocks from disk."""
    prompt = list(range(1000))
    keys = KeyChain(NAMESPACE.digest, BLOCK_TOKENS).update(prompt, len(prompt))
    with tempfile.TemporaryDirectory() as directory:
        cache = open_cache(directory)
        plan = cache.begin_store(keys, 0)
        # Here a worker copies the engine's blocks into plan.slots.
        cache.commit_store(plan.job_id)
        print(f"stored: {cache.match(keys).ready_blocks} of {len(keys)} blocks are in host memory")
        cache.close()

        cache = open_cache(directory)
        found = cache.match(keys)
        print(f"after a restart: {found.hit_blocks} blocks hit, {found.ready_blocks} of them in host memory")
        cache.promote(keys)
        cache.drain(timeout_s=10.0)
        print(f"promoted: {cache.match(keys).ready_blocks} blocks are in host memory")
        cache.close()
        assert cache.stats["disk.loaded_blocks"] == len(keys)


if __name__ == "__main__":
    main()
