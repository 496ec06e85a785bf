"""What the scheduler half knows of a request, and the settings it works by."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from kvtier.blend.layout import Placement
from kvtier.connectors.messages import Recompute, RequestOptions
from kvtier.hashing import KeyChain, TokenSpan, request_root
from kvtier.types import BlockKey

NEVER = 1 << 62
"""more tokens than any request has"""
LOOK_S = 0.01
"""an engine that has nothing else to do asks again within this time"""
_FIRST_WINDOW_BLOCKS = 16
_WINDOW_GROWTH = 4


@dataclass(frozen=True, slots=True)
class RequestIdentity:
    """What besides the token ids decides whether two requests may share KV."""

    extras: tuple[bytes, ...] = ()
    """adapter, cache salt, ...: part of the root, so they separate whole requests"""
    spans: tuple[TokenSpan, ...] = ()
    """multimodal items: part of the keys of the blocks they lie in, and so of all blocks behind"""
    tenant: str = ""
    """whose blocks they are; requests of different tenants must have different ``extras``"""
    has_adapter: bool = False
    """its KV is not that of the model alone"""


@dataclass(frozen=True, slots=True)
class Matched:
    """The answer to "how much of this prompt can you bring?"."""

    num_tokens: int | None
    """tokens beyond those the engine has already; ``None``: not known yet, ask again in a later step"""
    is_async: bool = False
    """the load runs while the request waits; never true with 0 or ``None``"""
    is_blended: bool = False
    """a part is put together from chunks: its KV must never serve another request by its prefix"""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes and numbers that are fixed once the engine has started.

    Raises:
        ValueError: ``block_tokens`` is not a multiple of ``engine_block_tokens``.
    """

    namespace: bytes
    """the 16-byte namespace digest, root of all keys"""
    block_tokens: int
    """tokens of a kvtier block, a multiple of ``engine_block_tokens``"""
    engine_block_tokens: int
    """tokens of an engine block"""
    num_workers: int
    """reports that make a job complete: all ranks, tensor times pipeline parallel"""
    host_blocks: int
    """how many blocks host memory can hold"""

    def __post_init__(self) -> None:
        if self.engine_block_tokens <= 0 or self.block_tokens <= 0 or self.block_tokens % self.engine_block_tokens:
            raise ValueError(
                f"block_tokens is {self.block_tokens}; it must be a multiple of the engine's block size, {self.engine_block_tokens}"
            )

    @property
    def blocks_per_slot(self) -> int:
        """Engine blocks in one kvtier block."""
        return self.block_tokens // self.engine_block_tokens


class ConnectorSettings(Protocol):
    """The ``connector:`` section of the configuration, as far as the halves read it."""

    @property
    def load(self) -> bool:
        """Take KV out of the cache at all."""

    @property
    def store(self) -> bool:
        """Put KV into the cache at all."""

    @property
    def store_decode_blocks(self) -> bool:
        """Also keep blocks that were filled while generating."""

    @property
    def async_load(self) -> bool | None:
        """Load while the request waits, not inside the step that computes it. None counts as false."""

    @property
    def promote_wait_s(self) -> float:
        """How long a request waits for blocks on slower tiers."""

    @property
    def max_pinned_fraction(self) -> float:
        """Share of host memory that waiting requests may keep from eviction."""

    @property
    def load_or_recompute(self) -> Literal["auto", "always"]:
        """Whether loads that are slower than computing are refused, or none."""


@dataclass(frozen=True, slots=True)
class DefaultSettings:
    """The defaults of :class:`ConnectorSettings`, for tests and scripts. No load is refused: that would depend on the machine's speed."""

    load: bool = True
    store: bool = True
    store_decode_blocks: bool = True
    async_load: bool = False
    promote_wait_s: float = 2.0
    max_pinned_fraction: float = 0.5
    load_or_recompute: Literal["auto", "always"] = "always"


@dataclass(slots=True)
class Lookup:
    """What is known of a waiting request's hit. Blocks count from ``first_block`` on."""

    first_block: int
    """blocks before it are in the engine already"""
    limit_block: int
    """no block from here on is of use"""
    end_block: int
    """nor is one from here on worth loading; at most ``limit_block``"""
    num_wanted: int = 0
    """blocks that some tier holds and that may be promoted"""
    num_promised: int = 0
    """blocks that are or will be in host memory"""
    num_draining: int = 0
    """slots that were about to be free when there was room for no more"""
    num_ready: int = 0
    is_waiting: bool = False
    """for promotions, or for the answer of a shared tier"""
    is_probing: bool = False
    """for the answer of a shared tier: it is not known yet what is a hit"""
    is_new: bool = False
    """the request was not looked up before"""
    ask_tiers: Sequence[str] | None = None
    """the shared tiers that are worth asking; None: not considered yet"""
    num_pinned: int = 0
    """leading blocks that cannot leave host memory"""
    pin_id: int = 0
    pinned_until: float = 0.0


