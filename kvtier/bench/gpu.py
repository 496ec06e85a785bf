"""``kvtier bench gpu``: copies between host memory and a GPU, beside large pinned copies measured in the same run.

Every figure is of whole calls, as the engine's worker makes them: submitting counts. Limits and ways are measured by turns. Behind
its rounds every way copies once more, over bytes that are not right, and all bytes are compared: a wrong copy has no figure.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from kvtier.bench.gpu_beside import beside_a_matrix_product
from kvtier.bench.options import add_json, add_rounds
from kvtier.bench.report import Record, publish
from kvtier.copy.cuda_calibrate import Bytes, calibrate, page_aligned
from kvtier.copy.cuda_choice import DIRECTIONS, Direction, Way
from kvtier.copy.cuda_copier import DEVICE_BLOCKS, bind_ways, close_lanes, open_lanes, upload_segments
from kvtier.copy.cuda_runtime import CudaRuntime, DeviceEvent
from kvtier.copy.cuda_ways import Batch, Bound, CopySettings, CopyWay, DirectCopies, Lane, Staging
from kvtier.layout import Segment

PIECE_BYTES = (4 << 10, 6 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10)
PIECES_PER_BLOCK = 32
TOTAL_BYTES = 256 << 20
ARROWS = {"load": "host to GPU", "store": "GPU to host"}
TARGET_FRACTIONS = {4 << 10: 0.85, 6 << 10: 0.85, 8 << 10: 0.85, 16 << 10: 0.85, 32 << 10: 0.95, 64 << 10: 0.95}
"""piece size -> stated target of a copy between host and GPU, of the large copy's rate"""
BOTH_TARGET = 80.0
"""stated target for both directions at once, in GB/s; the limit measured in the run stands beside it"""
GATHER_TARGET = 0.80
BOTH_PARTS = 8
"""loads and stores take turns in so many parts, as in an engine's steps"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    add_json(parser)
    add_rounds(parser, 15)
    parser.add_argument(
        "--without", action="append", default=[], choices=[way.value for way in Way], help="a way that is not tried; may be given again"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status: 2 where there is no GPU, 1 where bytes were wrong or it had to stop."""
    try:
        from kvtier.copy.cuda_cupy import CupyRuntime  # noqa: PLC0415 - only where there is CuPy

        runtime = CupyRuntime(args.device)
    except (ImportError, RuntimeError) as error:
        print(f"nothing was measured: there is no GPU, or no CuPy ({error})", file=sys.stderr)
        return 2
    records: list[Record] = []
    is_whole = True
    with GpuBench(runtime, rounds=args.rounds, without=[Way(name) for name in args.without]) as bench:
        print("\n".join(bench.table.lines()))
        try:
            for item in itertools.chain(bench.copies(), bench.both_at_once(), bench.gather(), beside_a_matrix_product(bench, args.device)):
                records.append(item)
                print(f"{item.name} {dict(item.params)}: {item.value:.4g} {item.unit}", flush=True)
        except (RuntimeError, ValueError, MemoryError) as error:
            is_whole = False  # what there is by now is kept
            print(f"STOPPED: {error}", flush=True)
    publish(f"kvtier bench gpu, compute capability {runtime.capability / 10}", records, args.json)
    for item in records:
        if verdict := missed(item):
            print(f"{verdict}: {item.name}, {dict(item.params)}")
    return 0 if is_whole and not any("wrong" in item.params for item in records) else 1


def missed(item: Record) -> str:
    """What is wrong with a figure that has a target; empty: nothing."""
    if "wrong" in item.params:
        return f"WRONG BYTES ({item.params['wrong']})"
    for name, value in (("target_fraction", item.fraction), ("target_gb_per_s", item.value)):
        target = item.params.get(name)
        if isinstance(target, float) and value is not None and value < target:
            return f"TARGET MISSED ({value:.3g} of {target:.3g})"
    most = item.params.get("target_ratio")
    return f"TARGET MISSED ({item.value:.4g}, at most {most})" if isinstance(most, float) and item.value > most else ""


