"""Where the CUDA copier cannot be had, torch copies, and one warning says what is missing."""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest

from kvtier.config import ConnectorConfig
from kvtier.copy import device
from kvtier.copy.cuda_choice import Way
from kvtier.copy.cuda_copier import ArenaPlace, CudaCopier
from kvtier.layout import KVLayout, Segment
from kvtier.testing.simulated_cuda import SimulatedCuda

LAYOUT = KVLayout((Segment(4096, 16, 16),), 1)
DEVICE = device.Device(0, lambda: 0)


def test_without_cupy_one_warning_names_the_extra(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And there is no copier, and no error."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert device.cuda_copier(LAYOUT, DEVICE, ArenaPlace(4096, 4096)) is None
    assert ["kvtier[cuda13]" in record.getMessage() for record in caplog.records] == [True]


def test_a_device_that_does_not_work_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """With CuPy, but without a driver or a GPU: as above, with the reason."""
    pytest.importorskip("cupy")
    if importlib.util.find_spec("cupy") and _has_gpu():
        pytest.skip("there is a GPU")
    assert device.cuda_copier(LAYOUT, DEVICE, ArenaPlace(4096, 4096)) is None
    (record,) = caplog.records
    assert logging.WARNING == record.levelno
    assert "copies go through torch and are slower: cuda" in record.getMessage()


def _has_gpu() -> bool:
    from cupy.cuda import runtime  # noqa: PLC0415 - it may not be there

    try:
        return bool(runtime.getDeviceCount())
    except RuntimeError:
        return False


def test_every_way_can_be_set() -> None:
    """The setting's values are ``auto`` and the ways."""
    allowed = ("auto", *(way.value for way in Way))
    assert [None, *Way] == [device.way_of(ConnectorConfig(gpu_copy=name).gpu_copy) for name in allowed]  # type: ignore[arg-type]


class TestOnASimulatedDevice:
    """The copier as an engine gets it, with a device that is not there in the real one's place."""

    @staticmethod
    def copier(monkeypatch: pytest.MonkeyPatch, simulated: SimulatedCuda, forced: Way | None) -> CudaCopier | None:
        pytest.importorskip("cupy")
        monkeypatch.setattr("kvtier.copy.cuda_cupy.CupyRuntime", lambda number: simulated)
        memory, arena = simulated.allocate(4096), np.zeros(4096, np.uint8)
        layout = KVLayout((Segment(memory.address, 16, 16),), 1)
        return device.cuda_copier(layout, DEVICE, ArenaPlace(arena.ctypes.data, 4096), forced=forced)

    @pytest.mark.parametrize("forced", [None, *Way])
    def test_every_kernel_ran_before_the_first_step(self, monkeypatch: pytest.MonkeyPatch, forced: Way | None) -> None:
        """Also where the way is forced: nothing is compiled inside a step. Ways that are not wanted are not even tried."""
        simulated = SimulatedCuda()
        copier = self.copier(monkeypatch, simulated, forced)
        assert copier is not None
        kernels = {operation.name for operation in simulated.log} - {"copy"}
        assert {"paged_copy", "bulk_copy"} - ({"bulk_copy"} if forced not in (None, Way.BULK) else set()) == kernels
        copier.close()

    def test_where_no_way_is_right_torch_copies(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """The engine starts, without kernels; a way that was asked for by name is an error."""

        class Broken(SimulatedCuda):
            def copy(self, stream, to, source, num_bytes):  # type: ignore[no-untyped-def]
                if len(num_bytes) > 1:
                    raise RuntimeError("the copy engines are gone")
                super().copy(stream, to, source, num_bytes)

            def launch(self, stream, launch):  # type: ignore[no-untyped-def]
                raise RuntimeError("the multiprocessors are gone")

        assert self.copier(monkeypatch, Broken(), None) is None
        assert "copies go through torch and are slower: no way to load" in caplog.text
        with pytest.raises(ValueError, match="copying by direct was asked for, but it failed"):
            self.copier(monkeypatch, Broken(), Way.DIRECT)
