"""The GPU's benchmark runs, on the simulated device; the figures are those of a clock that counts."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.bench import gpu
from kvtier.bench.gpu_beside import figures
from kvtier.bench.report import Record
from kvtier.copy.cuda_choice import Way
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
    assert [] == [gpu.missed(item) for item in records if "target_fraction" in item.params and gpu.missed(item)]
    of_both = [item for item in records if "target_gb_per_s" in item.params]
    assert ["TARGET MISSED"] * 2 == [gpu.missed(item)[:13] for item in of_both]


@pytest.mark.parametrize("kernel", [True, False])
def test_a_fast_copy_of_wrong_bytes_has_no_figure(monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    """A device that does nothing once it was calibrated is the fastest of all, and measured as wrong."""
    monkeypatch.setattr(gpu, "PIECE_BYTES", (65_536,))

    class Lazy(SimulatedCuda):
        is_lazy = False

        def copy(self, stream, to, source, num_bytes):  # type: ignore[no-untyped-def]
            few = slice(None, 1 if self.is_lazy and not kernel else None)
            super().copy(stream, to[few], source[few], num_bytes[few])

        def launch(self, stream, launch):  # type: ignore[no-untyped-def]
            if not (self.is_lazy and kernel):
                super().launch(stream, launch)

    device = Lazy()
    with gpu.GpuBench(device, rounds=1, total_bytes=8 << 20, without=[Way.BULK]) as bench:
        device.is_lazy = True
        records = [*bench.copies(), *bench.both_at_once(), *bench.gather()]
    wrong = {(item.name, item.params.get("way")) for item in records if gpu.missed(item).startswith("WRONG BYTES")}
    assert [0.0] == list({item.fraction for item in records if "wrong" in item.params})
    both_ways = {(f"{arrow}, one way", way) for arrow in gpu.ARROWS.values() for way in (("staged", "direct") if kernel else ("dma",))}
    assert both_ways <= wrong
    assert kernel == (("gather on the device", None) in wrong)
    assert not any(item.params.get("way") == "bulk" for item in records)


@pytest.mark.parametrize("fails", [False, True])
def test_figures_up_to_an_error_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    """The document has what was measured before it; the exit status is not that of success."""
    pytest.importorskip("cupy")

    def beside(bench: object, device: int) -> Iterator[Record]:
        if fails:
            raise RuntimeError("the device is gone")
        yield Record("beside", {}, 1.0, "ratio")

    monkeypatch.setattr(gpu, "PIECE_BYTES", (65_536,))
    monkeypatch.setattr(gpu, "GpuBench", functools.partial(gpu.GpuBench, total_bytes=4 << 20))
    monkeypatch.setattr(gpu, "beside_a_matrix_product", beside)
    monkeypatch.setattr("kvtier.copy.cuda_cupy.CupyRuntime", lambda number: SimulatedCuda())
    path = tmp_path / "gpu.json"
    assert int(fails) == gpu.run(argparse.Namespace(device=0, rounds=1, json=path, without=["bulk"]))
    names = {item["name"] for item in json.loads(path.read_text())["records"]}
    assert {"host to GPU", "GPU to host", "both directions at once", "gather on the device"} <= names
    assert fails == ("STOPPED: the device is gone" in capsys.readouterr().out)


class Product:
    """A matrix product that ends when so many loads have ended; it takes longer beside them."""

    def __init__(self) -> None:
        self.num_loads = 0
        self.most_at_once = 0
        self._under_way = 0
        self._is_beside = False
        self.bytes_of_a_load = 10**9

    def load_once(self) -> Product:
        """As the benchmark."""
        self._is_beside = True
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        return self

    def done(self) -> bool:
        """As the event of a load."""
        self._under_way -= 1
        self.num_loads += 1
        return True

    def wait(self) -> None:
        """As the event of a load."""
        self._under_way -= 1

    def __call__(self) -> tuple[Product, Product]:
        self.num_loads = 0
        return self, self

    def query(self) -> bool:
        """As the event of the end."""
        return self.num_loads == 5

    def synchronize(self) -> None:
        """As the event of the end."""

    def elapsed_time(self, other: Product) -> float:
        """Milliseconds."""
        is_beside, self._is_beside = self._is_beside, False
        return 103.0 if is_beside else 100.0


def test_loads_go_on_for_as_long_as_the_product() -> None:
    """Not only at its start: there is always one on its way and one behind it, and the figure says how fast they were."""
    product = Product()
    ratio, rate = figures(product, product, {}, rounds=3)
    assert 2 == product.most_at_once
    assert 1.03 == pytest.approx(ratio.value)
    assert gpu.missed(ratio).startswith("TARGET MISSED")
    assert 5 / 0.103 == pytest.approx(rate.value)


def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    """It says so and exits with 2."""
    try:
        measure_ways(0)
    except (ImportError, RuntimeError):
        assert 2 == gpu.run(argparse.Namespace(device=0, rounds=1, json=None, without=[]))
        assert "nothing was measured" in capsys.readouterr().err
    else:
        pytest.skip("there is a GPU")
