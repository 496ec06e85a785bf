"""A process that stores and removes blocks without end, to be killed at any moment.

Usage: python disk_victim.py DIRECTORY SEED CAPACITY_BYTES SEGMENT_BYTES
Standard output, one line each: ``open``; ``+N`` once the store of block N was acknowledged; ``-N`` before its removal.
Imports as little as possible: it is started hundreds of times.
"""

from __future__ import annotations

import os
import random
import sys

from kvtier.tiers.disk import DiskTier
from kvtier.types import BlockIO, BlockKey, BlockMeta, JobKind, Outcome, TransferJob

NAMESPACE = bytes(range(16))
SIZES = (16400, 18000, 20480)
"""lengths of several pages that share one record size: so the tier never drops a block on its own, which could not be
announced before it happens"""
NUM_BLOCKS = 200


def victim_meta(number: int) -> BlockMeta:
    """The block with this number; its size follows from it."""
    return BlockMeta(BlockKey(number.to_bytes(16, "little")), None, SIZES[number % 3])


def victim_payload(meta: BlockMeta) -> bytes:
    """The block's only right content."""
    return random.Random(meta.key).randbytes(meta.num_bytes)


def say(*words: str) -> None:
    """Prints at once, in one write: what was said before the kill arrives."""
    os.write(1, "".join(f"{word}\n" for word in words).encode())


def main(directory: str, seed: str, capacity_bytes: str, segment_bytes: str) -> None:
    """Works until killed."""
    choose = random.Random(int(seed))
    is_durable = int(seed) % 4 == 0  # a kill cannot tell the difference; syncing costs most of the time
    tier = DiskTier(directory, int(capacity_bytes), segment_bytes=int(segment_bytes), durable=is_durable)
    stored = [meta.key for meta in tier.entries()]
    say("open")
    for job_id in range(1 << 30):
        if choose.random() < 0.4 and stored:
            victims = [stored.pop(choose.randrange(len(stored))) for _ in range(min(len(stored), choose.randint(1, 6)))]
            say(*(f"-{int.from_bytes(key, 'little')}" for key in victims))
            tier.remove(victims)
        metas = [victim_meta(number) for number in choose.sample(range(NUM_BLOCKS), choose.randint(1, 8))]
        blocks = tuple(BlockIO(meta, memoryview(bytearray(victim_payload(meta)))) for meta in metas)
        tier.submit(TransferJob(job_id, JobKind.STORE, NAMESPACE, blocks))
        for result in tier.poll(10.0):
            assert not result.dropped
            fresh = [meta.key for meta, outcome in zip(metas, result.outcomes, strict=True) if outcome is Outcome.OK]
            say(*(f"+{int.from_bytes(key, 'little')}" for key in fresh))
            stored = list({*stored, *fresh})


if __name__ == "__main__":
    main(*sys.argv[1:])
