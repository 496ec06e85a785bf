"""The sparse prefill: some tokens of a prompt, layer by layer, each attending over all KV before it.

The reference of every other implementation. With all tokens it is full prefill; with none but the question it is full reuse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it

from kvtier.blend.model import BlendModel, LayerKV, Projected
from kvtier.blend.steps import Steps

GROUP_ROWS = {"cpu": 64}
"""rows whose attention is computed together, by the type of device"""
GROUP_ROWS_ELSEWHERE = 256
"""more where every call costs a launch"""

MOST_WEIGHTS = 1 << 24
"""weights of attention that are in memory at once, where they are looked at: fp32, and three times as much while they are computed"""
MOST_MASKED = 1 << 25
"""elements of masks that are kept from layer to layer; more are made anew in each"""

LayerHook = Callable[[int, Projected, LayerKV], None]
"""told of each layer's projections before they are written: layer, projections of the rows, the layer's KV"""


class KVLayers(Protocol):
    """The KV of a prompt's tokens, a layer at a time."""

    def opened(self, layer: int) -> AbstractContextManager[LayerKV]:
        """One layer, to be read and changed until the block is left."""
        ...


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
    kv: KVLayers,
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
    attention = _Attention(model, rows, kv, writable[rows.positions], hook)
    while rows.next_layer < end:
        layer = rows.next_layer
        rows.next_layer += 1
        attended = attention.of_layer(layer, rows.hidden, needs_output=not kv_only or layer + 1 < end)
        if attended is not None:
            rows.hidden = _finish(model, layer, rows.hidden, attended)
        yield len(rows.positions)


class _Attention:
    """Of rows to a prompt's KV, which gets theirs where ``written`` (a mask over the rows) is true."""

    def __init__(self, model: BlendModel, rows: Rows, kv: KVLayers, written: torch.Tensor, hook: LayerHook | None) -> None:
        self._model = model
        self._kv = kv
        self._hook = hook
        self._positions = rows.positions
        self._written = written
        self._targets = rows.positions[written]
        self._groups = CausalGroups(rows.positions, rows.hidden.dtype, absent=rows.absent)

    def of_layer(self, layer: int, hidden: torch.Tensor, *, needs_output: bool) -> torch.Tensor | None:
        """What the rows with these hidden states see there; None where nobody needs it."""
        projected = project(self._model, layer, hidden, self._positions)
        with self._kv.opened(layer) as kv:
            if self._hook is not None:
                self._hook(layer, projected, kv)
            kv.keys[:, self._targets] = projected.keys[:, self._written]
            kv.values[:, self._targets] = projected.values[:, self._written]
            return attend(projected.queries, kv.keys, kv.values, self._groups, self._model.scale) if needs_output else None


def project(model: BlendModel, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> Projected:
    """The model's projections of any number of rows, as many at once as it computes together."""
    if len(positions) <= model.max_rows:
        return model.project(layer, hidden, positions)
    pieces = zip(hidden.split(model.max_rows), positions.split(model.max_rows), strict=True)
    return Projected(*(torch.cat(parts, 1) for parts in zip(*(model.project(layer, *piece) for piece in pieces), strict=True)))


def _finish(model: BlendModel, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The same of what follows attention. May write over ``hidden``."""
    if len(hidden) <= model.max_rows:
        return model.finish(layer, hidden, attended)
    for piece, seen in zip(hidden.split(model.max_rows), attended.split(model.max_rows), strict=True):
        piece.copy_(model.finish(layer, piece, seen))
    return hidden


def attention_mask(positions: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """``[rows, num_tokens]``: true where a row may look: at itself and before."""
    return torch.arange(num_tokens, device=positions.device)[None, :] <= positions[:, None]


class CausalGroups:
    """What each row may not look at, for attention in groups of neighbours: ``[rows, tokens up to the group's last]``, -inf there.

    That is what lies behind it, and what is ``absent`` (a mask over positions). Those of many rows are made when they are asked for.

    No group reads what lies behind its last row, which halves the work. Rows of a mask lie a multiple of 16 elements apart, or kernels
    on a device would copy it first.
    """

    def __init__(
        self, positions: torch.Tensor, dtype: torch.dtype, group_rows: int | None = None, absent: torch.Tensor | None = None
    ) -> None:
        self._dtype = dtype
        self._absent = absent
        size = group_rows or GROUP_ROWS.get(positions.device.type, GROUP_ROWS_ELSEWHERE)
        self._parts = positions.split(size)
        self._ends = [int(part[-1]) + 1 for part in positions.cpu().split(size)] if len(positions) else [0]
        num_masked = sum(len(part) * end for part, end in zip(self._parts, self._ends, strict=True))
        self._masks = [*self._made()] if num_masked <= MOST_MASKED else None

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._masks) if self._masks is not None else self._made()

    def _made(self) -> Iterator[torch.Tensor]:
        for part, end in zip(self._parts, self._ends, strict=True):
            mask = torch.zeros((len(part), -(-end // 16) * 16), dtype=self._dtype, device=part.device)[:, :end]
            mask.masked_fill_(torch.arange(end, device=part.device)[None, :] > part[:, None], -torch.inf)
            yield mask if self._absent is None else mask.masked_fill_(self._absent[:end], -torch.inf)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    groups: Iterable[torch.Tensor],
    scale: float,
    *,
    folds: bool | None = None,
) -> torch.Tensor:
    """Attention of grouped queries, in :class:`CausalGroups`; ``[rows, num_heads * head_dim]``.

    ``folds`` (default: on a CPU): heads that share keys count as more rows of one head, which for few rows is several times faster there
    than to let torch share them. Elsewhere they read the same keys and the same mask, and nothing is copied.
    """
    folds = queries.device.type == "cpu" if folds is None else folds
    num_heads, num_rows, head_dim = queries.shape
    shared = queries.reshape(keys.shape[0], -1, num_rows, head_dim)
    parts = []
    first = 0
    with _without_cudnn():
        for mask in groups:
            part = shared[:, :, first : first + len(mask)]
            attended = (_folded if folds else _shared)(part, keys[:, : mask.shape[1]], values[:, : mask.shape[1]], mask, scale)
            parts.append(attended.reshape(num_heads, len(mask), head_dim))
            first += len(mask)
    return torch.cat(parts, 1).transpose(0, 1).reshape(first, -1)


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """torch's attention by any of its kernels but cuDNN's, which makes a plan of 0.1 s and more for each new shape: every group has one."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


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
