"""``kvtier bench gpu``: copies between host memory and a GPU, beside large pinned copies measured in the same run.

Every figure is of whole calls, as the engine's worker makes them: submitting counts. Limits and ways are measured by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from kvtier.bench.options import add_json, add_rounds
from kvtier.bench.report import Record, publish
from kvtier.copy.cuda_calibrate import calibrate
from kvtier.copy.cuda_choice import DIRECTIONS, Direction, Way
from kvtier.copy.cuda_copier import DEVICE_BLOCKS, bind_ways, open_lanes, upload_segments
from kvtier.copy.cuda_runtime import CudaRuntime, DeviceEvent
from kvtier.copy.cuda_ways import Batch, Bound, CopySettings, CopyWay, DirectCopies, Lane, Staging
from kvtier.layout import Segment

PIECE_BYTES = (4 << 10, 6 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10)
PIECES_PER_BLOCK = 32
TOTAL_BYTES = 256 << 20
ARROWS = {"load": "host to GPU", "store": "GPU to host"}
BOTH_LIMIT = 80.0
"""stated target for both directions at once, in GB/s; the limit measured in the run stands beside it"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    add_json(parser)
    add_rounds(parser, 15)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status: 2 where there is no GPU."""
    try:
        from kvtier.copy.cuda_cupy import CupyRuntime  # noqa: PLC0415 - only where there is CuPy

        runtime = CupyRuntime(args.device)
    except (ImportError, RuntimeError) as error:
        print(f"nothing was measured: there is no GPU, or no CuPy ({error})", file=sys.stderr)
        return 2
    with GpuBench(runtime, rounds=args.rounds) as bench:
        print("\n".join(bench.table.lines()))
        records = [*bench.copies(), *bench.both_at_once(), *bench.gather(), *beside_a_matrix_product(bench)]
    publish(f"kvtier bench gpu, compute capability {runtime.capability / 10}", records, args.json)
    return 0


Cases = dict[str, Sequence[Callable[[], DeviceEvent]]]
"""name -> what is submitted at once"""


@dataclass(frozen=True, slots=True)
class _Work:
    """Blocks of one piece size, bound to all ways."""

    bound: Bound
    """of loads"""
    batch: Batch
    submit: dict[tuple[Direction, Way], Callable[[], DeviceEvent]]

    @property
    def num_bytes(self) -> int:
        return len(self.batch) * self.bound.block_bytes


class GpuBench:
    """One device, its memory and the figures; closes what it opened."""

    def __init__(
        self, runtime: CudaRuntime, *, rounds: int, total_bytes: int = TOTAL_BYTES, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.runtime = runtime
        self._rounds = rounds
        self._total = total_bytes
        self._clock = clock
        self._settings = CopySettings()
        self._stack = contextlib.ExitStack()
        self.table = calibrate(runtime, self._settings, piece_sizes=PIECE_BYTES, total_bytes=min(16 << 20, total_bytes), clock=clock)
        self._device = self._stack.enter_context(contextlib.closing(runtime.allocate(2 * total_bytes)))
        self._host = np.random.default_rng(1).integers(0, 256, 2 * total_bytes, dtype=np.uint8)
        self._stack.enter_context(contextlib.closing(runtime.register(self._host.ctypes.data, len(self._host))))
        self._staging = self._stack.enter_context(contextlib.closing(Staging(runtime, self._settings)))
        self._lanes: dict[Direction, Lane] = open_lanes(runtime)
        self._engine = runtime.open_stream(is_urgent=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def copies(self) -> Iterator[Record]:
        """Each direction, piece size and way, and the way that would be chosen, against one large copy."""
        for piece_bytes in PIECE_BYTES:
            with self._work(piece_bytes) as work:
                for direction in DIRECTIONS:
                    cases: Cases = {"limit": [functools.partial(self._large, direction)]}
                    cases |= {way.value: [submit] for (each, way), submit in work.submit.items() if each == direction}
                    rates = self._rates(cases, work.num_bytes)
                    chosen = self.table.choose(direction, piece_bytes)
                    limit = statistics.median(rates["limit"])
                    params: dict[str, object] = {"piece_bytes": piece_bytes}
                    yield _record(ARROWS[direction], {**params, "way": f"chosen: {chosen.value}"}, rates[chosen.value], limit)
                    for name in (name for name in rates if name != "limit"):
                        yield _record(f"{ARROWS[direction]}, one way", {**params, "way": name}, rates[name], limit)

    def both_at_once(self) -> Iterator[Record]:
        """Loads and stores together, each the way that would be chosen, against two large copies at once."""
        for piece_bytes in PIECE_BYTES:
            with self._work(piece_bytes) as work:
                ways = {direction: work.submit[direction, self.table.choose(direction, piece_bytes)] for direction in DIRECTIONS}
                cases: Cases = {
                    "limit": [functools.partial(self._large, direction) for direction in DIRECTIONS],
                    "both": [ways[direction] for direction in DIRECTIONS],
                }
                rates = self._rates(cases, 2 * work.num_bytes)
                params = {"piece_bytes": piece_bytes, "target_gb_per_s": BOTH_LIMIT}
                yield _record("both directions at once", params, rates["both"], statistics.median(rates["limit"]))

    def gather(self) -> Iterator[Record]:
        """Pages into contiguous memory on the device, as into a pool there, against a copy of as many bytes on the device."""
        for piece_bytes in PIECE_BYTES:
            with self._work(piece_bytes) as work:
                bound = replace(
                    work.bound,
                    settings=CopySettings(num_blocks=DEVICE_BLOCKS),
                    arena_address=self._device.address + self._total,
                    is_on_device=True,
                )
                gather = functools.partial(self._submit, DirectCopies(bound), work.batch, "store")
                cases: Cases = {"limit": [self._on_device], "gather": [gather]}
                rates = self._rates(cases, work.num_bytes)
                yield _record("gather on the device", {"piece_bytes": piece_bytes}, rates["gather"], statistics.median(rates["limit"]))

    def load_once(self) -> DeviceEvent:
        """One load of Llama-sized pieces, the way that would be chosen; for measuring what it costs others."""
        if self._streaming is None:
            self._streaming = self._stack.enter_context(self._work(32 << 10))
        return self._streaming.submit["load", self.table.choose("load", 32 << 10)]()

    _streaming: _Work | None = None

    @contextlib.contextmanager
    def _work(self, piece_bytes: int) -> Iterator[_Work]:
        """Loads into the first half of the device's memory, stores from the second, so that both may run at once."""
        num_blocks = self._total // (PIECES_PER_BLOCK * piece_bytes)
        block_ids = np.random.default_rng(2).permutation(num_blocks).astype(np.int64)
        batch = Batch(block_ids, np.arange(num_blocks, dtype=np.int64) * (PIECES_PER_BLOCK * piece_bytes))
        bounds: dict[Direction, Bound] = {}
        submit: dict[tuple[Direction, Way], Callable[[], DeviceEvent]] = {}
        with contextlib.ExitStack() as stack:
            for direction in DIRECTIONS:
                first = self._first(direction)
                places = [self._device.address + first + index * num_blocks * piece_bytes for index in range(PIECES_PER_BLOCK)]
                segments = [Segment(place, piece_bytes, piece_bytes) for place in places]
                memory, table = upload_segments(segments, self.runtime, self._lanes["load"].transfer)
                stack.enter_context(contextlib.closing(memory))
                bounds[direction] = Bound(self.runtime, self._settings, self._lanes, table, self._host.ctypes.data + first)
                for way, copies in bind_ways(bounds[direction], self._staging)[0].items():
                    submit[direction, way] = functools.partial(self._submit, copies, batch, direction)
            yield _Work(bounds["load"], batch, submit)

    def _submit(self, copies: CopyWay, batch: Batch, direction: Direction) -> DeviceEvent:
        return copies.submit(batch, direction, self.runtime.record(self._engine))

    def _first(self, direction: Direction) -> int:
        return 0 if direction == "load" else self._total

    def _rates(self, cases: Cases, num_bytes: int) -> dict[str, list[float]]:
        """GB/s of each case in each round; all cases by turns, the first round not counted."""
        rates: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(self._rounds + 1):
            for name, submits in cases.items():
                start = self._clock()
                events = [submit() for submit in submits]
                for event in events:
                    event.wait()
                if number:
                    rates[name].append(num_bytes / (self._clock() - start) / 1e9)
        return rates

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


