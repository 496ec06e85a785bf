"""``kvtier bench tier``: storing and loading through the whole engine facade, beside the bare copy of the same bytes.

A store is a new prompt: its tokens are hashed, slots are planned (older blocks are evicted for them), the blocks are copied from paged
memory into the arena and committed. A load hashes the tokens again, finds the blocks, leases their slots and copies them back. The bare
copy moves the same blocks between the same kinds of places, in the same calls of the same copier, and does nothing else.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np

from kvtier.bench.options import MOST_MIB, add_json, add_rounds, whole
from kvtier.bench.peers import Peer
from kvtier.bench.report import Record, in_turns, publish, rates
from kvtier.config import Config
from kvtier.copy.base import BlockCopy
from kvtier.copy.cpu import NativeCopier
from kvtier.engine import EXTENT_BYTES, CacheEngine
from kvtier.hashing import KeyChain, Namespace
from kvtier.layout import KVLayout, Segment
from kvtier.memory.arena import Arena
from kvtier.types import BlockKey, SlotRef

PAGE_BYTES = 4096
BLOCK_TOKENS = 16
LEAST_MIB = 2
"""the largest of the blocks"""
SHAPES = {"Llama-3.1-8B": (64, 32 << 10), "SmolLM2-135M": (60, 6 << 10)}
"""segments of a block of 16 tokens (K and V of each layer), and bytes of each"""
PEER_SHAPES = {"Llama-3.1-8B": {"layers": 32, "heads": 8, "head_dim": 128}, "SmolLM2-135M": {"layers": 30, "heads": 3, "head_dim": 64}}
"""the same, as a peer is told"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    add_json(parser)
    add_rounds(parser, 21)
    parser.add_argument("--batch-mib", type=whole(LEAST_MIB, MOST_MIB), default=256, help="MiB moved per round (default: 256)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status."""
    records = [record for name in SHAPES for record in measure(name, args.rounds, args.batch_mib << 20)]
    publish("kvtier bench tier", records, args.json)
    return 0


def measure(name: str, rounds: int, batch_bytes: int) -> Iterator[Record]:
    """Storing and loading prompts of one model's shape."""
    bench = Bench(*SHAPES[name], batch_bytes)
    try:
        bench.verify()  # and slots for the bare copy
        params = {"model": name, "piece_kib": SHAPES[name][1] >> 10, "batch_mib": round(bench.batch_bytes / (1 << 20))}
        with Peer("facade", **PEER_SHAPES[name], block_tokens=BLOCK_TOKENS, num_blocks=bench.num_blocks) as peer:
            ours = [bench.store, bench.gather, bench.load, bench.scatter]
            theirs = [lambda: peer.run("store"), lambda: peer.run("load")]
            stores, gathers, loads, scatters, *_ = in_turns([*ours, *theirs], rounds)
        yield rates("store", params, stores, gathers, peers=peer.rate("store", bench.batch_bytes))
        yield rates("load", params, loads, scatters, peers=peer.rate("load", bench.batch_bytes))
    finally:
        bench.close()


class Bench:
    """Paged memory, an arena, a copier and an engine; each method returns bytes per second of one batch."""

    def __init__(self, num_segments: int, segment_bytes: int, batch_bytes: int) -> None:
        block_bytes = num_segments * segment_bytes
        self.num_blocks = batch_bytes // block_bytes
        self.batch_bytes = self.num_blocks * block_bytes
        slot_bytes = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
        per_extent = EXTENT_BYTES // slot_bytes
        # two prompts and the blocks of the bare copy, so that every store has to evict
        num_extents = 3 * -(-self.num_blocks // per_extent)
        self._memory = np.zeros((num_segments, self.num_blocks, segment_bytes), np.uint8)
        self._memory.view(np.uint64)[:] = np.random.default_rng(3).integers(0, 2**63, (num_segments, self.num_blocks, segment_bytes // 8))
        segments = [Segment(segment.ctypes.data, segment.strides[0], segment_bytes) for segment in self._memory]
        path = f"/dev/shm/kvtier-bench-{os.getpid()}-{time.monotonic_ns()}"
        self._arena = Arena.open(path, num_extents * EXTENT_BYTES)
        self._arena.prefault()
        self._arena.unlink()
        # A policy with admission would turn new prompts away; here all of them are to be stored.
        config = Config.from_mapping({"tiers": [{"type": "host", "capacity": num_extents * EXTENT_BYTES, "policy": "lru"}]})
        self._engine = CacheEngine.open(config, namespace=Namespace(model="bench"), block_bytes=block_bytes, arena=self._arena)
        while self._engine.is_growing:
            time.sleep(0.001)
            self._engine.poll()
        self._copier = NativeCopier(
            KVLayout(tuple(segments), self.num_blocks), arena_address=self._arena.address, arena_bytes=self._arena.capacity_bytes
        )
        self._block_ids = np.random.default_rng(4).permutation(self.num_blocks).tolist()
        self._number = 0
        self._tokens: list[int] = []
        self._slots: Sequence[SlotRef] = ()

    def store(self) -> float:
        """A new prompt, from its tokens to its committed blocks."""
        self._number += 1
        self._tokens = [self._number, *range(self.num_blocks * BLOCK_TOKENS - 1)]
        start = time.perf_counter()
        keys = self._keys()
        self._engine.poll()
        plan = self._engine.begin_store(keys, 0)
        assert self.num_blocks == len(plan.slots)
        self._copier.gather(self._copies(plan.slots))
        self._engine.commit_store(plan.job_id)
        seconds = time.perf_counter() - start
        self._slots = plan.slots
        return self.batch_bytes / seconds

    def verify(self) -> None:
        """Stores a prompt and loads it again. Raises RuntimeError where other bytes come back."""
        self.store()
        there = self._memory.copy()
        self._memory[:] = 0
        self.load()
        if not np.array_equal(there, self._memory):
            raise RuntimeError("what was stored and loaded is not what there was")

    def load(self) -> float:
        """The prompt stored last, from its tokens to its blocks in paged memory."""
        start = time.perf_counter()
        keys = self._keys()
        self._engine.poll()
        assert self.num_blocks == self._engine.match(keys).ready_blocks
        plan = self._engine.begin_load(keys)
        self._copier.scatter(self._copies(plan.slots))
        self._engine.end_load(plan.job_id)
        return self.batch_bytes / (time.perf_counter() - start)

    def gather(self) -> float:
        """The bare copy into the arena."""
        start = time.perf_counter()
        self._copier.gather(self._copies(self._slots))
        return self.batch_bytes / (time.perf_counter() - start)

    def scatter(self) -> float:
        """The bare copy out of the arena."""
        start = time.perf_counter()
        self._copier.scatter(self._copies(self._slots))
        return self.batch_bytes / (time.perf_counter() - start)

    def close(self) -> None:
        """Frees everything."""
        self._engine.close()

    def _keys(self) -> list[BlockKey]:
        return KeyChain(b"r" * 16, BLOCK_TOKENS).update(self._tokens, len(self._tokens))

    def _copies(self, slots: Sequence[SlotRef]) -> list[BlockCopy]:
        return [BlockCopy(block_id, ref.slot * PAGE_BYTES) for block_id, ref in zip(self._block_ids, slots, strict=True)]