@dataclass(frozen=True)
class _Work:
    """Blocks of one piece size, bound to all ways."""

    bounds: Mapping[Direction, Bound]
    batch: Batch
    piece_bytes: int
    ways: Mapping[tuple[Direction, Way], CopyWay]
    noise: Bytes

    @property
    def num_bytes(self) -> int:
        return len(self.batch) * PIECES_PER_BLOCK * self.piece_bytes

    @functools.cached_property
    def gathered(self) -> Bytes:
        """What contiguous memory holds after a store, where the noise was in the pages."""
        pages = self.noise[: self.num_bytes].reshape(self._shape)
        return np.ascontiguousarray(pages[:, self.batch.block_ids].transpose(1, 0, 2)).ravel()

    @functools.cached_property
    def scattered(self) -> Bytes:
        """What the pages hold after a load, where the noise was in contiguous memory."""
        pages = np.empty(self._shape, np.uint8)
        blocks = self.noise[: self.num_bytes].reshape(len(self.batch), PIECES_PER_BLOCK, self.piece_bytes)
        pages[:, self.batch.block_ids] = blocks.transpose(1, 0, 2)
        return pages.ravel()

    @property
    def _shape(self) -> tuple[int, int, int]:
        return PIECES_PER_BLOCK, len(self.batch), self.piece_bytes


Case = Sequence[Callable[[], DeviceEvent]]
"""what is submitted together"""


