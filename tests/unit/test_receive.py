"""Bytes from a socket into place, with a checksum on the way: the compiled core and its twin in Python."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvtier import _core, _fallback

Receive = Callable[[int, Sequence[bytearray], int, int, int], "bytes | None"]
RECEIVES = [_core.receive, _core.receive_portably, _fallback.receive]
SECOND_US = 1_000_000
BLOCK_BYTES = 1024
"""of the checksum"""

edges = st.builds(lambda blocks, more: blocks * BLOCK_BYTES + more, st.integers(1, 70), st.integers(-65, 65))
lengths = st.one_of(st.integers(241, 2000), edges, st.integers(1 << 19, (1 << 19) + 3 * BLOCK_BYTES))


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket to write to, and the one where that comes out."""
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@contextmanager
def sending(sock: socket.socket, data: bytes, cuts: Sequence[int]) -> Iterator[None]:
    """Another thread sends the bytes, in pieces that end at ``cuts``."""
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]

    def send() -> None:
        for start, end in pairwise(places):
            sock.sendall(data[start:end])

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize("receive", RECEIVES)
@given(
    lengths,
    st.lists(st.integers(0, 300), max_size=2),
    st.lists(st.integers(0, 3), max_size=2),
    st.lists(st.integers(0, 1 << 19), max_size=5),
    st.integers(0, 2**32),
)
def test_every_byte_lies_in_its_place(
    receive: Receive, length: int, before: list[int], behind: list[int], cuts: list[int], seed: int
) -> None:
    """Whatever the pieces are that it comes in: the buffers are filled in order, the checksum is right, no byte more is taken."""
    buffers = [bytearray(size) for size in (*before, length, *behind)]
    data = random.Random(seed).randbytes(sum(map(len, buffers)) + 1)
    with connected() as (left, right), sending(left, data, cuts):
        digest = receive(right.fileno(), buffers, len(before), 60 * SECOND_US, 60 * SECOND_US)
        assert data[:-1] == b"".join(buffers)
        assert data[-1:] == right.recv(2)
    assert xxhash.xxh3_128_digest(buffers[len(before)]) == digest


@pytest.mark.parametrize("receive", RECEIVES)
@pytest.mark.parametrize("times_us", [(20_000, 60 * SECOND_US), (2**62, 2**62)])
def test_a_sender_that_goes_is_told_from_one_that_is_silent(receive: Receive, times_us: tuple[int, int]) -> None:
    """None where the connection is closed in the middle; an error of its own where nothing comes; the longest times do not overflow."""
    buffer = bytearray(1000)
    with connected() as (left, right):
        left.sendall(bytes(500))
        if times_us[0] < SECOND_US:
            with pytest.raises(BlockingIOError):
                receive(right.fileno(), [buffer], 0, *times_us)
            left.sendall(bytes(500))
        left.shutdown(socket.SHUT_WR)
        assert receive(right.fileno(), [buffer], 0, *times_us) is None


@pytest.mark.parametrize("receive", RECEIVES)
@pytest.mark.parametrize("stall_us", [40_000, 60 * SECOND_US])
def test_a_sender_that_drips_is_late(receive: Receive, stall_us: int) -> None:
    """Bytes that come all the time, but too slowly, end with the whole time: also where that is over before a silence would be."""
    stop = threading.Event()
    with connected() as (left, right):

        def drip() -> None:
            while not stop.wait(0.01):
                left.send(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(TimeoutError):
            receive(right.fileno(), [bytearray(1000)], 0, stall_us, 100_000)
        stop.set()
        thread.join()


@pytest.mark.parametrize("receive", RECEIVES)
def test_no_time_at_all_is_late_at_once(receive: Receive) -> None:
    """Nothing is read then."""
    with connected() as (left, right):
        left.sendall(bytes(1000))
        with pytest.raises(TimeoutError):
            receive(right.fileno(), [bytearray(1000)], 0, SECOND_US, 0)
        assert bytes(1000) == right.recv(2000)


@pytest.mark.parametrize("receive", RECEIVES)
def test_what_is_refused(receive: Receive) -> None:
    """Errors that name the argument and the bound, before a byte is read."""
    with connected() as (left, right):
        left.sendall(bytes(1000))
        good = bytearray(241)
        for buffers, hashed, stall_us, total_us, words in [
            ([good] * 17, 0, 1, 1, "17 buffers, not up to 16"),
            ([good], 1, 1, 1, "buffer 1 of 1 is not there"),
            ([], 0, 1, 1, "buffer 0 of 0 is not there"),
            ([bytearray(240)], 0, 1, 1, "not of 241 bytes"),
            ([good], -1, 1, 1, "hashed is -1, not 0 or more"),
            ([good], 0, 0, 1, "stall_us is 0, not 1 or more"),
            ([good], 0, 1, -1, "total_us is -1, not 0 or more"),
        ]:
            with pytest.raises(ValueError, match=words):
                receive(right.fileno(), buffers, hashed, stall_us, total_us)
        with pytest.raises(BufferError):
            receive(right.fileno(), [good, bytes(3)], 0, 1, 1)  # type: ignore[list-item]
        with pytest.raises(OSError, match=rf"\[Errno {errno.EBADF}\]"):
            receive(-1, [good], 0, SECOND_US, SECOND_US)
        assert bytes(1000) == right.recv(2000)
