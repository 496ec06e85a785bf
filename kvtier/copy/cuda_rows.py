"""Puts rows of chunks into a prompt's KV on a CUDA device, turning keys on the way: the parameters of the kernel, and its launch.

``csrc/cuda/row_index.h`` declares the same structs; a test compares them member by member. ``kvtier.blend.placing`` does the same with
torch, to the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtier.copy.cuda_params import Record
from kvtier.copy.cuda_runtime import CudaRuntime, Launch
from kvtier.copy.rope import NUMPY_OF_STORAGE, Pairs, Storage

THREADS = 256
MAX_THREAD_BLOCKS = 1024
WIDE_PAIRS = 4
"""that one thread takes with wide accesses"""

ROW_TOKEN = np.dtype([("from", "<i8"), ("to", "<i8"), ("turn", "<i8")])
PLACE_ROWS = np.dtype(
    [
        *((name, "<u8") for name in ("source", "keys", "values", "tokens", "cos_sin")),
        *((name, "<i8") for name in ("num_tokens", "num_heads", "num_pairs", "value_offset")),
        *((name, "<i8") for name in ("source_head_stride", "target_head_stride", "pairs_per_item")),
    ]
)


@dataclass(frozen=True, slots=True)
class RowPlacement:
    """The chunks' rows of one layer, and where they go. Addresses of device memory, offsets and strides in bytes.

    A token's elements of one head lie side by side, ``2 * num_pairs`` of them. Targets do not overlap sources.
    """

    source: int
    """of the first key"""
    keys: int
    """of head 0, position 0 of the prompt's keys in this layer"""
    values: int
    tokens: int
    """of a table ``[num_tokens, 3]``, int64: offset of the token's key from ``source``, offset from ``keys`` and ``values``, and which
    row of ``cos_sin`` turns it (-1: none)"""
    cos_sin: int
    """of a table ``[rows, num_pairs, 2]``, fp32, as :func:`~kvtier.copy.rope.shift_table` makes it"""
    num_tokens: int
    num_heads: int
    num_pairs: int
    value_offset: int
    """from a key in the source to its value"""
    source_head_stride: int
    target_head_stride: int


def place_params(place: RowPlacement, storage: Storage) -> Record:
    """The kernel's parameters."""
    record = np.zeros(1, PLACE_ROWS)
    for name in place.__slots__:
        record[0][name] = getattr(place, name)
    record[0]["pairs_per_item"] = pairs_per_item(place, NUMPY_OF_STORAGE[storage].itemsize)
    return record


def pairs_per_item(place: RowPlacement, item_bytes: int) -> int:
    """:data:`WIDE_PAIRS` where so many neighbouring pairs can be read and written with wide accesses, else 1.

    Offsets of tokens are multiples of a token's bytes, and so need no look.
    """
    outer = (place.source, place.keys, place.values, place.value_offset, place.source_head_stride, place.target_head_stride)
    is_wide = place.num_pairs % WIDE_PAIRS == 0 and all(number % (WIDE_PAIRS * item_bytes) == 0 for number in outer)
    return WIDE_PAIRS if is_wide else 1


def launch_place_rows(runtime: CudaRuntime, stream: int, place: RowPlacement, *, pairs: Pairs, storage: Storage) -> None:
    """Starts the kernel. With no token it only sees to it that the kernel is compiled."""
    params = place_params(place, storage)
    items = place.num_tokens * place.num_heads * place.num_pairs // int(params[0]["pairs_per_item"])
    num_blocks = min(MAX_THREAD_BLOCKS, max(1, -(-items // THREADS)))
    runtime.launch(stream, Launch(f"place_{pairs}_{storage}", params, num_blocks, THREADS))
