"""The sparse prefill: some tokens of a prompt, layer by layer, each attending over all KV before it.

The reference of every other implementation. With all tokens it is full prefill; with none but the question it is full reuse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it

from kvtier.blend.model import BlendModel, Projected, TokenKV
from kvtier.blend.steps import Steps

GROUP_ROWS = {"cpu": 64}
"""rows whose attention is computed together, by the type of device"""
GROUP_ROWS_ELSEWHERE = 256
"""more where every call costs a launch"""

MOST_WEIGHTS = 1 << 26
"""weights of attention that are in memory at once, where they are looked at: fp32, and three times as much while they are computed"""

LayerHook = Callable[[int, Projected], None]
"""told of each layer's projections before they are written: layer, projections of the rows"""


@dataclass
class Rows:
    """The tokens being computed, and how far they are. Changed by :func:`advance`."""

    positions: torch.Tensor
    """increasing"""
    hidden: torch.Tensor
    next_layer: int = 0
    absent: torch.Tensor | None = None
    """a mask over positions that have no KV, so nobody looks there; None: all have, or will when they are looked at"""

    def narrow(self, keep: torch.Tensor) -> Rows:
        """Only those of which ``keep``, over all positions of the prompt, is true."""
        chosen = keep[self.positions]
        return Rows(self.positions[chosen], self.hidden[chosen], self.next_layer, self.absent)


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
) -> Steps[None]:
    """Computes ``rows`` up to ``end_layer`` (default: all), writing their KV where ``writable`` is true (a mask over positions).

    ``kv_only``: nobody needs what comes out of the last of these layers.
    """
    end = model.num_layers if end_layer is None else end_layer
    written = writable[rows.positions]
    targets = rows.positions[written]
    groups = causal_groups(rows.positions, kv.keys.dtype, absent=rows.absent)
    while rows.next_layer < end:
        layer = rows.next_layer
        projected = model.project(layer, rows.hidden, rows.positions)
        if hook is not None:
            hook(layer, projected)
        kv.keys[layer][:, targets] = projected.keys[:, written]
        kv.values[layer][:, targets] = projected.values[:, written]
        rows.next_layer += 1
        if not kv_only or rows.next_layer < end:
            attended = attend(projected.queries, kv.keys[layer], kv.values[layer], groups, model.scale)
            rows.hidden = model.finish(layer, rows.hidden, attended)
        yield len(rows.positions)


def attention_mask(positions: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """``[rows, num_tokens]``: true where a row may look: at itself and before."""
    return torch.arange(num_tokens, device=positions.device)[None, :] <= positions[:, None]


def causal_groups(
    positions: torch.Tensor, dtype: torch.dtype, group_rows: int | None = None, absent: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """What each row may not look at, for attention in groups of neighbours: ``[rows, tokens up to the group's last]``, -inf there.

    That is what lies behind it, and what is ``absent`` (a mask over positions).

    No group reads what lies behind its last row, which halves the work. Rows of a mask lie a multiple of 16 elements apart, or kernels
    on a device would copy it first.
    """
    groups = []
    for part in positions.split(group_rows or GROUP_ROWS.get(positions.device.type, GROUP_ROWS_ELSEWHERE)):
        end = int(part[-1]) + 1
        mask = torch.zeros((len(part), -(-end // 16) * 16), dtype=dtype, device=part.device)[:, :end]
        groups.append(mask.masked_fill_(torch.arange(end, device=part.device)[None, :] > part[:, None], -torch.inf))
        if absent is not None:
            mask.masked_fill_(absent[:end], -torch.inf)
    return groups


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    groups: Sequence[torch.Tensor],
    scale: float,
    *,
    folds: bool | None = None,
) -> torch.Tensor:
    """Attention of grouped queries, ``groups`` as :func:`causal_groups` gives them; ``[rows, num_heads * head_dim]``.

    ``folds`` (default: on a CPU): heads that share keys count as more rows of one head, which for few rows is several times faster there
    than to let torch share them. Elsewhere they read the same keys and the same mask, and nothing is copied.
    """
    folds = queries.device.type == "cpu" if folds is None else folds
    num_heads, num_rows, head_dim = queries.shape
    shared = queries.reshape(keys.shape[0], -1, num_rows, head_dim)
    parts = []
    first = 0
    for mask in groups:
        part = shared[:, :, first : first + len(mask)]
        attended = (_folded if folds else _shared)(part, keys[:, : mask.shape[1]], values[:, : mask.shape[1]], mask, scale)
        parts.append(attended.reshape(num_heads, len(mask), head_dim))
        first += len(mask)
    return torch.cat(parts, 1).transpose(0, 1).reshape(first, -1)


def _folded(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    num_shared = queries.shape[1]
    masks = mask.repeat(num_shared, 1) if num_shared > 1 else mask
    return F.scaled_dot_product_attention(queries.flatten(1, 2)[None], keys[None], values[None], attn_mask=masks, scale=scale)


def _shared(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    keys, values = (part[:, None].expand(-1, queries.shape[1], -1, -1) for part in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)


def attention_weights(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Mean over the heads of what each row looks at: ``[rows, num_tokens]``, fp32, each row sums to 1."""
    num_heads, num_rows, head_dim = queries.shape
    grouped = queries.reshape(keys.shape[0], -1, head_dim)
    scores = (grouped @ keys.transpose(1, 2)).float().mul_(scale).view(num_heads, num_rows, -1)
    return scores.masked_fill_(~mask, -torch.inf).softmax(-1).mean(0)


def mean_attention(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """What all rows look at together: the mean of :func:`attention_weights` over them, ``[num_tokens]``."""
    num_heads, num_rows, _ = queries.shape
    at_once = max(1, MOST_WEIGHTS // (num_heads * keys.shape[1]))
    total = torch.zeros(keys.shape[1], device=keys.device)
    for part, seen in zip(queries.split(at_once, 1), mask.split(at_once), strict=True):
        total += attention_weights(part, keys, seen, scale).sum(0)
    return total / num_rows
