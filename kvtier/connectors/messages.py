"""What the two halves of a connector say to each other. Plain data: picklable, small, no tensors.

The scheduler half decides and never sees a tensor; the worker half moves bytes and never decides. One
:class:`StepMessage` travels to every worker per engine step, one :class:`WorkerReport` comes back, merged over the workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvtier.blend.layout import PromptLayout


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request asked for (``kv_transfer_params["kvtier"]``)."""

    load: bool = True
    """may take KV out of the cache"""
    store: bool = True
    """may put KV into the cache"""
    store_only_prefix: int | None = None
    """tokens behind which nothing is stored; None: no bound"""
    priority: Literal["low", "normal", "high"] = "normal"
    """low: evicts nothing and refreshes nothing; high: kept for a while after its end"""
    tenant: str = ""
    """whose blocks they are; requests of different tenants share nothing"""
    session: str = ""
    """what its next requests have in common with it, for hints"""
    tool: str = ""
    """the tool that the session is going to call when the request has ended"""
    expected_s: float | None = None
    """how long that is expected to take"""
    next_use_s: float | None = None
    """when the session's next request is expected, after the end of this one"""
    blend: object = None
    """chunks of the prompt that may be reused at any position, as asked; None: none"""
    num_problems: int = 0
    """how much of what was asked made no sense"""


@dataclass(slots=True)
class ScheduledRequest:
    """A request's part in one engine step. Not frozen: 64 of them are made per step.

    ``block_ids`` are all of its engine blocks so far, in order; after the step the KV of its first
    ``num_computed_tokens`` tokens is in them.  The list may be the caller's own and grow later.
    """

    request_id: str
    block_ids: list[int]
    num_computed_tokens: int


@dataclass(frozen=True, slots=True)
class MoveJob:
    """One request's copies of one step, all in the same direction. ``job_id`` is the plan's.

    Columns of plain integers, since a long prompt has thousands of blocks.  Engine block ``block_ids[i]`` goes to or comes from
    part ``(first_index + i) % blocks_per_slot`` of slot ``slots[(first_index + i) // blocks_per_slot]``.
    """

    job_id: int
    request_id: str
    block_ids: tuple[int, ...]
    slots: tuple[int, ...]
    generations: tuple[int, ...]
    """of the slots: what the arena's table must say while the copy runs"""
    first_index: int = 0
    """0 for stores; a load may begin in the middle of a slot"""
    missing: tuple[int, ...] = ()
    """loads only: engine blocks that were promised and whose source has vanished; failed without a copy"""
    device_slots: tuple[int, ...] = ()
    """slot of each of ``slots`` in the device pool, -1: none; empty where there is no pool"""
    device_ready: tuple[bool, ...] = ()
    """loads only: whether the block is in its device slot already"""


@dataclass(frozen=True, slots=True)
class ChunkSlots:
    """Where the KV of a chunk lies, or is to be put: blocks ``positions`` of it."""

    positions: tuple[int, ...]
    slots: tuple[int, ...]
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recompute:
    """What is computed anew of a prompt's chunks."""

    method: str
    """how tokens are chosen"""
    ratio: float
    """their share"""
    min_margin: float = 0.0
    """where the first token's probability exceeds the next likely one's by less, all of the prompt; 0: nobody looks"""


@dataclass(frozen=True, slots=True)
class BlendJob:
    """The beginning of a prompt that is put together from chunks, instead of being computed."""

    job_id: int
    request_id: str
    token_ids: tuple[int, ...]
    """of the whole prompt"""
    layout: PromptLayout
    """its prefix, at most ``first`` tokens, lies in the engine's blocks when the loads of the step are done"""
    chunks: tuple[ChunkSlots, ...]
    """one for each placement; one that lacks blocks has been lost"""
    first: int
    """the first token that is written; those before are in the engine's blocks, or will be after the forward pass"""
    end: int
    """the engine computes the prompt from here on; a multiple of its block size"""
    recompute: Recompute
    block_ids: tuple[int, ...]
    """engine blocks of the tokens before ``end``"""
    is_async: bool = False
    """reported as received when it is done, or has failed; the request is not in the batch of this step"""
    is_spread: bool = False
    """each step does a share of it; else it is done in this one"""


@dataclass(frozen=True, slots=True)
class EntryJob:
    """A chunk whose KV is to be computed behind its anchor, and stored."""

    job_id: int
    key: bytes
    anchor_key: bytes
    """identifies the KV of ``anchor_ids``: another one after a reset"""
    anchor_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    slots: ChunkSlots
    is_spread: bool = False
    """as in :class:`BlendJob`"""


