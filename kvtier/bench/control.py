"""``kvtier bench control``: what deciding costs. No KV is moved.

Targets, not limits, stand beside the figures: there is no physical limit of a decision.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import mmap
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvtier.bench.options import MOST_BLOCKS, add_json, add_rounds, whole, writable_directory
from kvtier.bench.peers import Peer
from kvtier.bench.report import Record, in_turns, publish, record, time_rounds
from kvtier.bench.scratch import scratch_directory
from kvtier.cache import Cache
from kvtier.config import Config
from kvtier.connectors.messages import ScheduledRequest, WorkerReport
from kvtier.connectors.requests import DefaultSettings, Geometry
from kvtier.connectors.scheduler import SchedulerHalf
from kvtier.control.host_space import PAGE_BYTES, HostSpace
from kvtier.control.planner import Planner
from kvtier.control.residency import Residency
from kvtier.engine import CacheEngine
from kvtier.hashing import KeyChain, Namespace
from kvtier.io import AlignedFile, preallocate
from kvtier.memory.slab import SlabAllocator
from kvtier.policies import create_policy
from kvtier.stats import Stats
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk.geometry import divide
from kvtier.types import BlockIO, BlockKey, BlockMeta, JobKind, Outcome, StoreOrder, TransferJob

PROMPT_TOKENS = 131_072
BLOCKS_PER_PROMPT = 64
STEP_BLOCK_TOKENS = 32
DISK_BATCH = 256
"""blocks of one job"""
SEGMENT_BYTES = 64 << 20
LEAST_TO_WEIGH = 100_000
"""entries; fewer fit into memory that the process has already"""
PEER_RESIDENT = 10_000
"""entries up to which a peer that keeps a file for each can be filled in reasonable time"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    add_json(parser)
    add_rounds(parser, 31)
    sizes = whole(DISK_BATCH, MOST_BLOCKS)
    parser.add_argument("--resident", type=sizes, nargs="+", default=[10_000, 100_000, 1_000_000], help="resident entries for put + evict")
    parser.add_argument("--directory", type=writable_directory, default=None, help="where the disk tier's temporary directory is made")


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status."""
    records = [*lookups(args.rounds), *strangers(args.rounds), *steps(args.rounds), *evictions(args.resident, args.rounds)]
    records += disk_evictions(args.resident, args.rounds, args.directory)
    publish("kvtier bench control", records, args.json)
    return 0


def lookups(rounds: int) -> Iterator[Record]:
    """From a list of 131,072 token ids to the answer: everything hits, or nothing does."""
    token_ids = np.random.default_rng(7).integers(0, 49_152, PROMPT_TOKENS).tolist()
    for block_tokens in (256, 32):
        work = {"tokens": PROMPT_TOKENS, "block_tokens": block_tokens}
        with _engine(PROMPT_TOKENS // block_tokens + 1) as engine, Peer("lookups", **work, seed=7) as peer:
            keys = KeyChain(b"r" * 16, block_tokens).update(token_ids, PROMPT_TOKENS)
            _store(engine, keys)

            def all_hit(engine: CacheEngine = engine, block_tokens: int = block_tokens) -> None:
                found = engine.match(KeyChain(b"r" * 16, block_tokens).update(token_ids, PROMPT_TOKENS))
                assert PROMPT_TOKENS // block_tokens == found.ready_blocks

            def no_hit(engine: CacheEngine = engine, block_tokens: int = block_tokens) -> None:
                assert engine.match(KeyChain(b"s" * 16, block_tokens).iter(token_ids, PROMPT_TOKENS)).hit_blocks == 0

            def pinned(engine: CacheEngine = engine, block_tokens: int = block_tokens) -> None:
                chain = KeyChain(b"r" * 16, block_tokens).update(token_ids, PROMPT_TOKENS)
                engine.match(chain)
                engine.unpin(engine.pin(chain))

            times = time_rounds(all_hit, rounds=rounds)
            yield record("lookup, all hit", work, times, "ms", limit=1.0, peers=peer.rounds("all hit", rounds).time("all hit", "ms"))
            times = time_rounds(pinned, rounds=rounds)
            yield record("lookup, all hit, pin and unpin", work, times, "ms", peers=peer.rounds("pin", rounds).time("pin", "ms"))
            times = time_rounds(no_hit, rounds=rounds)
            yield record("lookup, no hit", work, times, "us", peers=peer.rounds("no hit", rounds).time("no hit", "us"))


def strangers(rounds: int) -> Iterator[Record]:
    """What a tenant could learn from the time of a lookup: a prompt that another tenant has, by turns with one that nobody has."""
    tokens = np.random.default_rng(8).integers(0, 49_152, (2, PROMPT_TOKENS)).tolist()
    with _engine(PROMPT_TOKENS // STEP_BLOCK_TOKENS + 1) as engine:
        _store(engine, KeyChain(b"a" * 16, STEP_BLOCK_TOKENS).update(tokens[0], PROMPT_TOKENS))

        def look(prompt: list[int]) -> float:
            chain = KeyChain(b"b" * 16, STEP_BLOCK_TOKENS)
            return _seconds(lambda: engine.match(chain.iter(prompt, PROMPT_TOKENS)))

        there, nowhere = in_turns([lambda: look(tokens[0]), lambda: look(tokens[1])], 40 * rounds)
    work = {"tokens": PROMPT_TOKENS, "block_tokens": STEP_BLOCK_TOKENS}
    yield record("lookup by a stranger, another tenant has it", work, there, "us")
    yield record("lookup by a stranger, nobody has it", work, nowhere, "us")


def steps(rounds: int, num_requests: int = 64) -> Iterator[Record]:
    """The scheduler half's share of an engine step in which 64 running requests decode one token each."""
    with _engine(num_requests * 256) as engine:  # in which each of them could have all of its blocks
        times = decode_steps(engine, rounds, num_requests)
    yield record("scheduler half, one step", {"running": num_requests, "block_tokens": STEP_BLOCK_TOKENS}, times, "us", limit=200.0)


