"""The compiled core does what its pure-Python twins say, and refuses what they refuse."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import _core, _fallback, _native

ROOT = Path(__file__).resolve().parents[2]
PARENT = bytes(range(16))
CHAINS = [_core.chain_keys, _core.chain_keys_portably, _fallback.chain_keys]

EDGES = [0, 1, 255, 256, 2**15, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 1]
token_id = st.one_of(st.integers(0, 50_000), st.sampled_from(EDGES), st.integers(0, 2**32 - 1))


def sequences(ids: list[int]) -> list[Any]:
    """The same ids in every form that holds them."""
    forms: list[Any] = [ids, tuple(ids), array("I", ids), array("q", ids), np.array(ids, "u4"), np.array(ids, "i8"), np.array(ids, "u8")]
    forms += [
        memoryview(b"?" + array("I", ids).tobytes())[1:].cast("I"),
        memoryview(array("I", ids)),
        ListLike(ids),
        [np.int64(number) for number in ids],
    ]
    if max(ids, default=0) < 2**31:
        forms.append(np.array(ids, "i4"))
    return forms


class ListLike(Sequence[int]):
    """A sequence that is no list, as engines have them."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        return self._ids[index]


def test_the_core_is_in_use_and_was_built_from_these_sources() -> None:
    """A left-over build is told from a fresh one by the digest of its sources."""
    digest = hashlib.sha256()
    for path in (*sorted((ROOT / "csrc").glob("*.h")), *sorted((ROOT / "csrc").glob("*.cpp"))):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    assert digest.hexdigest()[:16] == _core.SOURCE_DIGEST
    assert _native.ABI_VERSION == _core.ABI_VERSION
    assert _native.is_native


def test_lists_are_read_directly_by_the_interpreters_that_were_looked_at() -> None:
    """The fast way of reading lists is on for CPython 3.11 to 3.14, and off elsewhere."""
    is_known = sys.implementation.name == "cpython" and (3, 11) <= sys.version_info < (3, 15)
    assert is_known == bool(_core.READS_LISTS_DIRECTLY)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_key_is_a_truncated_sha_256(chain: Callable[..., list[bytes]]) -> None:
    """key[i] = SHA-256(tokens || extra || key[i - 1])[:16], here spelled out and pinned to known bytes."""
    first = hashlib.sha256(bytes.fromhex("010000000200000000010000ffffffff") + b"extra" + PARENT).digest()[:16]
    second = hashlib.sha256(bytes.fromhex("05000000060000000700000000000080") + first).digest()[:16]
    keys = chain(PARENT, [9, 1, 2, 256, 2**32 - 1, 5, 6, 7, 2**31], 1, 2, 4, [b"extra", b""])
    assert [first, second] == keys
    assert "3d3985052c640c9ca1b5a33e0afa61a7" == keys[1].hex()


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 70), st.integers(0, 9), st.integers(0, 3), st.booleans())
def test_all_chains_agree(data: st.DataObject, block_tokens: int, num_blocks: int, first_token: int, has_extras: bool) -> None:
    """Fast, portable and Python give the same keys, from whatever holds the ids."""
    num_tokens = first_token + num_blocks * block_tokens
    ids = data.draw(st.lists(token_id, min_size=num_tokens, max_size=num_tokens + 3))
    extras = data.draw(st.lists(st.binary(max_size=150), min_size=num_blocks, max_size=num_blocks)) if has_extras else None
    expected = _fallback.chain_keys(PARENT, ids, first_token, num_blocks, block_tokens, extras)
    for sequence in sequences(ids):
        for chain in CHAINS:
            assert expected == chain(PARENT, sequence, first_token, num_blocks, block_tokens, extras)


@pytest.mark.parametrize(("block_tokens", "num_blocks"), [(1, 9000), (16, 1031), (31, 601), (256, 67), (5000, 5), (20_000, 3)])
def test_long_prompts_are_hashed_in_pieces_as_in_one(block_tokens: int, num_blocks: int) -> None:
    """Where the core cuts a prompt does not show in the keys."""
    ids = np.random.default_rng(3).integers(0, 2**32, block_tokens * num_blocks).tolist()
    extras = [bytes([number % 256]) * (number % 130) for number in range(num_blocks)]
    for extra in (None, extras):
        expected = _fallback.chain_keys(PARENT, ids, 0, num_blocks, block_tokens, extra)
        assert expected == _core.chain_keys(PARENT, ids, 0, num_blocks, block_tokens, extra)
        assert expected == _core.chain_keys_portably(PARENT, ids, 0, num_blocks, block_tokens, extra)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("bad", [-1, 2**32, 2**63, 2**64, -(2**70), np.int64(-5)])
def test_ids_that_do_not_fit_are_refused(chain: Callable[..., list[bytes]], bad: int) -> None:
    """An id outside [0, 2**32) would be cut to another one: refused, wherever it stands."""
    for position in (0, 7, 39):
        ids = list(range(40))
        ids[position] = bad
        with pytest.raises(ValueError, match=r"outside \[0, 2\*\*32\)"):
            chain(PARENT, ids, 0, 10, 4, None)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("ids", [np.array([1, 2**32]), np.array([1, -1]), np.array([-1, 1], "i4"), array("Q", [1, 2**63])], ids=repr)
def test_arrays_with_ids_that_do_not_fit_are_refused(chain: Callable[..., list[bytes]], ids: Any) -> None:
    """The range holds for arrays, too."""
    with pytest.raises(ValueError, match=r"outside \[0, 2\*\*32\)"):
        chain(PARENT, ids, 0, 1, 2, None)


