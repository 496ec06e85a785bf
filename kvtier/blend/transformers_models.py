"""Models of transformers as the sparse prefill sees them: Llama (SmolLM2 is one), Mistral, Qwen2 and 2.5, Qwen3.

Takes a loaded model and imports nothing of transformers. What distinguishes the families, biases and norms of queries and keys, is in
their modules, which are called as they are. Models whose KV cannot be moved are refused by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvtier.blend.model import Projected, Rotary
from kvtier.copy.rope import Floats, llama3_frequencies, plain_frequencies, yarn_frequencies
from kvtier.errors import BlendRefusedError, RefusalReason

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the configurations"""

_WHY_NOT = {
    "gpt2": "its positions are learned and are in every layer's KV",
    "opt": "its positions are learned and are in every layer's KV",
    "mamba": "it is recurrent and has no KV of single tokens",
    "mamba2": "it is recurrent and has no KV of single tokens",
    "jamba": "some of its layers are recurrent",
    "gemma2": "some of its layers keep a sliding window of KV only",
    "gemma3_text": "some of its layers keep a sliding window of KV only",
}


class TransformersModel:
    """A causal language model of transformers, for reading only. Thread-safe as far as torch's inference is."""

    max_rows = 8192

    def __init__(self, model: Any) -> None:
        """
        Raises:
            BlendRefusedError: the model is of another family, or its keys depend on positions in a way that one rotation does not move.
        """
        config = model.config
        check_family(config)
        self._decoder = model.model
        self._head = model.lm_head
        self.device: torch.device = self._decoder.embed_tokens.weight.device
        self.num_layers: int = config.num_hidden_layers
        attention = self._decoder.layers[0].self_attn
        self._head_dim: int = attention.head_dim
        self.row_size: int = max(config.hidden_size, config.num_attention_heads * self._head_dim)
        self.inner_size: int = inner_size_of(config)
        self.scale: float = attention.scaling
        self.rotary = Rotary(frequencies_of(config, self._head_dim), "neox")
        _check_frequencies(config, self.rotary.frequencies, self._decoder.rotary_emb.inv_freq)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """As ``BlendModel`` says."""
        hidden: torch.Tensor = self._decoder.embed_tokens(token_ids)
        return hidden

    def project(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> Projected:
        """As ``BlendModel`` says."""
        module = self._decoder.layers[layer]
        attention = module.self_attn
        normed = module.input_layernorm(hidden)
        parts = []
        for name in ("q", "k", "v"):
            part = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, self._head_dim))
            norm = getattr(attention, f"{name}_norm", None)
            parts.append((part if norm is None else norm(part)).transpose(0, 1))
        cosine, sine = self._decoder.rotary_emb(hidden[None], positions[None])
        return Projected(_rotate(parts[0], cosine[0], sine[0]), _rotate(parts[1], cosine[0], sine[0]), parts[2])

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """As ``BlendModel`` says."""
        module = self._decoder.layers[layer]
        hidden = hidden + module.self_attn.o_proj(attended)
        result: torch.Tensor = hidden + module.mlp(module.post_attention_layernorm(hidden))
        return result

    def mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """As ``BlendModel`` says: there is one."""
        return values

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As ``BlendModel`` says."""
        result: torch.Tensor = self._head(self._decoder.norm(hidden)).float()
        return result


def _rotate(vectors: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    left, right = vectors.chunk(2, dim=-1)
    return vectors * cosine + torch.cat((-right, left), dim=-1) * sine


def inner_size_of(config: Any) -> int:
    """Elements that a token has in an MLP at once: two projections, their product, and what comes out."""
    return int(3 * config.intermediate_size + config.hidden_size)


def check_family(config: Any) -> None:
    """Raises BlendRefusedError unless the configuration is of a family whose KV can be moved."""
    kind = config.model_type
    if kind not in SUPPORTED:
        why = _WHY_NOT.get(kind, f"chunks are reused with {', '.join(SUPPORTED)} only")
        raise BlendRefusedError(RefusalReason.MODEL, f"model type {kind!r}: {why}")
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    slides = any(name != "full_attention" for name in layer_types) if layer_types else window is not None
    if slides and (window is None or window < config.max_position_embeddings):
        text = f"model type {kind!r} with a sliding window of {window} tokens: KV outside of the window is gone"
        raise BlendRefusedError(RefusalReason.MODEL, text)


def frequencies_of(config: Any, head_dim: int) -> Floats:
    """The radians per position of each pair, after the configuration. Raises BlendRefusedError for kinds whose keys cannot be moved."""
    parameters = config.rope_parameters
    kind, theta = parameters["rope_type"], parameters["rope_theta"]
    if kind == "default":
        return plain_frequencies(theta, head_dim)
    if kind == "llama3":
        return llama3_frequencies(
            theta,
            head_dim,
            factor=parameters["factor"],
            low_freq_factor=parameters["low_freq_factor"],
            high_freq_factor=parameters["high_freq_factor"],
            original_max_positions=parameters["original_max_position_embeddings"],
        )
    if kind == "yarn":
        return yarn_frequencies(
            theta,
            head_dim,
            factor=parameters["factor"],
            original_max_positions=parameters["original_max_position_embeddings"],
            beta_fast=parameters.get("beta_fast") or 32.0,
            beta_slow=parameters.get("beta_slow") or 1.0,
        )
    raise BlendRefusedError(RefusalReason.MODEL, f"rope_type {kind!r}: default, llama3 and yarn keys can be moved")


def _check_frequencies(config: Any, ours: Floats, models: torch.Tensor) -> None:
    """They must be those that the model itself uses."""
    kind = config.rope_parameters["rope_type"]
    theirs = models.detach().float().cpu().numpy()
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-5, atol=0):
        raise BlendRefusedError(
            RefusalReason.MODEL, f"rope_type {kind!r} of model type {config.model_type!r} turns by other frequencies than its kind's"
        )
