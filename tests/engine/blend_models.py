"""Tiny random models of the families that chunks are reused with, and what a test of them needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (  # type: ignore[import-not-found]
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvtier.blend.chunks import NO_ANCHOR, Anchor, anchor_of
from kvtier.blend.entries import ChunkEntry, compute_entry, full_prefill
from kvtier.blend.finding import ChunkSpace
from kvtier.blend.layout import PromptLayout
from kvtier.blend.model import TokenKV
from kvtier.blend.transformers_models import TransformersModel
from kvtier.hashing import Namespace, request_root

ROOT = request_root(Namespace(model="tiny").digest)
BLOCK_TOKENS = 8
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3, "head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-yarn": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": YARN}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


@functools.cache
def tiny(family: str) -> tuple[Any, TransformersModel]:
    """The model of transformers, random but the same each time, and kvtier's view of it."""
    config_class, model_class, more = FAMILIES[family]
    torch.manual_seed(5)
    model = model_class(config_class(**SIZES, **more)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # initialised to what does nothing
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif parameter.dim() == 2:
            parameter.data *= 4
    return model, TransformersModel(model)


class Store:
    """Entries of one model and one anchor, computed when they are first asked for."""

    def __init__(self, model: TransformersModel, anchor_ids: Sequence[int]) -> None:
        self.model = model
        self.anchor: Anchor = anchor_of(ROOT, anchor_ids, BLOCK_TOKENS)
        self.space = ChunkSpace(ROOT, self.anchor, BLOCK_TOKENS)
        self._anchor_kv: TokenKV | None = None
        if self.anchor != NO_ANCHOR:
            self._anchor_kv, _ = full_prefill(model, torch.tensor(anchor_ids))

    def entries(self, token_ids: Sequence[int], layout: PromptLayout) -> list[ChunkEntry]:
        """One for each placement."""
        entries = []
        for placement in layout.placements:
            first = placement.start - placement.first_token
            tokens = torch.tensor(token_ids[first : placement.end])
            entries.append(compute_entry(self.model, placement.chunk, tokens, self._anchor_kv))
        return entries