BAD_CALLS: list[tuple[type[Exception], tuple[Any, ...]]] = [
    (ValueError, (b"short", [1, 2], 0, 1, 2, None)),
    (ValueError, (PARENT, [1, 2, 3], 0, 2, 2, None)),
    (ValueError, (PARENT, [1, 2, 3], 2, 1, 2, None)),
    (ValueError, (PARENT, (1, 2, 3), 2, 1, 2, None)),
    (ValueError, (PARENT, np.arange(3), 2, 1, 2, None)),
    (ValueError, (PARENT, [1, 2], -1, 1, 2, None)),
    (ValueError, (PARENT, [1, 2], 0, -1, 2, None)),
    (ValueError, (PARENT, [1, 2], 0, 1, 0, None)),
    (ValueError, (PARENT, [1, 2], 0, 2**40, 2**40, None)),
    (ValueError, (PARENT, [1, 2], 0, 1, 2, [b"", b""])),
    (TypeError, (PARENT, [1, 2.5], 0, 1, 2, None)),
    (TypeError, (PARENT, [1, None], 0, 1, 2, None)),
    (TypeError, (PARENT, "ab", 0, 1, 2, None)),
    (TypeError, (PARENT, b"abcdefgh", 0, 1, 2, None)),
    (TypeError, (PARENT, np.array([1.0, 2.0]), 0, 1, 2, None)),
    (TypeError, (PARENT, np.array([1, 2], "i2"), 0, 1, 2, None)),
    (TypeError, (PARENT, np.array([1, 2], ">i4"), 0, 1, 2, None)),
    (TypeError, (PARENT, np.array([[1, 2]]), 0, 1, 2, None)),
    (TypeError, (PARENT, {1, 2}, 0, 1, 2, None)),
    (TypeError, (PARENT, None, 0, 1, 2, None)),
    (TypeError, (None, [1, 2], 0, 1, 2, None)),
    (TypeError, (PARENT, [1, 2], 0, 1, 2, [5.0])),
    (BufferError, (PARENT, np.arange(8)[::2], 0, 1, 2, None)),
]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(("error", "arguments"), BAD_CALLS)
def test_bad_calls_raise_the_same_everywhere(chain: Callable[..., list[bytes]], error: type[Exception], arguments: tuple[Any, ...]) -> None:
    """The twins share their errors."""
    with pytest.raises((error, ValueError) if error is BufferError else error):  # numpy's BufferError is a ValueError
        chain(*arguments)


def test_a_list_that_shrinks_while_it_is_read_is_an_error() -> None:
    """An odd item's ``__index__`` may run any code; the core must not read what is gone."""

    class Vandal:
        def __index__(self) -> int:
            ids.clear()
            return 5

    for chain in (_core.chain_keys, _core.chain_keys_portably):
        ids: list[Any] = [10**6 + number for number in range(64)]
        ids[3] = Vandal()
        with pytest.raises(IndexError):
            chain(PARENT, ids, 0, 2, 32, None)


def test_nothing_leaks() -> None:
    """Every reference that a call takes is given back, on success and on failure; the keys are held by the result alone."""
    ids = [10**6 + number for number in range(300)]
    bad = [*ids[:-1], -1]
    extras = [bytes([number]) * 9 for number in range(3)]

    def counts(chain: Callable[..., list[bytes]]) -> list[int]:
        keys: list[bytes] = []
        for _ in range(50):
            keys = chain(PARENT, ids, 0, 3, 100, extras)
            chain(PARENT, tuple(ids), 0, 3, 100, None)
            with pytest.raises(ValueError, match="outside"):
                chain(PARENT, bad, 0, 3, 100, None)
        return [sys.getrefcount(item) for item in (*ids, ids, bad, PARENT, *extras, keys, *keys)]

    assert counts(_fallback.chain_keys) == counts(_core.chain_keys) == counts(_core.chain_keys_portably)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, in the checkout."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60, check=False)


STALE = "import sys, types; stale = types.ModuleType('kvtier._core'); stale.ABI_VERSION = {}; stale.__file__ = 'old.so'; "
STALE += "sys.modules['kvtier._core'] = stale; from kvtier import _native; print(_native.is_native)"


def test_a_core_of_another_version_is_not_used() -> None:
    """It is named in a warning, and refused where the core is required."""
    outcome = run_python(STALE.format(_native.ABI_VERSION + 1), KVTIER_REQUIRE_NATIVE="0")
    assert "False\n" == outcome.stdout
    assert "old.so is a left-over of another version of kvtier" in outcome.stderr
    required = run_python(STALE.format(_native.ABI_VERSION + 1), KVTIER_REQUIRE_NATIVE="1")
    assert 1 == required.returncode
    assert "ImportError: old.so is a left-over" in required.stderr


def test_without_a_core_the_twins_stand_in() -> None:
    """A missing core is no error unless it is required."""
    code = "import sys; sys.modules['kvtier._core'] = None; from kvtier import _native, _fallback as twins; "
    code += "print(_native.chain_keys is twins.chain_keys)"
    outcome = run_python(code, KVTIER_REQUIRE_NATIVE="0")
    assert ("True\n", "") == (outcome.stdout, outcome.stderr)
    assert "ImportError: kvtier's compiled core is required" in run_python(code, KVTIER_REQUIRE_NATIVE="1").stderr
