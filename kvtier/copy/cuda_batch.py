"""What CuPy lacks of the CUDA driver, by its C interface: many copies in one call (12.8 and later), and how threads heed captures.

``cuda.bindings`` takes the copies as Python lists, which cost more than the copies.
"""

from __future__ import annotations

import ctypes

import numpy as np

from kvtier.copy.cuda_runs import Addresses, Ints

LIBRARY = "libcuda.so.1"
_IN_STREAM_ORDER = 1
_PREFER_OVERLAP_WITH_COMPUTE = 1
_RELAXED = 2


class Location(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Attributes(ctypes.Structure):
    """``CUmemcpyAttributes``."""

    _fields_ = [
        ("source_order", ctypes.c_int),
        ("source_hint", Location),
        ("target_hint", Location),
        ("flags", ctypes.c_uint),
    ]


class BatchCopyError(RuntimeError):
    """The driver refused a batch."""


class BatchCopy:
    """``cuMemcpyBatchAsync``, in the form of CUDA 13 or in that of 12.8, which has one argument more."""

    def __init__(self, function: ctypes._NamedFuncPointer, *, has_fail_index: bool) -> None:
        function.restype = ctypes.c_int
        self._function = function
        self._has_fail_index = has_fail_index
        self._attributes = Attributes(_IN_STREAM_ORDER, Location(0, 0), Location(0, 0), _PREFER_OVERLAP_WITH_COMPUTE)
        self._first = ctypes.c_size_t(0)

    @classmethod
    def find(cls, library: str = LIBRARY) -> BatchCopy | None:
        """The driver's function; None where there is no driver or an older one."""
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            return None
        for name, has_fail_index in (("cuMemcpyBatchAsync_v2", False), ("cuMemcpyBatchAsync", True)):
            try:
                return cls(driver[name], has_fail_index=has_fail_index)
            except AttributeError:
                continue
        return None

    def __call__(self, stream: int, to: Addresses, source: Addresses, num_bytes: Ints) -> None:
        """Submits all copies to a stream. Raises BatchCopyError."""
        arrays = [np.ascontiguousarray(array, dtype=np.uint64) for array in (to, source, num_bytes)]
        failed = ctypes.c_size_t(0)
        status = self._function(
            *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
            ctypes.c_size_t(len(num_bytes)),
            ctypes.byref(self._attributes),
            ctypes.byref(self._first),
            ctypes.c_size_t(1),
            *((ctypes.byref(failed),) if self._has_fail_index else ()),
            ctypes.c_void_p(stream),
        )
        if status != 0:
            raise BatchCopyError(f"the driver refused a batch of {len(num_bytes)} copies with error {status}")


def tolerate_captures(library: str = LIBRARY) -> bool:
    """Lets the calling thread, from now on, allocate, register and wait while another thread captures a CUDA graph.

    By CUDA's default such a call fails, and breaks the other thread's capture. Returns whether it was done; False: there is no driver.
    """
    try:
        exchange = ctypes.CDLL(library).cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return False
    return int(exchange(ctypes.byref(ctypes.c_int(_RELAXED)))) == 0
