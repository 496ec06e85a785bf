"""Keys are moved as the models of transformers would have computed them at the other position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig  # type: ignore[import-not-found]
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # type: ignore[import-not-found]
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb  # type: ignore[import-not-found]

from kvtier.copy.rope import TokenShift, llama3_frequencies, shift_keys, shift_table, yarn_frequencies

HEAD_DIM = 64
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32_768}


def config_of(kind: str, theta: float, settings: dict[str, Any]) -> LlamaConfig:
    """A model with this rotary embedding and heads of ``HEAD_DIM``."""
    parameters = {"rope_type": kind, "rope_theta": theta, **settings}
    return LlamaConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=131_072, rope_parameters=parameters)


@pytest.mark.parametrize(
    ("kind", "theta", "settings", "ours"),
    [("llama3", 500_000.0, LLAMA3, llama3_frequencies), ("yarn", 1_000_000.0, YARN, yarn_frequencies)],
)
def test_frequencies_are_the_models(kind: str, theta: float, settings: dict[str, Any], ours: Any) -> None:
    """Llama 3 scaled and YaRN, to fp32's last bit or two."""
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config_of(kind, theta, settings), "cpu")
    renamed = {key.replace("_position_embeddings", "_positions"): value for key, value in settings.items()}
    np.testing.assert_allclose(ours(theta, HEAD_DIM, **renamed), expected.numpy(), rtol=4e-7)


@pytest.mark.parametrize(("kind", "settings"), [("default", {}), ("llama3", LLAMA3), ("yarn", YARN)])
def test_rotation_is_the_models(kind: str, settings: dict[str, Any]) -> None:
    """K of a Llama layer at one position, moved, is its K at the other one; YaRN's factor stays in it."""
    rotary = LlamaRotaryEmbedding(config_of(kind, 10_000.0, settings))
    keys = torch.randn((1, 2, 4, HEAD_DIM), generator=torch.Generator().manual_seed(1))

    def at(first: int) -> Any:
        cosine, sine = rotary(keys, torch.arange(first, first + 4)[None])
        return apply_rotary_pos_emb(keys, keys, cosine, sine)[1].permute(0, 2, 1, 3).contiguous().numpy()

    moved = at(3)
    shift_keys(moved, [TokenShift(0, 0, 4, 0)], shift_table(rotary.inv_freq.numpy(), [500]), pairs="neox", storage="fp32")
    # the model rounds its angles to fp32, which for 503 radians means to 3e-5
    np.testing.assert_allclose(moved, at(503), rtol=0, atol=2e-4)
