"""A CUDA device in memory of the CPU, as unkind as the real one may be: nothing happens before it must, and streams overtake each other.

Everything that is submitted is put off until somebody waits; then the streams are served in a random order that keeps only what
``record`` and ``wait`` promise. Beside that every operation is checked, whatever order came out: two that touch the same bytes, one of
them writing, must be ordered by streams, events and the host's waiting. If they are not, that is a :class:`RaceError`, on every run.

Kernels are played by their twin in numpy.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtier.copy.cuda_params import PAGED_COPY, SEGMENT, Record
from kvtier.copy.cuda_runs import Addresses, Ints, runs_of
from kvtier.copy.cuda_runtime import DeviceEvent, Launch

Ranges = Sequence[tuple[int, int]]
"""first address and the one behind the last"""

HOST = -1
"""the host's own place among the clocks"""


class RaceError(AssertionError):
    """Two accesses to the same bytes that nothing orders."""


@dataclass(slots=True)
class _Operation:
    name: str
    stream: int
    number: int
    """position among all operations of the stream"""
    seen: dict[int, int]
    """stream -> the last operation of it that is over before this one starts"""
    run: Callable[[], None]
    reads: Ranges = ()
    writes: Ranges = ()
    is_over: bool = False


@dataclass(slots=True)
class _Stream:
    clock: dict[int, int] = field(default_factory=dict)
    waiting: deque[_Operation] = field(default_factory=deque)
    awaited: list[tuple[int, SimulatedEvent]] = field(default_factory=list)
    """(number of the first operation that waits, event)"""
    num_submitted: int = 0


class SimulatedEvent:
    """A point in the work of a simulated stream."""

    def __init__(self, device: SimulatedCuda, stream: int, number: int, clock: dict[int, int]) -> None:
        self.device = device
        self.stream = stream
        self.number = number
        self.clock = clock

    @property
    def is_over(self) -> bool:
        """Whether all operations up to it have run."""
        queue = self.device.streams[self.stream].waiting
        return not queue or queue[0].number > self.number

    def done(self) -> bool:
        """Whether it is over; lets the device do at most one operation, anywhere."""
        self.device.do_one()
        if self.is_over:
            self.device.host_saw(self.clock)
        return self.is_over

    def wait(self) -> None:
        """Lets the device work until it is over."""
        while not self.is_over:
            self.device.do_one()
        self.device.host_saw(self.clock)