@dataclass(slots=True)
class BlendState:
    """What is known of a request's chunks."""

    placements: list[Placement]
    """where they lie in the prompt"""
    anchor_ids: tuple[int, ...]
    """tokens that they are computed behind"""
    recompute: Recompute
    num_prompt_tokens: int
    plan: BlendPlan | None = None
    """what the last match promised"""
    deadline: float | None = None
    """when it stops waiting for chunks on slower tiers"""
    is_over: bool = False
    """nothing is to be reused (any more)"""
    job_id: int = 0
    """of the last blend that was ordered"""
    exact_before: int = NEVER
    """the request's ``blended_from`` before that one"""
    num_tokens: int = 0
    """taken from chunks instead of computed as a prompt"""
    to_capture: deque[Placement] = field(default_factory=deque)
    """chunks that are to be copied from its blocks when they are computed, in the prompt's order"""

    def plan_for(self, num_exact: int, end: int, placements: Sequence[Placement], num_tokens: int, block_tokens: int) -> BlendPlan:
        """What is put together of ``num_tokens`` tokens whose chunks reach up to ``end``.

        Where it counts how sure the model is of the first token, that is all of the prompt: the workers have to compute what lies behind
        the chunks, so the engine need not. Of a request that was preempted behind its first token nobody wants to know.
        """
        recompute = self.recompute
        if num_tokens > self.num_prompt_tokens:
            recompute = replace(recompute, min_margin=0.0)
        if recompute.min_margin:
            end = (num_tokens - 1) // block_tokens * block_tokens
        return BlendPlan(num_exact, end, tuple(placements), recompute)


@dataclass(frozen=True, slots=True)
class BlendPlan:
    """The part of a prompt that is going to be put together from chunks: tokens ``[num_exact, end)``."""

    num_exact: int
    """tokens before it whose KV is what full prefill computes"""
    end: int
    placements: tuple[Placement, ...]
    """of chunks that are in host memory"""
    recompute: Recompute

    @property
    def num_reused(self) -> int:
        """Tokens that come from chunks."""
        return sum(min(at.end, self.end) - max(at.start, self.num_exact) for at in self.placements if at.start < self.end)

    @property
    def num_computed(self) -> int:
        """About as many tokens does the blend compute: what no chunk covers, and a share of what one does."""
        num_reused = self.num_reused
        return self.end - self.num_exact - num_reused + math.ceil(self.recompute.ratio * num_reused)


