"""A rotation by the difference makes a key what it would be at the other position."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.copy.rope import (
    NUMPY_OF_STORAGE,
    Pairs,
    TokenShift,
    from_floats,
    llama3_frequencies,
    plain_frequencies,
    shift_keys,
    shift_table,
    to_floats,
    yarn_frequencies,
)

HEAD_DIM = 64
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 8192}
YARN = {"factor": 4.0, "original_max_positions": 32_768}
FREQUENCIES = {
    "plain": plain_frequencies(10_000.0, HEAD_DIM),
    "llama3": llama3_frequencies(500_000.0, HEAD_DIM, **LLAMA3),  # type: ignore[arg-type]
    "yarn": yarn_frequencies(1_000_000.0, HEAD_DIM, **YARN),  # type: ignore[arg-type]
}


def at_position(keys: Any, position: int, frequencies: Any, *, pairs: Pairs, scale: float = 1.0) -> Any:
    """The formula of the paper, with complex numbers, in fp64."""
    turn = scale * np.exp(1j * position * frequencies.astype(np.float64))
    half = len(frequencies)
    left, right = (
        (keys[..., 0 : 2 * half : 2], keys[..., 1 : 2 * half : 2])
        if pairs == "interleaved"
        else (keys[..., :half], keys[..., half : 2 * half])
    )
    turned = (left + 1j * right) * turn
    out = keys.astype(np.float64).copy()
    if pairs == "interleaved":
        out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2] = turned.real, turned.imag
    else:
        out[..., :half], out[..., half : 2 * half] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("scale", [1.0, 1.1386])
@pytest.mark.parametrize("pairs", ["neox", "interleaved"])
@pytest.mark.parametrize("kind", FREQUENCIES)
def test_key_at_a_becomes_key_at_b(kind: str, pairs: Pairs, scale: float) -> None:
    """To fp32 accuracy, for near and far positions, backwards too; what the model multiplies keys by stays in them."""
    frequencies = FREQUENCIES[kind]
    keys = np.random.default_rng(1).standard_normal((1, 4, 2, HEAD_DIM))
    for a, b in ((0, 1), (5, 4000), (100_000, 3), (131_071, 130_000)):
        stored = at_position(keys, a, frequencies, pairs=pairs, scale=scale).astype(np.float32)
        shift_keys(stored, [TokenShift(0, 0, 4, 0)], shift_table(frequencies, [b - a]), pairs=pairs, storage="fp32")
        np.testing.assert_allclose(stored, at_position(keys, b, frequencies, pairs=pairs, scale=scale), rtol=0, atol=2e-6)


@given(st.lists(st.integers(-4000, 4000), min_size=1, max_size=20))
def test_many_moves_are_one_move(deltas: list[int]) -> None:
    """In fp32 the rounding of twenty moves stays that of twenty additions, whatever the distances."""
    keys = np.random.default_rng(2).standard_normal((1, 1, 1, HEAD_DIM)).astype(np.float32)
    moved = keys.copy()
    table = shift_table(FREQUENCIES["plain"], [*deltas, sum(deltas)])
    for row in range(len(deltas)):
        shift_keys(moved, [TokenShift(0, 0, 1, row)], table, pairs="neox", storage="fp32")
    shift_keys(keys, [TokenShift(0, 0, 1, len(deltas))], table, pairs="neox", storage="fp32")
    np.testing.assert_allclose(moved, keys, rtol=0, atol=1e-6 * (1 + len(deltas)))


def test_only_the_named_tokens_and_dimensions_change() -> None:
    """Other blocks, tokens before and behind, and dimensions behind the pairs keep their bits."""
    keys = np.random.default_rng(3).standard_normal((3, 8, 2, HEAD_DIM + 6)).astype(np.float32)
    before = keys.copy()
    shift_keys(keys, [TokenShift(1, 2, 3, 0)], shift_table(FREQUENCIES["plain"], [5]), pairs="neox", storage="fp32")
    changed = np.argwhere(keys != before)
    assert {1} == set(changed[:, 0])
    assert {2, 3, 4} == set(changed[:, 1])
    assert set(range(HEAD_DIM)) == set(changed[:, 3])


def test_a_difference_of_zero_keeps_every_bit() -> None:
    """For every storage."""
    for storage, dtype in NUMPY_OF_STORAGE.items():
        keys = np.random.default_rng(4).integers(0, 0x3F80, (1, 2, 1, HEAD_DIM)).astype(np.uint16).view("u2")
        keys = keys.view(np.float16) if storage == "fp16" else keys if storage == "bf16" else to_floats(keys)
        assert dtype == keys.dtype
        before = keys.tobytes()
        shift_keys(keys, [TokenShift(0, 0, 2, 0)], shift_table(FREQUENCIES["yarn"], [0]), pairs="neox", storage=storage)
        assert before == keys.tobytes()


def test_llama3_slows_the_slow_pairs_down() -> None:
    """Pairs that turn often over the original context are kept, those that turn less than once are divided, between they are blended."""
    plain = plain_frequencies(500_000.0, 128).astype(np.float64)
    scaled = llama3_frequencies(500_000.0, 128, **LLAMA3)  # type: ignore[arg-type]
    for pair, frequency in enumerate(plain):
        turns = 8192 * frequency / (2 * math.pi)
        if turns > 4:
            expected = frequency
        elif turns < 1:
            expected = frequency / 8
        else:
            smooth = (turns - 1) / 3
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert scaled[pair] == pytest.approx(expected, rel=1e-6)


def test_yarn_ramps_over_the_pairs() -> None:
    """The first pairs are kept, the last divided, and between them it goes down in equal steps of the pair's index."""
    plain = plain_frequencies(1_000_000.0, 128).astype(np.float64)
    share = (yarn_frequencies(1_000_000.0, 128, **YARN) / plain - 0.25) / 0.75  # type: ignore[arg-type]
    low = math.floor(128 * math.log(32_768 / (32 * 2 * math.pi)) / (2 * math.log(1_000_000)))
    high = math.ceil(128 * math.log(32_768 / (2 * math.pi)) / (2 * math.log(1_000_000)))
    assert [pytest.approx(1.0, abs=1e-6)] * low == share[:low].tolist()
    assert [pytest.approx(0.0, abs=1e-6)] * (64 - high) == share[high:].tolist()
    np.testing.assert_allclose(np.diff(share[low : high + 1]), -1 / (high - low), atol=1e-5)


