"""Measured figures decide which way copies go, and wrong bytes exclude a way."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.copy.cuda_batch import Attributes, BatchCopy, BatchCopyError, tolerate_captures
from kvtier.copy.cuda_calibrate import calibrate
from kvtier.copy.cuda_choice import DIRECTIONS, CopyTable, Direction, Measured, Way
from kvtier.copy.cuda_runtime import Launch
from kvtier.copy.cuda_ways import CopySettings
from kvtier.testing.simulated_cuda import SimulatedCuda

SMALL = CopySettings(slice_bytes=64 << 10, num_buffers=2)


def table_of(rates: dict[tuple[Direction, Way, int], float], **more: Any) -> CopyTable:
    return CopyTable(tuple(Measured(direction, way, size, rate) for (direction, way, size), rate in rates.items()), **more)


def test_a_forced_way_that_was_wrong_is_refused() -> None:
    """In the direction in which it was."""
    table = CopyTable((Measured("load", Way.BULK, 4096, 9.0, is_right=False), Measured("store", Way.BULK, 4096, 9.0)))
    assert Way.BULK is table.choose("store", 4096, forced=Way.BULK)
    with pytest.raises(ValueError, match="copying by bulk was asked for, but it failed or moved wrong bytes"):
        table.choose("load", 4096, forced=Way.BULK)


def test_the_fastest_is_chosen_per_direction_and_size() -> None:
    """Each direction has its own figures, and each size its own winner."""
    table = table_of(
        {
            ("load", Way.DMA, 4096): 1.0,
            ("load", Way.STAGED, 4096): 9.0,
            ("load", Way.DMA, 65_536): 9.0,
            ("load", Way.STAGED, 65_536): 5.0,
            ("store", Way.DMA, 4096): 9.0,
            ("store", Way.STAGED, 4096): 1.0,
        }
    )
    assert Way.STAGED is table.choose("load", 4096)
    assert Way.DMA is table.choose("load", 65_536)
    assert Way.DMA is table.choose("store", 4096)
    assert Way.STAGED is table.choose("load", 100)
    assert Way.DMA is table.choose("load", 1e9)


def test_nearly_as_fast_and_free_is_better() -> None:
    """The copy engines cost no multiprocessor: within three percent they win."""
    assert Way.DMA is table_of({("load", Way.DMA, 1): 98.0, ("load", Way.BULK, 1): 100.0}).choose("load", 1)
    assert Way.BULK is table_of({("load", Way.DMA, 1): 96.0, ("load", Way.BULK, 1): 100.0}).choose("load", 1)


def test_rates_lie_on_a_line_over_the_sizes_logarithm() -> None:
    """Half-way between 4 and 16 KiB is 8 KiB; outside the nearest figure holds."""
    table = table_of({("load", Way.DMA, 4096): 10.0, ("load", Way.DMA, 16_384): 30.0})
    assert [10.0, pytest.approx(20.0), 30.0, 30.0] == [table.rate("load", Way.DMA, size) for size in (1, 8192, 16_384, 1e6)]
    assert table.rate("store", Way.DMA, 4096) is None


def test_without_figures_the_size_decides() -> None:
    """Large pieces by the copy engines, small ones by a kernel, whichever of these there is."""
    refused = {Way.BULK: "an old device"}
    assert [Way.BULK, Way.DMA] == [CopyTable().choose("load", size) for size in (4096, 32_768)]
    assert [Way.STAGED, Way.DMA] == [CopyTable((), refused).choose("load", size) for size in (4096, 32_768)]


def test_wrong_and_refused_ways_are_never_chosen() -> None:
    """However fast; and where nothing is left that is an error, not a guess."""
    fast = (
        Measured("load", Way.BULK, 4096, 99.0, is_right=False),
        Measured("load", Way.BULK, 8192, 99.0),
        Measured("load", Way.DMA, 4096, 1.0),
    )
    assert Way.DMA is CopyTable(fast).choose("load", 8192)
    assert Way.STAGED is CopyTable(fast, {Way.DMA: "forbidden"}).choose("store", 8192, forced=Way.STAGED)
    with pytest.raises(ValueError, match="copying by dma was asked for, but forbidden"):
        CopyTable(fast, {Way.DMA: "forbidden"}).choose("load", 8192, forced=Way.DMA)
    with pytest.raises(ValueError, match="no way to load"):
        CopyTable((), dict.fromkeys(Way, "forbidden")).choose("load", 8192)


@given(
    st.dictionaries(st.tuples(st.sampled_from(DIRECTIONS), st.sampled_from(list(Way)), st.integers(1, 1 << 20)), st.floats(1.0, 1e12)),
    st.integers(1, 1 << 22),
)
def test_the_choice_is_never_much_slower(rates: dict[Any, float], size: int) -> None:
    """Whatever was measured: what is chosen reaches 95 % of the best figure for the size."""
    table = table_of(rates)
    for direction in DIRECTIONS:
        known = [rate for way in Way if (rate := table.rate(direction, way, size)) is not None]
        if known:
            chosen = table.rate(direction, table.choose(direction, size), size)
            assert chosen is not None
            assert chosen >= 0.95 * max(known)


class TestCalibration:
    """On the simulated device, with a clock that counts its calls."""

    @staticmethod
    def clock() -> Callable[[], float]:
        return (float(tick) for tick in itertools.count()).__next__

    def test_every_way_is_measured_and_checked(self) -> None:
        """Both directions, all sizes, all ways; all right; nothing stays allocated."""
        device = SimulatedCuda()
        before = device.free_bytes
        table = calibrate(device, SMALL, piece_sizes=(2048, 4096), total_bytes=256 << 10, clock=self.clock())
        expected = {(direction, way, size) for direction in DIRECTIONS for way in Way for size in (2048, 4096)}
        assert expected == {(it.direction, it.way, it.piece_bytes) for it in table.measured}
        assert {(float(256 << 10), True)} == {(it.bytes_per_s, it.is_right) for it in table.measured}
        assert before == device.free_bytes
        assert 4 == len(table.lines())
        assert "[dma " in table.lines()[0]

    def test_a_way_that_moves_bytes_wrongly_is_found(self) -> None:
        """One wrong byte is enough, and the way is out for that direction."""

        class Broken(SimulatedCuda):
            def launch(self, stream: int, launch: Launch) -> None:
                if launch.kernel == "bulk_copy" and launch.params[0]["to_paged"]:
                    launch.params[0]["offsets"][0] += 16
                super().launch(stream, launch)

        table = calibrate(Broken(), SMALL, piece_sizes=(2048,), total_bytes=192 << 10, clock=self.clock())
        assert [("load", Way.BULK)] == [(it.direction, it.way) for it in table.measured if not it.is_right]
        assert any("WRONG" in line for line in table.lines())

    def test_a_way_that_fails_is_out_and_the_rest_is_measured(self) -> None:
        """An error of the device while a way is tried is not an error of the start."""

        class Failing(SimulatedCuda):
            def launch(self, stream: int, launch: Launch) -> None:
                if launch.kernel == "bulk_copy":
                    raise RuntimeError("no such instruction")
                super().launch(stream, launch)

        table = calibrate(Failing(), SMALL, piece_sizes=(2048,), total_bytes=128 << 10, clock=self.clock())
        assert {(Way.BULK, 0.0)} == {(it.way, it.bytes_per_s) for it in table.measured if not it.is_right}
        assert 8 == len(table.measured)

    def test_no_room(self) -> None:
        """Is said before anything is copied, and nothing stays allocated."""
        device = SimulatedCuda(memory_bytes=300_000)
        with pytest.raises(MemoryError, match="staging buffers"):
            calibrate(device, SMALL, piece_sizes=(2048,), total_bytes=128 << 10)
        assert 300_000 == device.free_bytes


LIBRARY = r"""
#include <stddef.h>
#include <string.h>
struct Location { int type, id; };
struct Attributes { int order; struct Location source, target; unsigned flags; };
size_t attributes_size(void) { return sizeof(struct Attributes); }
typedef struct Attributes A;
static int copy(void** to, void** from, size_t* sizes, size_t count, A* attributes, size_t* first, size_t num, void* stream) {
  if (stream == (void*)13) return 801;
  if (num != 1 || first[0] != 0 || attributes->order != 1 || attributes->flags != 1 || stream != (void*)7) return 1;
  for (size_t i = 0; i < count; ++i) memcpy(to[i], from[i], sizes[i]);
  return 0;
}
#ifdef OLD
int cuMemcpyBatchAsync(void** to, void** from, size_t* sizes, size_t count, A* a, size_t* f, size_t n, size_t* fail, void* s) {
  *fail = 5;
  return copy(to, from, sizes, count, a, f, n, s);
}
#else
int cuMemcpyBatchAsync_v2(void** to, void** from, size_t* sizes, size_t count, A* a, size_t* f, size_t n, void* s) {
  return copy(to, from, sizes, count, a, f, n, s);
}
#endif
"""


class TestBatchCopy:
    """The call into the driver, against a library with the same C interface."""

    @pytest.mark.parametrize("options", [[], ["-DOLD"]])
    def test_arguments_arrive(self, tmp_path: Path, options: list[str]) -> None:
        """In both forms of the function; an error names its number."""
        source, library = tmp_path / "driver.c", tmp_path / "driver.so"
        source.write_text(LIBRARY)
        subprocess.run(["cc", "-shared", "-fPIC", *options, str(source), "-o", str(library)], check=True)
        size = ctypes.CDLL(str(library)).attributes_size
        size.restype = ctypes.c_size_t
        assert ctypes.sizeof(Attributes) == size()
        batch = BatchCopy.find(str(library))
        assert batch is not None
        source_bytes, target = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
        starts, lengths = np.array([3, 50], np.uint64), np.array([10, 7])
        batch(7, target.ctypes.data + starts, source_bytes.ctypes.data + starts, lengths)
        expected = np.zeros(100, np.uint8)
        for start, length in ((3, 10), (50, 7)):
            expected[start : start + length] = source_bytes[start : start + length]
        assert expected.tolist() == target.tolist()
        with pytest.raises(BatchCopyError, match="2 copies with error 801"):
            batch(13, target.ctypes.data + starts, source_bytes.ctypes.data + starts, lengths)

    def test_without_a_driver(self, tmp_path: Path) -> None:
        """There is none; an older driver, which lacks the function, is none either."""
        assert BatchCopy.find(str(tmp_path / "absent.so")) is None
        source, library = tmp_path / "driver.c", tmp_path / "driver.so"
        source.write_text("int cuInit(unsigned flags) { return (int)flags; }")
        subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        assert BatchCopy.find(str(library)) is None


def test_a_thread_beside_a_capture(tmp_path: Path) -> None:
    """It asks for the mode in which its calls do not break the capture (2, relaxed); without a driver nothing happens."""
    source, library = tmp_path / "driver.c", tmp_path / "driver.so"
    source.write_text("int mode; int cuThreadExchangeStreamCaptureMode(int* m) { mode = *m; *m = 0; return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    assert tolerate_captures(str(library))
    assert 2 == ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "mode").value
    assert not tolerate_captures(str(tmp_path / "absent.so"))
