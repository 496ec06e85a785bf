"""The sparse prefill: some tokens of a prompt, layer by layer, each attending over all KV before it.

The reference of every other implementation. With all tokens it is full prefill; with none but the question it is full reuse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it

from kvtier.blend.model import BlendModel, Projected, TokenKV

GROUP_ROWS = 64
"""rows whose attention is computed together"""

LayerHook = Callable[[int, Projected], None]
"""told of each layer's projections before they are written: layer, projections of the rows"""


@dataclass
class Rows:
    """The tokens being computed, and how far they are. Changed by :func:`advance`."""

    positions: torch.Tensor
    """increasing"""
    hidden: torch.Tensor
    next_layer: int = 0

    def narrow(self, keep: torch.Tensor) -> Rows:
        """Only those of which ``keep``, over all positions of the prompt, is true."""
        chosen = keep[self.positions]
        return Rows(self.positions[chosen], self.hidden[chosen], self.next_layer)


def start(model: BlendModel, token_ids: torch.Tensor, positions: torch.Tensor) -> Rows:
    """Before the first layer."""
    return Rows(positions, model.embed(token_ids[positions]))


def advance(
    model: BlendModel,
    rows: Rows,
    kv: TokenKV,
    writable: torch.Tensor,
    *,
    end_layer: int | None = None,
    hook: LayerHook | None = None,
    kv_only: bool = False,
) -> None:
    """Computes ``rows`` up to ``end_layer`` (default: all), writing their KV where ``writable`` is true (a mask over positions).

    ``kv_only``: nobody needs what comes out of the last of these layers.
    """
    end = model.num_layers if end_layer is None else end_layer
    written = writable[rows.positions]
    targets = rows.positions[written]
    groups = causal_groups(rows.positions, kv.keys.dtype)
    while rows.next_layer < end:
        layer = rows.next_layer
        projected = model.project(layer, rows.hidden, rows.positions)
        if hook is not None:
            hook(layer, projected)
        kv.keys[layer][:, targets] = projected.keys[:, written]
        kv.values[layer][:, targets] = projected.values[:, written]
        rows.next_layer += 1
        if kv_only and rows.next_layer == end:
            return
        attended = attend(projected.queries, kv.keys[layer], kv.values[layer], groups, model.scale)
        rows.hidden = model.finish(layer, rows.hidden, attended)


def attention_mask(positions: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """``[rows, num_tokens]``: true where a row may look: at itself and before."""
    return torch.arange(num_tokens, device=positions.device)[None, :] <= positions[:, None]


def causal_groups(positions: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """What each row may not look at, for attention in groups of neighbours: ``[rows, tokens up to the group's last]``, -inf there.

    No group reads what lies behind its last row, which halves the work.
    """
    groups = []
    for part in positions.split(GROUP_ROWS):
        behind = torch.arange(int(part[-1]) + 1, device=part.device)[None, :] > part[:, None]
        groups.append(torch.zeros(behind.shape, dtype=dtype, device=part.device).masked_fill_(behind, -torch.inf))
    return groups


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, groups: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """Attention of grouped queries, ``groups`` as :func:`causal_groups` gives them; ``[rows, num_heads * head_dim]``.

    Heads that share keys count as more rows of one head, which for few rows is several times faster than to let torch share them.
    """
    parts = []
    first = 0
    num_heads, _, head_dim = queries.shape
    num_shared = num_heads // keys.shape[0]
    for mask in groups:
        num_rows, end = mask.shape
        folded = queries[:, first : first + num_rows].reshape(1, keys.shape[0], num_shared * num_rows, head_dim)
        masks = mask.repeat(num_shared, 1) if num_shared > 1 else mask
        part = F.scaled_dot_product_attention(folded, keys[None, :, :end], values[None, :, :end], attn_mask=masks, scale=scale)
        parts.append(part.view(num_heads, num_rows, head_dim))
        first += num_rows
    return torch.cat(parts, 1).transpose(0, 1).reshape(first, -1)


def attention_weights(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Mean over the heads of what each row looks at: ``[rows, num_tokens]``, fp32, each row sums to 1."""
    num_heads, num_rows, head_dim = queries.shape
    grouped = queries.reshape(keys.shape[0], -1, head_dim)
    scores = (grouped @ keys.transpose(1, 2)).float().mul_(scale).view(num_heads, num_rows, -1)
    return scores.masked_fill_(~mask, -torch.inf).softmax(-1).mean(0)
