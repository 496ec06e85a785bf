"""ServedCache: a daemon's cache as a connector sees it. In place of a :class:`~kvtier.CacheEngine`, which documents the methods."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from kvtier.control.commands import BlockEvent
from kvtier.control.hints import Hint
from kvtier.engine import Attachment
from kvtier.errors import ClosedError
from kvtier.serve import messages
from kvtier.serve.channel import Attaching, Channel
from kvtier.serve.estimates import SharedEstimates
from kvtier.serve.plain_hints import plain_hint
from kvtier.serve.remote_sharing import RemoteSharing
from kvtier.serve.remote_verbs import RemoteVerbs
from kvtier.stats import Stats
from kvtier.types import KEY_BYTES, BlockKey, BlockMeta, Damage, LoadPlan, PrefixMatch, SlotRef, StoreOrder, StorePlan

FIRST_KEYS = 128
"""keys that are asked for at first; the rest follow at once where all of these hit"""
_MISS = PrefixMatch(0, 0)


@dataclass(frozen=True, slots=True)
class _Copy:
    """A load or store that was begun: in which session, with which arena, and how many slots."""

    session: int
    arena_id: str
    num_slots: int
    is_load: bool


class ServedCache:
    """A cache that a daemon owns. One thread drives it.

    Without a daemon every question is a miss; it comes back by itself. All calls between two ``poll`` wait for the daemon no longer
    than ``settings.deadline_s`` together; then the session is given up. What was held in a session that was lost is void. ``reset``
    forgets for this engine alone, which shares nothing with the others from then on.

    Raises:
        DaemonError: from the constructor: there is no daemon, or it refuses this engine.
    """

    def __init__(self, attaching: Attaching) -> None:
        self.stats = Stats()
        self.estimates = SharedEstimates()
        self._pin_ids = itertools.count(1)
        self._job_ids = itertools.count(1)
        self._copies: dict[int, _Copy] = {}
        self._pins: set[int] = set()
        self._mask = 0
        self._attachment: Attachment | None = None
        self._is_closed = False
        self._is_scheduler = attaching.hello.role == "scheduler"
        self._channel = channel = Channel(attaching, self.stats, self.estimates)
        channel.on_session = self._resume
        channel.on_loss = self._pins.clear
        self.block_bytes = channel.welcome.block_bytes
        self.verbs = RemoteVerbs(channel.welcome, self._ask, self._ask_in_step)
        self.sharing = RemoteSharing(self._channel, self.estimates, self._join)
        channel.begin()

    # ---- asking and copying -------------------------------------------------------------------------------------

    @property
    def arena_id(self) -> str:
        return self._channel.welcome.arena_id

    @property
    def welcome(self) -> messages.Welcome:
        """What the daemon said of itself, last."""
        return self._channel.welcome

    def match(self, keys: Iterable[BlockKey]) -> PrefixMatch:
        remaining = iter(keys)
        hit_blocks = ready_blocks = 0
        is_pending = False
        size = FIRST_KEYS
        while chunk := list(itertools.islice(remaining, size)):
            reply = self._channel.call(lambda call: messages.Match(call, self._join(chunk)), messages.Matched)
            if reply is None:
                return _MISS
            if ready_blocks == hit_blocks:
                ready_blocks += reply.ready_blocks
            hit_blocks += reply.hit_blocks
            is_pending |= reply.is_pending
            if reply.hit_blocks < len(chunk):
                break
            size = messages.MAX_KEYS // 8
        return PrefixMatch(hit_blocks, ready_blocks, is_pending)

    def promote(self, keys: Sequence[BlockKey]) -> int:
        reply = self._channel.call(lambda call: messages.Promote(call, self._join(keys)), messages.Value)
        return 0 if reply is None else int(reply.value)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        self._channel.tell(messages.Touch(self._join(keys)))

    def pin(self, keys: Sequence[BlockKey], ttl_s: float | None = None) -> int:
        pin_id = next(self._pin_ids)
        self._pins.add(pin_id)
        self._channel.tell(messages.Pin(pin_id, self._join(keys), ttl_s), at_once=True)
        return pin_id

    def unpin(self, pin_id: int) -> None:
        if pin_id < 0:
            self._channel.tell(messages.Unpin(-pin_id, is_reserved=True), at_once=True)
        elif pin_id in self._pins:
            self._pins.discard(pin_id)
            self._channel.tell(messages.Unpin(pin_id), at_once=True)

    def begin_load(self, keys: Sequence[BlockKey], *, pooled: bool = True) -> LoadPlan:
        job_id = next(self._job_ids)
        reply = self._channel.call(lambda call: messages.BeginLoad(call, job_id, self._join(keys)), messages.Slots)
        if reply is None:
            return LoadPlan(job_id)
        self._copies[job_id] = _Copy(self._channel.session, self.arena_id, len(reply.slots), is_load=True)
        return LoadPlan(job_id, _refs(reply))

    def end_load(self, job_id: int, failed: Collection[int] = (), *, partial: Collection[int] = ()) -> None:
        copy = self._copies.pop(job_id, None)
        if copy is None:
            return
        self.stats.add("load.failed_blocks", len(failed))
        self.stats.add("host.loaded_blocks", copy.num_slots - len(failed))
        self._ended(copy, messages.EndLoad(job_id, tuple(failed), tuple(partial)))

    def begin_store(
        self, keys: Sequence[BlockKey], first: int, tenant: str = "", *, may_evict: bool = True, pooled: bool = True
    ) -> StorePlan:
        return self.begin_stores([StoreOrder(keys, first, tenant, may_evict, pooled)])[0]

    def begin_stores(self, orders: Sequence[StoreOrder]) -> list[StorePlan]:
        plans: list[StorePlan] = []
        for group in _in_frames(orders):
            plans += self._begin(group)
            if plans[-1].broken:
                break
        return plans

    def commit_store(self, job_id: int, failed: Collection[int] = ()) -> None:
        copy = self._copies.pop(job_id, None)
        if copy is None:
            return
        is_void = self._is_void(copy)
        num_good = 0 if is_void else min(failed, default=copy.num_slots)
        self.stats.add("host.stored_blocks", num_good)
        self.stats.add("store.aborted_blocks", copy.num_slots - num_good)
        self._ended(copy, messages.EndStore(job_id, tuple(failed), is_void))

    def abort_store(self, job_id: int) -> None:
        self.commit_store(job_id, (0,))

    def poll(self, timeout_s: float = 0.0) -> None:
        if self._is_closed:
            raise ClosedError("this ServedCache is closed")
        self._channel.poll(timeout_s)
        if self._attachment is not None:
            self._attachment.serve()

    # ---- what it says of itself ---------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """The daemon drives its tiers itself: no engine must step for them."""
        return self._attachment is not None and self._attachment.has_work

    @property
    def is_usable(self) -> bool:
        """Whether there is a daemon and all workers have mapped its arena."""
        return self._channel.is_usable

    def wait_until_usable(self, timeout_s: float) -> bool:
        """Waits for the workers, for an engine that is starting. Returns whether they have come."""
        deadline = time.monotonic() + timeout_s
        while not self.is_usable and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.005)
        return self.is_usable

    @property
    def is_growing(self) -> bool:
        return self._channel.status.is_growing

    @property
    def draining_blocks(self) -> int:
        return self._channel.status.draining_blocks

    def num_blocks(self) -> Mapping[str, int]:
        """When the session began."""
        return self.welcome.num_blocks

    def take_events(self) -> list[BlockEvent]:
        """Of all engines; those of others say nothing any more once this one has keys of its own."""
        events = []
        while self._channel.events:
            stored, tier, key, parent, num_bytes = self._channel.events.popleft()
            meta = BlockMeta(BlockKey(self._masked(key)), None if parent is None else BlockKey(self._masked(parent)), num_bytes)
            events.append(BlockEvent(stored, tier, meta))
        return events

    def check(self) -> list[Damage]:
        return [Damage("daemon", problem) for problem in self._ask(messages.Verb(0, "check"))]

    # ---- hints and control --------------------------------------------------------------------------------------

    def hint(self, hint: Hint) -> None:
        kind, fields = plain_hint(hint)
        self._channel.call(lambda call: messages.TakeHint(call, kind, fields), messages.Value)

    def hint_began(self, session: str) -> None:
        self._channel.tell(messages.Began(session), at_once=True)

    def hint_ended(self, session: str, keys: Sequence[BlockKey], num_tokens: int) -> None:
        self._channel.tell(messages.Ended(session, self._join(keys), num_tokens), at_once=True)

    def hint_keep(self, keys: Sequence[BlockKey]) -> None:
        self._channel.tell(messages.Ended("", self._join(keys), 0), at_once=True)

    def attach(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def reset(self) -> None:
        """Others may go on with what this engine must not see any more (its weights may have changed), so it gets keys of its own."""
        self.stats.add("index.reset")
        self._mask = int.from_bytes(secrets.token_bytes(KEY_BYTES), "little")
        for job_id, copy in self._copies.items():
            if not copy.is_load:
                self._copies[job_id] = replace(copy, session=0)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._attachment is not None:
            self._attachment.close()
        self._channel.close()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """A session begins."""
        self.verbs.welcome = self.welcome
        if self._is_scheduler:
            open_jobs = tuple(job_id for job_id, copy in self._copies.items() if copy.arena_id == self.arena_id)
            self._channel.tell(messages.Resume(open_jobs), at_once=True)

    def _ask(self, verb: messages.Verb) -> Any:
        verb.keys = self._masked(verb.keys)
        return self._channel.ask(verb.name, lambda call: msgspec.structs.replace(verb, call=call))

    def _ask_in_step(self, verb: messages.Verb) -> Any:
        verb.keys = self._masked(verb.keys)
        reply = self._channel.call(lambda call: msgspec.structs.replace(verb, call=call), messages.Value)
        return None if reply is None else reply.value

    def _begin(self, orders: Sequence[StoreOrder]) -> list[StorePlan]:
        """In one frame. A daemon that is not there refuses them all."""
        stores = tuple(map(self._store, orders))
        reply = self._channel.call(lambda call: messages.BeginStores(call, stores), messages.Stores)
        if reply is None:
            return [StorePlan(store.job, num_refused=len(store.keys) // KEY_BYTES) for store in stores]
        plans = []
        for store, slots in zip(stores, reply.stores, strict=False):
            if slots.slots:
                self._copies[store.job] = _Copy(self._channel.session, self.arena_id, len(slots.slots), is_load=False)
            refs = _refs(slots)
            plans.append(StorePlan(store.job, slots.positions, refs, slots.num_refused, slots.num_declined, slots.is_broken))
        return plans

    def _store(self, order: StoreOrder) -> messages.Store:
        keys, first = order.keys, order.first
        parent = self._join(keys[first - 1 : first]) if first else b""
        return messages.Store(next(self._job_ids), parent, self._join(keys[first:]), order.tenant, order.may_evict)

    def _is_void(self, copy: _Copy) -> bool:
        """Whether the session in which a copy was begun has ended."""
        return copy.session != self._channel.session or not self._channel.is_open

    def _ended(self, copy: _Copy, frame: messages.EndLoad | messages.EndStore) -> None:
        if self._is_void(copy):
            self.stats.add("daemon.void_copies")
        if copy.arena_id == self.arena_id:  # else another daemon runs now, which knows nothing of it
            self._channel.tell(frame)

    def _join(self, keys: Iterable[BlockKey]) -> bytes:
        return self._masked(b"".join(keys))

    def _masked(self, joined: bytes) -> bytes:
        """The keys as the daemon has them; the same function gives them back."""
        if not self._mask or not joined:
            return joined
        repeated = int.from_bytes(self._mask.to_bytes(KEY_BYTES, "little") * (len(joined) // KEY_BYTES), "little")
        return (int.from_bytes(joined, "little") ^ repeated).to_bytes(len(joined), "little")


def _in_frames(orders: Sequence[StoreOrder]) -> Iterator[list[StoreOrder]]:
    """Groups that one frame holds each: nearly always a single one."""
    group: list[StoreOrder] = []
    num_keys = 0
    for order in orders:
        num_keys += len(order.keys) - order.first + 1
        if group and (num_keys > messages.MAX_KEYS or len(group) == messages.MAX_STORES):
            yield group
            group, num_keys = [], len(order.keys) - order.first + 1
        group.append(order)
    if group:
        yield group


def _refs(reply: messages.Slots | messages.StoreSlots) -> tuple[SlotRef, ...]:
    return tuple(map(SlotRef, reply.slots, reply.generations))
