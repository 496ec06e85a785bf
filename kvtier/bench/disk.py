"""``kvtier bench disk``: the disk tier beside the disk it lies on.

By turns, the tier stores or loads a batch of blocks and ``fio`` writes or reads as many bytes with the same block size and queue depth in
the same directory (a loop of plain direct I/O where there is no fio). Both overwrite places that were written before and end with a sync;
the tier's time ends when the last block is durable, or verified. Both read past the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvtier.bench.report import Record, publish
from kvtier.io import PAGE_BYTES, AlignedFile, Scratch, address_of, preallocate
from kvtier.tiers.disk import DiskTier
from kvtier.types import BlockIO, BlockKey, BlockMeta, JobKind, Outcome, TransferJob

NAMESPACE = b"n" * 16
TARGET = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds per figure (default: 9)")
    parser.add_argument("--directory", type=Path, default=None, help="where the temporary directory is made: the disk to measure")
    parser.add_argument("--block-mib", type=int, nargs="+", default=[2, 8, 32], help="block sizes in MiB (default: 2 8 32)")
    parser.add_argument("--batch-mib", type=int, default=512, help="MiB moved per round (default: 512)")
    parser.add_argument("--queue-depth", type=int, default=8, help="transfers under way at once (default: 8)")
    parser.add_argument("--engine", choices=("auto", "io_uring", "threads"), default="auto", help="how the tier does its I/O")
    parser.add_argument("--buffered", action="store_true", help="through the page cache, dropped before each read")


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status."""
    records: list[Record] = []
    for block_mib in args.block_mib:
        directory = Path(tempfile.mkdtemp(prefix="kvtier-bench-", dir=args.directory))
        try:
            records += measure(args, block_mib << 20, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    publish("kvtier bench disk", records, args.json)
    return 0


def measure(args: argparse.Namespace, block_bytes: int, directory: Path) -> Iterator[Record]:
    """Writing and reading blocks of one size."""
    num_blocks = max(args.queue_depth, (args.batch_mib << 20) // block_bytes)
    batch = Batch(args, block_bytes, num_blocks, directory)
    raw: Limit = Fio(args, block_bytes, num_blocks, directory) if shutil.which("fio") else Loop(args, block_bytes, num_blocks, directory)
    try:
        for name, own, limit in (("write", batch.store, raw.write), ("cold read", batch.load, raw.read)):
            ours, theirs = in_turns([own, limit], args.rounds)
            params = {"block_mib": block_bytes >> 20, "queue_depth": args.queue_depth, "io": batch.engine_name, "beside": raw.name}
            yield rates(name, params, ours, theirs)
    finally:
        batch.close()


def in_turns(functions: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """What each function returned in each round; the order changes from round to round, and the first round does not count."""
    values: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        order = list(range(len(functions)))
        for index in order if number % 2 else order[::-1]:
            values[index].append(functions[index]())
    return [each[1:] for each in values]


def rates(name: str, params: dict[str, object], values: Sequence[float], limits: Sequence[float]) -> Record:
    """A record of rates in bytes per second beside their limit."""
    ordered = sorted(value / 1e9 for value in values)
    value, limit = statistics.median(ordered), statistics.median(limits) / 1e9
    spread = ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]
    return Record(name, params, value, "GB/s", spread, limit, value / limit)


class Batch:
    """Blocks in host memory, and a disk tier that holds little more than them."""

    def __init__(self, args: argparse.Namespace, block_bytes: int, num_blocks: int, directory: Path) -> None:
        segment_bytes = max(64 << 20, block_bytes + (1 << 20))
        per_segment = segment_bytes // (block_bytes + PAGE_BYTES)
        num_segments = -(-num_blocks // per_segment)
        self._block_bytes = block_bytes
        scratch = Scratch()
        scratch.reset(block_bytes * num_blocks)
        self._memory = scratch.take(block_bytes * num_blocks)
        np.frombuffer(self._memory, np.uint64)[:] = np.random.default_rng(1).integers(0, 2**63, len(self._memory) // 8)
        self._tier = DiskTier(
            directory / "tier",
            (num_segments + 1) * segment_bytes * 128 // 126 + (4 << 20),
            segment_bytes=segment_bytes,
            direct_io="off" if args.buffered else "auto",
            io_engine=args.engine,
            queue_depth=args.queue_depth,
            max_in_flight_bytes=2 * len(self._memory),
            memory=(address_of(self._memory), len(self._memory)),
        )
        self.engine_name = self._tier.io_engine
        self._is_buffered = args.buffered
        self._directory = directory
        self._generation = 0
        self._num_jobs = 0
        self._keys: list[BlockKey] = []
        self._num_blocks = num_blocks

    def store(self) -> float:
        """Bytes per second until all blocks are durable."""
        self._tier.remove(self._keys)
        self._generation += 1
        self._keys = [BlockKey(self._generation.to_bytes(8, "big") + number.to_bytes(8, "big")) for number in range(self._num_blocks)]
        time.sleep(0.2)  # the removals reach the index file
        return self._transfer(JobKind.STORE)

    def load(self) -> float:
        """Bytes per second until all blocks are verified."""
        if self._is_buffered:
            drop_from_page_cache(self._directory)
        return self._transfer(JobKind.LOAD)

    def close(self) -> None:
        """Closes the tier."""
        self._tier.close()

    def _transfer(self, kind: JobKind) -> float:
        size = self._block_bytes
        buffers = [self._memory[number * size : (number + 1) * size] for number in range(self._num_blocks)]
        self._num_jobs += 1
        blocks = tuple(BlockIO(BlockMeta(key, None, size), buffer) for key, buffer in zip(self._keys, buffers, strict=True))
        job = TransferJob(self._num_jobs, kind, NAMESPACE, blocks)
        start = time.perf_counter()
        self._tier.submit(job)
        while not (results := self._tier.poll(1.0)):
            pass
        seconds = time.perf_counter() - start
        if set(results[0].outcomes) != {Outcome.OK}:
            raise RuntimeError(f"the disk tier failed: {results[0].error}")
        return len(self._memory) / seconds


class Limit:
    """What the disk gives without kvtier."""

    name = ""

    def write(self) -> float:
        """Bytes per second, the final sync included."""
        raise NotImplementedError

    def read(self) -> float:
        """Bytes per second past the page cache."""
        raise NotImplementedError


class Fio(Limit):
    """The disk as fio sees it."""

    name = "fio"

    def __init__(self, args: argparse.Namespace, block_bytes: int, num_blocks: int, directory: Path) -> None:
        self._command = [
            "fio", "--name=limit", f"--filename={directory / 'fio'}", f"--bs={block_bytes}", f"--size={block_bytes * num_blocks}",
            f"--iodepth={args.queue_depth}", f"--direct={0 if args.buffered else 1}", "--invalidate=1", "--overwrite=1", "--end_fsync=1",
            "--scramble_buffers=0", "--output-format=json",
        ]  # fmt: skip
        self._engine = ["--ioengine=io_uring", "--fixedbufs=1"]
        if not self._run("write"):
            self._engine = ["--ioengine=libaio"]

    def write(self) -> float:
        return self._run("write")

    def read(self) -> float:
        return self._run("read")

    def _run(self, direction: str) -> float:
        done = subprocess.run([*self._command, *self._engine, f"--rw={direction}"], capture_output=True, text=True, check=False)
        start = done.stdout.find("{")
        if done.returncode or start < 0:
            return 0.0
        return float(json.loads(done.stdout[start:])["jobs"][0][direction]["bw_bytes"])


class Loop(Limit):
    """The disk as a plain loop sees it: as many threads as the queue is deep, each with one transfer at a time."""

    name = "plain loop"

    def __init__(self, args: argparse.Namespace, block_bytes: int, num_blocks: int, directory: Path) -> None:
        path = directory / "loop"
        preallocate(path, block_bytes * num_blocks)
        self._file = AlignedFile(path, direct="off" if args.buffered else "auto")
        self._directory = directory
        self._num_blocks = num_blocks
        self._block_bytes = block_bytes
        self._pool = ThreadPoolExecutor(args.queue_depth)
        scratch = Scratch()
        scratch.reset(block_bytes * args.queue_depth)
        self._buffers = [scratch.take(block_bytes) for _ in range(args.queue_depth)]
        for buffer in self._buffers:
            buffer[:] = np.random.default_rng(2).bytes(block_bytes)

    def write(self) -> float:
        return self._run(lambda buffer, offset: self._file.writev([buffer], offset), self._file.sync)

    def read(self) -> float:
        drop_from_page_cache(self._directory)
        return self._run(lambda buffer, offset: self._file.readv([buffer], offset))

    def _run(self, transfer: Callable[[memoryview, int], object], finish: Callable[[], None] = lambda: None) -> float:
        def lane(index: int) -> None:
            for number in range(index, self._num_blocks, len(self._buffers)):
                transfer(self._buffers[index], number * self._block_bytes)

        start = time.perf_counter()
        list(self._pool.map(lane, range(len(self._buffers))))
        finish()
        return self._num_blocks * self._block_bytes / (time.perf_counter() - start)


def drop_from_page_cache(directory: Path) -> None:
    """Has the kernel forget the contents of all files below ``directory``; they must be synced."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
