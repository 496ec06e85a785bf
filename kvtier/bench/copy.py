"""``kvtier bench copy``: moving blocks between an engine's paged memory and host memory, and hashing prompts.

The limit of a copy is the fastest plain copy of as many bytes, measured by turns with it: the C library's ``memcpy`` in one call (which
writes past the caches) and a MiB at a time (which does not), and the compiled core's own copy of one contiguous run; each on one thread and
on several. All memory is warm. What hashing should take at most is stated, not measured; beside it stands one SHA-256 over the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import mmap
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier import _fallback
from kvtier.bench.options import MOST_MIB, MOST_THREADS, add_json, add_rounds, whole
from kvtier.bench.peers import Peer
from kvtier.bench.report import Record, publish, record
from kvtier.copy.base import BlockCopy
from kvtier.copy.cpu import DEFAULT_THREADS, NativeCopier
from kvtier.hashing import KeyChain
from kvtier.layout import Axis, KVLayout, Segment, StrideTable

PROMPT_TOKENS = 131_072
HASH_BLOCK_TOKENS = (16, 32, 256)
GAINED_TOKENS = 32
PIECE_BYTES = 1 << 20
PAGE_BYTES = 4096
LEAST_MIB = 2
"""a whole block of each shape, and a piece of a plain copy"""
Timed = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What decides how a block lies in memory; 16-bit numbers, K and V of each layer apart, tokens outside of heads."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int = 16

    @property
    def piece_bytes(self) -> int:
        """Bytes of one layer's K, or V, in one block: the longest contiguous run."""
        return self.block_tokens * self.num_kv_heads * self.head_dim * 2

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, all layers."""
        return self.num_layers * 2 * self.piece_bytes

    def peer_work(self) -> dict[str, int]:
        """The shape as a peer is told."""
        return {"layers": self.num_layers, "heads": self.num_kv_heads, "head_dim": self.head_dim, "block_tokens": self.block_tokens}


SHAPES = (ModelShape("Llama-3.1-8B", 32, 8, 128), ModelShape("SmolLM2-135M", 30, 3, 64))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    add_json(parser)
    add_rounds(parser, 31)
    parser.add_argument("--mib", type=whole(LEAST_MIB, MOST_MIB), default=192, help="MiB copied per round (default: 192)")
    parser.add_argument(
        "--threads", type=whole(1, MOST_THREADS), default=DEFAULT_THREADS, help=f"threads of a copy (default: {DEFAULT_THREADS})"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status."""
    records: list[Record] = []
    for shape in SHAPES:
        records += copies(shape, args.mib << 20, args.threads, args.rounds)
    records += hashing(args.rounds)
    publish("kvtier bench copy", records, args.json)
    return 0


