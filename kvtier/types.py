"""The values that cross module borders. Standard library only, frozen, cheap.

Those of which a step makes thousands are named tuples: they cost a third of a frozen dataclass.

Nouns are those of the glossary: a *block* is the KV of ``block_tokens`` consecutive tokens in all
layers, a *block key* its content address, a *slot* the place of a block in the arena, a *tier* a place
with a capacity.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import NamedTuple, NewType

BlockKey = NewType("BlockKey", bytes)
"""Content address of a block: 16 bytes, chained over the prefix and keyed by the namespace."""

KEY_BYTES = 16


class BlockMeta(NamedTuple):
    """What a tier or policy must know of a block: identity, place in its prefix chain, size in bytes.

    ``parent`` is the key of the block before it in the prompt, or ``None`` for the first one.
    """

    key: BlockKey
    parent: BlockKey | None
    num_bytes: int

    @classmethod
    def many(cls, keys: Iterable[BlockKey], parents: Iterable[BlockKey | None], num_bytes: int) -> list[BlockMeta]:
        """Blocks of one size, at half the cost of making each."""
        return list(map(partial(tuple.__new__, cls), zip(keys, parents, repeat(num_bytes), strict=False)))


class JobKind(enum.Enum):
    """Direction of a transfer, seen from the arena."""

    STORE = "store"
    """arena -> tier (demotion)"""
    LOAD = "load"
    """tier -> arena (promotion)"""


class Outcome(enum.Enum):
    """What became of one block of a job. Expected outcomes are values, never exceptions."""

    OK = "ok"
    MISS = "miss"
    """the tier does not hold the key (any more)"""
    CORRUPT = "corrupt"
    """bytes were there and failed verification; the tier has forgotten the key; the buffer is undefined"""
    REJECTED = "rejected"
    """the tier declined (no room, admission, over its in-flight bound)"""
    FAILED = "failed"
    """an I/O error or a tier that is offline"""


class BlockIO(NamedTuple):
    """One block of a job: ``buffer`` holds exactly the block's bytes (STORE: read, LOAD: written).

    The buffer belongs to the tier from ``submit`` until the job's result was polled.
    """

    meta: BlockMeta
    buffer: memoryview


@dataclass(frozen=True, slots=True)
class TransferJob:
    """One asynchronous batch transfer. ``job_id`` is unique among the running jobs of a tier."""

    job_id: int
    kind: JobKind
    namespace: bytes
    """16-byte digest of the namespace the blocks belong to (echoed in every record)"""
    blocks: tuple[BlockIO, ...]


@dataclass(frozen=True, slots=True)
class JobResult:
    """The outcome of a job: one :class:`Outcome` per block, in the job's order."""

    job_id: int
    kind: JobKind
    outcomes: tuple[Outcome, ...]
    seconds: float
    """time from submit to completion"""
    num_bytes: int
    """payload bytes of the blocks that came out OK"""
    dropped: tuple[BlockKey, ...] = ()
    """keys the tier gave up on its own to make room; the index must forget them there"""
    error: str | None = None
    """first error in words, for the log; ``None`` where everything went as planned"""


@dataclass(frozen=True, slots=True)
class ProbeJob:
    """Asks a shared store which leading blocks of a prompt it holds. ``job_id`` is unique among the running probes of a tier."""

    job_id: int
    namespace: bytes
    """16-byte digest of the namespace the blocks belong to"""
    keys: tuple[BlockKey, ...]
    """in prompt order"""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The answer to a :class:`ProbeJob`: the leading run that the store held when it was asked. Nothing was loaded or verified."""

    job_id: int
    num_bytes: tuple[int, ...]
    """payload length of each block of the run, in prompt order; its length is the run's"""
    is_complete: bool
    """False where the store stopped answering: the run is at least this long"""
    seconds: float
    """time from submit to completion"""
    error: str | None = None
    """why it is not complete, in words, for the log"""


@dataclass(frozen=True, slots=True)
class Damage:
    """One finding of a ``check()``: which file or structure, which key if known, what is wrong."""

    where: str
    what: str
    key: BlockKey | None = None


class SlotRef(NamedTuple):
    """A slot of the arena at one moment: ``generation`` changes whenever the slot gets a new tenant."""

    slot: int
    generation: int

    @classmethod
    def many(cls, slots: Iterable[int], generations: Iterable[int]) -> tuple[SlotRef, ...]:
        """Slots with their generations, at half the cost of making each."""
        return tuple(map(partial(tuple.__new__, cls), zip(slots, generations, strict=True)))


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest leading run of a key sequence that some tier holds.

    ``ready_blocks`` of them lie committed in host memory (a leading run as well), so
    ``0 <= ready_blocks <= hit_blocks``.  ``pending`` is true where a promotion of some of the others is
    already under way.
    """

    hit_blocks: int
    ready_blocks: int
    pending: bool = False


@dataclass(frozen=True, slots=True)
class StoreOrder:
    """What one request wants stored: those of ``keys[first:]`` that host memory lacks; ``keys`` is the prompt's whole chain so far."""

    keys: Sequence[BlockKey]
    first: int
    tenant: str = ""
    """whose blocks they are; blocks of one tenant must never continue those of another one"""
    may_evict: bool = True
    """False: only what is free is used, nobody leaves"""
    pooled: bool = True
    """False: the blocks do not pass through the pool in device memory, where there is one"""


@dataclass(frozen=True, slots=True)
class StorePlan:
    """Where the new blocks of a store go. ``positions[i]`` of the keys asked for goes to ``slots[i]``.

    Blocks that are present already need no copy and are not listed; a store that only partly fits keeps its
    leading part.  A plan with slots ends by ``commit_store`` or ``abort_store``; one without needs no end.
    ``broken``: the block before the first one asked for is nowhere, so nothing could be found again behind it;
    ask again from an earlier block on.
    """

    job_id: int
    positions: tuple[int, ...] = ()
    slots: tuple[SlotRef, ...] = ()
    num_refused: int = 0
    """blocks at the end that found no slot; asking again later is fine"""
    num_declined: int = 0
    """blocks at the end that host memory does not take because what it has is worth more; asking again soon is of little use"""
    broken: bool = False
    device_slots: tuple[int, ...] = ()
    """where each block passes through the device pool, -1: nowhere; empty without a pool"""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Slots leased for reading, in the order of the keys asked for, until ``end_load``."""

    job_id: int
    slots: tuple[SlotRef, ...] = field(default=())
    device_slots: tuple[int, ...] = ()
    """the slot of each block in the device pool, -1: none; empty without a pool"""
    device_ready: tuple[bool, ...] = ()
    """whether the block is in its device slot already; else it is to be put there on its way"""
