"""A process that stores, reads and removes blocks without end, to be killed at any moment.

Usage: python disk_victim.py DIRECTORY SEED CAPACITY_BYTES SEGMENT_BYTES
Standard output, one line each: ``open``; ``+N`` once the store of block N was acknowledged; ``-N`` before its removal.
Around handing in a store: ``(`` before, ``)`` after, and in between ``-N`` for what the tier crowded out to make room.
Imports as little as possible: it is started hundreds of times.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterable

from kvtier.tiers.disk import DiskTier
from kvtier.types import BlockIO, BlockKey, BlockMeta, JobKind, Outcome, TransferJob

NAMESPACE = bytes(range(16))
SIZES = (3000, 18000, 60000)
"""a segment is divided into slots of one of these; it changes hands whenever it is empty"""
NUM_BLOCKS = 200


def victim_meta(number: int) -> BlockMeta:
    """The block with this number; its size follows from it."""
    return BlockMeta(BlockKey(number.to_bytes(16, "little")), None, SIZES[number % 3])


def number_of(key: BlockKey) -> int:
    """The number of the block with this key."""
    return int.from_bytes(key, "little")


def victim_payload(meta: BlockMeta) -> bytes:
    """The block's only right content."""
    return random.Random(meta.key).randbytes(meta.num_bytes)


def say(*words: str) -> None:
    """Prints at once, in one write: what was said before the kill arrives."""
    os.write(1, "".join(f"{word}\n" for word in words).encode())


def named(sign: str, keys: Iterable[BlockKey]) -> list[str]:
    """The lines that say something of blocks."""
    return [f"{sign}{number_of(key)}" for key in keys]


def some(choose: random.Random, stored: set[BlockKey]) -> list[BlockKey]:
    """Blocks to remove: a few, or all of one size, so that segments become empty."""
    if choose.random() < 0.2:
        size = choose.randrange(3)
        return sorted(key for key in stored if int.from_bytes(key, "little") % 3 == size)
    return choose.sample(sorted(stored), min(len(stored), choose.randint(1, 6)))


def read(tier: DiskTier, job_id: int, keys: list[BlockKey]) -> None:
    """Loads blocks; they are what they were. Most of a victim's life goes into this, and little into handing in stores."""
    blocks = tuple(BlockIO(meta, memoryview(bytearray(meta.num_bytes))) for meta in map(victim_meta, map(number_of, keys)))
    tier.submit(TransferJob(job_id, JobKind.LOAD, NAMESPACE, blocks))
    (result,) = tier.poll(10.0)
    assert {Outcome.OK} >= set(result.outcomes)
    assert all(victim_payload(block.meta) == block.buffer for block in blocks)


def main(directory: str, seed: str, capacity_bytes: str, segment_bytes: str) -> None:
    """Works until killed."""
    choose = random.Random(int(seed))
    is_durable = int(seed) % 4 == 0  # a kill cannot tell the difference; waiting for the disk costs most of the time
    tier = DiskTier(
        directory,
        int(capacity_bytes),
        segment_bytes=int(segment_bytes),
        direct_io="auto" if is_durable else "off",
        durable=is_durable,
    )
    stored = {meta.key for meta in tier.entries()}
    say("open")
    for job_id in range(1 << 30):
        if choose.random() < 0.4 and stored:
            victims = some(choose, stored)
            stored.difference_update(victims)
            say(*named("-", victims))
            tier.remove(victims)
        numbers = choose.sample(range(NUM_BLOCKS), choose.randint(1, 8))
        if choose.random() < 0.5:
            numbers = sorted({number - number % 3 + job_id % 3 for number in numbers})  # all of one size
        metas = [victim_meta(number) for number in numbers]
        blocks = tuple(BlockIO(meta, memoryview(bytearray(victim_payload(meta)))) for meta in metas)
        say("(")
        tier.submit(TransferJob(job_id, JobKind.STORE, NAMESPACE, blocks))
        crowded_out = [key for key in stored if not tier.lookup([key])]
        stored.difference_update(crowded_out)
        say(*named("-", crowded_out), ")")
        for result in tier.poll(10.0):
            assert set(result.dropped) <= set(crowded_out)
            fresh = [meta.key for meta, outcome in zip(metas, result.outcomes, strict=True) if outcome is Outcome.OK]
            say(*named("+", fresh))
            stored.update(fresh)
        read(tier, job_id, choose.sample(sorted(stored), min(len(stored), 8)))


if __name__ == "__main__":
    main(*sys.argv[1:])
