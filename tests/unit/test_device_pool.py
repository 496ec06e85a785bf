"""The pool in device memory: blocks pass through it and stay; the bytes are right whichever way they come. On CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.connectors.jobs import LoadJob
from kvtier.connectors.messages import MoveJob
from kvtier.copy.base import BlockCopy, CopyEvent
from kvtier.copy.cuda_copier import ArenaPlace, CudaCopier
from kvtier.copy.pool import PoolCopier
from kvtier.copy.torch_copier import TorchCopier
from kvtier.hashing import Namespace
from kvtier.layout import KVLayout, Segment
from kvtier.testing.fake_system import FakeSystem, FakeSystemOptions
from kvtier.testing.simulated_cuda import SimulatedCuda

PROMPT = list(range(40))
NUM_BLOCKS = 8
SIZES = (24, 40)
BLOCK_BYTES = sum(SIZES)


@pytest.fixture(params=[1, 2], ids=["one engine block a slot", "two"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeSystem]:
    """A system with a pool that holds a prompt."""
    options = FakeSystemOptions(device_slots=10, blocks_per_slot=request.param, token_budget=64)
    system = FakeSystem(tmp_path, Namespace(model="pool"), options)
    yield system
    assert [] == system.problems()
    system.close()


def ask(system: FakeSystem, name: str) -> int:
    """Puts the prompt; how many of its tokens were computed."""
    request = system.engine.submit(name, PROMPT)
    system.settle()
    return request.num_forward_tokens


def test_a_hit_comes_from_the_pool(system: FakeSystem) -> None:
    """What was just stored is read from the pool: host memory is not read at all."""
    assert len(PROMPT) <= ask(system, "first")
    system.arena.buffer[:] = bytes(len(system.arena.buffer))  # whoever reads host memory now computes nonsense
    assert len(PROMPT) > ask(system, "again")
    assert system.cache.stats["gpu.loaded_blocks"] > 0
    assert 0 == system.cache.stats["host.loaded_blocks"]


def test_what_left_the_pool_comes_from_host_memory_and_back(system: FakeSystem) -> None:
    """Other prompts take the slots; the first one is then loaded from host memory, and the next time from the pool."""
    ask(system, "first")
    for number in range(3):
        system.engine.submit(f"other {number}", [100 + number, *PROMPT[:15]])
        system.settle()
    assert system.cache.stats["gpu.evicted_blocks"] > 0
    system.cache.stats.since({})
    before = system.cache.stats["host.loaded_blocks"]
    assert len(PROMPT) > ask(system, "again")
    assert system.cache.stats["host.loaded_blocks"] > before
    from_pool = system.cache.stats["gpu.loaded_blocks"]
    assert len(PROMPT) > ask(system, "once more")
    assert system.cache.stats["gpu.loaded_blocks"] > from_pool


def test_a_reset_empties_the_pool(system: FakeSystem) -> None:
    """After new weights nothing of the old ones is found, in no tier."""
    ask(system, "first")
    assert system.engine.reset(new_weights=True)
    assert 0 == system.cache.num_blocks()["gpu"]
    assert len(PROMPT) <= ask(system, "again")


@pytest.mark.parametrize(("first", "count", "expected"), [(0, 4, set()), (1, 3, {0}), (0, 3, {1}), (1, 1, {0}), (1, 2, {0, 1})])
def test_slots_of_which_a_part_was_copied(first: int, count: int, expected: set[int]) -> None:
    """Two engine blocks a slot: a load may begin and end in the middle of one, and then the pool has only a part of it."""
    move = MoveJob(1, "r", tuple(range(count)), (0, 1), (0, 0), first)
    assert expected == LoadJob(move, is_async=False, first_block=0, remaining=1).partial_slots(2)


class Rig:
    """Engine tensors, an arena and a pool, each block filled with its number."""

    def __init__(self) -> None:
        self.tensors = [torch.arange(NUM_BLOCKS, dtype=torch.int8)[:, None].repeat(1, size) for size in SIZES]
        self.arena = bytearray(NUM_BLOCKS * BLOCK_BYTES)
        direct = TorchCopier(self.tensors, memoryview(self.arena))
        self.copier = PoolCopier.allocate(direct, self.tensors, memoryview(self.arena), NUM_BLOCKS * BLOCK_BYTES)

    def block(self, number: int) -> bytes:
        """What the engine's block holds."""
        return b"".join(bytes(tensor[number].tolist()) for tensor in self.tensors)


places = st.permutations(range(NUM_BLOCKS))