class SimulatedMemory:
    """Memory of the device, or of the host that it knows."""

    def __init__(self, address: int, room: Any = None, on_close: Callable[[], None] | None = None) -> None:
        self.address = address
        self.room = room
        self._on_close = on_close

    def close(self) -> None:
        """Idempotent."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()


class SimulatedCuda:
    """A :class:`~kvtier.copy.cuda_runtime.CudaRuntime` without a device.

    Args:
        capability: 10 * major + minor
        memory_bytes: what can be allocated
        seed: of the order in which streams are served
        fail_at: number of the operation whose submission fails, counted from 0; None for none
        kernels: what plays the kernels other than the copies; nothing is known of the bytes that these touch
    """

    def __init__(
        self,
        *,
        capability: int = 90,
        memory_bytes: int = 1 << 30,
        seed: int = 0,
        fail_at: int | None = None,
        kernels: Callable[[Launch], None] | None = None,
    ) -> None:
        self.capability = capability
        self.reads_host_memory = True
        self.free_bytes = memory_bytes
        self.streams: list[_Stream] = []
        self.urgent_streams: set[int] = set()
        self.closed_streams: set[int] = set()
        self.log: list[_Operation] = []
        """all operations ever submitted, in that order"""
        self.fail_at = fail_at
        self._kernels = kernels
        self._random = random.Random(seed)
        self._host_clock: dict[int, int] = {}
        self.compute = self.open_stream(is_urgent=False)
        """the engine's stream"""

    def open_stream(self, *, is_urgent: bool) -> int:
        self.streams.append(_Stream())
        number = len(self.streams) - 1
        if is_urgent:
            self.urgent_streams.add(number)
        return number

    def close_stream(self, stream: int) -> None:
        assert stream not in self.closed_streams, f"stream {stream} was closed already"
        self.closed_streams.add(stream)

    def allocate(self, num_bytes: int) -> SimulatedMemory:
        if num_bytes > self.free_bytes:
            raise MemoryError(f"{self.free_bytes} bytes are free on the device")
        room = np.full(num_bytes + 256, 0xDB, np.uint8)
        self.free_bytes -= num_bytes

        def give_back() -> None:
            self.free_bytes += num_bytes

        return SimulatedMemory(-(-room.ctypes.data // 256) * 256, room, give_back)

    def register(self, address: int, num_bytes: int) -> SimulatedMemory:
        return SimulatedMemory(address)

    def record(self, stream: int) -> SimulatedEvent:
        queue = self._open(stream)
        return SimulatedEvent(self, stream, queue.num_submitted, dict(queue.clock))

    def wait(self, stream: int, event: DeviceEvent) -> None:
        assert isinstance(event, SimulatedEvent)
        queue = self._open(stream)
        queue.awaited.append((queue.num_submitted + 1, event))
        _merge(queue.clock, event.clock)

    def copy(self, stream: int, to: Addresses, source: Addresses, num_bytes: Ints) -> None:
        runs = list(zip(to.tolist(), source.tolist(), num_bytes.tolist(), strict=True))
        reads = [(begin, begin + length) for _, begin, length in runs]
        writes = [(begin, begin + length) for begin, _, length in runs]
        self.submit("copy", stream, lambda: _move(runs), reads, writes)

    def launch(self, stream: int, launch: Launch) -> None:
        play = self._kernels
        if PAGED_COPY != launch.params.dtype and play is not None:
            self.submit(launch.kernel, stream, lambda: play(launch))
            return
        assert PAGED_COPY == launch.params.dtype
        paged, contiguous = _sides(launch.params[0])
        to_paged = bool(launch.params[0]["to_paged"])
        to, source = (paged, contiguous) if to_paged else (contiguous, paged)
        runs = [(left[0], right[0], left[1] - left[0]) for left, right in zip(to, source, strict=True)]
        self.submit(launch.kernel, stream, lambda: _move(runs), source, to)

    # ---- for the test --------------------------------------------------------------------------------------------

    def submit(self, name: str, stream: int, run: Callable[[], None], reads: Ranges = (), writes: Ranges = ()) -> None:
        """Puts any operation into a stream: for example what an engine computes.

        Raises:
            RaceError: it touches bytes that another one touches at the same time.
            RuntimeError: this is the one that was asked to fail.
        """
        if self.fail_at == len(self.log):
            raise RuntimeError(f"{name} could not be submitted")
        queue = self._open(stream)
        queue.num_submitted += 1
        _merge(queue.clock, self._host_clock)
        operation = _Operation(name, stream, queue.num_submitted, dict(queue.clock), run, reads, writes)
        self._check(operation)
        queue.clock[stream] = queue.num_submitted
        queue.waiting.append(operation)
        self.log.append(operation)

    def host_access(self, name: str, *, reads: Ranges = (), writes: Ranges = ()) -> None:
        """The host touches memory now. Raises RaceError where the device may still do so."""
        self._check(_Operation(name, HOST, 0, self._host_clock, _nothing, reads, writes))

    def do_one(self) -> None:
        """Runs one operation of a random stream whose turn it may be."""
        ready = [queue for queue in self.streams if queue.waiting and self._is_ready(queue)]
        if not ready:
            if any(queue.waiting for queue in self.streams):
                raise RaceError("every stream waits for another one: a deadlock")
            return
        operation = self._random.choice(ready).waiting.popleft()
        operation.run()
        operation.is_over = True

    def finish(self) -> None:
        """Runs everything."""
        while any(queue.waiting for queue in self.streams):
            self.do_one()

    def host_saw(self, clock: dict[int, int]) -> None:
        """The host knows that everything up to ``clock`` is over."""
        _merge(self._host_clock, clock)

    def _open(self, stream: int) -> _Stream:
        assert stream not in self.closed_streams, f"stream {stream} is closed"
        return self.streams[stream]

    def _is_ready(self, queue: _Stream) -> bool:
        return all(event.is_over for number, event in queue.awaited if number <= queue.waiting[0].number)

    def _check(self, operation: _Operation) -> None:
        for other in self.log:
            if other.stream == operation.stream or operation.seen.get(other.stream, 0) >= other.number:
                continue
            conflicts = ((operation.writes, (*other.reads, *other.writes)), (operation.reads, other.writes))
            if any(_overlap(mine, theirs) for mine, theirs in conflicts):
                raise RaceError(f"{operation.name} on stream {operation.stream} does not wait for {other.name} on stream {other.stream}")


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def _overlap(left: Ranges, right: Ranges) -> bool:
    if not left or not right:
        return False
    mine, theirs = np.array(left, np.uint64), np.array(right, np.uint64)
    return bool(((mine[:, None, 0] < theirs[None, :, 1]) & (theirs[None, :, 0] < mine[:, None, 1])).any())


def _move(runs: Sequence[tuple[int, int, int]]) -> None:
    for to, source, num_bytes in runs:
        ctypes.memmove(to, source, num_bytes)


def _sides(params: np.void) -> tuple[Ranges, Ranges]:
    """The bytes of a launch of a copy kernel, in pages and in contiguous memory."""
    count, num_blocks = int(params["num_segments"]), int(params["num_blocks"])
    rows: Record = np.frombuffer(ctypes.string_at(int(params["segments"]), count * SEGMENT.itemsize), SEGMENT)
    runs = runs_of(rows, params["block_ids"][:num_blocks], params["offsets"][:num_blocks], int(params["contiguous"]))
    ends = runs.num_bytes.astype(np.uint64)
    return tuple(list(zip(side.tolist(), (side + ends).tolist(), strict=True)) for side in (runs.paged, runs.contiguous))  # type: ignore[return-value]


def _nothing() -> None:
    pass
