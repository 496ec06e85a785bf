"""The model that vLLM has loaded, as the sparse prefill sees it: its own modules, called outside of a scheduled forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group

from kvtier.blend.model import Projected, Rotary
from kvtier.blend.transformers_models import check_family, frequencies_of, inner_size_of
from kvtier.errors import BlendRefusedError, RefusalReason

_PROBED_POSITIONS = (1, 7, 100)


class EngineModel:
    """A loaded model of vLLM, this worker's heads of it. Reads the weights where they are; holds no state of a prompt."""

    def __init__(self, model: Any, max_rows: int) -> None:
        """
        Args:
            max_rows: tokens that are computed together at most: no more than in a step of the engine, whose memory is there

        Raises:
            BlendRefusedError: the model is of another family, or its keys depend on positions in a way that one rotation does not move.
        """
        config = model.config
        check_family(config)
        self._model = model
        self._decoder = model.model
        self._layers = list(model.model.layers)
        self.num_layers = len(self._layers)
        self.max_rows = max_rows
        attention = self._layers[0].self_attn
        self._head_dim: int = attention.head_dim
        self._sizes: list[int] = [attention.q_size, attention.kv_size, attention.kv_size]
        self.row_size = max(config.hidden_size, attention.q_size)
        self.inner_size = inner_size_of(config)
        self.scale = float(attention.scaling)
        self.device: torch.device = next(model.parameters()).device
        self.rotary = Rotary(frequencies_of(config, self._head_dim), "neox")
        _check_rotation(attention.rotary_emb, self.rotary)

    @property
    def attentions(self) -> list[Any]:
        """Of each layer, vLLM's attention, which owns the layer's KV memory."""
        return [layer.self_attn.attn for layer in self._layers]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """As ``BlendModel`` says."""
        hidden: torch.Tensor = self._decoder.embed_tokens(token_ids)
        return hidden

    def project(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> Projected:
        """As ``BlendModel`` says."""
        module = self._layers[layer]
        attention = module.self_attn
        parts = attention.qkv_proj(module.input_layernorm(hidden))[0].split(self._sizes, dim=-1)
        queries, keys = (self._normed(attention, name, part) for name, part in zip(("q_norm", "k_norm"), parts, strict=False))
        queries, keys = attention.rotary_emb(positions, queries, keys)
        return Projected(*(part.unflatten(-1, (-1, self._head_dim)).transpose(0, 1) for part in (queries, keys, parts[2])))

    def _normed(self, attention: Any, name: str, part: torch.Tensor) -> torch.Tensor:
        norm = getattr(attention, name, None)
        if norm is None:
            return part.contiguous()
        return torch.as_tensor(norm(part.unflatten(-1, (-1, self._head_dim)).contiguous())).flatten(-2)

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """As ``BlendModel`` says."""
        module = self._layers[layer]
        hidden = hidden + module.self_attn.o_proj(attended)[0]
        result: torch.Tensor = hidden + module.mlp(module.post_attention_layernorm(hidden))
        return result

    def mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """As ``BlendModel`` says. What an all-reduce gives may differ in its last bits from rank to rank, so the first one's counts."""
        group = get_tp_group()
        if group.world_size == 1:
            return values
        mean: torch.Tensor = group.broadcast(group.all_reduce(values) / group.world_size, src=0)
        return mean

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As ``BlendModel`` says."""
        result: torch.Tensor = self._model.compute_logits(self._decoder.norm(hidden)).float()
        return result


def _check_rotation(module: Any, rotary: Rotary) -> None:
    """The frequencies that kvtier moves keys by must be those that the engine turns them by, as far as its table's precision shows."""
    table = getattr(module, "cos_sin_cache", None)
    if table is None or not module.is_neox_style or module.rotary_dim != module.head_size:
        raise BlendRefusedError(RefusalReason.MODEL, f"{type(module).__name__}: not a table of cosines and sines over the whole head")
    angles = np.outer(_PROBED_POSITIONS, rotary.frequencies)
    cosines, sines = table[list(_PROBED_POSITIONS)].float().cpu().chunk(2, dim=-1)
    length = (cosines.square() + sines.square()).sqrt()  # YaRN scales
    tolerance = 1e-4 if table.dtype == torch.float32 else 2e-2
    for ours, theirs in ((np.cos(angles), cosines / length), (np.sin(angles), sines / length)):
        if not np.allclose(ours, theirs.numpy(), rtol=0, atol=tolerance):
            raise BlendRefusedError(RefusalReason.MODEL, f"{type(module).__name__} turns keys by other frequencies than its kind's")