def copies(shape: ModelShape, num_bytes: int, num_threads: int, rounds: int) -> Iterator[Record]:
    """Storing and loading a batch, with block ids in a row, as a fresh engine gives them, and in random order."""
    num_blocks = max(1, num_bytes // shape.block_bytes)
    work = _Work(shape, num_blocks, num_threads)
    work.verify()
    scattered = np.random.default_rng(1).permutation(2 * num_blocks)[:num_blocks].tolist()
    orders: dict[str, Sequence[int]] = {"in a row": range(num_blocks), "scattered": scattered}
    ours: dict[tuple[str, str], Timed] = {}
    for order, block_ids in orders.items():
        ours["store", order] = work.gather(block_ids)
        ours["load", order] = work.scatter(block_ids)
    plain = work.plain_copies()
    with Peer("copies", **shape.peer_work(), num_blocks=num_blocks) as peer:
        theirs = {("peer", *name): lambda name=name: peer.run(", ".join(name)) for name in ours} if peer.is_running else {}
        times = _by_turns({**ours, **plain, **theirs}, rounds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    fastest = min(plain, key=medians.__getitem__)
    limit = work.num_bytes / medians[fastest] / 1e9
    params = {"shape": shape.name, "piece_kib": shape.piece_bytes // 1024, "mib": work.num_bytes >> 20, "threads": num_threads}
    for name in ours:
        rates = sorted(work.num_bytes / seconds / 1e9 for seconds in times[name])
        spread = rates[(3 * len(rates)) // 4] - rates[len(rates) // 4]
        value = work.num_bytes / medians[name] / 1e9
        what = {**params, "blocks": name[1], "limit": str(fastest)}
        peers = peer.rate(", ".join(name), work.num_bytes)
        yield Record(f"copy, {name[0]}", what, value, "GB/s", spread, limit, value / limit, peers)


class _Work:
    """Warm memory of one shape, and what is done with it."""

    def __init__(self, shape: ModelShape, num_blocks: int, num_threads: int) -> None:
        pool_blocks = 2 * num_blocks
        self._slot_bytes = -(-shape.block_bytes // PAGE_BYTES) * PAGE_BYTES
        self._pages = _memory(pool_blocks * shape.block_bytes, mmap.MAP_PRIVATE)
        self._blocks = self._pages.reshape(2 * shape.num_layers, pool_blocks, shape.piece_bytes)
        self._arena = _memory(num_blocks * self._slot_bytes, mmap.MAP_SHARED)
        self._num_threads = num_threads
        self.num_bytes = num_blocks * shape.block_bytes
        token_bytes = shape.num_kv_heads * shape.head_dim * 2
        tensor_bytes = pool_blocks * shape.piece_bytes
        axes = (Axis(shape.num_layers, 2 * tensor_bytes), Axis(2, tensor_bytes), Axis(shape.block_tokens, token_bytes))
        table = StrideTable(self._pages.ctypes.data, Axis(pool_blocks, shape.piece_bytes), axes, token_bytes)
        self._copier = self._copier_of(KVLayout.of([table]), num_threads)

    def verify(self) -> None:
        """Stores all blocks there is room for and loads them into others. Raises RuntimeError where other bytes arrive."""
        num_blocks = len(self._blocks[0]) // 2
        self._pages.view(np.uint64)[:] = np.random.default_rng(2).integers(0, 2**63, self._pages.nbytes // 8)
        self.gather(range(num_blocks))()
        self.scatter(range(num_blocks, 2 * num_blocks))()
        if not all(np.array_equal(blocks[:num_blocks], blocks[num_blocks:]) for blocks in self._blocks):
            raise RuntimeError("what was stored and loaded is not what there was")

    def gather(self, block_ids: Sequence[int]) -> Timed:
        batch = self._batch(block_ids, self._slot_bytes)
        return lambda: self._copier.gather(batch)

    def scatter(self, block_ids: Sequence[int]) -> Timed:
        batch = self._batch(block_ids, self._slot_bytes)
        return lambda: self._copier.scatter(batch)

    def plain_copies(self) -> dict[str, Timed]:
        """Ways of copying as many bytes from one place to another."""
        ways: dict[str, Timed] = {}
        num_runs = self.num_bytes // PIECE_BYTES
        flat = KVLayout((Segment(self._pages.ctypes.data, PIECE_BYTES, PIECE_BYTES),), num_runs)
        batch = self._batch(range(num_runs), PIECE_BYTES)
        for num_threads in sorted({1, self._num_threads}):
            copier = self._copier_of(flat, num_threads)
            pool = ThreadPoolExecutor(num_threads)
            threads = f"{num_threads} thread{'s' * (num_threads > 1)}"
            ways[f"memcpy, {threads}"] = self._memcpy(pool, num_threads, self.num_bytes)
            ways[f"memcpy by MiB, {threads}"] = self._memcpy(pool, num_threads, PIECE_BYTES)
            ways[f"core, {threads}"] = lambda copier=copier: copier.gather(batch)  # type: ignore[misc]
        return ways

    def _memcpy(self, pool: ThreadPoolExecutor, num_threads: int, step: int) -> Timed:
        target, source = self._arena.ctypes.data, self._pages.ctypes.data
        share = -(-self.num_bytes // num_threads)

        def part(first: int) -> None:
            end = min(first + share, self.num_bytes)
            for start in range(first, end, step):
                ctypes.memmove(target + start, source + start, min(step, end - start))

        if num_threads == 1:
            return lambda: part(0)
        return lambda: list(pool.map(part, range(0, self.num_bytes, share)))

    def _copier_of(self, layout: KVLayout, num_threads: int) -> NativeCopier:
        return NativeCopier(layout, arena_address=self._arena.ctypes.data, arena_bytes=self._arena.nbytes, num_threads=num_threads)

    def _batch(self, block_ids: Sequence[int], slot_bytes: int) -> list[BlockCopy]:
        return [BlockCopy(block, index * slot_bytes) for index, block in enumerate(block_ids)]


def hashing(rounds: int) -> Iterator[Record]:
    """A whole prompt from what an engine holds its token ids in, and a few tokens more of a long one."""
    ids = np.random.default_rng(7).integers(0, 49_152, PROMPT_TOKENS)
    forms: Mapping[str, tuple[Any, float]] = {
        "numpy int64": (ids, 0.4),
        "numpy int32": (ids.astype(np.int32), 0.4),
        "array of unsigned int": (array("I", ids.tolist()), 0.4),
        "list": (ids.tolist(), 1.0),
    }
    packed = ids.astype(np.uint32).tobytes()
    cases = [(name, size) for name in forms for size in HASH_BLOCK_TOKENS]
    functions: dict[Any, Timed] = {(name, size): _hash(forms[name][0], size) for name, size in cases}
    for size in HASH_BLOCK_TOKENS:
        if any(
            functions[name, size]() != _fallback.chain_keys(b"r" * 16, forms["list"][0], 0, PROMPT_TOKENS // size, size, None)
            for name in forms
        ):
            raise RuntimeError(f"other keys than they should be, in blocks of {size} tokens")
    times = _by_turns({**functions, "digest": lambda: hashlib.sha256(packed).digest()}, rounds)
    peers = {"one sha256": 1e3 * statistics.median(times["digest"])}
    theirs: dict[int, Mapping[str, float]] = {}
    for size in HASH_BLOCK_TOKENS:
        with Peer("hashing", tokens=PROMPT_TOKENS, block_tokens=size, seed=7) as peer:
            theirs[size] = peer.rounds("list", rounds).time("list", "ms")
    for name, size in cases:
        params = {"tokens": PROMPT_TOKENS, "block_tokens": size, "from": name}
        others = {**peers, **(theirs[size] if name == "list" else {})}
        yield record("hash a prompt", params, times[name, size], "ms", limit=forms[name][1], peers=others)
    for size in HASH_BLOCK_TOKENS:
        yield _grown(ids.tolist(), size, rounds)


def _grown(tokens: list[int], block_tokens: int, rounds: int) -> Record:
    """The keys of a long prompt after every 32 tokens that it gained."""
    chain = KeyChain(b"r" * 16, block_tokens)
    chain.update(tokens, len(tokens))
    times = []
    for _ in range(rounds + 2):
        tokens += range(GAINED_TOKENS)
        start = time.perf_counter()
        chain.update(tokens, len(tokens))
        times.append(time.perf_counter() - start)
    params = {"tokens": PROMPT_TOKENS, "block_tokens": block_tokens, "from": "list"}
    return record(f"hash {GAINED_TOKENS} tokens more", params, times[2:], "us", limit=20.0)


def _hash(form: Any, block_tokens: int) -> Timed:
    return lambda: KeyChain(b"r" * 16, block_tokens).update(form, PROMPT_TOKENS)


def _by_turns(functions: Mapping[Any, Timed], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each function in each round. Every round calls all of them, so that what disturbs one disturbs the others as well.

    What a function returns is given up after its time was taken.
    """
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            result = function()
            end = time.perf_counter()
            del result
            if number:  # the first round warms up
                times[name].append(end - start)
    return times


def _memory(num_bytes: int, sharing: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pages that are there, at the start of a page, as engines' tensors and the arena are."""
    memory = np.frombuffer(mmap.mmap(-1, num_bytes, flags=sharing | mmap.MAP_ANONYMOUS), np.uint8)
    memory[:] = 1
    return memory
