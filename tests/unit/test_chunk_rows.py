"""Chunks out of slots, a layer at a time: read by the CPU, and copied ahead of the computation on a simulated device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.connectors.chunk_rows import LAYERS_AHEAD, ArenaReads, DeviceReads, RowShape
from kvtier.connectors.messages import ScheduledRequest, WorkerReport
from kvtier.copy.base import CopyEvent
from kvtier.copy.cuda_copier import ArenaPlace, CopierOptions, CudaCopier, DeviceCopyEvent
from kvtier.copy.cuda_rows import RowPlacement
from kvtier.copy.cuda_runs import Addresses, Ints
from kvtier.copy.cuda_ways import CopySettings
from kvtier.copy.rope import Pairs, Storage
from kvtier.layout import KVLayout, Segment
from kvtier.memory.arena import Arena
from kvtier.memory.arena_file import PAGE_BYTES
from kvtier.testing.simulated_cuda import RaceError, SimulatedCuda
from tests.cuda_on_cpu import KernelsOnCpu

from .blend_system import LAYERS, SYSTEM, System, begun_blend, document, joined

CPU = torch.device("cpu")
NUM_SLOTS = 24


def copier_of(device: SimulatedCuda, arena: Arena) -> CudaCopier:
    """Over a page of no interest."""
    page = device.allocate(PAGE_BYTES)
    layout = KVLayout((Segment(page.address, PAGE_BYTES, PAGE_BYTES),), 1)
    place = ArenaPlace(arena.address, arena.capacity_bytes)
    options = CopierOptions(CopySettings(slice_bytes=64 << 10))
    return CudaCopier(layout, device, place, compute_stream=lambda: device.compute, options=options)


@contextmanager
def filled_arena(directory: Path, seed: int = 3) -> Iterator[Arena]:
    """Slots of random bytes."""
    with Arena.open(str(directory / "rows"), NUM_SLOTS * PAGE_BYTES, huge_pages=False) as arena:
        arena.unlink()
        arena.buffer[:] = random.Random(seed).randbytes(NUM_SLOTS * PAGE_BYTES)
        yield arena


def read_deferred(device: SimulatedCuda, reads: DeviceReads, shape: RowShape) -> list[bytes]:
    """What the computation sees of each layer, though the device does nothing before it must."""
    seen: list[bytes] = []
    for index in range(shape.num_layers):
        rows = reads.layer(index)
        start = rows.data_ptr()

        def look(rows: torch.Tensor = rows) -> None:
            seen.append(rows.numpy().tobytes())

        device.submit("compute", device.compute, look, reads=[(start, start + rows.numel() * rows.itemsize)])
    reads.end()
    device.finish()
    return seen


@given(
    st.integers(1, 7),
    st.lists(st.integers(0, NUM_SLOTS - 4), min_size=1, max_size=9),
    st.sampled_from([(1, 4, 8), (3, 5, 6)]),
    st.integers(0, 99),
)
def test_layers_arrive_before_they_are_computed(
    tmp_path_factory: pytest.TempPathFactory, num_layers: int, slots: list[int], sizes: tuple[int, int, int], seed: int
) -> None:
    """Every layer is seen whole, in whatever order streams are served; none is overwritten before it was read."""
    heads, block_tokens, head_dim = sizes
    shape = RowShape(num_layers, heads, block_tokens, head_dim, torch.float16, first_byte=32)
    with filled_arena(tmp_path_factory.getbasetemp(), seed) as arena:
        device = SimulatedCuda(seed=seed)
        seen = read_deferred(device, DeviceReads(copier_of(device, arena), shape, slots, CPU), shape)
        plain = ArenaReads(arena, shape, slots, CPU)
        assert [plain.layer(index).numpy().tobytes() for index in range(num_layers)] == seen
        slot = slots[0] * PAGE_BYTES + 32
        assert bytes(arena.buffer[slot : slot + shape.layer_bytes]) == seen[0][: shape.layer_bytes]
        plain.end()


def test_layers_are_read_ahead(tmp_path: Path) -> None:
    """When a layer is asked for, the next ones have been submitted."""
    shape = RowShape(8, 1, 4, 8, torch.float16)
    with filled_arena(tmp_path) as arena:
        device = SimulatedCuda()
        copier = copier_of(device, arena)
        before = len(device.log)
        reads = DeviceReads(copier, shape, [1, 5], CPU)
        counts = []
        for index in range(8):
            reads.layer(index)
            counts.append(len(device.log) - before)
        reads.end()
        device.finish()
    assert [min(8, index + LAYERS_AHEAD + max(1, min(index, 1))) for index in range(8)] == counts


class _WithoutOrder(DeviceCopyEvent):
    def order_compute(self) -> None:
        """Nothing is ordered."""


def test_missing_order_is_seen(tmp_path: Path) -> None:
    """The rig notices a computation that does not wait for its layer, and one whose layer is overwritten too early."""
    shape = RowShape(6, 1, 4, 8, torch.float16)
    with filled_arena(tmp_path) as arena:
        device = SimulatedCuda()
        reads = DeviceReads(copier_of(device, arena), shape, [1, 5], CPU)
        reads._events = [_WithoutOrder(event._event, device, lambda: device.compute) for event in reads._events]  # type: ignore[attr-defined]
        with pytest.raises(RaceError):
            read_deferred(device, reads, shape)
        device = SimulatedCuda()
        copier = copier_of(device, arena)
        reads = DeviceReads(copier, shape, [1, 5], CPU)
        elsewhere = device.open_stream(is_urgent=False)
        copier._compute_stream = lambda: elsewhere
        with pytest.raises(RaceError):
            read_deferred(device, reads, shape)


class _Failing:
    """Rows of which one copy cannot be begun, or is not waited for."""

    def __init__(self, copier: CudaCopier, number: int, *, at_once: bool) -> None:
        self._copier = copier
        self._left = number
        self._at_once = at_once
        self.num_copies = 0

    def read_pieces(self, to: Addresses, offsets: Ints, num_bytes: int) -> CopyEvent:
        self.num_copies += 1
        self._left -= 1
        if not self._left and self._at_once:
            raise RuntimeError("injected")
        event = self._copier.read_pieces(to, offsets, num_bytes)
        if not self._left:
            event.order_compute = self._fail  # type: ignore[method-assign]
        return event

    def place_rows(self, place: RowPlacement, *, pairs: Pairs, storage: Storage) -> None:
        raise AssertionError

    def _fail(self) -> None:
        raise RuntimeError("injected")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("number", range(1, 7))
def test_a_copy_that_fails_is_told_when_nobody_waits(tmp_path: Path, number: int, at_once: bool) -> None:
    """Layers are given as if nothing was, since other ranks compute them too; nothing more is copied, and the error comes with the end."""
    shape = RowShape(6, 1, 4, 8, torch.float16)
    with filled_arena(tmp_path) as arena:
        device = SimulatedCuda()
        mover = _Failing(copier_of(device, arena), number, at_once=at_once)
        reads = DeviceReads(mover, shape, [1, 5], CPU)
        for index in range(6):
            assert (2, *shape.of_layer) == reads.layer(index).shape
        for tell in (reads.rest, reads.end):
            with pytest.raises(RuntimeError, match="injected"):
                tell()
        device.finish()
        assert (number if at_once else max(LAYERS_AHEAD + 1, min(6, number + LAYERS_AHEAD))) == mover.num_copies


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 8), (NUM_SLOTS * PAGE_BYTES - 7, 8), (0, -1)])
def test_pieces_outside_of_the_arena(tmp_path: Path, offset: int, num_bytes: int) -> None:
    """Are an error before anything is submitted."""
    with filled_arena(tmp_path) as arena:
        device = SimulatedCuda()
        copier = copier_of(device, arena)
        before = len(device.log)
        with pytest.raises(IndexError, match=f"{num_bytes} bytes"):
            copier.read_pieces(np.zeros(2, np.uint64), np.array([0, offset]), num_bytes)
        assert before == len(device.log)


class _Waiting:
    """Rows that are there and in place when the computation may begin, since torch on a CPU knows no streams."""

    def __init__(self, copier: CudaCopier, device: SimulatedCuda) -> None:
        self._copier = copier
        self._device = device
        self.num_placed = 0

    def read_pieces(self, to: Addresses, offsets: Ints, num_bytes: int) -> CopyEvent:
        event = self._copier.read_pieces(to, offsets, num_bytes)
        event.order_compute = event.wait  # type: ignore[method-assign]
        return event

    def place_rows(self, place: RowPlacement, *, pairs: Pairs, storage: Storage) -> None:
        self._copier.place_rows(place, pairs=pairs, storage=storage)
        self._device.record(self._device.compute).wait()
        self.num_placed += place.num_tokens


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelsOnCpu:
    return KernelsOnCpu(tmp_path_factory.mktemp("cuda_on_cpu"))


def simulated(kernels: KernelsOnCpu, seed: int = 0) -> SimulatedCuda:
    """A device that runs the kernels' own text."""
    return SimulatedCuda(seed=seed, kernels=lambda launch: kernels.place_rows(launch.kernel, launch.params))


