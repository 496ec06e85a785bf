"""What the compiled core does, in Python: its specification, the oracle of its tests, and its stand-in where it is missing.

``kvtier._core`` has the same functions with the same results and the same exceptions, many times faster.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import operator
import os
import socket
import struct
import time
from collections.abc import Sequence
from errno import ENOSYS, ETIMEDOUT
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

KEY_BYTES = 16
TOKEN_ID_LIMIT = 2**32
INT64_BYTES = 8
INT64_LIMIT = 2**63
MAX_BUFFERS = 16
CHECKSUM_LEAST = 241
"""shorter input is hashed in another way, which the core does not know"""
LEAST_TIMEOUT_US = 1000
LONGEST_US = 86400 * 1_000_000


def chain_keys(
    parent: Buffer,
    token_ids: Sequence[int] | Buffer,
    first_token: int,
    num_blocks: int,
    block_tokens: int,
    extras: Sequence[Buffer] | None,
    /,
) -> list[bytes]:
    """The keys of ``num_blocks`` blocks of ``block_tokens`` tokens that start at position ``first_token`` of ``token_ids``.

    ``key[i] = SHA-256(tokens of block i as little-endian 32-bit words || extras[i] || key[i - 1])[:16]`` with
    ``key[-1] = parent``. The parent comes last, so that what lies before it can be hashed for several blocks at a time.

    Raises:
        ValueError: a token id outside [0, 2**32), too few tokens, not one extra per block, a parent that is not 16 bytes,
            or a negative count.
        TypeError: what should be an integer is none; or a buffer that is no one-dimensional array of 32- or 64-bit integers.
    """
    for name, value, least in (("first_token", first_token, 0), ("num_blocks", num_blocks, 0), ("block_tokens", block_tokens, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}, not {least} or more")
    key = bytes(parent)
    if len(key) != KEY_BYTES:
        raise ValueError(f"the parent key has {len(key)} bytes, not {KEY_BYTES}")
    if extras is not None and len(extras) != num_blocks:
        raise ValueError(f"extra bytes for {len(extras)} blocks of {num_blocks}")
    end = first_token + num_blocks * block_tokens
    packed = _pack_tokens(_tokens_between(token_ids, first_token, end), end - first_token)
    block_bytes = block_tokens * 4
    keys = []
    for block in range(num_blocks):
        digest = hashlib.sha256(packed[block * block_bytes : (block + 1) * block_bytes])
        if extras is not None:
            digest.update(extras[block])
        digest.update(key)
        key = digest.digest()[:KEY_BYTES]
        keys.append(key)
    return keys


def copy_blocks(
    paged: Buffer, arena_address: int, arena_bytes: int, block_ids: Buffer, arena_offsets: Buffer, to_arena: bool, num_threads: int = 1, /
) -> int:
    """Copies engine blocks from paged memory to the arena, or back. Returns how many bytes it copied.

    ``paged`` is an int64 array: the number of blocks, then base address, stride and length of each segment
    (:class:`~kvtier.layout.KVLayout`). Block ``block_ids[i]`` lies at ``arena_address + arena_offsets[i]``. Neither side may
    overlap the other. The compiled core shares large batches among up to ``num_threads`` threads, one per CPU at most; here
    it is one.

    Raises:
        IndexError: a block id or an arena offset is out of bounds. Nothing was copied.
        ValueError: ``paged`` is malformed, there are not as many block ids as offsets, two blocks would go to the same place,
            or their places in the arena overlap. Nothing was copied.
        TypeError: an argument is no one-dimensional contiguous array of int64.
    """
    words = _int64s("paged", paged)
    if len(words) < 4 or len(words) % 3 != 1 or not _paged_is_valid(words):
        raise ValueError("paged is [num_blocks, (base, stride, num_bytes) of each segment]")
    block_bytes = sum(words[3::3])
    if arena_address < 1 or arena_bytes < 0 or num_threads < 1:
        raise ValueError(f"an arena of {arena_bytes} bytes at address {arena_address}, {num_threads} threads")
    ids, offsets = _int64s("block_ids", block_ids), _int64s("arena_offsets", arena_offsets)
    if len(ids) != len(offsets):
        raise ValueError(f"{len(ids)} block_ids and {len(offsets)} arena_offsets")
    _check_range("block_ids", ids, words[0])
    _check_range("arena_offsets", offsets, max(0, arena_bytes - block_bytes + 1))
    _check_distances("block_ids", ids, 1, may_be_equal=to_arena)
    _check_distances("arena_offsets", offsets, block_bytes, may_be_equal=not to_arena)
    for block_id, offset in zip(ids, offsets, strict=True):
        in_arena = arena_address + offset
        for base, stride, num_bytes in zip(words[1::3], words[2::3], words[3::3], strict=True):
            in_pages = base + block_id * stride
            ctypes.memmove(in_arena if to_arena else in_pages, in_pages if to_arena else in_arena, num_bytes)
            in_arena += num_bytes
    return block_bytes * len(ids)


def receive(fd: int, buffers: Sequence[Buffer], hashed: int, stall_us: int, total_us: int, /) -> bytes | None:
    """Fills all of the buffers, one behind the other, from a connected blocking socket.

    Returns:
        the xxh3-128 of the buffer at ``hashed``, in canonical byte order; None where the other side closed the connection. The core
        takes it of each piece while that lies in the cache.

    Raises:
        BlockingIOError: no byte came for ``stall_us``. TimeoutError: not done within ``total_us``. OSError: of the socket. After any of
            these, and None, what the buffers hold is undefined.
        ValueError: more than 16 buffers, or none at ``hashed`` of 241 bytes or more.
        BufferError: a buffer that is read-only.
    """
    import xxhash  # noqa: PLC0415 - ``import kvtier`` does without it

    views = [memoryview(buffer).cast("B") for buffer in buffers]
    for name, value, least in (("fd", fd, -1), ("hashed", hashed, 0), ("stall_us", stall_us, 1), ("total_us", total_us, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}, not {least} or more")
    if len(views) > MAX_BUFFERS:
        raise ValueError(f"{len(views)} buffers, not up to {MAX_BUFFERS}")
    if any(view.readonly for view in views):
        raise BufferError("a buffer is read-only")
    if hashed >= len(views) or len(views[hashed]) < CHECKSUM_LEAST:
        raise ValueError(f"buffer {hashed} of {len(views)} is not there, or not of {CHECKSUM_LEAST} bytes")
    payload = views[hashed]
    views = [view for view in views if view]
    end = time.monotonic() + min(total_us, LONGEST_US) / 1e6
    with socket.socket(fileno=os.dup(fd)) as sock:
        while views:
            left_us = int((end - time.monotonic()) * 1e6)
            if left_us <= 0:
                raise TimeoutError(ETIMEDOUT, os.strerror(ETIMEDOUT))
            seconds, rest_us = divmod(min(max(min(stall_us, left_us), LEAST_TIMEOUT_US), LONGEST_US), 1_000_000)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", seconds, rest_us))
            try:
                count = sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            except BlockingIOError as error:
                if left_us <= stall_us:
                    raise TimeoutError(ETIMEDOUT, os.strerror(ETIMEDOUT)) from error
                raise
            if not count:
                return None
            views = rest_of(views, count)
    return xxhash.xxh3_128_digest(payload)


def ring_open(num_entries: int, /) -> object:  # noqa: ARG001 - as below: the signatures of the core
    """An io_uring. Not in Python; use threads.

    Raises:
        OSError: ENOSYS, always.
    """
    raise OSError(ENOSYS, "io_uring takes the compiled core")


def ring_register(ring: object, slot: int, address: int, num_bytes: int, /) -> None:  # noqa: ARG001
    """Lets the kernel know memory that a ring will use. There is no ring here to call it with; so below."""
    raise OSError(ENOSYS, "io_uring takes the compiled core")


def ring_submit(ring: object, token: int, is_read: bool, fd: int, offset: int, buffers: Sequence[Buffer], slot: int, /) -> None:  # noqa: ARG001
    """Starts to move bytes between a file and buffers, which stay the caller's duty until ``token`` comes out of ``ring_wait``."""
    raise OSError(ENOSYS, "io_uring takes the compiled core")


