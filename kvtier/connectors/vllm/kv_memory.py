"""vLLM's KV memory of one layer, divided into the scheduler's blocks."""

from __future__ import annotations

import torch

from kvtier.errors import UnsupportedModelError


def by_blocks(name: str, tensor: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, int]:
    """The tensor with a dimension that counts the scheduler's blocks, and which one that is.

    Some attention kernels have smaller blocks of their own: a block of the scheduler is then several neighbours of theirs.

    Raises:
        UnsupportedModelError: none does.
    """
    for dim, size in enumerate(tensor.shape[:2]):  # what lies behind may have as many places by chance
        if size == num_blocks:
            return tensor, dim
        if size and size % num_blocks == 0:
            return tensor.unflatten(dim, (num_blocks, size // num_blocks)), dim
    raise UnsupportedModelError(f"layer {name}: no dimension of {tuple(tensor.shape)} is the number of blocks, {num_blocks}")