class Request:
    """A request as the scheduler half sees it."""

    __slots__ = (
        "blend",
        "blend_refusal",
        "blended_from",
        "can_load",
        "can_store",
        "capture_at",
        "chain",
        "deadline",
        "hit_tokens",
        "is_admitted",
        "is_stopped",
        "lookup",
        "num_computed_tokens",
        "num_done_tokens",
        "num_found_ready",
        "num_keys",
        "num_store_tokens",
        "options",
        "request_id",
        "store_at",
        "store_from",
        "tenant",
        "token_ids",
    )

    def __init__(self, request_id: str, token_ids: Sequence[int], chain: KeyChain, options: RequestOptions, tenant: str) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.token_ids = token_ids
        self.chain = chain
        self.options = options
        self.blend: BlendState | None = None
        """chunks that it named, where they may be reused"""
        self.blend_refusal = ""
        """why not, where it asked for it"""
        self.blended_from = NEVER
        """tokens behind which what the engine has may be an approximation, made of chunks: nothing is stored there.

        Also when it starts over: the engine's own prefix cache may give such blocks back to it.
        """
        self.can_load = options.load
        self.can_store = options.store
        self.num_store_tokens = NEVER if options.store_only_prefix is None else options.store_only_prefix
        """tokens behind which nothing is stored"""
        self.lookup: Lookup | None = None
        self.deadline: float | None = None
        """when it stops waiting for promotions"""
        self.hit_tokens = (0, 0)
        """loaded tokens: those that lay in host memory when it came, and those that were promoted for it"""
        self.num_found_ready = 0
        """leading blocks that lay in host memory when it was looked up first"""
        self.num_computed_tokens = 0
        """what the engine had when it asked last"""
        self.num_done_tokens = 0
        """tokens whose KV the engine has after the last step: computed or loaded; no more than that, or others read what is not there"""
        self.is_admitted = False
        """the engine has given it blocks"""
        self.num_keys = 0
        """blocks that have been hashed"""
        self.store_from = 0
        """first block that was not considered for storing"""
        self.store_at = NEVER
        """computed tokens that make the next block full"""
        self.capture_at = NEVER
        """computed tokens that make the next chunk full that is to be copied"""
        self.is_stopped = False
        """its blocks are not to be stored until it starts over"""

    def begin_waiting(self, now: float, promote_wait_s: float) -> float:
        """When it stops waiting, by the clock; the first call decides it."""
        if self.deadline is None:
            self.deadline = end_of_wait(now, promote_wait_s)
        return self.deadline

    def num_full_blocks(self, num_computed_tokens: int, block_tokens: int) -> int:
        """Blocks that are full and may be stored once so many tokens are computed."""
        return min(num_computed_tokens, len(self.token_ids), self.num_store_tokens, self.blended_from) // block_tokens

    def start_over(self) -> None:
        """The engine has taken its blocks away; it waits again."""
        self.is_admitted = self.is_stopped = False
        self.deadline = None
        self.store_from = 0
        self.store_at = NEVER

    def begin_blend(self, job_id: int, plan: BlendPlan) -> None:
        """What ``plan`` says is put together from chunks. The request has a state of its chunks."""
        state = self.blend
        assert state is not None
        state.job_id, state.num_tokens, state.exact_before = job_id, plan.num_reused, self.blended_from
        self.blended_from = min(self.blended_from, plan.num_exact)

    def give_up_blend(self, job_id: int, block_tokens: int, refusal: str = "") -> None:
        """The engine computes what was to come from chunks, so it may be stored; chunks are not tried again.

        ``job_id``: of the blend that came to nothing. Of one that was ordered since, nothing is known yet. ``refusal``: why, where nothing
        has failed.
        """
        state = self.blend
        self.blend_refusal = refusal or self.blend_refusal
        if state is None:
            return
        state.is_over = True
        if state.job_id == job_id:
            state.num_tokens = 0
            first, self.blended_from = self.blended_from, state.exact_before
            self.num_done_tokens = min(self.num_done_tokens, first)
            self.store_again(first // block_tokens, block_tokens)

    def load_failed(self, first_block: int, block_tokens: int) -> None:
        """The engine computes from ``first_block`` on. No second try to load: a failure that lasts must not go round for ever."""
        self.can_load = False
        self.num_done_tokens = min(self.num_done_tokens, first_block * block_tokens)
        self.store_again(first_block, block_tokens)

    def store_again(self, first_block: int, block_tokens: int) -> None:
        """What was planned to be stored from ``first_block`` on came to nothing."""
        self.store_from = min(self.store_from, first_block)
        self.store_next(block_tokens)

    def store_next(self, block_tokens: int) -> None:
        """Waits for the block at ``store_from`` to be full."""
        at = (self.store_from + 1) * block_tokens
        self.store_at = at if self.can_store and not self.is_stopped and at <= min(self.num_store_tokens, self.blended_from) else NEVER

    def capture_next(self) -> None:
        """Waits for the next chunk that is to be copied to be full."""
        to_capture = self.blend.to_capture if self.blend is not None else ()
        self.capture_at = to_capture[0].end if to_capture else NEVER

    def stop_storing(self) -> None:
        """What it has computed so far is out of date."""
        if self.is_admitted:
            self.is_stopped = True
            self.store_at = NEVER

    def keys(self, num_blocks: int, block_tokens: int) -> list[BlockKey]:
        """The keys of the first ``num_blocks`` blocks; hashes only what is new."""
        keys = self.chain.update(self.token_ids, num_blocks * block_tokens)
        self.num_keys = max(self.num_keys, len(keys))
        return keys

    def keys_from(self, first_block: int, limit_block: int, block_tokens: int) -> Iterator[BlockKey]:
        """The keys of the blocks in the range, hashed in growing windows: who stops early has hashed little."""
        return itertools.chain.from_iterable(self._windows(first_block, limit_block, block_tokens))

    def _windows(self, first_block: int, limit_block: int, block_tokens: int) -> Iterator[list[BlockKey]]:
        done = first_block
        size = _FIRST_WINDOW_BLOCKS
        while done < limit_block:
            end = min(limit_block, max(done + size, self.num_keys))
            yield self.keys(end, block_tokens)[done:end]
            done = end
            size *= _WINDOW_GROWTH


def end_of_wait(now: float, promote_wait_s: float) -> float:
    """When to stop waiting so that the request as a whole is delayed by no more than it may: the engine is to ask once more, and to load
    what came, or to compute beside the end of a copy that came too late (``kvtier bench faults``, a slow store)."""
    return now + promote_wait_s - min(max(LOOK_S, promote_wait_s / 5), promote_wait_s / 4)


def make_request(
    request_id: str, token_ids: Sequence[int], identity: RequestIdentity, options: RequestOptions, *, geometry: Geometry
) -> Request:
    """A request that waits. Hashes nothing."""
    keys = KeyChain(request_root(geometry.namespace, identity.extras), geometry.block_tokens, identity.spans)
    return Request(request_id, token_ids, keys, options, identity.tenant)