def served_system(directory: Path) -> System:
    """Two documents are in the cache."""
    system = System(directory)
    tokens, spans = joined([document(1, 9), document(2, 8)], SYSTEM, [1, 2])
    system.serve("first", tokens, spans=spans)
    return system


def blend_order(system: System, method: str) -> tuple[list[int], WorkerReport, set[int]]:
    """The same documents in another order, put together; the engine blocks, and what became of it."""
    tokens, spans = joined([document(2, 8), document(1, 9)], SYSTEM, [1, 2])
    system.add("second", tokens, spans=spans, method=method, ratio=0.3)
    matched = system.half.match("second", len(tokens), 0)
    block_ids = system.blocks(len(tokens))
    assert matched.is_blended
    assert matched.num_tokens is not None
    system.half.allocated("second", block_ids, matched.num_tokens)
    message = system.half.build_step([ScheduledRequest("second", block_ids, len(tokens))])
    report = WorkerReport()
    unfilled = system.blend_steps.blend(message.blends, set(), report)
    system.finish(message, report)
    system.half.request_finished("second")
    while system.half.has_pending_work:
        system.step()
    return block_ids, report, unfilled


@pytest.mark.parametrize("method", ["none", "combined", "cacheblend", "epic"])
def test_blends_are_the_same_on_a_device(tmp_path: Path, method: str, kernels: KernelsOnCpu) -> None:
    """Bit for bit, whether the CPU reads the slots or the device's copy engines."""
    found = []
    for name in ("cpu", "device"):
        (tmp_path / name).mkdir()
        system = served_system(tmp_path / name)
        if name == "device":
            device = simulated(kernels)
            rows = _Waiting(copier_of(device, system.arena), device)
            system.blend_steps.attach(system.arena, "", rows)
        block_ids, report, unfilled = blend_order(system, method)
        assert not unfilled
        assert not report.failed
        kv = system.memory.part(0, 20, block_ids)
        found.append((kv.keys.numpy().tobytes(), kv.values.numpy().tobytes()))
        system.close()
    assert found[0] == found[1]
    assert LAYERS * 17 == rows.num_placed


