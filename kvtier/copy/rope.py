"""Moves keys to other positions: one rotation by the position difference, in fp32. The CPU twin of the CUDA kernels.

Rotary embeddings turn each pair of dimensions by position * frequency. So a key that was computed at one position becomes
that of another one by turning it by the difference alone; what a model multiplies keys by (YaRN's attention factor) stays
in them. Angles are computed in fp64 on the host and their cosines and sines rounded once, so large differences cost no accuracy,
and repeated moves do not add up the rounding of a way back and forth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]
Keys = np.ndarray[Any, np.dtype[Any]]
Pairs = Literal["neox", "interleaved"]
"""which dimensions form a pair: i and i + rotary_dim / 2 (neox: Llama, Qwen), or 2i and 2i + 1 (interleaved: GPT-J, DeepSeek)"""

Storage = Literal["bf16", "fp16", "fp32"]
NUMPY_OF_STORAGE: Mapping[Storage, np.dtype[Any]] = {
    "bf16": np.dtype(np.uint16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
"""numpy has no bf16: its bits are taken as uint16"""


@dataclass(frozen=True, slots=True)
class TokenShift:
    """Tokens of one block that move by the same number of positions."""

    block_id: int
    first_token: int
    num_tokens: int
    row: int
    """of the table that :func:`shift_table` makes"""


def plain_frequencies(theta: float, rotary_dim: int) -> Floats:
    """Radians per position of each pair, as the original paper and most models have them."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return _floats(1.0 / np.power(np.float32(theta), exponents))


def llama3_frequencies(
    theta: float, rotary_dim: int, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_positions: int
) -> Floats:
    """Llama 3.1 and later: slow pairs are slowed down by ``factor``, fast ones are kept, those between are blended."""
    plain = plain_frequencies(theta, rotary_dim)
    turns = original_max_positions * plain / np.float32(2 * math.pi)
    """of each pair over the original context"""
    blend = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0).astype(np.float32)
    return _floats((1.0 - blend) * plain / np.float32(factor) + blend * plain)


def yarn_frequencies(
    theta: float, rotary_dim: int, *, factor: float, original_max_positions: int, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> Floats:
    """YaRN (Qwen, DeepSeek): pairs that turn often are kept, those seldom are slowed down, with a ramp over their indices."""

    def pair_with(turns: float) -> float:
        return rotary_dim * math.log(original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(beta_fast)), 0)
    high: float = min(math.ceil(pair_with(beta_slow)), rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rotary_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0).astype(np.float32)
    plain = plain_frequencies(theta, rotary_dim)
    return _floats(plain / np.float32(factor) * ramp + plain * (1.0 - ramp))


def _floats(values: np.ndarray[Any, Any]) -> Floats:
    return values.astype(np.float32)


def shift_table(frequencies: Floats, deltas: Sequence[int]) -> Floats:
    """Cosine and sine of every pair for each position difference: ``[len(deltas), num_pairs, 2]``."""
    angles = np.asarray(deltas, dtype=np.float64)[:, None] * frequencies.astype(np.float64)[None, :]
    return np.stack((np.cos(angles), np.sin(angles)), axis=-1).astype(np.float32)


def shift_keys(keys: Keys, shifts: Sequence[TokenShift], table: Floats, *, pairs: Pairs, storage: Storage) -> None:
    """Rotates keys in place.

    Args:
        keys: ``[num_blocks, block_tokens, num_heads, head_dim]`` with any strides, of the type that stands for ``storage``
        shifts: which tokens; no token twice
        table: from :func:`shift_table`; dimensions behind its pairs are left alone

    Raises:
        ValueError: ``keys`` is not of this form.
        IndexError: a shift names a block, token or row that does not exist. Nothing was moved then.
    """
    num_pairs = table.shape[1]
    _check_keys(keys, num_pairs, storage)
    check_shifts(shifts, num_blocks=keys.shape[0], block_tokens=keys.shape[1], num_rows=table.shape[0])
    first, second = (slice(0, num_pairs), slice(num_pairs, 2 * num_pairs))
    if pairs == "interleaved":
        first, second = (slice(0, 2 * num_pairs, 2), slice(1, 2 * num_pairs, 2))
    for shift in shifts:
        part = keys[shift.block_id, shift.first_token : shift.first_token + shift.num_tokens]
        left, right = to_floats(part[..., first]), to_floats(part[..., second])
        cosine, sine = table[shift.row, :, 0], table[shift.row, :, 1]
        part[..., first] = from_floats(left * cosine - right * sine, storage)
        part[..., second] = from_floats(right * cosine + left * sine, storage)


def check_shifts(shifts: Sequence[TokenShift], *, num_blocks: int, block_tokens: int, num_rows: int) -> None:
    """Raises IndexError, naming the value and the bound, where a shift is outside of what there is."""
    for shift in shifts:
        if not 0 <= shift.block_id < num_blocks:
            raise IndexError(f"block id {shift.block_id} is outside [0, {num_blocks})")
        if shift.first_token < 0 or shift.num_tokens < 0 or shift.first_token + shift.num_tokens > block_tokens:
            raise IndexError(f"{shift.num_tokens} tokens from {shift.first_token} on are outside [0, {block_tokens})")
        if not 0 <= shift.row < num_rows:
            raise IndexError(f"row {shift.row} of the table is outside [0, {num_rows})")


def _check_keys(keys: Keys, num_pairs: int, storage: Storage) -> None:
    if keys.ndim != 4 or keys.dtype != NUMPY_OF_STORAGE[storage]:
        raise ValueError(f"keys must be {NUMPY_OF_STORAGE[storage]} with 4 dimensions for {storage}, not {keys.dtype} {keys.shape}")
    if 2 * num_pairs > keys.shape[3]:
        raise ValueError(f"{num_pairs} pairs do not fit into {keys.shape[3]} dimensions")


def to_floats(stored: Keys) -> Floats:
    """fp32 of stored elements; uint16 is taken as bf16."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def from_floats(values: Floats, storage: Storage) -> Keys:
    """What is stored for fp32 values: to nearest, ties to even."""
    if storage != "bf16":
        with np.errstate(over="ignore"):
            converted: Keys = values.astype(NUMPY_OF_STORAGE[storage])
        return converted
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    result: Keys = np.where(np.isnan(values), bits >> 16 | np.uint32(0x40), rounded).astype(np.uint16)
    return result
