"""The kernels' text, compiled for the CPU and called through ctypes."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.copy.cuda_params import BulkRing

HERE = Path(__file__).resolve().parent
FLAGS = (
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-function",
    "-Wno-unknown-pragmas",
)
PLACE_KERNELS = tuple(f"place_{pairs}_{storage}" for pairs in ("neox", "interleaved") for storage in ("bf16", "fp16", "fp32"))
Record = np.ndarray[Any, np.dtype[np.void]]


class KernelsOnCpu:
    """What ``kernels.cpp`` exports."""

    def __init__(self, folder: Path) -> None:
        """Compiles into ``folder``. Raises CalledProcessError where the text does not compile."""
        path = folder / "kernels.so"
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([*compiler.split(), *FLAGS, str(HERE / "kernels.cpp"), "-o", str(path)], check=True)
        self._library = ctypes.CDLL(str(path))
        self._library.num_copy_items.restype = ctypes.c_longlong

    def paged_copy(self, params: Record, num_blocks: int = 2, num_threads: int = 64) -> None:
        """Runs the kernel on memory of the CPU."""
        self._library.run_paged_copy(_address(params), num_blocks, num_threads)

    def bulk_copy(self, params: Record, ring: BulkRing, num_blocks: int = 2, *, late_loads: bool, late_stores: bool) -> int:
        """Runs the kernel; returns what it did wrong, 0 for nothing."""
        shared_bytes = ctypes.c_longlong(ring.shared_bytes)
        threads = 32 * ring.num_warps
        return int(self._library.run_bulk_copy(_address(params), num_blocks, threads, shared_bytes, int(late_loads), int(late_stores)))

    def place_rows(self, kernel: str, params: Record, num_blocks: int = 2, num_threads: int = 32) -> None:
        """Runs one of ``PLACE_KERNELS``."""
        self._library.run_place_rows(PLACE_KERNELS.index(kernel), _address(params), num_blocks, num_threads)

    def items(self, params: Record) -> list[tuple[int, int, int]]:
        """Addresses and length of every chunk."""
        out = (ctypes.c_longlong * 3)()
        found = []
        for item in range(self._library.num_copy_items(_address(params))):
            self._library.copy_item(_address(params), ctypes.c_longlong(item), out)
            found.append(tuple(out))
        return found

    def split(self, left: int, right: int, num_bytes: int) -> tuple[int, ...]:
        """Width, head, words and tail."""
        out = (ctypes.c_longlong * 4)()
        self._library.split(ctypes.c_ulonglong(left), ctypes.c_ulonglong(right), ctypes.c_longlong(num_bytes), out)
        return tuple(out)

    def struct_layout(self, name: str) -> list[int]:
        """Offsets of a struct's members, then its size."""
        out = (ctypes.c_longlong * 32)()
        count = getattr(self._library, f"{name}_layout")(out)
        return list(out)[:count]


def _address(record: Record) -> ctypes.c_void_p:
    return ctypes.c_void_p(record.ctypes.data)
