"""Moves keys to other positions on a CUDA device. ``rope`` is the twin on the CPU and says what a shift is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvtier.copy.cuda_copier import upload
from kvtier.copy.cuda_params import RopePlace, rope_pairs_per_item, rope_shifts
from kvtier.copy.cuda_runtime import CudaRuntime, DeviceEvent, DeviceMemory, Launch
from kvtier.copy.rope import NUMPY_OF_STORAGE, Floats, Pairs, Storage, TokenShift, check_shifts

THREADS = 256


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
        self._stream = runtime.open_stream(is_urgent=False)
        self._tables: list[tuple[DeviceEvent, DeviceMemory]] = []
        """of rotations that may be running"""
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
        self._forget_tables()
        cos_sin = upload(np.ascontiguousarray(table), self._runtime, self._stream)
        for params in rope_shifts(place, [shift for shift in shifts if shift.num_tokens], cos_sin=cos_sin.address, num_pairs=num_pairs):
            self._runtime.launch(compute_stream, Launch(self._kernel, params, self._num_blocks, THREADS))
        event = self._runtime.record(compute_stream)
        self._tables.append((event, cos_sin))
        return event

    def close(self) -> None:
        """Waits for running rotations and gives device memory back. Idempotent."""
        for event, table in self._tables:
            event.wait()
            table.close()
        self._tables.clear()
        self._bases.close()

    def _forget_tables(self) -> None:
        while self._tables and self._tables[0][0].done():
            self._tables.pop(0)[1].close()
