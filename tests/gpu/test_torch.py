"""What a worker of vLLM is given on a real GPU: memory that is pinned and let go of, every way, the pool, and torch alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="NOTHING WAS CHECKED ON A GPU: torch is not installed")

from kvtier.connectors.vllm.movers import movers_of  # noqa: E402 - only where there is torch
from kvtier.copy.base import BlockCopy, Movers  # noqa: E402 - only where there is torch
from kvtier.copy.cuda_batch import tolerate_captures  # noqa: E402 - only where there is torch
from kvtier.copy.pinning import pin_arena, unpin  # noqa: E402 - only where there is torch
from kvtier.copy.torch_copier import TorchCopier  # noqa: E402 - only where there is torch
from kvtier.layout import KVLayout, Segment  # noqa: E402 - only where there is torch
from kvtier.memory.arena import Arena  # noqa: E402 - only where there is torch

DEVICE = "cuda:0"
NUM_BLOCKS, SEGMENT_BYTES, NUM_SEGMENTS = 48, 8192, 4
BLOCK_BYTES = NUM_SEGMENTS * SEGMENT_BYTES
LAYERS = [range(2), range(2, 4)]


@pytest.fixture(scope="module", autouse=True)
def gpu_of_torch() -> None:
    if DEVICE != "cpu" and not torch.cuda.is_available():
        pytest.skip("NOTHING WAS CHECKED ON A GPU: torch sees none")


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.open(f"/dev/shm/kvtier-gpu-test-{os.getpid()}", 64 << 20, huge_pages=True)
    arena.unlink()
    arena.prefault()
    yield arena
    arena.close()


class Engine:
    """KV tensors, and what of them should be in the arena."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.tensors = [torch.zeros(NUM_BLOCKS, SEGMENT_BYTES, dtype=torch.int8, device=DEVICE) for _ in range(NUM_SEGMENTS)]
        self.layout = KVLayout(tuple(Segment(it.data_ptr(), SEGMENT_BYTES, SEGMENT_BYTES) for it in self.tensors), NUM_BLOCKS)
        order = torch.randperm(NUM_BLOCKS).tolist()
        self.copies = [BlockCopy(block, slot * BLOCK_BYTES) for slot, block in enumerate(order[:40])]

    def movers(self, way: str, *, layers: bool = False, pool_bytes: int = 0) -> Movers:
        settings: Any = SimpleNamespace(gpu_copy=way, copy_threads=1)
        return movers_of(self.arena, self.layout, self.tensors, layers=LAYERS if layers else None, pool_bytes=pool_bytes, settings=settings)

    def compute(self) -> None:
        """New KV, on the current stream, behind something that takes a while."""
        square = torch.rand(2048, 2048, device=DEVICE)
        for _ in range(10):
            square = square @ square.clamp(0, 1e-3)
        for tensor in self.tensors:
            tensor.copy_(torch.randint_like(tensor, -128, 128))

    def blocks(self) -> Any:
        """What is computed on now, behind everything on the current stream."""
        found = torch.cat(self.tensors, dim=1).cpu()
        return torch.stack([found[copy.block_id] for copy in self.copies])

    def slots(self) -> Any:
        """What the arena holds now."""
        stored = torch.frombuffer(bytearray(self.arena.buffer[: len(self.copies) * BLOCK_BYTES]), dtype=torch.int8)
        return stored.view(len(self.copies), BLOCK_BYTES)

    def erase(self) -> None:
        for tensor in self.tensors:
            tensor.fill_(7)

    def round_trip(self, movers: Movers, copies: list[BlockCopy], again: list[BlockCopy]) -> None:
        """Stores what was computed last, and loads it into blocks that were overwritten, without waiting on the host between."""
        assert movers.copier is not None
        for _ in range(5):
            self.compute()
            assert movers.copier is not None
            movers.copier.gather(copies).wait()
            expected = self.blocks()
            assert torch.equal(expected, self.slots())
            self.erase()
            movers.copier.scatter(again).order_compute()
            assert torch.equal(expected, self.blocks())
            if movers.storer is not None and movers.loader is not None:
                self.compute()
                store = movers.storer.gather_layers(copies)
                for layer in range(len(LAYERS)):
                    store.copy_layer(layer)
                store.end().wait()
                expected = self.blocks()
                assert torch.equal(expected, self.slots())
                self.erase()
                for event in movers.loader.scatter_layers(again):
                    event.order_compute()
                assert torch.equal(expected, self.blocks())


