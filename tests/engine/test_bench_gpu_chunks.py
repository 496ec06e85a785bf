"""The benchmark of chunk reuse on a GPU runs where there is none, on a small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtier.bench.chunks_on_device import ChunksOnDevice
from kvtier.bench.gpu_chunks import SHAPES
from kvtier.cli import main
from kvtier.connectors.blend_worker import ChunkBlender
from kvtier.connectors.chunk_rows import ArenaReads

SMALL = ["--shape", "tiny", "--tokens", "500", "--chunk-tokens", "90", "--rounds", "1"]


def test_every_figure_is_there(tmp_path: Path) -> None:
    """Of every method beside full prefill; chunks and attention by themselves."""
    path = tmp_path / "figures.json"
    assert 0 == main(["bench", "gpu-chunks", "--device", "cpu", *SMALL, "--json", str(path)])
    records = json.loads(path.read_text())["records"]
    names = [record["name"] for record in records]
    assert {f"of computing, {method}" for method in ("none", "epic", "cacheblend", "prophetkv", "combined")} <= set(names)
    assert {"chunks to the device", "chunks out of a prompt", "attention of chosen rows, one layer"} <= set(names)
    assert all(record["value"] > 0 for record in records)
    (bound,) = (record for record in records if record["name"].startswith("difference"))
    assert 0.1 > bound["value"]


def test_what_was_measured_stays_where_the_rest_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are in the file as soon as they are there; so are they where time runs out."""
    path = tmp_path / "figures.json"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ChunksOnDevice, "loading", killed)
    assert 130 == main(["bench", "gpu-chunks", "--device", "cpu", *SMALL, "--json", str(path)])
    names = {record["name"] for record in json.loads(path.read_text())["records"]}
    assert {"time to first token, computed", "time to first token, combined"} <= names


def test_memory_is_asked_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that was allocated since the first share, less what was there before, beside what the worker asks for."""
    asked: list[str] = []

    def answer(name: str, num_bytes: int) -> Callable[[torch.device], int]:
        def told(_: torch.device) -> int:
            asked.append(name)
            return num_bytes

        return told

    for name, num_bytes in (("memory_allocated", 5000), ("reset_peak_memory_stats", 0), ("max_memory_allocated", 25_000)):
        monkeypatch.setattr(torch.cuda, name, answer(name, num_bytes))
    with torch.inference_mode(), ChunksOnDevice(torch.device("cpu"), SHAPES["tiny"], 500, 90, tmp_path) as bench:
        found = list(bench.taken())
    assert ["memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"] * 2 == asked
    for record in found:
        assert 2e-5 == record.value
        assert record.limit is not None
        assert record.fraction == pytest.approx(record.value / record.limit)
    assert 2 == len({record.limit for record in found}), "of each method its own"


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """And that is said, with a status of its own."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert 2 == main(["bench", "gpu-chunks", *SMALL])
    assert "no device cuda:0" in capsys.readouterr().err


def test_a_prompt_without_room_for_a_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    """Is an error that names the option."""
    assert 2 == main(["bench", "gpu-chunks", "--tokens", "600", "--chunk-tokens", "500"])
    assert "--chunk-tokens is 500" in capsys.readouterr().err


def test_wrong_kv_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where chunks do not arrive as they were stored, or ratio 1 does not give full prefill's logits, the benchmark ends."""
    with torch.inference_mode(), ChunksOnDevice(torch.device("cpu"), SHAPES["tiny"], 500, 90, tmp_path) as bench:
        bench.check()
        with monkeypatch.context() as patch:
            patch.setattr(ArenaReads, "layer", _one_late(ArenaReads.layer))
            with pytest.raises(RuntimeError, match="not what was stored"):
                bench.check()
        with monkeypatch.context() as patch:
            patch.setattr(ChunkBlender, "capture", lambda *_: None)
            with pytest.raises(RuntimeError, match="is not what is there"):
                bench.check()
        bench._model.scale *= 3000
        with pytest.raises(RuntimeError, match="of their spread"):
            bench.check()


@pytest.mark.parametrize("method", ["none", "epic", "cacheblend", "combined"])
def test_blends_over_steps_are_those_at_once(tmp_path: Path, method: str) -> None:
    """To the last bit, whatever is put together in between; as ``tests/gpu`` looks at it on a GPU."""
    with torch.inference_mode(), ChunksOnDevice(torch.device("cpu"), SHAPES["tiny"], 500, 90, tmp_path) as bench:
        prompt, other = bench.prompt(), bench.prompt()
        expected = bench.blended(*prompt, method, 0.5)
        kv = bench.memory.kv.clone()
        shares: list[int] = []

        def between() -> int:
            bench.blended(*other, "none", 0.0)
            shares.append(40)
            return shares[-1]

        found = bench.blended(*prompt, method, 0.5, between)
        for left, right in ((expected, found), (kv.keys, bench.memory.kv.keys), (kv.values, bench.memory.kv.values)):
            assert torch.equal(left, right)
        assert len(shares) > 1 or method == "none"


def _one_late(layer: Any) -> Any:
    return lambda self, index: layer(self, max(0, index - 1))
