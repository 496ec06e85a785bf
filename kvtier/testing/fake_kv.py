"""KV memory of an engine without a model: the KV of a token is a function of everything before it.

So it can be said of every block, at any time, whether it holds what it must. A forward pass reads what really lies in the blocks
before it: on wrong KV it computes wrong KV, as a model would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.layout import KVLayout, Segment

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_GARBAGE = np.uint64(0xBADBADBADBADBAD1)
ALL_LAYERS = slice(None)
TOKEN_BYTES = 8
"""bytes of one token's KV in one layer on one rank"""


def token_states(tokens: Sequence[int], seed: int, known: Sequence[int] = ()) -> list[int]:
    """One 64-bit state per token, each depending on all tokens so far; ``known`` are the first ones."""
    states = list(known)
    state = states[-1] if states else (seed * _GOLDEN) & _MASK
    for token in tokens[len(states) :]:
        state = ((state ^ (token + 1)) * _GOLDEN) & _MASK
        state ^= state >> 29
        states.append(state)
    return states


def next_token(state: int, vocabulary: int) -> int:
    """What a greedy model says after a token with this state."""
    return (state >> 17) % vocabulary


class FakeKVMemory:
    """The paged KV tensors of all ranks: ``[layer][block][token]``, 8 bytes a token."""

    def __init__(self, *, num_ranks: int, num_layers: int, num_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        shape = (num_layers, num_blocks, block_tokens)
        self.ranks: list[npt.NDArray[np.uint64]] = [np.full(shape, _GARBAGE, dtype=np.uint64) for _ in range(num_ranks)]
        self._factors = [
            np.array([2 * (rank * 1000 + layer) + 0x10001 for layer in range(num_layers)], dtype=np.uint64)[:, None]
            for rank in range(num_ranks)
        ]

    @property
    def engine_block_bytes(self) -> int:
        """Bytes of one engine block on one rank."""
        return int(self.ranks[0].shape[0]) * self.block_tokens * TOKEN_BYTES

    def layout(self, rank: int) -> KVLayout:
        """How the blocks lie in a rank's memory: one segment a layer."""
        memory = self.ranks[rank]
        num_bytes = self.block_tokens * TOKEN_BYTES
        base = memory.ctypes.data
        return KVLayout(
            tuple(Segment(base + layer * self.num_blocks * num_bytes, num_bytes, num_bytes) for layer in range(memory.shape[0])),
            self.num_blocks,
        )

    def tensors(self, rank: int) -> list[Any]:
        """The same memory as torch tensors, int8 ``[num_blocks, bytes]``, one a layer."""
        import torch  # noqa: PLC0415 - heavy, and few tests need it

        shape = (self.num_layers, self.num_blocks, self.block_tokens * TOKEN_BYTES)
        return list(torch.from_numpy(self.ranks[rank].view(np.int8)).view(shape))

    def scribble(self, block_ids: Sequence[int]) -> None:
        """Overwrites blocks that were given to a new owner, so that nothing works by accident."""
        if block_ids:
            for memory in self.ranks:
                memory[:, list(block_ids), :] = _GARBAGE

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return int(self.ranks[0].shape[0])

    def is_right(self, block_ids: Sequence[int], states: Sequence[int], layers: slice = ALL_LAYERS) -> bool:
        """Whether the first ``len(states)`` tokens in the blocks are what they must be, on all ranks."""
        num_tokens = len(states)
        if not num_tokens:
            return True
        num_blocks = -(-num_tokens // self.block_tokens)
        wanted = np.array(states, dtype=np.uint64)
        for memory, factors in zip(self.ranks, self._factors, strict=True):
            found = memory[layers][:, list(block_ids[:num_blocks]), :]
            if not np.array_equal(found.reshape(found.shape[0], -1)[:, :num_tokens], wanted * factors[layers]):
                return False
        return True

    def forward(self, block_ids: Sequence[int], states: Sequence[int], first_token: int, layers: slice = ALL_LAYERS) -> bool:
        """Computes the tokens from ``first_token`` on. Returns whether what it read was right; else it writes nonsense."""
        is_right = self.is_right(block_ids, states[:first_token], layers)
        new = np.array(states[first_token:], dtype=np.uint64)
        if not is_right:
            new = new ^ _GARBAGE
        positions = np.arange(first_token, len(states))
        blocks = np.array(block_ids)[positions // self.block_tokens]
        for memory, factors in zip(self.ranks, self._factors, strict=True):
            memory[layers, blocks, positions % self.block_tokens] = new * factors[layers]
        return is_right
