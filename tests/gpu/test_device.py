"""The contract of CUDA devices on the real one, and what only a real one can show."""

from __future__ import annotations

import numpy as np
import pytest

cuda_cupy = pytest.importorskip("kvtier.copy.cuda_cupy", reason="NOTHING WAS CHECKED ON A GPU: CuPy is not installed", exc_type=ImportError)

from kvtier.copy.cuda_calibrate import page_aligned  # noqa: E402 - only where there is CuPy
from kvtier.copy.cuda_choice import Way  # noqa: E402 - only where there is CuPy
from kvtier.copy.cuda_params import PAGED_COPY  # noqa: E402 - only where there is CuPy
from kvtier.copy.cuda_runtime import Launch  # noqa: E402 - only where there is CuPy
from kvtier.testing.cuda_copies import DeviceContract, WayContract  # noqa: E402


def test_a_wrong_kernel_is_an_error_and_not_silence() -> None:
    """A launch that the device refuses raises when it is submitted."""
    runtime = cuda_cupy.CupyRuntime(0)
    params = np.zeros(1, np.dtype([("x", "<i8", (PAGED_COPY.itemsize // 8,))]))
    with pytest.raises(RuntimeError):
        runtime.launch(runtime.open_stream(is_urgent=False), Launch("paged_copy", params, 1, 4096))


def test_too_much_memory_is_a_memory_error() -> None:
    """Which says how much there is."""
    with pytest.raises(MemoryError, match=r"\d+ of \d+ bytes are free"):
        cuda_cupy.CupyRuntime(0).allocate(1 << 50)


def test_batches_go_in_one_call() -> None:
    """The driver's batch copy was found and takes batches; the loop is not what is measured."""
    runtime = cuda_cupy.CupyRuntime(0)
    if not runtime.has_batch_copies:
        pytest.skip("the driver is older than CUDA 12.8")
    memory = runtime.allocate(1 << 20)
    source, target = page_aligned(1 << 20), page_aligned(1 << 20)
    source[:], target[:] = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8), 0
    pinned = [runtime.register(array.ctypes.data, array.nbytes) for array in (source, target)]
    stream = runtime.open_stream(is_urgent=True)
    places, lengths = np.arange(0, 1 << 20, 4096, dtype=np.uint64), np.full(256, 4000)
    runtime.copy(stream, memory.address + places, source.ctypes.data + places, lengths)
    runtime.copy(stream, target.ctypes.data + places, memory.address + places, lengths)
    runtime.record(stream).wait()
    assert runtime.has_batch_copies
    expected = source.reshape(256, 4096).copy()
    expected[:, 4000:] = 0
    assert expected.tobytes() == target.tobytes()
    for each in (*pinned, memory):
        each.close()


class OnGpu:
    """The device; often, for races, and behind streams that are busy for some milliseconds."""

    rounds = 20
    busy_bytes = 4 << 30

    def open_runtime(self) -> cuda_cupy.CupyRuntime:  # type: ignore[name-defined]
        return cuda_cupy.CupyRuntime(0)


class TestDma(OnGpu, WayContract):
    """Each way for itself, so that ``scripts/gpu_check.py`` can run it in a process of its own: some errors leave no device behind."""

    ways = (Way.DMA,)


class TestStaged(OnGpu, WayContract):
    """As above."""

    ways = (Way.STAGED,)


class TestDirect(OnGpu, WayContract):
    """As above."""

    ways = (Way.DIRECT,)


class TestBulk(OnGpu, WayContract):
    """As above."""

    ways = (Way.BULK,)


class TestDevice(OnGpu, DeviceContract):
    """Kernels against the CPU's twins, and all ways as they are measured at an engine's start."""
