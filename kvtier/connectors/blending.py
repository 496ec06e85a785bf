"""Chunk reuse as the scheduler half sees it: which prompts begin with chunks that are there, and which chunks are to be stored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from kvtier.blend.chunks import Chunk
from kvtier.blend.layout import Placement
from kvtier.blend.separators import TokenTexts
from kvtier.cache import Cache
from kvtier.config import BlendConfig
from kvtier.connectors.blend_orders import BlendOrder, blocks_in_flight, job_of
from kvtier.connectors.blend_request import BlendSettings, Surroundings, read_request
from kvtier.connectors.blend_runs import BlendRuns
from kvtier.connectors.boundary import Boundary
from kvtier.connectors.chunk_entries import ChunkEntries, chunk_slots
from kvtier.connectors.known_chunks import KnownChunks
from kvtier.connectors.messages import BlendJob, CaptureJob, EntryJob, ScheduledRequest, StepBlends, WorkerReport
from kvtier.connectors.requests import (
    NEVER,
    BlendPlan,
    BlendState,
    ConnectorSettings,
    Geometry,
    Matched,
    Request,
    RequestIdentity,
    end_of_wait,
)
from kvtier.connectors.step_meter import StepTokens
from kvtier.errors import BlendRefusedError, RefusalReason
from kvtier.hashing import request_root

_LOG = logging.getLogger(__name__)
_LATER = Matched(None)
LosePromise: TypeAlias = Callable[[Request, Sequence[int], int, bool], None]
"""for a request: the engine blocks, the token that they begin at, and whether it waits outside of the batch"""
LEAST_SHARE = 4
"""one in so many of a step's tokens goes to what is spread, however much the engine computes beside"""


@dataclass(frozen=True, slots=True)
class BlendParts:
    """What chunk reuse is configured with; by default it is off."""

    settings: BlendSettings = field(default_factory=BlendConfig)
    primer: tuple[int, ...] = ()
    """tokens of the neutral document that chunks are computed behind"""
    turn_markers: frozenset[int] = frozenset()
    """tokens that a message of a chat begins with"""
    texts: TokenTexts | None = None
    """finds separators that are given as a text; ``None``: the model has no tokenizer"""
    refusal: str = ""
    """why the model's chunks cannot be reused; empty: they can"""
    num_positions: int = NEVER
    """how many the model knows"""
    max_step_tokens: int = NEVER
    """as many tokens may the blends of a step compute, and a chunk that is to be stored; what needs more is spread over steps"""


