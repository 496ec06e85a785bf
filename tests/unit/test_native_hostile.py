"""Every function of the compiled core with arguments that nobody should give it: an exception or a result, never the process's end."""

from __future__ import annotations

import contextlib
import mmap
import socket
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import _core

PAGE_BYTES = 4096
EDGES = [0, 1, -1, 2, 8, 64, 240, 241, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30]


class Liar(Sequence[int]):
    """A sequence that says it is longer than anything, or shorter than nothing."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self
        if index > 1000:
            raise IndexError(index)
        return 7


def buffers() -> list[Any]:
    """What is a buffer, what was one, and what looks like one."""
    closed, released = mmap.mmap(-1, PAGE_BYTES), memoryview(bytearray(8))
    closed.close()
    released.release()
    unaligned = np.frombuffer(b"\0" * 81, "u1")[1:]
    numbers = [
        np.arange(40),
        np.arange(40)[::-1],
        np.zeros((4, 4), "i8"),
        np.arange(40, dtype="u4"),
        np.zeros(4, ">i8"),
        unaligned.view("i8"),
    ]
    views = [memoryview(bytearray(400))[1:301], memoryview(bytearray(400))[::2], memoryview(b"z" * 400), memoryview(b"\0" * 64).cast("q")]
    others = [b"", b"x" * 16, b"y" * 15, bytearray(300), closed, released, array("q", [1, 2]), array("d", [1.0]), np.zeros(3, "i4,i8")]
    return [*numbers, *views, *others, mmap.mmap(-1, PAGE_BYTES), None, 5, "text", Liar(-1), Liar(3), Liar(2**62), range(100), (1, 2, 3)]


BUFFERS = buffers()
number = st.one_of(st.sampled_from(EDGES), st.integers(-3, 300), st.sampled_from([None, 1.5, "x", True]))
buffer = st.integers(0, len(BUFFERS) - 1).map(BUFFERS.__getitem__)  # by place: not all of them can be hashed
several = st.one_of(buffer, st.lists(buffer, max_size=18))
hostile = settings(max_examples=150, deadline=None)


def call(function: Callable[..., object], *arguments: object) -> None:
    """Any exception will do."""
    with contextlib.suppress(Exception):
        function(*arguments)


@hostile
@given(buffer, st.one_of(buffer, st.lists(number, max_size=70)), number, st.one_of(st.integers(-2, 40), st.none()), number, several)
def test_keys(parent: Any, token_ids: Any, first: Any, count: Any, block_tokens: Any, extras: Any) -> None:
    """Of anything."""
    for chain in (_core.chain_keys, _core.chain_keys_portably):
        call(chain, parent, token_ids, first, count, block_tokens, extras)
        call(chain, parent, token_ids, first, count, block_tokens, None)
    call(_core.chain_keys, b"p" * 16, token_ids, 0, 2**62, 1, None)


@hostile
@given(buffer, number, number, buffer, buffer, number, st.lists(number, max_size=3))
def test_copies(paged: Any, address: Any, num_bytes: Any, block_ids: Any, offsets: Any, way: Any, more: list[Any]) -> None:
    """None of these has a layout, so nothing is ever copied."""
    call(_core.copy_blocks, paged, address, num_bytes, block_ids, offsets, way, *more)


@hostile
@given(several, number, st.sampled_from([1, 0, -1, 2**63 - 1, None]), st.sampled_from([0, -1, 500, None]), st.integers(0, 2000))
def test_receiving(into: Any, hashed: Any, stall_us: Any, total_us: Any, num_sent: int) -> None:
    """From a socket that has less, or more."""
    left, right = socket.socketpair()
    with left, right:
        left.send(b"q" * num_sent)
        for receive in (_core.receive, _core.receive_portably):
            call(receive, right.fileno(), into, hashed, stall_us, total_us)
            call(receive, -1, into, hashed, stall_us, total_us)


@hostile
@given(st.sampled_from(["open", "closed", "none"]), number, number, number, several, number, number)
def test_rings(kind: str, token: Any, is_read: Any, offset: Any, into: Any, slot: Any, num_bytes: Any) -> None:
    """Open, closed, and none at all."""
    try:
        ring: Any = _core.ring_open(2)
    except OSError:
        return
    if kind != "open":
        _core.ring_close(ring)
    used = object() if kind == "none" else ring
    call(_core.ring_submit, used, token, is_read, -1, offset, into, slot)
    call(_core.ring_register, used, slot, 0, num_bytes)
    call(_core.ring_wake, used)
    call(_core.ring_wait, used, 0)
    call(_core.ring_wait, used, token if not isinstance(token, int) else -2)
    call(_core.ring_open, token if not isinstance(token, int) or token > PAGE_BYTES else 0)
    call(_core.ring_close, used)
    _core.ring_close(ring)
