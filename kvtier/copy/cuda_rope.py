"""Moves keys to other positions on a CUDA device. ``rope`` is the twin on the CPU and says what a shift is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvtier.copy.cuda_copier import put, upload
from kvtier.copy.cuda_params import RopePlace, rope_pairs_per_item, rope_shifts
from kvtier.copy.cuda_runtime import CudaRuntime, DeviceEvent, DeviceMemory, Launch
from kvtier.copy.rope import NUMPY_OF_STORAGE, Floats, Pairs, Storage, TokenShift, check_shifts

THREADS = 256
MIN_TABLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class KeyLayout:
    """Where the keys of all layers lie on a device.

    Raises:
        ValueError: a number that must be positive is not, or there is no layer; names it.
    """

    addresses: tuple[int, ...]
    """of each layer's key of block 0, token 0, head 0, dimension 0"""
    num_blocks: int
    block_tokens: int
    num_heads: int
    head_dim: int
    strides: tuple[int, int, int, int]
    """bytes from one block, token, head and dimension to the next"""

    def __post_init__(self) -> None:
        numbers = {"num_blocks": self.num_blocks, "block_tokens": self.block_tokens, "num_heads": self.num_heads, "head_dim": self.head_dim}
        for name, value in {**numbers, "number of layers": len(self.addresses)}.items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; allowed: more than 0")


class CudaKeyShifter:
    """Rotates keys in place, in fp32, with the same bits as :func:`~kvtier.copy.rope.shift_keys`.

    Args:
        num_blocks: thread blocks of a launch: so many multiprocessors are busy with it
    """

    def __init__(self, keys: KeyLayout, runtime: CudaRuntime, *, pairs: Pairs, storage: Storage, num_blocks: int = 64) -> None:
        self._keys = keys
        self._runtime = runtime
        self._kernel = f"rope_{pairs}_{storage}"
        self._item_bytes = NUMPY_OF_STORAGE[storage].itemsize
        self._num_blocks = num_blocks
        self._stack = contextlib.ExitStack()
        self._stream = runtime.open_stream(is_urgent=False)
        self._stack.callback(runtime.close_stream, self._stream)
        self._running: list[tuple[DeviceEvent, int, DeviceMemory]] = []
        """rotations that may be running: their end, and the size and place of their table"""
        self._spare: list[tuple[int, DeviceMemory]] = []
        """tables whose rotation is over. Giving memory back waits for all that the device does, so they are used again."""
        self._bases = upload(np.array(keys.addresses, np.uint64), runtime, self._stream)

    def shift(self, shifts: Sequence[TokenShift], table: Floats, *, compute_stream: int) -> DeviceEvent:
        """Starts the rotation, on the engine's stream and so in order with what it computes.

        Keeps the caller waiting for work of its own, not for that stream.

        Raises:
            IndexError: a shift names a block, token or row that does not exist. Nothing is moved then.
            ValueError: there are more pairs than the keys have dimensions for.
        """
        keys, num_pairs = self._keys, table.shape[1]
        if 2 * num_pairs > keys.head_dim:
            raise ValueError(f"{num_pairs} pairs do not fit into {keys.head_dim} dimensions")
        check_shifts(shifts, num_blocks=keys.num_blocks, block_tokens=keys.block_tokens, num_rows=table.shape[0])
        wide = rope_pairs_per_item(keys.addresses, keys.strides, num_pairs=num_pairs, item_bytes=self._item_bytes)
        place = RopePlace(self._bases.address, len(keys.addresses), keys.num_heads, keys.strides, wide)
        num_bytes, cos_sin = self._room(table.nbytes)
        put(np.ascontiguousarray(table), cos_sin.address, self._runtime, self._stream)
        for params in rope_shifts(place, [shift for shift in shifts if shift.num_tokens], cos_sin=cos_sin.address, num_pairs=num_pairs):
            self._runtime.launch(compute_stream, Launch(self._kernel, params, self._num_blocks, THREADS))
        event = self._runtime.record(compute_stream)
        self._running.append((event, num_bytes, cos_sin))
        return event

    def close(self) -> None:
        """Waits for running rotations and gives device memory back. Idempotent."""
        for event, _, _ in self._running:
            event.wait()
        for _, table in [*self._spare, *((size, table) for _, size, table in self._running)]:
            table.close()
        self._spare.clear()
        self._running.clear()
        self._bases.close()
        self._stack.close()

    def _room(self, num_bytes: int) -> tuple[int, DeviceMemory]:
        """Room for a table, and its size, which is a power of two."""
        while self._running and self._running[0][0].done():
            self._spare.append(self._running.pop(0)[1:])
        for index, (size, _) in enumerate(self._spare):
            if size >= num_bytes:
                return self._spare.pop(index)
        size = max(MIN_TABLE_BYTES, 1 << (num_bytes - 1).bit_length())
        return size, self._runtime.allocate(size)
