"""These tests need an NVIDIA GPU and CuPy; ``make gpu-check`` runs them. Without they are skipped, and say so."""

from __future__ import annotations

import pytest


def _missing() -> str:
    """What is missing; empty where nothing is."""
    try:
        from cupy.cuda import runtime  # noqa: PLC0415 - it may not be there

        return "" if runtime.getDeviceCount() else "there is no GPU"
    except ImportError as error:
        return f"CuPy is not installed ({error})"
    except RuntimeError as error:
        return f"there is no GPU ({error})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips everything where there is no GPU."""
    missing = _missing()
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"NOTHING WAS CHECKED ON A GPU: {missing}"))