def ring_wake(ring: object, /) -> None:  # noqa: ARG001
    """Has ``ring_wait`` return, with token 0."""
    raise OSError(ENOSYS, "io_uring takes the compiled core")


def ring_wait(ring: object, timeout_us: int, /) -> list[tuple[int, int]]:  # noqa: ARG001
    """Tokens of what is over, each with the bytes moved or a negative errno; waits for the first (-1: without end)."""
    raise OSError(ENOSYS, "io_uring takes the compiled core")


def ring_close(ring: object, /) -> None:  # noqa: ARG001
    """Frees a ring on which nothing runs."""
    raise OSError(ENOSYS, "io_uring takes the compiled core")


def rest_of(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of views after the first ``count`` bytes."""
    rest = list(views)
    while rest and count >= len(rest[0]):
        count -= len(rest.pop(0))
    if count:
        rest[0] = rest[0][count:]
    return rest


def _tokens_between(token_ids: Sequence[int] | Buffer, first: int, end: int) -> Sequence[int]:
    if isinstance(token_ids, list):
        return token_ids[first:end]
    try:
        view = memoryview(token_ids)  # type: ignore[arg-type]
    except TypeError:
        return list(token_ids[first:end])  # type: ignore[index]
    if not view.c_contiguous:
        raise BufferError("token ids must be contiguous")
    if view.format.lstrip("@=<") not in tuple("ilqILQ") or view.ndim != 1:
        raise TypeError(f"token ids are 32- or 64-bit integers in one dimension, not {view.format!r} in {view.ndim}")
    return view[first:end].tolist()


def _pack_tokens(tokens: Sequence[int], expected: int) -> bytes:
    if len(tokens) != expected:
        raise ValueError(f"{expected} tokens were asked for, {len(tokens)} are there")
    values = [operator.index(token) for token in tokens]
    for position, value in enumerate(values):
        if not 0 <= value < TOKEN_ID_LIMIT:
            raise ValueError(f"token id {value} at position {position} is outside [0, 2**32)")
    return struct.pack(f"<{expected}I", *values)


def _int64s(name: str, values: Buffer) -> list[int]:
    view = memoryview(values)
    if view.format.lstrip("@=<") not in ("q", "l") or view.itemsize != INT64_BYTES or view.ndim != 1 or not view.c_contiguous:
        raise TypeError(f"{name} must be a one-dimensional contiguous array of int64")
    return view.tolist()


def _paged_is_valid(words: list[int]) -> bool:
    segments = zip(words[1::3], words[2::3], words[3::3], strict=True)
    is_valid = words[0] > 0 and all(base > 0 and num_bytes > 0 and stride >= num_bytes for base, stride, num_bytes in segments)
    ends = [base + stride * words[0] for base, stride in zip(words[1::3], words[2::3], strict=True)]
    return is_valid and max(sum(words[3::3]), *ends) < INT64_LIMIT


def _check_range(name: str, values: list[int], end: int) -> None:
    for index, value in enumerate(values):
        if not 0 <= value < end:
            raise IndexError(f"{name}[{index}] is {value}, outside [0, {end})")


def _check_distances(name: str, values: list[int], distance: int, *, may_be_equal: bool) -> None:
    order = sorted(range(len(values)), key=values.__getitem__)
    for left, right in itertools.pairwise(order):
        gap = values[right] - values[left]
        if gap < distance and not (gap == 0 and may_be_equal):
            raise ValueError(f"{name}[{left}] is {values[left]} and {name}[{right}] is {values[right]}: not {distance} apart")
