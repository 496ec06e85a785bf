"""Single tokens in vLLM's paged memory: written by its own kernel, wherever that puts them, and read again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from kvtier.blend.model import LayerKV
from kvtier.connectors.vllm.paged_tokens import PagedTokens
from kvtier.errors import UnsupportedModelError

pytestmark = [pytest.mark.engine, pytest.mark.every_version]
HEADS, HEAD_DIM, NUM_BLOCKS, BLOCK_TOKENS = 2, 32, 6, 64
NOBODYS = 12345.0


class Backend:
    """vLLM's on a CPU, as far as it writes KV."""

    attn_type = AttentionType.DECODER
    kv_cache_dtype = "auto"
    isa = "vec"
    do_kv_cache_update = CPUAttentionBackendImpl.do_kv_cache_update


class KeysFirst(Backend):
    """One whose memory is ``[keys and values, blocks, tokens, heads, head_dim]``."""

    def do_kv_cache_update(self, _layer: Any, keys: torch.Tensor, values: torch.Tensor, memory: torch.Tensor, slots: torch.Tensor) -> None:
        """Token by token."""
        for kind, rows in enumerate((keys, values)):
            memory[kind, slots // memory.shape[2], slots % memory.shape[2]] = rows


def attention_of(memory: torch.Tensor) -> Any:
    """A layer with this KV memory."""
    scales = {"_k_scale_float": 1.0, "_v_scale_float": 1.0}
    return SimpleNamespace(
        impl=Backend() if memory.dim() == 4 else KeysFirst(), kv_cache=memory, num_kv_heads=HEADS, head_size=HEAD_DIM, isa="vec", **scales
    )


def memory_of(kernel_tokens: int, num_blocks: int = NUM_BLOCKS) -> torch.Tensor:
    """As vLLM views it for kernels whose blocks have so many tokens: ``[blocks, heads, tokens, K and V]``."""
    return torch.zeros(num_blocks * BLOCK_TOKENS // kernel_tokens, HEADS, kernel_tokens, 2 * HEAD_DIM)


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What lies behind the memory that is made to find out about the layout."""
    behind: list[torch.Tensor] = []
    real = torch.full

    def in_the_middle(like: torch.Tensor, **_options: Any) -> torch.Tensor:
        around = real((8 * like.numel(),), NOBODYS)
        behind.append(around[like.numel() :])
        return around[: like.numel()].view(like.shape).zero_()

    monkeypatch.setattr(torch, "zeros_like", in_the_middle)
    return behind


@pytest.mark.parametrize("has_keys_first", [False, True])
@pytest.mark.parametrize("kernel_tokens", [64, 32])
def test_what_was_written_is_read(guards: list[torch.Tensor], kernel_tokens: int, has_keys_first: bool) -> None:
    """Where kernels have smaller blocks than the scheduler, too; nothing is written but a request's own tokens."""
    memory = memory_of(kernel_tokens)
    if has_keys_first:
        memory = torch.zeros(2, len(memory), kernel_tokens, HEADS, HEAD_DIM)
    tokens = PagedTokens([attention_of(memory)], NUM_BLOCKS, BLOCK_TOKENS)
    assert bool((guards[0] == NOBODYS).all())
    block_ids = torch.tensor([4, 1, 3])
    kv = LayerKV(*torch.randn(2, HEADS, 100, HEAD_DIM))
    tokens.write(0, kv, 37, block_ids)
    for first, end in ((37, 137), (64, 128), (90, 91), (100, 130)):
        for expected, found in zip(kv, tokens.read(0, first, end, block_ids), strict=True):
            assert torch.equal(expected[:, first - 37 : end - 37], found)
    assert not tokens.read(0, 0, 37, block_ids).keys.any()
    by_block = memory.unflatten(int(has_keys_first), (NUM_BLOCKS, -1))
    assert not by_block.index_select(int(has_keys_first), torch.tensor([0, 2, 5])).any()


def test_memory_without_blocks_is_refused_before_anything_is_written(guards: list[torch.Tensor]) -> None:
    """One more block than the engine says there is."""
    memory = memory_of(64, NUM_BLOCKS + 1)
    with pytest.raises(UnsupportedModelError, match="number of blocks, 6"):
        PagedTokens([attention_of(memory)], NUM_BLOCKS, BLOCK_TOKENS)
    assert not guards
    assert not memory.any()
