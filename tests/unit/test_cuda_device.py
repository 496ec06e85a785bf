"""Where the CUDA copier cannot be had, torch copies, and one warning says what is missing."""

from __future__ import annotations

import importlib.util
import logging

import pytest

from kvtier.config import ConnectorConfig
from kvtier.copy import device
from kvtier.copy.cuda_choice import Way
from kvtier.copy.cuda_copier import ArenaPlace
from kvtier.layout import KVLayout, Segment

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
