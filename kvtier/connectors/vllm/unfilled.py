"""Engine blocks that a load or a blend was to fill and did not: nobody may find them, or read them, before they are computed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from vllm.v1.core.block_pool import BlockPool

from kvtier.connectors.messages import ScheduledRequest


class UnfilledBlocks:
    """What the scheduler's side does about them, beyond what vLLM does itself: it lets the first request that has them compute them.

    vLLM leaves them in its prefix cache, and takes for computed what another request shares, although the first one may be preempted,
    aborted, or held up before it has done so.
    """

    def __init__(self, block_tokens: int) -> None:
        self.pool: BlockPool | None = None
        """whose prefix cache they leave; None: there is none"""
        self._block_tokens = block_tokens
        self._unfilled: set[int] = set()

    def add(self, unfilled: AbstractSet[int], tables: Iterable[Sequence[int]]) -> None:
        """Blocks that were not filled in a step. ``tables``: all blocks of each request that was in it, in order.

        They leave vLLM's prefix cache, and so do those behind them, which were computed from them.
        """
        for block_ids in tables:
            first = next((place for place, block_id in enumerate(block_ids) if block_id in unfilled), len(block_ids))
            self._unfilled.update(block_ids[first:])
            if self.pool is not None:
                self.pool.evict_blocks(set(block_ids[first:]))

    def keep(self, tables: Iterable[Sequence[int]]) -> None:
        """Forgets those that are in no request's blocks any more: who gets them next fills them."""
        if self._unfilled:
            self._unfilled &= set().union(*tables)

    def read_by(self, scheduled: Collection[ScheduledRequest], num_new: Mapping[str, int]) -> tuple[int, ...]:
        """Those that a step reads and does not compute. ``num_new``: tokens that each request computes in it."""
        if not self._unfilled:
            return ()
        size = self._block_tokens
        parts = [(item.block_ids, item.num_computed_tokens - num_new[item.request_id], item.num_computed_tokens) for item in scheduled]
        for block_ids, first, end in parts:
            self._unfilled.difference_update(block_ids[first // size : end // size])
        return tuple(self._unfilled.intersection(block_id for block_ids, first, _ in parts for block_id in block_ids[: first // size]))