def decode_steps(cache: Cache, rounds: int, num_requests: int) -> list[float]:
    """Seconds of steps in which each running request decodes one token; the blocks that become full are stored, without bytes.

    Host memory is full before, as it is nearly always: of prompts of which one was used again and again.
    """
    prompts = _prompts(1 << 120)  # the cache may have others already
    often = next(prompts)
    _store(cache, often)
    for _ in range(num_requests * 256 // BLOCKS_PER_PROMPT):
        _store(cache, next(prompts))
        cache.touch(often[::-1])
        cache.poll()
    block_tokens = STEP_BLOCK_TOKENS
    geometry = Geometry(b"n" * 16, block_tokens, block_tokens, num_workers=1, host_blocks=num_requests * 256)
    half = SchedulerHalf(cache, geometry, DefaultSettings(), strict=True)
    tokens = {f"r{number}": list(range(number, number + 2048)) for number in range(num_requests)}
    blocks = {name: list(range(number * 256, number * 256 + 256)) for number, name in enumerate(tokens)}
    for name, ids in tokens.items():
        half.add_request(name, ids, num_prompt_tokens=2048)
        half.match(name, 2048, 0)
        half.allocated(name, blocks[name], 0)
    computed = dict(zip(tokens, range(2048, 2048 + num_requests), strict=True))
    _step(half, blocks, dict.fromkeys(tokens, 2048))

    def decode() -> None:
        for name, ids in tokens.items():
            ids.append(7)
            computed[name] += 1
        _step(half, blocks, computed)

    for ids, extra in zip(tokens.values(), range(num_requests), strict=True):
        ids.extend([7] * extra)
    return time_rounds(decode, rounds=max(rounds, 64))


def evictions(resident: Sequence[int], rounds: int) -> Iterator[Record]:
    """Storing prompts into a host memory that is full: slots, index, policy, eviction; no bytes."""
    for count in resident:
        before = _resident_bytes()
        generations = np.zeros(count, np.uint32).data
        space = HostSpace(SlabAllocator(count * PAGE_BYTES, 64 << 20), generations)
        planner = Planner(space, Residency("host", lambda: create_policy("lru"), None), [], Stats())
        prompts = _prompts()
        while planner.num_blocks()["host"] + BLOCKS_PER_PROMPT <= count:
            _put(planner, next(prompts))
        entry_bytes = (_resident_bytes() - before) / count
        fresh = [next(prompts) for _ in range(rounds + 2)]
        times = time_rounds(lambda fresh=fresh, planner=planner: _put(planner, fresh.pop()), rounds=rounds)  # type: ignore[misc]
        per_block = [seconds / BLOCKS_PER_PROMPT for seconds in times]
        yield record("put + evict, memory", {"resident": count}, per_block, "us", limit=5.0)
        if count == max(resident) and count >= LEAST_TO_WEIGH:
            yield Record("memory per entry, host", {"resident": count}, entry_bytes, "bytes")
        del planner, space
        gc.collect()


def disk_evictions(resident: Sequence[int], rounds: int, directory: Path | None) -> Iterator[Record]:
    """The disk tier's own cost per block: remove one, put one, commit to the durable index; one page of payload each.

    By turns, as many bytes are written to a plain file; that time is subtracted, since it is the I/O.
    """
    for count in resident:
        with scratch_directory(directory) as path:
            if shutil.disk_usage(path).free < _capacity_for(count):
                print(f"no room for a disk tier of {count} blocks: it must be allowed {_capacity_for(count)} bytes", file=sys.stderr)
                continue
            yield from _disk_eviction(path, count, rounds)


def _disk_eviction(path: Path, count: int, rounds: int) -> Iterator[Record]:
    tier = DiskTier(path / "tier", _capacity_for(count), durable=False, max_in_flight_bytes=1 << 30)
    payload = memoryview(bytearray(PAGE_BYTES * DISK_BATCH))
    jobs = itertools.count(1)

    def put(keys: Sequence[BlockKey]) -> None:
        pages = [payload[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] for i in range(len(keys))]
        blocks = tuple(BlockIO(BlockMeta(key, None, PAGE_BYTES), page) for key, page in zip(keys, pages, strict=True))
        tier.submit(TransferJob(next(jobs), JobKind.STORE, b"n" * 16, blocks))
        while not (results := tier.poll(1.0)):
            pass
        assert {Outcome.OK} == set(results[0].outcomes), "the tier takes them all, or nothing was measured"

    prompts = ([BlockKey((number * DISK_BATCH + i).to_bytes(16, "big")) for i in range(DISK_BATCH)] for number in itertools.count())
    stored = deque(itertools.islice(prompts, count // DISK_BATCH))
    for keys in stored:
        put(keys)

    def replace() -> None:
        tier.remove(stored.popleft())
        stored.append(next(prompts))
        put(stored[-1])

    with contextlib.closing(_RawFile(path / "raw")) as raw:
        own, plain = in_turns([lambda: _seconds(replace), lambda: _seconds(raw.write)], rounds)
    io_s = statistics.median(plain)
    per_block = [(seconds - io_s) / DISK_BATCH for seconds in own]
    params = {"resident": count, "io_us": round(1e6 * io_s / DISK_BATCH, 1)}
    peers: Mapping[str, float] = {}
    if count <= PEER_RESIDENT:
        with Peer("eviction", resident=count, directory=str(path / "peer")) as peer:
            peers = peer.rounds("put", rounds).time("put", "us")
    yield record("put + evict, disk, beyond the I/O", params, per_block, "us", limit=20.0, peers=peers)
    tier.close()


class _RawFile:
    """A file that is written in pieces as large as a batch of records, directly, around and around."""

    def __init__(self, path: Path) -> None:
        preallocate(path, SEGMENT_BYTES)
        self._file = AlignedFile(path)
        self._piece = memoryview(mmap.mmap(-1, 2 * PAGE_BYTES * DISK_BATCH))
        self._offsets = itertools.cycle(range(0, SEGMENT_BYTES, len(self._piece)))
        for _ in range(SEGMENT_BYTES // len(self._piece)):
            self.write()

    def write(self) -> None:
        """Writes the next piece."""
        self._file.writev([self._piece], next(self._offsets))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _resident_bytes() -> int:
    """Memory of this process. (Its peak says nothing of what is freed and used again.)"""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _capacity_for(num_blocks: int) -> int:
    """What a tier must be allowed for so many blocks of a page, nearly: with such small ones the index is the bound."""
    capacity_bytes = 1 << 28
    while divide(capacity_bytes, SEGMENT_BYTES).max_blocks(PAGE_BYTES) < num_blocks + DISK_BATCH:
        capacity_bytes += capacity_bytes >> 3
    return capacity_bytes


def _put(planner: Planner, keys: list[BlockKey]) -> None:
    plan = planner.begin_store(StoreOrder(keys, 0), PAGE_BYTES, 0.0)
    assert len(keys) == len(plan.slots), "the planner takes them all, or nothing was measured"
    planner.commit_store(plan.job_id, (), 0.0)


def _prompts(number: int = 0) -> Iterator[list[BlockKey]]:
    """The keys of prompts that share nothing, beginning with ``number``."""
    while True:
        yield [BlockKey((number + position).to_bytes(16, "little")) for position in range(BLOCKS_PER_PROMPT)]
        number += BLOCKS_PER_PROMPT


def _step(half: SchedulerHalf, blocks: dict[str, list[int]], computed: dict[str, int]) -> None:
    message = half.build_step([ScheduledRequest(name, block_ids, computed[name]) for name, block_ids in blocks.items()])
    half.finish_step(WorkerReport(done={job.job_id: 1 for job in message.stores}))


def _store(engine: Cache, keys: list[BlockKey]) -> None:
    plan = engine.begin_store(keys, 0)
    assert len(keys) == len(plan.slots)
    engine.commit_store(plan.job_id)


@contextmanager
def _engine(num_blocks: int) -> Iterator[CacheEngine]:
    """An engine of one-page blocks, its memory ready."""
    config = Config.from_mapping({"tiers": [{"type": "host", "capacity": num_blocks * PAGE_BYTES}]})
    namespace = Namespace(model="bench")
    engine = CacheEngine.open(config, namespace=namespace, block_bytes=PAGE_BYTES)
    while engine.is_growing:
        time.sleep(0.001)
        engine.poll()
    try:
        yield engine
    finally:
        engine.close()