@given(blocks=places, slots=places, pool=places, count=st.integers(1, NUM_BLOCKS), pooled=st.lists(st.booleans(), min_size=8, max_size=8))
def test_bytes_arrive_by_every_way(blocks: list[int], slots: list[int], pool: list[int], count: int, pooled: list[bool]) -> None:
    """Stored through the pool or past it, loaded from the arena or from the pool: each block gets its own bytes."""
    rig = Rig()
    copies = [
        BlockCopy(blocks[index], slots[index] * BLOCK_BYTES, pool[index] * BLOCK_BYTES if pooled[index] else -1) for index in range(count)
    ]
    rig.copier.gather(copies).wait()
    for copy in copies:
        assert bytes([copy.block_id]) * BLOCK_BYTES == rig.arena[copy.arena_offset : copy.arena_offset + BLOCK_BYTES]
    for is_wiped in (False, True):
        for tensor in rig.tensors:
            tensor.fill_(-1)
        if is_wiped:
            rig.arena[:] = bytes(len(rig.arena))
        again = [
            BlockCopy(c.block_id, c.arena_offset, c.pool_offset, in_pool=is_wiped) for c in copies if c.pool_offset >= 0 or not is_wiped
        ]
        rig.copier.scatter(again).wait()
        for copy in again:
            assert bytes([copy.block_id]) * BLOCK_BYTES == rig.block(copy.block_id)


def test_offsets_outside_are_refused() -> None:
    """An offset outside the pool or the arena is an error, not a copy of something else."""
    rig = Rig()
    for copy in (
        BlockCopy(0, 0, NUM_BLOCKS * BLOCK_BYTES),
        BlockCopy(0, NUM_BLOCKS * BLOCK_BYTES, 0),
        BlockCopy(0, -2 * BLOCK_BYTES, 0),
    ):
        with pytest.raises(IndexError):
            rig.copier.gather([copy])


class SlowBus:
    """In place of the stream from the pool to the arena: what is submitted has not arrived yet."""

    def after(self, event: CopyEvent | None) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def event(self) -> SlowBus:
        return self

    def done(self) -> bool:
        return False

    def released(self) -> bool:
        return False


def test_a_store_gives_the_blocks_of_the_engine_back_before_it_has_crossed_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered into the pool no longer reads the engine's blocks, however long the way to the arena takes."""
    rig = Rig()
    monkeypatch.setattr(rig.copier, "_out", SlowBus())
    event = rig.copier.gather([BlockCopy(0, 0, 0)])
    assert (True, False) == (event.released(), event.done())


def test_the_engine_does_not_wait_for_the_bus() -> None:
    """A scatter from the pool is ordered behind the run into the pool on that run's own stream; the compute stream goes on."""
    log: list[str] = []

    class Stream:
        @contextlib.contextmanager
        def after(self, event: CopyEvent | None) -> Iterator[None]:
            log.append("enter")
            yield
            log.append("leave")

        def event(self) -> CopyEvent:
            raise AssertionError("the engine would be made to wait for this")

    class Within(TorchCopier):
        def scatter(self, copies):  # type: ignore[no-untyped-def]
            log.append("scatter")
            return super().scatter(copies)

    pages, arena, pool = torch.zeros(NUM_BLOCKS, 16, dtype=torch.int8), bytearray(range(64)), torch.zeros(64, dtype=torch.int8)
    within = Within([pages], pool)
    copier = PoolCopier(TorchCopier([pages], memoryview(arena)), within, memoryview(arena), pool, block_bytes=16)
    copier._in = Stream()  # type: ignore[assignment]
    copier.scatter([BlockCopy(3, 32, pool_offset=16), BlockCopy(5, 0, pool_offset=16, in_pool=True)]).wait()
    assert ["enter", "scatter", "leave"] == log
    assert 2 * [list(range(32, 48))] == [pages[3].tolist(), pages[5].tolist()]


def test_the_pool_gives_back_what_its_kernels_took() -> None:
    """The copier between the engine and the pool is the pool's own, and is closed with it; the one across the bus is not."""
    device = SimulatedCuda()
    pages, arena = torch.zeros(NUM_BLOCKS, 16, dtype=torch.int8), bytearray(NUM_BLOCKS * 16)
    layout = KVLayout((Segment(pages.data_ptr(), 16, 16),), NUM_BLOCKS)
    place = ArenaPlace(torch.frombuffer(arena, dtype=torch.int8).data_ptr(), len(arena))
    direct = CudaCopier(layout, device, place, compute_stream=lambda: device.compute)
    free_bytes, num_streams = device.free_bytes, len(device.streams)
    copier = PoolCopier.allocate(direct, [pages], memoryview(arena), NUM_BLOCKS * 16)
    assert device.free_bytes < free_bytes
    copier.scatter([BlockCopy(0, 0, pool_offset=16)]).wait()
    for _ in range(2):
        copier.close()
    assert device.free_bytes == free_bytes
    assert set(range(num_streams, len(device.streams))) == device.closed_streams
    direct.close()
