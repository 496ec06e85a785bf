"""What engines and the node daemon say to each other: the frames by type. `frames` has how they travel.

One-way frames go out without waiting for anything; those with a ``call`` are answered by one frame with the same number. Keys travel
as one byte string, 16 bytes each. A field of a frame is never trusted: msgspec checks types and bounds, the daemon's session the rest.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from kvtier.stats import COUNTERS
from kvtier.types import KEY_BYTES, BlockKey

PROTOCOL = 3
"""grows whenever a frame changes its meaning; both sides must have the same"""
MAX_KEYS = 1 << 18
"""in one frame"""
MAX_STORES = 1 << 12
"""in one frame"""

Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Name = Annotated[str, msgspec.Meta(max_length=1024)]
Keys = Annotated[bytes, msgspec.Meta(max_length=MAX_KEYS * KEY_BYTES)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Positions = Annotated[tuple[Natural, ...], msgspec.Meta(max_length=MAX_KEYS)]


class Frame(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Base of all frames."""


# ---- from an engine ---------------------------------------------------------------------------------------------------


class Hello(Frame, tag=1):
    """The first frame of a connection: who it is."""

    role: Literal["scheduler", "worker", "control"]
    engine: Name
    """names the engine, the same for its scheduler and its workers; empty for ``control``"""
    instance: Name
    """tells one life of a scheduler from the next"""
    namespace: Annotated[dict[Name, int | Name], msgspec.Meta(max_length=64)]
    """the fields of the :class:`~kvtier.Namespace`; empty for workers and ``control``"""
    block_bytes: Natural = 0
    block_tokens: Natural = 0
    wants_events: bool = False
    launch: Name = ""
    """tells one start of an engine, with scheduler and workers, from the next; empty: nobody knows"""


class Resume(Frame, tag=2):
    """A scheduler is back: of the copies that it began in an earlier session, these have not ended."""

    open_jobs: Positions


class Mapped(Frame, tag=3):
    """A worker has mapped the arena."""


class Match(Frame, tag=4):
    """See ``CacheEngine.match``. Answered by :class:`Matched`."""

    call: Natural
    keys: Keys


class Promote(Frame, tag=5):
    """Answered by :class:`Value`, how many blocks are promised."""

    call: Natural
    keys: Keys


class Pin(Frame, tag=6):
    """The engine numbers its pins itself, so that nobody waits for an answer."""

    pin: Natural
    keys: Keys
    ttl_s: Seconds | None


class Unpin(Frame, tag=7):
    """Ends a pin of this session: by the engine's number, or one of the control API (``reserve``) by the planner's."""

    pin: Natural
    is_reserved: bool = False


class Touch(Frame, tag=8):
    """Blocks that a request uses."""

    keys: Keys


class BeginLoad(Frame, tag=9):
    """Answered by :class:`Slots`. The engine numbers its copies itself, over all its sessions."""

    call: Natural
    job: Natural
    keys: Keys


class EndLoad(Frame, tag=10):
    """A load has ended; positions of blocks that could not be copied, and of those copied in part.

    Nobody loses a block by it: for this session those that failed are not there for a while.
    """

    job: Natural
    failed: Positions
    partial: Positions


class Store(Frame):
    """One store of :class:`BeginStores`. ``parent`` is the key before the first of ``keys``, empty where there is none."""

    job: Natural
    parent: Keys
    keys: Keys
    tenant: Name
    may_evict: bool


class BeginStores(Frame, tag=11):
    """All stores that begin in one step, in their order. Answered by :class:`Stores`."""

    call: Natural
    stores: Annotated[tuple[Store, ...], msgspec.Meta(min_length=1, max_length=MAX_STORES)]


class EndStore(Frame, tag=12):
    """A store has ended: committed but for the positions ``failed`` and what follows them, or given up."""

    job: Natural
    failed: Positions
    is_aborted: bool


class Began(Frame, tag=13):
    """A session of an agent has a request again."""

    session: Name


class Ended(Frame, tag=14):
    """A session's request has ended (``session`` empty: one of high priority has)."""

    session: Name
    keys: Keys
    num_tokens: Natural


class TakeHint(Frame, tag=15):
    """A hint. Answered by :class:`Value`."""

    call: Natural
    kind: Literal["ToolCall", "NextUse", "SessionOver", "Workflow"]
    fields: dict[Name, Any]


class Poll(Frame, tag=16):
    """Once per step. Answered by :class:`Status`: at once, or when a transfer is over, after ``wait_s`` at the latest."""

    wait_s: Annotated[float, msgspec.Meta(ge=0, le=1)]
    counters: Annotated[dict[Name, Natural], msgspec.Meta(max_length=256)]
    """growth of the engine's own counters"""
    computed: Annotated[tuple[tuple[Natural, Natural, Seconds], ...], msgspec.Meta(max_length=1024)]
    """steps of the engine: tokens, tokens before them, seconds"""


