"""Single tokens' KV in vLLM's paged memory, whatever the attention backend's layout is.

Written by the backend's own ``do_kv_cache_update``. Where the bytes of a block then lie is found out once by writing numbered values
into a block of our own, and that is how tokens are read. So no layout is written down here: head-major, token-major, K transposed
inside the block (as on a CPU) or interleaved are all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvtier.blend.model import LayerKV
from kvtier.connectors.vllm.kv_memory import by_blocks
from kvtier.errors import BlendRefusedError, RefusalReason

_BASE = 128
"""numbers up to which every kind of KV memory is exact"""


class PagedTokens:
    """Reads and writes the KV of a request's tokens in its engine blocks. One thread, the worker's.

    Args:
        attentions: vLLM's attention of each layer, whose KV memory has been registered
        num_blocks: engine blocks there are
        block_tokens: tokens of one

    Raises:
        BlendRefusedError: the backend writes no KV outside of its forward pass, or not every element lies exactly once in its block.
        UnsupportedModelError: no dimension of a layer's memory counts the blocks. Nothing has been written then.
    """

    def __init__(self, attentions: Sequence[Any], num_blocks: int, block_tokens: int) -> None:
        self._attentions = attentions
        self._num_blocks = num_blocks
        self.block_tokens = block_tokens
        first = attentions[0]
        self._num_heads, self._head_dim = int(first.num_kv_heads), int(first.head_size)
        memory = first.kv_cache
        if not hasattr(first.impl, "do_kv_cache_update") or memory.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            text = f"{type(first.impl).__name__} with KV of {memory.dtype}: single tokens cannot be written"
            raise BlendRefusedError(RefusalReason.MODEL, text)
        self.dtype: torch.dtype = memory.dtype
        self._places = self._find_places()
        """of each element of ``[2, heads, tokens, head_dim]``: where it lies in a block"""

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """``(layers, KV heads, head_dim)``"""
        return len(self._attentions), self._num_heads, self._head_dim

    def write(self, layer: int, kv: LayerKV, first: int, block_ids: torch.Tensor) -> None:
        """Writes the KV of a prompt's tokens from ``first`` on into its blocks; ``kv`` is of these tokens alone."""
        positions = torch.arange(first, first + kv.keys.shape[1], device=block_ids.device)
        slots = block_ids[positions // self.block_tokens] * self.block_tokens + positions % self.block_tokens
        attention = self._attentions[layer]
        self._update(attention, attention.kv_cache, kv.keys, kv.values, slots)

    def read(self, layer: int, first: int, end: int, block_ids: torch.Tensor) -> LayerKV:
        """The KV of a request's tokens ``[first, end)`` in one layer, in memory of its own."""
        first_block = first // self.block_tokens
        skipped = first_block * self.block_tokens
        wanted = block_ids[first_block : -(-end // self.block_tokens)]
        flat = self._by_block(layer)[wanted].flatten(1)
        rows = flat[:, self._places.flatten()].view(len(wanted), *self._places.shape)
        both = rows.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, first - skipped : end - skipped]
        return LayerKV(both[0], both[1])

    def _update(self, attention: Any, memory: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        rows = (part.transpose(0, 1).contiguous() for part in (keys, values))
        attention.impl.do_kv_cache_update(attention, *rows, memory, slots)

    def _by_block(self, layer: int) -> torch.Tensor:
        """The layer's memory with the dimension first that counts the engine's blocks."""
        blocks, dim = by_blocks(str(layer), self._attentions[layer].kv_cache, self._num_blocks)
        return blocks.movedim(dim, 0)

    def _find_places(self) -> torch.Tensor:
        """Writes every element's number, digit by digit, and reads which element lies where."""
        attention = self._attentions[0]
        memory = attention.kv_cache
        _, dim = by_blocks("0", memory, self._num_blocks)
        kernel_blocks = memory.shape[dim] // self._num_blocks
        block = torch.zeros_like(memory.narrow(dim, 0, kernel_blocks), memory_format=torch.preserve_format)
        shape = (2, self._num_heads, self.block_tokens, self._head_dim)
        count = 2 * self._num_heads * self.block_tokens * self._head_dim
        numbers = torch.arange(count, device=memory.device).view(shape)
        slots = torch.arange(self.block_tokens, device=memory.device)
        found = torch.zeros(block.numel(), dtype=torch.long, device=memory.device)
        factor = 1
        while factor < count:
            digits = (numbers // factor % _BASE).to(self.dtype)
            self._update(attention, block, digits[0], digits[1], slots)
            found += block.unflatten(dim, (1, kernel_blocks)).movedim(dim, 0).flatten().long() * factor
            factor *= _BASE
        if block.numel() != count or not torch.equal(found.sort().values, numbers.flatten()):
            text = f"{type(attention.impl).__name__}: the elements of a block are not where they can be found"
            raise BlendRefusedError(RefusalReason.MODEL, text)
        return found.argsort().view(shape)
