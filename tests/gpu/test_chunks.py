"""Chunks on a real GPU: brought ahead of the computation, put into place by the kernel, as the CPU and torch would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="NOTHING WAS CHECKED ON A GPU: torch is not installed")
pytest.importorskip("transformers", reason="NOTHING WAS CHECKED ON A GPU: transformers is not installed")

from kvtier.bench.chunks_on_device import ChunksOnDevice  # noqa: E402 - only where there is torch
from kvtier.bench.gpu_chunks import SHAPES  # noqa: E402 - only where there is torch
from kvtier.bench.scratch import scratch_directory  # noqa: E402 - only where there is torch

ROUNDS = 10
METHODS = ("none", "epic", "cacheblend", "combined")


@pytest.fixture
def bench() -> Iterator[ChunksOnDevice]:
    if not torch.cuda.is_available():
        pytest.skip("NOTHING WAS CHECKED ON A GPU: torch sees none")
    with (
        scratch_directory(Path("/dev/shm")) as directory,
        torch.inference_mode(),
        ChunksOnDevice(torch.device("cuda:0"), SHAPES["tiny"], 2000, 90, directory) as bench,
    ):
        yield bench


def test_chunks_arrive_as_they_were_stored(bench: ChunksOnDevice) -> None:
    """Copied by the device's engines, to the last bit, in ever new orders; ratio 1 is full prefill; a prompt's are copied back."""
    assert bench.rows is not None, "there is CuPy, so the device brings the chunks"
    for _ in range(ROUNDS):
        bench.check()


def test_a_blend_takes_no_more_than_it_asked_for(bench: ChunksOnDevice) -> None:
    """Of the device's memory."""
    for record in bench.taken():
        assert record.fraction is not None
        assert 0 < record.fraction <= 1, record


@pytest.mark.parametrize("method", METHODS)
def test_blends_over_steps_are_those_at_once(bench: ChunksOnDevice, method: str) -> None:
    """With other work between the shares."""
    square = torch.rand(2048, 2048, device="cuda:0")
    shares: list[int] = []

    def between() -> int:
        nonlocal square
        square = (square @ square).clamp(0, 1)
        shares.append(40)
        return shares[-1]

    for _ in range(ROUNDS):
        prompt = bench.prompt()
        expected = bench.blended(*prompt, method, 0.5)
        kv = bench.memory.kv.clone()
        bench.blended(*bench.prompt(), "none", 0.0)
        found = bench.blended(*prompt, method, 0.5, between)
        for left, right in ((expected, found), (kv.keys, bench.memory.kv.keys), (kv.values, bench.memory.kv.values)):
            torch.testing.assert_close(left, right, rtol=0, atol=0 if method == "none" else 1e-2)
    assert len(shares) > ROUNDS or method == "none"


@pytest.mark.parametrize("method", METHODS)
def test_the_device_and_the_cpu_bring_the_same(bench: ChunksOnDevice, method: str) -> None:
    """Whole blends, beside work that keeps the engine's stream busy, so that a copy that is not waited for comes too late."""
    rows = bench.rows
    square = torch.rand(2048, 2048, device="cuda:0")
    for _ in range(ROUNDS):
        found = []
        prompt = bench.prompt()
        for way in (None, rows):
            bench.rows = way
            for _ in range(10):
                square = (square @ square).clamp(0, 1)
            logits = bench.blended(*prompt, method, 0.15)
            found.append((logits.cpu(), bench.memory.kv.keys.cpu().clone(), bench.memory.kv.values.cpu().clone()))
        for left, right in zip(*found, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0 if method == "none" else 1e-2)