class Verb(Frame, tag=17):
    """A verb of the control API. Answered by :class:`Value`."""

    call: Natural
    name: Literal[
        "snapshot", "online", "check", "holdings", "sources", "reserve", "evict", "clear", "set_policy", "set_quota", "reserved_blocks"
    ]
    keys: Keys = b""
    tiers: Annotated[tuple[int, ...], msgspec.Meta(max_length=64)] = ()
    text: Name | None = None
    number: float | int | None = None
    everywhere: bool = False


class Probe(Frame, tag=18):
    """Asks shared tiers for ``keys``; see ``CacheEngine.sharing``. Answered by :class:`Value`, whether an answer is under way."""

    call: Natural
    parent: Keys
    keys: Keys
    tenant: Name
    tiers: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] | None


FromEngine = (
    Hello | Resume | Mapped | Match | Promote | Pin | Unpin | Touch | BeginLoad | EndLoad | BeginStores | EndStore
    | Began | Ended | TakeHint | Poll | Verb | Probe
)  # fmt: skip

# ---- from the daemon --------------------------------------------------------------------------------------------------


class Welcome(Frame, tag=1):
    """The answer to :class:`Hello`."""

    arena_id: str
    """another one after every start of the daemon"""
    arena_path: str
    arena_bytes: int
    namespace: dict[str, int | str]
    block_bytes: int
    block_tokens: int
    tiers: dict[str, int]
    shared_tiers: tuple[str, ...]
    capacity_blocks: int
    max_reserved_blocks: int
    num_blocks: dict[str, int]


class Refused(Frame, tag=2):
    """The answer to :class:`Hello`, or what ends a session; the connection is closed behind it."""

    message: str


class Failed(Frame, tag=3):
    """A call was refused: the name of an error and its message. The session goes on."""

    call: int
    kind: str
    message: str


class Matched(Frame, tag=4):
    """The answer to :class:`Match`."""

    call: int
    hit_blocks: int
    ready_blocks: int
    is_pending: bool


class Slots(Frame, tag=5):
    """The answer to :class:`BeginLoad`."""

    call: int
    slots: tuple[int, ...]
    generations: tuple[int, ...]


class StoreSlots(Frame):
    """One store of :class:`Stores`: ``positions`` says of which keys the slots are."""

    slots: tuple[int, ...]
    generations: tuple[int, ...]
    positions: tuple[int, ...]
    num_refused: int
    num_declined: int
    is_broken: bool


class Stores(Frame, tag=8):
    """The answer to :class:`BeginStores`, in its order; ends behind the first that is broken."""

    call: int
    stores: tuple[StoreSlots, ...]


class Value(Frame, tag=6):
    """Any other answer."""

    call: int
    value: Any


class Status(Frame, tag=7):
    """The answer to :class:`Poll`."""

    is_busy: bool
    is_growing: bool
    draining_blocks: int
    num_workers: int
    """workers of this start of the engine that have mapped the arena"""
    num_transfers: int
    """transfers that were seen to end since the daemon started"""
    transfers: tuple[tuple[str, int, float], ...]
    """since the last answer: tier, bytes (-1: it answered a question), seconds"""
    events: tuple[tuple[bool, str, bytes, bytes | None, int], ...]
    """since the last answer: stored, tier, key, parent, bytes"""


FromDaemon = Welcome | Refused | Failed | Matched | Slots | Stores | Value | Status


_COUNTED_BY_ENGINES = ("lookup.", "recompute.", "daemon.", "record.")
_ALSO = frozenset({"hint.bad", "connector.errors", "load.stale_slots", "promote.timeouts", "probe.skipped", "probe.timeouts"})


def is_counted_by_engines(name: str) -> bool:
    """Whether the connectors count this; the daemon counts the rest. The daemon's totals have both."""
    return name in COUNTERS and (name.startswith(_COUNTED_BY_ENGINES) or name in _ALSO)


def keys_of(joined: bytes) -> list[BlockKey]:
    """The keys of a frame. Raises ValueError where they are not whole, or one of them comes twice."""
    if len(joined) % KEY_BYTES:
        raise ValueError(f"{len(joined)} bytes of keys; allowed: {KEY_BYTES} for each")
    keys = [BlockKey(joined[at : at + KEY_BYTES]) for at in range(0, len(joined), KEY_BYTES)]
    if len(set(keys)) != len(keys):
        raise ValueError("a key comes twice")
    return keys