@pytest.mark.parametrize("in_pool", [False, True], ids=["from the arena", "from the pool"])
def test_blocks_come_back_through_the_pool(arena: Arena, in_pool: bool) -> None:
    """Stored through the pool, which has them still, or has other bytes by now."""
    engine = Engine(arena)
    movers = engine.movers("direct", pool_bytes=len(engine.copies) * BLOCK_BYTES)
    pooled = [BlockCopy(it.block_id, it.arena_offset, pool_offset=place * BLOCK_BYTES) for place, it in enumerate(engine.copies[::-1])]
    again = [BlockCopy(it.block_id, it.arena_offset, it.pool_offset, in_pool) for it in pooled]
    engine.round_trip(movers, pooled, again)
    movers.release()


def test_torch_alone(arena: Arena) -> None:
    """Where there is no CuPy; and from memory that is not pinned."""
    engine = Engine(arena)
    engine.round_trip(Movers(TorchCopier(engine.tensors, arena.buffer)), engine.copies, engine.copies)


def test_memory_that_is_pinned_already(arena: Arena) -> None:
    """CUDA refuses it; torch does not find the refusal at its next kernel."""
    assert pin_arena(arena, 0) == arena.ready_bytes
    assert 0 == pin_arena(arena, 0)
    assert [1.0] == torch.ones(1, device=DEVICE).tolist()
    assert unpin(arena.address, 0)


def test_what_a_thread_prepares_breaks_no_capture(arena: Arena) -> None:
    """A copier is made, used and closed on another thread while this one captures a CUDA graph."""
    engine = Engine(arena)
    problems: list[BaseException] = []
    is_capturing, is_over = threading.Event(), threading.Event()

    def prepare() -> None:
        try:
            assert tolerate_captures()
            is_capturing.wait(20)
            with torch.cuda.device(0):
                movers = engine.movers("dma")
            assert not isinstance(movers.copier, TorchCopier), "making it failed"
            movers.release()
        except BaseException as error:  # noqa: BLE001 - it is this test's failure
            problems.append(error)
        finally:
            is_over.set()

    number, graph = torch.full((4,), 3.0, device=DEVICE), torch.cuda.CUDAGraph()
    thread = threading.Thread(target=prepare)
    thread.start()
    with torch.cuda.graph(graph):
        is_capturing.set()
        assert is_over.wait(60)
        result = number * 2
    thread.join()
    graph.replay()
    assert [] == problems
    assert [6.0] * 4 == result.tolist()


@pytest.mark.parametrize("way", ["dma", "staged", "direct", "auto", "bulk"])
@pytest.mark.parametrize("own_stream", [False, True], ids=["on the default stream", "on a stream of the engine's"])
def test_blocks_come_back(arena: Arena, way: str, own_stream: bool) -> None:
    """Whole and by layers, in the order of the engine's stream. What was pinned can be pinned again behind it."""
    with torch.cuda.stream(torch.cuda.Stream() if own_stream else torch.cuda.current_stream()):
        engine = Engine(arena)
        try:
            movers = engine.movers(way, layers=True)
        except ValueError as error:
            if "moved wrong bytes" in str(error):
                raise
            pytest.skip(str(error))
        assert not isinstance(movers.copier, TorchCopier), "there is CuPy, so there are kernels"
        engine.round_trip(movers, engine.copies, engine.copies)
        movers.release()
        assert pin_arena(arena, 0) == arena.ready_bytes
        assert unpin(arena.address, 0)
