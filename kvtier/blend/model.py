"""What the sparse prefill asks of a model, and the KV it works on.

Tensors of tokens have no batch dimension: one prompt at a time. Positions are those in the prompt, from 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from kvtier.copy.rope import Floats, Pairs, shift_table


class Projected(NamedTuple):
    """Of some tokens in one layer, rotated for their positions."""

    queries: torch.Tensor
    """``[num_heads, num_tokens, head_dim]``"""
    keys: torch.Tensor
    """``[num_kv_heads, num_tokens, head_dim]``"""
    values: torch.Tensor


class LayerKV(NamedTuple):
    """Keys and values of consecutive tokens in one layer: ``[num_kv_heads, num_tokens, head_dim]`` each."""

    keys: torch.Tensor
    values: torch.Tensor


class BlendModel(Protocol):
    """A decoder whose layers can be computed for any tokens of a prompt. Implementations hold no state of a prompt."""

    num_layers: int
    max_rows: int
    """tokens that are computed together at most, which bounds the memory for what lies inside of a layer"""
    row_size: int
    """elements of a token's hidden state or queries, whichever are more"""
    inner_size: int
    """elements that a token has inside of a layer at once, at most"""
    scale: float
    """of the products of queries and keys before the softmax"""
    rotary: Rotary
    device: torch.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The hidden states ``[num_tokens, hidden_size]`` that enter layer 0."""
        ...

    def project(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> Projected:
        """Queries, keys and values of these tokens."""
        ...

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The hidden states behind the layer; ``attended`` is ``[num_tokens, num_heads * head_dim]``."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of what comes out of the last layer: ``[num_tokens, vocabulary]``, in fp32."""
        ...

    def mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of what all ranks have that share the model's heads, the same bits on each of them. May change ``values``."""
        ...


@dataclass(frozen=True)
class Rotary:
    """How a model's keys depend on their position."""

    frequencies: Floats
    """radians per position of each pair"""
    pairs: Pairs

    def move(self, keys: torch.Tensor, shift: int) -> torch.Tensor:
        """Keys ``[..., head_dim]`` as of ``shift`` positions later. One rotation in fp32; the bits of ``kvtier.copy.rope.shift_keys``."""
        if shift == 0:
            return keys
        return self.turn(keys, torch.from_numpy(shift_table(self.frequencies, [shift])).to(keys.device))

    def turn(self, keys: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Keys ``[..., num_tokens, head_dim]``, each token's turned by its own cosines and sines ``[num_tokens or 1, pairs, 2]``, fp32."""
        num_pairs = turns.shape[1]
        first, second = slice(0, num_pairs), slice(num_pairs, 2 * num_pairs)
        if self.pairs == "interleaved":
            first, second = slice(0, 2 * num_pairs, 2), slice(1, 2 * num_pairs, 2)
        left, right = keys[..., first].float(), keys[..., second].float()
        cosine, sine = turns[:, :, 0], turns[:, :, 1]
        moved = keys.clone()
        moved[..., first] = (left * cosine - right * sine).to(keys.dtype)
        moved[..., second] = (right * cosine + left * sine).to(keys.dtype)
        return moved


@dataclass(frozen=True)
class TokenKV:
    """Keys and values of consecutive tokens: ``[num_layers, num_kv_heads, num_tokens, head_dim]`` each."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """How many tokens."""
        return self.keys.shape[2]

    @contextlib.contextmanager
    def opened(self, layer: int) -> Iterator[LayerKV]:
        """A view of one layer."""
        yield LayerKV(self.keys[layer], self.values[layer])

    def part(self, start: int, end: int) -> TokenKV:
        """A view of tokens ``[start, end)``."""
        return TokenKV(self.keys[:, :, start:end], self.values[:, :, start:end])

    def clone(self) -> TokenKV:
        """A copy with memory of its own."""
        return TokenKV(self.keys.clone(), self.values.clone())