class GpuBench:
    """One device, its memory and the figures; closes what it opened.

    The first half of device and host memory is what loads go between, the second half that of stores.
    """

    def __init__(
        self,
        runtime: CudaRuntime,
        *,
        rounds: int,
        total_bytes: int = TOTAL_BYTES,
        clock: Callable[[], float] = time.perf_counter,
        without: Collection[Way] = (),
    ) -> None:
        self.runtime = runtime
        self._rounds = rounds
        self._total = total_bytes
        self._clock = clock
        self._without = without
        self._settings = CopySettings()
        self._stack = contextlib.ExitStack()
        small = min(16 << 20, total_bytes)
        self.table = calibrate(runtime, self._settings, piece_sizes=PIECE_BYTES, total_bytes=small, clock=clock, without=without)
        self._device = self._stack.enter_context(contextlib.closing(runtime.allocate(2 * total_bytes)))
        self._host = page_aligned(2 * total_bytes)
        self._noise = np.random.default_rng(1).integers(0, 256, total_bytes, dtype=np.uint8)
        self._poison = ~self._noise
        self._host[:total_bytes] = self._noise
        self._stack.enter_context(contextlib.closing(runtime.register(self._host.ctypes.data, len(self._host))))
        self._staging = self._stack.enter_context(contextlib.closing(Staging(runtime, self._settings)))
        self._lanes: dict[Direction, Lane] = open_lanes(runtime)
        self._stack.callback(close_lanes, runtime, self._lanes)
        self._engine = runtime.open_stream(is_urgent=False)
        self._stack.callback(runtime.close_stream, self._engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def copies(self) -> Iterator[Record]:
        """Each direction, piece size and way, and the way that would be chosen, against one large copy."""
        for piece_bytes in PIECE_BYTES:
            with self._work(piece_bytes) as work:
                for direction in DIRECTIONS:
                    ways = {way.value: copies for (each, way), copies in work.ways.items() if each == direction}
                    cases: dict[str, Case] = {"limit": [functools.partial(self._large, direction)]}
                    cases |= {name: [functools.partial(self._submit, copies, work.batch, direction)] for name, copies in ways.items()}
                    rates = self._rates(cases, work.num_bytes)
                    wrong = {name: self._wrong(work, direction, cases[name]) for name in ways}
                    chosen, limit = self.table.choose(direction, piece_bytes).value, statistics.median(rates["limit"])
                    params: dict[str, object] = {"piece_bytes": piece_bytes}
                    target = {"way": f"chosen: {chosen}", "target_fraction": TARGET_FRACTIONS[piece_bytes]}
                    yield _record(ARROWS[direction], {**params, **target}, rates[chosen], limit, wrong[chosen])
                    for name in ways:
                        yield _record(f"{ARROWS[direction]}, one way", {**params, "way": name}, rates[name], limit, wrong[name])

    def both_at_once(self) -> Iterator[Record]:
        """Loads and stores together, each the way that would be chosen, against two large copies at once."""
        for piece_bytes in PIECE_BYTES:
            with self._work(piece_bytes) as work:
                size = -(-len(work.batch) // BOTH_PARTS)
                chosen = {direction: work.ways[direction, self.table.choose(direction, piece_bytes)] for direction in DIRECTIONS}
                cases: dict[str, Case] = {
                    "limit": [functools.partial(self._large, direction) for direction in DIRECTIONS],
                    "both": [
                        functools.partial(self._submit, chosen[direction], part, direction)
                        for part in work.batch.parts(size)
                        for direction in DIRECTIONS
                    ],
                }
                rates = self._rates(cases, 2 * work.num_bytes)
                wrong = " ".join(filter(None, (self._wrong(work, direction, cases["both"]) for direction in DIRECTIONS)))
                params = {"piece_bytes": piece_bytes, "target_gb_per_s": BOTH_TARGET}
                yield _record("both directions at once", params, rates["both"], statistics.median(rates["limit"]), wrong)

    def gather(self) -> Iterator[Record]:
        """Pages into contiguous memory on the device, as into a pool there, against a copy of as many bytes on the device."""
        for piece_bytes in PIECE_BYTES:
            with self._work(piece_bytes) as work:
                bound = replace(
                    work.bounds["load"],
                    settings=CopySettings(num_blocks=DEVICE_BLOCKS),
                    arena_address=self._device.address + self._total,
                    is_on_device=True,
                )
                cases: dict[str, Case] = {
                    "limit": [self._on_device],
                    "gather": [functools.partial(self._submit, DirectCopies(bound), work.batch, "store")],
                }
                rates = self._rates(cases, work.num_bytes)
                wrong = self._wrong_on_device(work, cases["gather"])
                params = {"piece_bytes": piece_bytes, "target_fraction": GATHER_TARGET}
                yield _record("gather on the device", params, rates["gather"], statistics.median(rates["limit"]), wrong)

    def load_once(self) -> DeviceEvent:
        """One load of Llama-sized pieces, the way that would be chosen; for measuring what it costs others."""
        if self._streaming is None:
            self._streaming = self._stack.enter_context(self._work(32 << 10))
        way = self._streaming.ways["load", self.table.choose("load", 32 << 10)]
        return self._submit(way, self._streaming.batch, "load")

    _streaming: _Work | None = None

    @property
    def bytes_of_a_load(self) -> int:
        """That :meth:`load_once` copies."""
        return self._total

    @contextlib.contextmanager
    def _work(self, piece_bytes: int) -> Iterator[_Work]:
        """Loads into the first half of the device's memory, stores from the second, so that both may run at once."""
        num_blocks = self._total // (PIECES_PER_BLOCK * piece_bytes)
        block_ids = np.random.default_rng(2).permutation(num_blocks).astype(np.int64)
        batch = Batch(block_ids, np.arange(num_blocks, dtype=np.int64) * (PIECES_PER_BLOCK * piece_bytes))
        bounds: dict[Direction, Bound] = {}
        ways: dict[tuple[Direction, Way], CopyWay] = {}
        with contextlib.ExitStack() as stack:
            for direction in DIRECTIONS:
                first = self._first(direction)
                places = [self._device.address + first + index * num_blocks * piece_bytes for index in range(PIECES_PER_BLOCK)]
                segments = [Segment(place, piece_bytes, piece_bytes) for place in places]
                memory, table = upload_segments(segments, self.runtime, self._lanes["load"].transfer)
                stack.enter_context(contextlib.closing(memory))
                bounds[direction] = Bound(self.runtime, self._settings, self._lanes, table, self._host.ctypes.data + first)
                bound_ways = bind_ways(bounds[direction], self._staging)[0]
                ways |= {(direction, way): copies for way, copies in bound_ways.items() if way not in self._without}
            yield _Work(bounds, batch, piece_bytes, ways, self._noise)

    def _submit(self, copies: CopyWay, batch: Batch, direction: Direction) -> DeviceEvent:
        return copies.submit(batch, direction, self.runtime.record(self._engine))

    def _first(self, direction: Direction) -> int:
        return 0 if direction == "load" else self._total

    def _rates(self, cases: Mapping[str, Case], num_bytes: int) -> dict[str, list[float]]:
        """GB/s of each case in each round; all cases by turns, the first round not counted."""
        rates: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(self._rounds + 1):
            for name, submits in cases.items():
                start = self._clock()
                _run(submits)
                if number:
                    rates[name].append(num_bytes / (self._clock() - start) / 1e9)
        return rates

    def _wrong(self, work: _Work, direction: Direction, case: Case) -> str:
        """Runs a case over bytes that are not right; empty where all of one direction are right behind it."""
        pages, host = self._device.address + self._first(direction), self._host[self._first(direction) :][: self._total]
        if direction == "load":
            self._fill(pages, self._poison)
            host[:] = self._noise
            _run(case)
            return "" if np.array_equal(work.scattered, self._contents(pages)[: work.num_bytes]) else direction
        self._fill(pages, self._noise)
        host[:] = self._poison
        _run(case)
        return "" if np.array_equal(work.gathered, host[: work.num_bytes]) else direction

    def _wrong_on_device(self, work: _Work, case: Case) -> str:
        pages, pool = self._device.address, self._device.address + self._total
        self._fill(pages, self._noise)
        self._fill(pool, self._poison)
        _run(case)
        return "" if np.array_equal(work.gathered, self._contents(pool)[: work.num_bytes]) else "gather"

    def _fill(self, address: int, contents: Bytes) -> None:
        self._plain(self._engine, address, contents.ctypes.data).wait()

    def _contents(self, address: int) -> Bytes:
        found = np.empty(self._total, np.uint8)
        self._plain(self._engine, found.ctypes.data, address).wait()
        return found

    def _large(self, direction: Direction) -> DeviceEvent:
        """All bytes of a direction in one piece."""
        pages, host = (base + self._first(direction) for base in (self._device.address, self._host.ctypes.data))
        to, source = (pages, host) if direction == "load" else (host, pages)
        return self._plain(self._lanes[direction].transfer, to, source)

    def _on_device(self) -> DeviceEvent:
        return self._plain(self._engine, self._device.address + self._total, self._device.address)

    def _plain(self, stream: int, to: int, source: int) -> DeviceEvent:
        self.runtime.copy(stream, np.array([to], np.uint64), np.array([source], np.uint64), np.array([self._total], np.int64))
        return self.runtime.record(stream)


def _run(case: Case) -> None:
    events = [submit() for submit in case]
    for event in events:
        event.wait()


def _record(name: str, params: dict[str, Any], rates: Sequence[float], limit: float, wrong: str = "") -> Record:
    values = sorted(rates)
    spread = values[(3 * len(values)) // 4] - values[len(values) // 4] if len(values) > 3 else 0.0
    if wrong:
        return Record(name, {**params, "wrong": wrong}, 0.0, "GB/s", 0.0, limit, 0.0)
    value = statistics.median(values)
    return Record(name, params, value, "GB/s", spread, limit, value / limit)
