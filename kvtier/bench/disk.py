"""``kvtier bench disk``: the disk tier beside the disk it lies on.

By turns, the tier stores or loads a batch of blocks and ``fio`` writes or reads as many bytes with the same block size and queue depth in
the same files (a loop of plain direct I/O where there is no fio): a disk may be twice as fast in one file as in the next. What is written
was written before, and both end with a sync; the tier's time ends when the last block is durable, or verified. Both read past the page
cache, and have their buffers in huge pages where the system has some. Each size is measured in several places on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvtier.bench.options import MOST_MIB, MOST_THREADS, add_json, add_rounds, whole, writable_directory
from kvtier.bench.report import Record, in_turns, publish, rates
from kvtier.bench.scratch import scratch_directory
from kvtier.io import PAGE_BYTES, AlignedFile, address_of
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.record import payload_checksum
from kvtier.types import BlockIO, BlockKey, BlockMeta, JobKind, Outcome, TransferJob

NAMESPACE = b"n" * 16
MOST_PLACES = 1000
MOST_BLOCK_MIB = 4095
"""a segment, which holds a whole block, is shorter than 4 GiB"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    add_json(parser)
    add_rounds(parser, 5, "timed rounds per figure and place")
    parser.add_argument("--places", type=whole(1, MOST_PLACES), default=3, help="times that the files are made anew (default: 3)")
    parser.add_argument(
        "--directory", type=writable_directory, default=None, help="where the temporary directory is made: the disk to measure"
    )
    parser.add_argument(
        "--block-mib", type=whole(1, MOST_BLOCK_MIB), nargs="+", default=[2, 8, 32], help="block sizes in MiB (default: 2 8 32)"
    )
    parser.add_argument("--batch-mib", type=whole(1, MOST_MIB), default=1024, help="MiB moved per round (default: 1024)")
    parser.add_argument("--queue-depth", type=whole(1, MOST_THREADS), default=8, help="transfers under way at once (default: 8)")
    parser.add_argument("--engine", choices=("auto", "io_uring", "threads"), default="auto", help="how the tier does its I/O")
    parser.add_argument("--buffered", action="store_true", help="through the page cache, dropped before each read")


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status."""
    records: list[Record] = []
    for block_mib in args.block_mib:
        records += measure(args, block_mib << 20)
    publish("kvtier bench disk", records, args.json)
    return 0


def measure(args: argparse.Namespace, block_bytes: int) -> Iterator[Record]:
    """Writing and reading blocks of one size."""
    writes: list[list[float]] = [[], []]
    reads: list[list[float]] = [[], []]
    params: dict[str, object] = {}
    for _ in range(args.places):
        with scratch_directory(args.directory) as directory, contextlib.closing(Batch(args, block_bytes, directory)) as batch:
            batch.verify()
            limit = (Fio if shutil.which("fio") else Loop)(args, block_bytes, batch.files, batch.blocks_per_file)
            params = {"block_mib": block_bytes >> 20, "queue_depth": args.queue_depth, "io": batch.io_engine, "beside": limit.name}
            for all_values, values in zip(writes, in_turns([batch.store, limit.write], args.rounds), strict=True):
                all_values.extend(values)
            batch.store()  # the other has written over it
            for all_values, values in zip(reads, in_turns([batch.load, limit.read], args.rounds), strict=True):
                all_values.extend(values)
    yield rates("write", params, *writes)
    yield rates("cold read", params, *reads)


class Batch:
    """Blocks in host memory, and a disk tier that holds little more than them."""

    def __init__(self, args: argparse.Namespace, block_bytes: int, directory: Path) -> None:
        segment_bytes = max(64 << 20, block_bytes + PAGE_BYTES)
        self.blocks_per_file = segment_bytes // (block_bytes + PAGE_BYTES)
        num_segments = max(1, (args.batch_mib << 20) // (block_bytes * self.blocks_per_file))
        self._num_blocks = num_segments * self.blocks_per_file
        self._block_bytes = block_bytes
        self._memory = huge_pages(block_bytes * self._num_blocks)
        np.frombuffer(self._memory, np.uint64)[:] = np.random.default_rng(1).integers(0, 2**63, len(self._memory) // 8)
        self._tier = DiskTier(
            directory,
            num_segments * segment_bytes * 128 // 126 + (4 << 20),
            segment_bytes=segment_bytes,
            direct_io="off" if args.buffered else "auto",
            io_engine=args.engine,
            queue_depth=args.queue_depth,
            max_in_flight_bytes=2 * len(self._memory),
            memory=(address_of(self._memory), len(self._memory)),
        )
        self.io_engine = self._tier.io_engine
        self._is_buffered = args.buffered
        self._directory = directory
        self._generation = 0
        self._num_jobs = 0
        self._keys: list[BlockKey] = []

    @property
    def files(self) -> list[Path]:
        """The segment files, all full after a ``store``."""
        return sorted(self._directory.glob("segment-*.kv"))

    def store(self) -> float:
        """Bytes per second until all blocks are durable."""
        self._tier.remove(self._keys)
        self._generation += 1
        self._keys = [BlockKey(self._generation.to_bytes(8, "big") + number.to_bytes(8, "big")) for number in range(self._num_blocks)]
        time.sleep(0.2)  # the removals reach the index file
        return self._transfer(JobKind.STORE)

    def verify(self) -> None:
        """Stores all blocks and loads them again. Raises RuntimeError where other bytes come back."""
        self.store()
        there = payload_checksum(self._memory)
        self._memory[:] = bytes(len(self._memory))
        self.load()
        if there != payload_checksum(self._memory):
            raise RuntimeError("what was stored and loaded is not what there was")

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
    """What the disk gives without kvtier, in the same files."""

    name = ""

    def write(self) -> float:
        """Bytes per second, a final sync included."""
        raise NotImplementedError

    def read(self) -> float:
        """Bytes per second past the page cache."""
        raise NotImplementedError


class Fio(Limit):
    """The disk as fio sees it, with memory registered before its clock starts."""

    name = "fio"

    def __init__(self, args: argparse.Namespace, block_bytes: int, files: Sequence[Path], blocks_per_file: int) -> None:
        self._num_bytes = len(files) * blocks_per_file * block_bytes
        self._files = files
        self._command = [
            "fio", "--name=limit", f"--filename={':'.join(map(str, files))}", "--file_service_type=sequential", f"--bs={block_bytes}",
            f"--size={self._num_bytes}", f"--iodepth={args.queue_depth}", f"--direct={0 if args.buffered else 1}", "--invalidate=1",
            "--overwrite=1", "--scramble_buffers=0", "--output-format=json",
        ]  # fmt: skip
        self._engine = ["--ioengine=io_uring", "--fixedbufs=1"]
        try:
            self._run("write")
        except RuntimeError:  # no memory to lock, or no io_uring
            self._engine = ["--ioengine=libaio"]
            self._run("write")

    def write(self) -> float:
        seconds = self._num_bytes / self._run("write")
        fd = os.open(self._files[0], os.O_RDWR)
        start = time.perf_counter()
        os.fdatasync(fd)  # one is enough: it flushes the disk
        seconds += time.perf_counter() - start
        os.close(fd)
        return self._num_bytes / seconds

    def read(self) -> float:
        return self._run("read")

    def _run(self, direction: str) -> float:
        command = [*self._command, *self._engine, f"--rw={direction}"]
        huge = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=huge)
        start = done.stdout.find("{")
        if done.returncode or start < 0:
            raise RuntimeError(f"fio failed: {(done.stderr or done.stdout).strip()[-500:]}")
        return float(json.loads(done.stdout[start:])["jobs"][0][direction]["bw_bytes"])


class Loop(Limit):
    """The disk as a plain loop sees it: as many threads as the queue is deep, each with one transfer at a time."""

    name = "plain loop"

    def __init__(self, args: argparse.Namespace, block_bytes: int, files: Sequence[Path], blocks_per_file: int) -> None:
        self._files = [AlignedFile(path, direct="off" if args.buffered else "auto") for path in files]
        self._directory = files[0].parent
        self._places = [(file, number * block_bytes) for file in self._files for number in range(blocks_per_file)]
        self._num_bytes = len(self._places) * block_bytes
        self._pool = ThreadPoolExecutor(args.queue_depth)
        self._buffers = [huge_pages(block_bytes) for _ in range(args.queue_depth)]
        for buffer in self._buffers:
            buffer[:] = np.random.default_rng(2).bytes(block_bytes)

    def write(self) -> float:
        return self._run(AlignedFile.writev, self._files[0].sync)

    def read(self) -> float:
        drop_from_page_cache(self._directory)
        return self._run(AlignedFile.readv)

    def _run(
        self, transfer: Callable[[AlignedFile, Sequence[memoryview], int], object], finish: Callable[[], None] = lambda: None
    ) -> float:
        def lane(index: int) -> None:
            for file, offset in self._places[index :: len(self._buffers)]:
                transfer(file, [self._buffers[index]], offset)

        start = time.perf_counter()
        list(self._pool.map(lane, range(len(self._buffers))))
        finish()
        return self._num_bytes / (time.perf_counter() - start)


def huge_pages(num_bytes: int) -> memoryview:
    """Memory in huge pages where there are some. In small ones a disk's speed depends on how they happen to lie."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has small pages on many systems
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def drop_from_page_cache(directory: Path) -> None:
    """Has the kernel forget the contents of all files below ``directory``; they must be synced."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
