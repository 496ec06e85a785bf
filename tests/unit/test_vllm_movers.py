"""What a worker pins it lets go of, and a call that CUDA refuses is nobody else's error."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvtier.bench import chunks_on_device  # noqa: E402 - only where there is torch
from kvtier.connectors.vllm import movers  # noqa: E402 - only where there is torch
from kvtier.copy.base import Movers  # noqa: E402
from kvtier.copy.pool import PoolCopier  # noqa: E402 - only where there is torch
from kvtier.layout import KVLayout, Segment  # noqa: E402
from kvtier.memory.arena import Arena  # noqa: E402

LAYOUT = KVLayout((Segment(4096, 16, 16),), 1)


class Cuda:
    """The part of torch that registers memory, without a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, register: int = 0, unregister: int = 0) -> None:
        self.pinned: list[int] = []
        self.log: list[str] = []
        self._status = {"register": register, "unregister": unregister}
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch, "ones", self._launch)
        monkeypatch.setattr(movers, "cuda_copier", lambda *args, **more: self)
        monkeypatch.setattr(movers, "TorchCopier", lambda *args: "torch")

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.pinned += [address] * (not self._status["register"])
        return self._status["register"]

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        self.log.append("unregister")
        self.pinned.remove(address)
        return self._status["unregister"]

    def close(self) -> None:
        """As a copier."""
        self.log.append("close")

    def _launch(self, *args: object, **more: object) -> None:
        self.log.append("launch")
        raise RuntimeError("CUDA error: of the call before")


@pytest.fixture
def arena(tmp_path: Path) -> Any:
    with Arena.open(str(tmp_path / "arena"), 1 << 20) as arena:
        arena.prefault()
        yield arena


def movers_of(arena: Arena) -> Movers:
    return movers._on_cuda(arena, LAYOUT, [torch.zeros(1, 16, dtype=torch.int8)], None, "auto")


def test_pinned_memory_is_given_back_after_the_copier(monkeypatch: pytest.MonkeyPatch, arena: Arena) -> None:
    """The arena may be unmapped then: CUDA knows nothing of it any more, and the copier's memory is free."""
    cuda = Cuda(monkeypatch)
    made = movers_of(arena)
    assert [arena.address] == cuda.pinned
    made.release()
    assert [] == cuda.pinned
    assert ["close", "unregister"] == cuda.log


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch, arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    """torch copies; the refusal, which CUDA keeps for the next launch, is taken here and not by the engine's step."""
    cuda = Cuda(monkeypatch, register=2)
    made = movers_of(arena)
    assert "torch" in repr(made.copier)
    assert ["launch"] == cuda.log
    assert ["cudaHostRegister" in record.getMessage() for record in caplog.records] == [True]
    made.release()


class TestPool:
    """A pool in front of host memory."""

    @pytest.fixture
    def cuda(self, monkeypatch: pytest.MonkeyPatch) -> Cuda:
        return Cuda(monkeypatch)

    def made(self, arena: Arena, monkeypatch: pytest.MonkeyPatch, pool: Any) -> Movers:
        """With this for a pool."""
        monkeypatch.setattr(PoolCopier, "allocate", pool)
        view: Any = SimpleNamespace(device=torch.device("cuda:0"))
        settings: Any = SimpleNamespace(gpu_copy="auto", copy_threads=1)
        return movers.movers_of(arena, LAYOUT, [view], layers=None, pool_bytes=4096, settings=settings)

    @pytest.mark.parametrize("is_broken", [False, True])
    def test_it_is_closed_before_the_copier(self, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, arena: Arena, is_broken: bool) -> None:
        """Or each daemon that comes back would cost its streams and tables once more. What it raises keeps nothing pinned."""

        def close() -> None:
            cuda.log.append("close pool")
            if is_broken:
                raise RuntimeError("an illegal address")

        self.made(arena, monkeypatch, lambda *_: SimpleNamespace(close=close)).release()
        assert ["close pool", "close", "unregister"] == cuda.log
        assert [] == cuda.pinned

    def test_nothing_stays_pinned_where_it_does_not_fit(self, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, arena: Arena) -> None:
        """The error is the caller's."""

        def refused(*_: object) -> Any:
            raise MemoryError("no room")

        with pytest.raises(MemoryError):
            self.made(arena, monkeypatch, refused)
        assert ["close", "unregister"] == cuda.log
        assert [] == cuda.pinned


def test_a_benchmark_does_not_go_on_without_pinned_memory(monkeypatch: pytest.MonkeyPatch, arena: Arena) -> None:
    """Its figures would be of other copies: it ends, and says where memory can be pinned. The refusal is not left to the next launch."""
    cuda = Cuda(monkeypatch, register=2)
    with contextlib.ExitStack() as stack, pytest.raises(RuntimeError, match=f"{arena.path} as pinned memory.*/dev/shm"):
        chunks_on_device._open_rows(arena, torch.device("cuda:0"), stack)
    assert ["launch"] == cuda.log


def test_a_benchmark_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch, arena: Arena) -> None:
    """After what copies from it."""
    cuda = Cuda(monkeypatch)
    monkeypatch.setattr(torch, "zeros", lambda *args, **more: torch.empty(4096))
    monkeypatch.setattr(chunks_on_device, "cuda_copier", lambda *args: cuda)
    with contextlib.ExitStack() as stack:
        chunks_on_device._open_rows(arena, torch.device("cuda:0"), stack)
        assert [arena.address] == cuda.pinned
    assert ["close", "unregister"] == cuda.log
    assert [] == cuda.pinned


def test_memory_that_cannot_be_given_back(monkeypatch: pytest.MonkeyPatch, arena: Arena, caplog: pytest.LogCaptureFixture) -> None:
    """One warning; nothing is raised."""
    cuda = Cuda(monkeypatch, unregister=1)
    movers_of(arena).release()
    assert ["close", "unregister", "launch"] == cuda.log
    assert ["cudaHostUnregister" in record.getMessage() for record in caplog.records] == [True]
