"""Rows of chunks and where they belong, at random; and what the CPU makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtier.copy.cuda_rows import ROW_TOKEN, RowPlacement
from kvtier.copy.rope import NUMPY_OF_STORAGE, Pairs, Storage, TokenShift, from_floats, plain_frequencies, shift_keys, shift_table

Array = np.ndarray[Any, np.dtype[Any]]
SHIFTS = (7, -3, 100_000)


class RowCase:
    """One layer: ``source`` is ``[blocks, 2, heads, tokens, head_dim]``, ``keys`` and ``values`` are ``[heads, positions, head_dim]``.

    ``gap`` elements lie before each of them, so that wide accesses may be impossible.
    """

    def __init__(self, seed: int, *, pairs: Pairs, storage: Storage, num_heads: int, num_pairs: int, num_blocks: int, gap: int = 0) -> None:
        chance = np.random.default_rng(seed)
        self.pairs, self.storage = pairs, storage
        block_tokens, head_dim = 5, 2 * num_pairs
        num_rows, num_positions = num_blocks * block_tokens, num_blocks * block_tokens + 3
        self._chance = chance
        self.source = self._noise((num_blocks, 2, num_heads, block_tokens, head_dim), gap)
        self.keys, self.values = (self._noise((num_heads, num_positions, head_dim), gap) for _ in range(2))
        number = int(chance.integers(0, num_rows + 1))
        self._rows = chance.permutation(num_rows)[:number]
        self._positions = chance.permutation(num_positions)[:number]
        self._turns = chance.integers(-1, len(SHIFTS), number)
        self.table = np.ascontiguousarray(shift_table(plain_frequencies(10_000.0, head_dim), SHIFTS))
        self._blocks, self._tokens = self._rows // block_tokens, self._rows % block_tokens
        token_bytes = head_dim * self.source.itemsize
        offsets = self._blocks * self.source.strides[0] + self._tokens * token_bytes
        self.tokens = np.zeros(number, ROW_TOKEN)
        self.tokens["from"], self.tokens["to"], self.tokens["turn"] = offsets, self._positions * token_bytes, self._turns

    def expected(self) -> tuple[Array, Array]:
        """Keys and values afterwards, by the CPU's rotation."""
        keys, values = self.keys.copy(), self.values.copy()
        moved = np.ascontiguousarray(self.source[self._blocks, 0, :, self._tokens])[:, None]
        shifts = [TokenShift(index, 0, 1, int(turn)) for index, turn in enumerate(self._turns) if turn >= 0]
        if len(moved):
            shift_keys(moved, shifts, self.table, pairs=self.pairs, storage=self.storage)
        for index, position in enumerate(self._positions):
            keys[:, position] = moved[index, 0]
            values[:, position] = self.source[self._blocks[index], 1, :, self._tokens[index]]
        return keys, values

    def placement(self, *, source: int, keys: int, values: int, tokens: int, cos_sin: int) -> RowPlacement:
        """With everything at these addresses."""
        return RowPlacement(
            source=source,
            keys=keys,
            values=values,
            tokens=tokens,
            cos_sin=cos_sin,
            num_tokens=len(self.tokens),
            num_heads=self.source.shape[2],
            num_pairs=self.table.shape[1],
            value_offset=self.source.strides[1],
            source_head_stride=self.source.strides[2],
            target_head_stride=self.keys.strides[0],
        )

    def _noise(self, shape: tuple[int, ...], gap: int) -> Array:
        dtype = NUMPY_OF_STORAGE[self.storage]
        size = int(np.prod(shape))
        room = np.empty((gap + size) * dtype.itemsize + 64, np.uint8)
        start = -room.ctypes.data % 64 + gap * dtype.itemsize
        array = room[start : start + size * dtype.itemsize].view(dtype).reshape(shape)
        array[:] = from_floats(self._chance.standard_normal(shape).astype(np.float32), self.storage)
        return array
