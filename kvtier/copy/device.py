"""The copier for an engine's KV memory on a CUDA device: kernels and copy engines where CuPy is installed, torch alone where not."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvtier.copy.cuda_choice import CopyTable, Way
from kvtier.copy.cuda_copier import ArenaPlace, CopierOptions, CudaCopier
from kvtier.layout import KVLayout

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """A CUDA device, as the engine uses it."""

    number: int
    """in this process"""
    compute_stream: Callable[[], int]
    """the stream that the engine computes on at the time of the call"""


def way_of(name: str) -> Way | None:
    """The way of a setting: ``auto`` is none in particular."""
    return None if name == "auto" else Way(name)


def cuda_copier(
    layout: KVLayout, device: Device, arena: ArenaPlace, *, layers: Sequence[range] | None = None, forced: Way | None = None
) -> CudaCopier | None:
    """A copier that was measured on this device; None, after one warning that says what to install, where CuPy is missing.

    The arena must be registered with CUDA. The table of what was measured is logged and is the copier's ``table``.

    Raises:
        ValueError: the forced way is impossible here.
    """
    if importlib.util.find_spec("cupy") is None:
        _LOG.warning("kvtier: CuPy is not installed, so copies go through torch and are slower: pip install 'kvtier[cuda13]' (or cuda12)")
        return None
    from kvtier.copy.cuda_calibrate import PIECE_BYTES, calibrate  # noqa: PLC0415 - this and the next only where there is CuPy
    from kvtier.copy.cuda_cupy import CupyRuntime  # noqa: PLC0415

    options = CopierOptions(forced=forced, layers=layers)
    try:
        runtime = CupyRuntime(device.number)
        if forced is None:
            table = calibrate(runtime, options.settings)
        else:
            # Nothing to choose, but this shows that the way is right, and compiles its kernel, and that of pools, before the first step.
            without = [way for way in Way if way not in (forced, Way.DIRECT)]
            table = calibrate(runtime, options.settings, piece_sizes=PIECE_BYTES[:1], without=without)
        copier = CudaCopier(layout, runtime, arena, compute_stream=device.compute_stream, options=replace(options, table=table))
    except (RuntimeError, MemoryError, ImportError, ValueError) as error:
        if forced is not None and isinstance(error, ValueError):
            raise
        # of the device, the driver or CuPy's own libraries; or no way that was tried is right
        _LOG.warning("kvtier: copies go through torch and are slower: %s", error)
        return None
    for line in copier.table.lines():
        _LOG.info("kvtier: copies: %s", line)
    return copier


def measure_ways(number: int) -> CopyTable:
    """What would be measured on a device at an engine's start.

    Raises:
        ImportError: CuPy is missing.
        MemoryError: the device has no room to measure.
        RuntimeError: there is no such device.
    """
    from kvtier.copy.cuda_calibrate import calibrate  # noqa: PLC0415 - this and the next only where there is CuPy
    from kvtier.copy.cuda_cupy import CupyRuntime  # noqa: PLC0415

    return calibrate(CupyRuntime(number), CopierOptions().settings)


def device_names() -> list[str]:
    """The CUDA devices of this process, in order, with capability and memory. Raises RuntimeError or ImportError where there are none."""
    from kvtier.copy.cuda_cupy import device_names as names  # noqa: PLC0415 - only where there is CuPy

    return names()
