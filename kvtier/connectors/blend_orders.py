"""Blends of the step that is being built, and the jobs that they become once it is known who computes what in it."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from kvtier.blend.layout import lay_out
from kvtier.connectors.messages import BlendJob, ChunkSlots, ScheduledRequest
from kvtier.connectors.requests import BlendPlan, BlendState, Request


@dataclass(frozen=True, slots=True)
class BlendOrder:
    """A blend whose chunks are leased."""

    job_id: int
    request: Request
    state: BlendState
    plan: BlendPlan
    chunks: tuple[ChunkSlots, ...]
    block_ids: tuple[int, ...]
    """engine blocks of the tokens before its end"""
    is_async: bool
    is_spread: bool


def blocks_in_flight(scheduled: Iterable[tuple[ScheduledRequest, int]], block_tokens: int) -> set[int]:
    """Engine blocks that a step fills. ``scheduled``: who computes in it, and the first token that each computes."""
    return {
        block_id
        for item, first in scheduled
        for block_id in item.block_ids[first // block_tokens : -(-item.num_computed_tokens // block_tokens)]
    }


def job_of(order: BlendOrder, in_flight: AbstractSet[int], block_tokens: int) -> BlendJob:
    """What the workers are told.

    A prefix that the engine's own cache gave may be computed in this very step, by a request beside (``in_flight``): what is not there
    before the forward pass is computed by the blend too, for its own use.
    """
    plan, state, request = order.plan, order.state, order.request
    prefix_ids = order.block_ids[: plan.num_exact // block_tokens]
    num_there = next((place for place, block_id in enumerate(prefix_ids) if block_id in in_flight), len(prefix_ids))
    return BlendJob(
        order.job_id,
        request.request_id,
        tuple(request.token_ids[: state.num_prompt_tokens]),
        lay_out(state.num_prompt_tokens, num_there * block_tokens, plan.placements),
        order.chunks,
        plan.num_exact,
        plan.end,
        plan.recompute,
        order.block_ids,
        order.is_async,
        order.is_spread,
    )