class Blending:
    """Plans blends and the storing of chunks, and takes in what became of them. One thread, the scheduler half's.

    A blended request stores nothing under prefix keys from its first chunk on. Its chunks are leased while the workers copy them.
    """

    def __init__(
        self,
        engine: Cache,
        geometry: Geometry,
        settings: ConnectorSettings,
        parts: BlendParts,
        *,
        clock: Callable[[], float],
        boundary: Boundary,
        lose: LosePromise,
    ) -> None:
        """``lose``: has blocks that were promised to the engine reported as not filled."""
        self._engine = engine
        self._geometry = geometry
        self._settings = settings
        self._parts = parts
        self._clock = clock
        self._boundary = boundary
        self._lose = lose
        self._num_blenders = 0
        self._num_attached = 0
        self._new_blends: list[BlendOrder] = []
        self._runs = BlendRuns(engine, geometry, boundary)
        self._entries = ChunkEntries(engine, geometry.num_workers, parts.max_step_tokens)
        self._captures: list[CaptureJob] = []
        self._known = KnownChunks()
        self.is_waiting = False
        """whether a request waits for chunks, since the last ``take_orders``"""

    @property
    def has_pending_work(self) -> bool:
        """Whether workers have something to report, or will get something to do."""
        return bool(self._runs) or self._entries.has_work

    def begin(self, request: Request, identity: RequestIdentity, num_prompt_tokens: int) -> None:
        """Reads what a new request asks. What is refused is counted, and the request is served as any other."""
        asked = request.options.blend
        if asked is None:
            return
        try:
            if not self._parts.settings.enabled:
                raise BlendRefusedError(RefusalReason.OFF, "blend.enabled is false")
            if not request.can_load:
                raise BlendRefusedError(RefusalReason.LOAD, "nothing may be loaded for it")
            if self._parts.refusal:
                raise BlendRefusedError(RefusalReason.MODEL, self._parts.refusal)
            if identity.spans or identity.has_adapter:
                raise BlendRefusedError(RefusalReason.MODEL, "a prompt with images or the like, or an adapter")
            parts = self._parts
            prompt = tuple(request.token_ids[:num_prompt_tokens])
            root = request_root(self._geometry.namespace, identity.extras)
            around = Surroundings(root, self._geometry.block_tokens, parts.primer, parts.turn_markers, parts.texts, self._known)
            request.blend = read_request(asked, prompt, parts.settings, around)
            self._engine.stats.add("blend.chunks", len(request.blend.placements))
        except BlendRefusedError as error:
            request.blend_refusal = error.reason.value
            self._engine.stats.add(f"blend.refused_{error.reason.value}")
            _LOG.info("request %s: chunks are not reused: %s", request.request_id, error)

    # ---- putting together ---------------------------------------------------------------------------------------

    def improve(self, request: Request, exact: Matched, num_tokens: int) -> Matched:
        """What the request can be given with its chunks; ``exact``, the answer without, where that is as much."""
        state = request.blend
        can_be = request.can_load and self._can_blend
        if state is None or state.is_over or exact.num_tokens is None or not can_be:
            return exact
        state.plan = None
        num_exact = request.num_computed_tokens + exact.num_tokens
        ready = [at for at in state.placements if at.end > num_exact and self._is_ready(at.chunk)]
        if len(ready) < len(state.placements) and self._is_bringing(request, num_exact, ready):
            self.is_waiting = True
            return _LATER
        size = self._geometry.engine_block_tokens
        end = min(max((at.end for at in ready), default=0), state.num_prompt_tokens - 1, num_tokens - 1) // size * size
        if end <= request.num_computed_tokens + exact.num_tokens:
            return exact
        plan = state.plan_for(num_exact, end, ready, num_tokens, size)
        if plan.num_reused < self._parts.settings.min_reuse * (plan.end - num_exact):
            self._engine.stats.add("blend.too_few")
            state.is_over = True
            return exact
        if not self._has_room_for(plan):
            return _LATER
        state.plan = plan
        return Matched(plan.end - request.num_computed_tokens, self._is_async(plan), is_blended=True)

    def num_exact_tokens(self, request: Request, num_external_tokens: int) -> int:
        """How many of the tokens that the engine was promised are loaded as they are."""
        plan = None if request.blend is None else request.blend.plan
        if plan is None or plan.end - request.num_computed_tokens != num_external_tokens:
            return num_external_tokens
        return plan.num_exact - request.num_computed_tokens

    def allocated(self, request: Request, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """The request starts: orders the blend that was promised, and the storing of chunks that are not there."""
        state = request.blend
        if state is None:
            return
        plan, state.plan = state.plan, None
        if plan is not None and plan.end - request.num_computed_tokens == num_external_tokens:
            self._order(request, state, plan, block_ids)
        self._want(request)

    @property
    def has_new_blends(self) -> bool:
        """Whether some were ordered since the last ``take_orders``."""
        return bool(self._new_blends)

    @property
    def _can_blend(self) -> bool:
        """Whether every worker can."""
        return self._num_blenders >= self._geometry.num_workers

    def _has_room_for(self, plan: BlendPlan) -> bool:
        """Whether a blend may be begun in this step. One that is spread over steps has them to itself."""
        if self._runs.is_spreading:
            return False
        num_tokens = sum(order.plan.num_computed for order in self._new_blends)
        return not self._new_blends or num_tokens + plan.num_computed <= self._parts.max_step_tokens

    def _is_spread(self, plan: BlendPlan) -> bool:
        """Whether a blend needs more than a step, so that those who generate get their tokens in between."""
        return plan.num_computed > self._parts.max_step_tokens

    def _is_async(self, plan: BlendPlan) -> bool:
        """Whether the request waits for its blend outside of the batch."""
        return bool(self._settings.async_load) or self._is_spread(plan)

    @property
    def is_spread(self) -> bool:
        """Whether workers may go on in this step with what an earlier one began."""
        return self._entries.is_spread or self._runs.is_spreading

    def take_orders(self, scheduled: Iterable[tuple[ScheduledRequest, int]], tokens: StepTokens) -> StepBlends:
        """What was ordered since the last call, and the chunk that this step begins to compute. Raises nothing.

        ``scheduled``: who computes in this step, and the first token that each computes. ``tokens``: how many that is.
        """
        orders, self._new_blends = self._new_blends, []
        captures, self._captures = self._captures, []
        blends = self._jobs(orders, scheduled) if orders else []
        entries: list[EntryJob] = []
        with self._boundary.at("take chunk"):
            entries = self._take_entries(is_prefilling=tokens.num_prefill > 0 or bool(blends))
        ordered = StepBlends(tuple(blends), tuple(entries), tuple(captures))
        with self._boundary.at("share out"):
            share_tokens = self._share_tokens(tokens.num_prefill + tokens.num_decode)
            return replace(ordered, abandoned=self._runs.take_abandoned(), share_tokens=share_tokens)
        return ordered

    def _jobs(self, orders: Sequence[BlendOrder], scheduled: Iterable[tuple[ScheduledRequest, int]]) -> list[BlendJob]:
        """Orders that cannot be carried out are lost."""
        jobs: dict[int, BlendJob] = {}
        size = self._geometry.engine_block_tokens
        with self._boundary.at("in flight"):
            in_flight = blocks_in_flight(scheduled, size)
            for order in orders:
                with self._boundary.at("order blend"):
                    jobs[order.job_id] = job_of(order, in_flight, size)
        for order in orders:
            if order.job_id not in jobs:
                with self._boundary.at("lose blend"):
                    self._runs.lose(order.job_id)
                    self._lose_blend(order.request, order.plan, order.block_ids)
        return list(jobs.values())

    def _share_tokens(self, num_tokens: int) -> int:
        """What is spread over steps may compute so many tokens in a step in which the engine computes ``num_tokens``: what these leave."""
        most = self._parts.max_step_tokens
        return max(most - num_tokens, most // LEAST_SHARE, 1) if self.is_spread else 0

    def _is_ready(self, chunk: Chunk) -> bool:
        return self._engine.match(chunk.block_keys).ready_blocks == len(chunk.block_keys)

    def _is_bringing(self, request: Request, num_exact: int, ready: Sequence[Placement]) -> bool:
        """Starts to bring chunks from slower tiers, asks for them what other engines share, and says whether to wait for that.

        ``ready``: chunks that are there.
        """
        state = request.blend
        assert state is not None
        now = self._clock()
        if state.deadline is None:
            state.deadline = end_of_wait(now, self._settings.promote_wait_s)
            for at in ready:  # or the others would come in their place
                self._engine.touch(at.chunk.block_keys)
        is_coming = False
        for at in state.placements:
            found = self._engine.match(at.chunk.block_keys)
            if at.end <= num_exact or found.ready_blocks == len(at.chunk.block_keys):
                continue
            if found.hit_blocks < len(at.chunk.block_keys):
                is_coming |= self._is_asked_for(request, at, found.hit_blocks)
            else:
                promised = found.ready_blocks if found.pending else self._engine.promote(at.chunk.block_keys)
                is_coming |= found.pending or promised > found.ready_blocks
        return is_coming and now < state.deadline

    def _is_asked_for(self, request: Request, at: Placement, num_known: int) -> bool:
        """Has shared tiers be asked for the rest of a chunk. Whether an answer is under way."""
        sharing = self._engine.sharing
        if not sharing.tiers:
            return False
        keys = at.chunk.block_keys
        tiers = sharing.tiers
        if self._settings.load_or_recompute == "auto":
            num_missing = len(keys) - num_known
            tiers = sharing.worth_probing(at.start, num_missing * self._geometry.block_tokens, num_missing)
        return bool(tiers) and sharing.probe(keys, num_known, request.tenant, tiers=tiers)

    def _order(self, request: Request, state: BlendState, plan: BlendPlan, block_ids: Sequence[int]) -> None:
        """Leases the chunks and orders the blend. The engine has been promised its tokens: where that is not possible, they are lost."""
        leases = []
        with self._boundary.at("lease chunks"):
            for placement in plan.placements:
                leases.append(self._engine.begin_load(placement.chunk.block_keys, pooled=False))
                self._engine.touch(placement.chunk.block_keys)
        load_ids = [leased.job_id for leased in leases]
        block_ids = tuple(block_ids[: plan.end // self._geometry.engine_block_tokens])
        if len(leases) < len(plan.placements):
            self._runs.end_leases(load_ids)
            state.is_over = True
            self._lose_blend(request, plan, block_ids)
            return
        chunks = tuple(chunk_slots(range(len(leased.slots)), leased.slots) for leased in leases)
        is_spread = self._is_spread(plan)
        job_id = self._runs.begin(request, plan, load_ids, is_spread=is_spread)
        self._new_blends.append(BlendOrder(job_id, request, state, plan, chunks, block_ids, self._is_async(plan), is_spread))

    def _lose_blend(self, request: Request, plan: BlendPlan, block_ids: Sequence[int]) -> None:
        """Has it reported that nobody fills the request's blocks from the plan's first token on."""
        self._lose(request, block_ids[plan.num_exact // self._geometry.engine_block_tokens :], plan.num_exact, self._is_async(plan))
        self._engine.stats.add("blend.failed")

    # ---- storing ------------------------------------------------------------------------------------------------

    def _want(self, request: Request) -> None:
        """Sees to it that the request's chunks are stored that no tier holds: what is computed as it is anyway is copied from its blocks
        where the settings say so, the others are queued."""
        state = request.blend
        if state is None or not request.options.store or not self._settings.store:
            return
        state.to_capture.clear()
        copies = self._parts.settings.entries == "served"
        for at in sorted(state.placements, key=lambda at: at.start):
            chunk = at.chunk
            if not self._entries.wants(chunk):
                continue
            if copies and at.end <= request.blended_from:
                state.to_capture.append(at)
                continue
            if chunk.anchor.num_tokens + chunk.num_tokens > self._parts.num_positions or self._parts.refusal:
                self._engine.stats.add("blend.unstored_chunks")
                continue
            self._entries.add(chunk, state.anchor_ids, tuple(request.token_ids[at.start : at.end]), request.tenant)
        request.capture_next()

    def computed(self, request: Request, item: ScheduledRequest) -> None:
        """This step computes ``request.capture_at`` tokens of a request: has chunks copied that are full by then."""
        state = request.blend
        assert state is not None
        size = self._geometry.engine_block_tokens
        while state.to_capture and state.to_capture[0].end <= item.num_computed_tokens:
            at = state.to_capture.popleft()
            if not request.is_stopped and self._entries.wants(at.chunk):
                self._captures += self._entries.capture(at, request.tenant, item.block_ids[: -(-at.end // size)])
        request.capture_next()

    def void(self, block_ids: AbstractSet[int]) -> None:
        """What was computed from these engine blocks is wrong."""
        self._entries.void(block_ids)

    def _take_entries(self, *, is_prefilling: bool) -> list[EntryJob]:
        """The chunk that this step computes and stores: at most one, and none beside prompts unless it has waited for long."""
        self.is_waiting = False
        return self._entries.take(is_prefilling=is_prefilling or self._runs.is_spreading) if self._can_blend else []

    # ---- what became of it --------------------------------------------------------------------------------------

    def report(self, report: WorkerReport) -> None:
        """Takes in what workers finished."""
        self._num_attached += report.attached
        self._num_blenders += report.blenders
        if self._num_attached and self._num_attached > self._num_blenders and self._parts.settings.enabled and not self._parts.refusal:
            self._parts = replace(self._parts, refusal="a worker cannot run the loaded model outside of its steps")
            self._entries.give_up()
        for job_id, count in report.done.items():
            with self._boundary.at("end blend"):
                if job_id in self._runs:
                    self._runs.advance(job_id, report)
                elif job_id in self._entries:
                    self._entries.advance(job_id, count, has_failed=job_id in report.failed)

    def abandon(self, request: Request | None = None) -> None:
        """Nobody wants what the workers are putting together over several steps, for a request or for any."""
        self._runs.abandon(request)

    def forget(self) -> None:
        """The cache is being reset: what was begun is not gone on with, chunks that wait are not stored, and later ones need their anchor
        computed anew."""
        self.abandon()
        self._entries.reset()