def test_nothing_is_read_between_two_steps(tmp_path: Path, kernels: KernelsOnCpu) -> None:
    """Of a blend that is spread over them: the arena may go away. What was brought stays."""
    system = System(tmp_path)
    message, _ = begun_blend(system, num_computed_tokens=0)
    (whole,) = message.blends
    for seed in range(10):  # in which order the device happens to work
        device = simulated(kernels, seed)
        system.blend_steps.attach(system.arena, "", _Waiting(copier_of(device, system.arena), device))
        report = WorkerReport()
        num_steps = 0
        while not report.done:
            system.blend_steps.blend([] if num_steps else [replace(whole, is_spread=True)], set(), report, share_tokens=1)
            assert not any(queue.waiting for queue in device.streams)
            num_steps += 1
        assert num_steps > LAYERS
        assert not report.failed
    system.finish(message, report)
    system.half.request_finished("second")
    system.close()


@pytest.mark.parametrize("fail_at", range(6))
def test_what_cannot_be_submitted_fails_its_blend(tmp_path: Path, fail_at: int, kernels: KernelsOnCpu) -> None:
    """The blocks count as unfilled, nothing runs any more, and the next one succeeds."""
    system = served_system(tmp_path)
    device = simulated(kernels)
    system.blend_steps.attach(system.arena, "", _Waiting(copier_of(device, system.arena), device))
    device.fail_at = len(device.log) + fail_at
    block_ids, report, unfilled = blend_order(system, "combined")
    if fail_at < 2 * LAYERS:  # a copy and a kernel each
        assert set(block_ids[:5]) == unfilled
        assert report.failed
    else:
        assert not unfilled
    assert not any(queue.waiting for queue in device.streams)
    system.close()


def test_nothing_runs_behind_a_blend_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots' leases end with it."""
    system = served_system(tmp_path)
    device = SimulatedCuda(kernels=lambda launch: None)
    system.blend_steps.attach(system.arena, "", _Waiting(copier_of(device, system.arena), device))

    def fail(*_: object) -> None:
        raise ValueError("a model that cannot")

    monkeypatch.setattr(system.model, "project", fail)
    _, report, unfilled = blend_order(system, "none")
    assert unfilled
    assert report.failed
    assert not any(queue.waiting for queue in device.streams)
    system.close()


@pytest.mark.parametrize("when", ["before", "while it is read"])
def test_a_slot_that_changes_hands_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Nothing is computed of one that is lost before, and nothing is written of one that is lost meanwhile."""
    system = served_system(tmp_path)
    project = system.model.project
    before = system.model.num_embedded

    def take(*args: Any) -> Any:
        system.arena.bump(taken)
        return project(*args)

    taken = next(slot for slot in range(NUM_SLOTS) if int(system.arena.generations[slot]))
    if when == "before":
        monkeypatch.setattr(system.blend_steps, "blend", _bumping(system, taken))
    else:
        monkeypatch.setattr(system.model, "project", take)
    block_ids, report, unfilled = blend_order(system, "none")
    assert set(block_ids[:5]) == unfilled
    assert report.failed
    assert (when == "before") == (before == system.model.num_embedded)
    assert bool(torch.isnan(system.memory.part(0, 20, block_ids).keys).all())


def _bumping(system: System, slot: int) -> Any:
    blend = system.blend_steps.blend

    def bump(*args: Any) -> set[int]:
        system.arena.bump(slot)
        return blend(*args)

    return bump