@dataclass(frozen=True, slots=True)
class CaptureJob:
    """A chunk whose KV is to be copied from the blocks of a request that has computed it."""

    job_id: int
    first: int
    """position in the prompt of the chunk's first token"""
    end: int
    shift: int
    """by how many positions its keys are turned back"""
    block_ids: tuple[int, ...]
    """engine blocks of the tokens before ``end``"""
    slots: ChunkSlots


@dataclass(frozen=True, slots=True)
class StepBlends:
    """The part of a :class:`StepMessage` that is about chunks."""

    blends: tuple[BlendJob, ...] = ()
    entries: tuple[EntryJob, ...] = ()
    captures: tuple[CaptureJob, ...] = ()
    abandoned: tuple[int, ...] = ()
    share_tokens: int = 1
    """never 0, so that what was begun comes to an end"""


@dataclass(frozen=True, slots=True)
class StepMessage:
    """Everything the workers must do around one forward pass."""

    loads: tuple[MoveJob, ...] = ()
    """to be finished before the forward pass of this step reads the blocks"""
    async_loads: tuple[MoveJob, ...] = ()
    """reported as received by ``request_id`` when finished; the request is not in this step's batch"""
    stores: tuple[MoveJob, ...] = ()
    """to be copied after the forward pass of this step has written the blocks"""
    preempted: tuple[str, ...] = ()
    """requests that lost their blocks since the last step: no copy may still read those when they are overwritten"""
    held: tuple[str, ...] = ()
    """finished requests whose blocks the engine holds until every worker has reported them as sent"""
    blends: tuple[BlendJob, ...] = ()
    """to be begun before the forward pass of this step, and after its loads; finished there, but for what is spread over steps"""
    entries: tuple[EntryJob, ...] = ()
    """to be computed after the forward pass of this step"""
    abandoned: tuple[int, ...] = ()
    """of blends that are spread over steps: those that nobody wants any more, which end as failed"""
    share_tokens: int = 0
    """this step's share of what is spread: as many tokens through all layers, and what is left of a layer"""
    captures: tuple[CaptureJob, ...] = ()
    """to be copied after the forward pass of this step"""
    unfilled: tuple[int, ...] = ()
    """engine blocks that this step reads and nobody has filled: reported as failed, as if their load had failed in it"""
    arena_id: str = ""
    """of the arena that all slots belong to: a worker that has mapped another one copies nothing"""
    step: int = 0
    """number of this step where the engine computes in it; 0: it does not"""
    is_busy: bool = False
    """the engine computes in this step, or still in one before it: copies may have to wait for that"""


@dataclass(slots=True)
class WorkerReport:
    """What workers finished since the last report. ``done[job_id]`` counts workers; merged by ``merge``."""

    done: dict[int, int] = field(default_factory=dict)
    failed: dict[int, set[int]] = field(default_factory=dict)
    """job_id -> positions in ``MoveJob.block_ids`` that did not copy, on any worker"""
    attached: int = 0
    """workers that have mapped the arena since the last report"""
    num_stale: int = 0
    """slots that had a new tenant"""
    num_errors: int = 0
    """unexpected errors that became failed copies"""
    load_times: list[tuple[int, float]] = field(default_factory=list)
    """loads that did not overlap with computing: bytes of all ranks, seconds"""
    blenders: int = 0
    """of the attached workers, those that can put prompts together from chunks"""
    num_chosen: dict[int, int] = field(default_factory=dict)
    """job_id -> tokens of chunks that a blend computed anew; each worker says the same"""
    step: int = 0
    """the last step that was carried out and in which the engine computed; 0: none since the last report"""
    unsure: set[int] = field(default_factory=set)
    """blends that left the model less sure than was asked for, on any worker; in ``failed`` are those that could not be done"""

    def merge(self, other: WorkerReport) -> WorkerReport:
        """Adds another worker's report to this one, in place, and returns it."""
        for job_id, count in other.done.items():
            self.done[job_id] = self.done.get(job_id, 0) + count
        for job_id, positions in other.failed.items():
            self.failed.setdefault(job_id, set()).update(positions)
        self.unsure |= other.unsure
        self.attached += other.attached
        self.blenders += other.blenders
        self.num_chosen |= other.num_chosen
        self.num_stale += other.num_stale
        self.num_errors += other.num_errors
        self.step = max(self.step, other.step)
        self.load_times += other.load_times
        return self

    def __bool__(self) -> bool:
        return bool(self.done or self.failed or self.attached or self.num_stale or self.num_errors or self.step)