def beside_a_matrix_product(bench: GpuBench, *, size: int = 8192, products: int = 20, rounds: int = 7) -> Iterator[Record]:
    """What a running matrix product loses while a load streams. Only where torch is installed with CUDA."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch  # noqa: PLC0415 - only here, and only where it is

    if not torch.cuda.is_available():
        return
    left, right = (torch.randn((size, size), device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def seconds(*, is_loading: bool) -> float:
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        running = [bench.load_once() for _ in range(4)] if is_loading else []
        start.record()
        for _ in range(products):
            torch.mm(left, right)
            if running and running[0].done():
                running = [*running[1:], bench.load_once()]
        end.record()
        end.synchronize()
        for event in running:
            event.wait()
        return float(start.elapsed_time(end)) / 1e3

    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for is_loading in (False, True):
            elapsed = seconds(is_loading=is_loading)
            if number:
                times[is_loading].append(elapsed)
    ratios = [with_load / alone for with_load, alone in zip(times[True], times[False], strict=True)]
    value = statistics.median(ratios)
    yield Record(
        "matrix product beside a load", {"size": size, "dtype": "bf16"}, value, "ratio", max(ratios) - min(ratios), 1.02, value / 1.02
    )


def _record(name: str, params: dict[str, Any], rates: Sequence[float], limit: float) -> Record:
    values = sorted(rates)
    spread = values[(3 * len(values)) // 4] - values[len(values) // 4] if len(values) > 3 else 0.0
    value = statistics.median(values)
    return Record(name, params, value, "GB/s", spread, limit, value / limit)
