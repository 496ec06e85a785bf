"""The GPU's benchmark runs, on the simulated device; the figures are those of a clock that counts."""

from __future__ import annotations

import argparse
import itertools

import pytest

from kvtier.bench import gpu
from kvtier.copy.device import measure_ways
from kvtier.testing.simulated_cuda import SimulatedCuda


def test_every_figure_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions, all sizes and ways, both at once, the gather; each with the limit of the same run."""
    monkeypatch.setattr(gpu, "PIECE_BYTES", (4096, 65_536))
    ticks = (float(tick) for tick in itertools.count())
    device = SimulatedCuda()
    before = device.free_bytes
    with gpu.GpuBench(device, rounds=1, total_bytes=8 << 20, clock=ticks.__next__) as bench:
        records = [*bench.copies(), *bench.both_at_once(), *bench.gather()]
        bench.load_once().wait()
    assert before == device.free_bytes
    names = [item.name for item in records]
    expected = {"host to GPU": 2, "GPU to host": 2, "host to GPU, one way": 8, "GPU to host, one way": 8}
    expected |= {"both directions at once": 2, "gather on the device": 2}
    assert expected == {name: names.count(name) for name in names}
    assert {1.0} == {item.fraction for item in records}


def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    """It says so and exits with 2."""
    try:
        measure_ways(0)
    except (ImportError, RuntimeError):
        assert 2 == gpu.run(argparse.Namespace(device=0, rounds=1, json=None))
        assert "nothing was measured" in capsys.readouterr().err
    else:
        pytest.skip("there is a GPU")