def test_bf16_rounds_to_nearest_even() -> None:
    """Ties go to the even neighbour; infinities and NaN stay what they are."""
    cases = {0x3F80_8000: 0x3F80, 0x3F81_8000: 0x3F82, 0x3F80_8001: 0x3F81, 0x3F80_7FFF: 0x3F80, 0x7F80_0000: 0x7F80, 0x7F7F_FFFF: 0x7F80}
    values = np.array(list(cases), np.uint32).view(np.float32)
    assert list(cases.values()) == from_floats(values, "bf16").tolist()
    assert np.isnan(to_floats(from_floats(np.array([np.nan], np.float32), "bf16")))[0]
    assert np.isnan(to_floats(from_floats(np.array([0x7FFF_FFFF], np.uint32).view(np.float32), "bf16")))[0]


def test_bad_input_moves_nothing() -> None:
    """Block, tokens, row, type and number of dimensions are checked before the first key changes."""
    keys = np.ones((2, 4, 1, HEAD_DIM), np.float32)
    table = shift_table(FREQUENCIES["plain"], [1])
    good = TokenShift(0, 0, 4, 0)
    for bad in (TokenShift(2, 0, 1, 0), TokenShift(-1, 0, 1, 0), TokenShift(0, 3, 2, 0), TokenShift(0, -1, 1, 0), TokenShift(0, 0, 1, 1)):
        with pytest.raises(IndexError, match="outside"):
            shift_keys(keys, [good, bad], table, pairs="neox", storage="fp32")
    with pytest.raises(ValueError, match="must be uint16"):
        shift_keys(keys, [good], table, pairs="neox", storage="bf16")
    with pytest.raises(ValueError, match="32 pairs do not fit into 62"):
        shift_keys(keys[..., :62], [good], table, pairs="neox", storage="fp32")
    assert (keys == 1).all()
