"""One engine's scheduler, as the daemon sees it: its frames become calls of the cache. No I/O."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.control.commands import BlockEvent
from kvtier.control.hints import check_hint
from kvtier.engine import CacheEngine
from kvtier.errors import ControlError
from kvtier.policies import POLICIES
from kvtier.serve import messages
from kvtier.serve.estimates import SharedEstimates
from kvtier.serve.failed_loads import FailedLoads
from kvtier.serve.frames import ProtocolError
from kvtier.serve.members import Copy, Member
from kvtier.serve.messages import Frame, is_counted_by_engines, keys_of
from kvtier.serve.plain_hints import hint_of
from kvtier.types import BlockKey, StoreOrder

MAX_PINS = 100_000
"""of one session"""
MAX_COPIES = 100_000
MAX_EVENTS = 100_000
"""events that wait for an engine that does not ask for them; the oldest are lost"""
MAX_GROWTH = 1 << 40
"""of a counter by one poll: more than an engine counts while its daemon is away"""
MAX_COUNT = 1 << 53
"""where the engines' counters stop, so that whoever asks for them can be answered"""


@dataclass(slots=True)
class LongPoll:
    """A :class:`~kvtier.serve.messages.Poll` that waits for a transfer."""

    until: float
    num_transfers: int


class Session:
    """Carries out the frames of one scheduler or controller. Raises ProtocolError for what no honest engine says.

    Args:
        cache: the daemon's; all sessions share it
        estimates: the cache's
        member: the engine; None for a controller, which copies nothing
        send: queues a frame for the engine
        clock: seconds that do not go backwards
    """

    def __init__(
        self,
        cache: CacheEngine,
        estimates: SharedEstimates,
        member: Member | None,
        send: Callable[[Frame], None],
        clock: Callable[[], float],
    ) -> None:
        self.wants_events = False
        self._events: deque[BlockEvent] = deque(maxlen=MAX_EVENTS)
        self._transfers: deque[tuple[str, int, float]] = deque(maxlen=256)
        self._cache = cache
        self._estimates = estimates
        self._member = member
        self._send = send
        self._clock = clock
        self._pins: dict[int, tuple[int, float]] = {}
        """the engine's number -> the planner's, and when it ends by itself"""
        self._prune_pins_at = 1024
        self._failed_loads = FailedLoads(clock)
        self._reserved: set[int] = set()
        """pins of the control API, by the planner's number"""
        self._poll: LongPoll | None = None
        self._verbs: Mapping[str, Callable[[messages.Verb], Any]] = {
            "snapshot": lambda _: self._cache.verbs.snapshot(self._cache.stats.snapshot(), self._cache.estimates.figures()),
            "online": lambda _: self._cache.verbs.online(),
            "check": lambda _: [damage.what for damage in self._cache.check()],
            "holdings": lambda verb: self._cache.verbs.holdings(self._keys(verb.keys)),
            "reserve": self._reserve,
            "reserved_blocks": lambda _: self._cache.verbs.reserved_blocks,
            "sources": lambda verb: self._cache.verbs.sources(self._keys(verb.keys)),
            "evict": lambda verb: self._cache.verbs.evict(self._keys(verb.keys), self._tiers(verb.tiers), everywhere=verb.everywhere),
            "clear": lambda verb: self._cache.verbs.clear(self._tiers(verb.tiers), verb.text, everywhere=verb.everywhere),
            "set_policy": self._set_policy,
            "set_quota": self._set_quota,
        }
        self._handlers: Mapping[type[Frame], Callable[[Any], None]] = {
            messages.Resume: self._resume,
            messages.Match: self._match,
            messages.Promote: lambda frame: self._answer(frame.call, self._cache.promote(self._loadable(frame.keys))),
            messages.Pin: self._pin,
            messages.Unpin: self._unpin,
            messages.Touch: lambda frame: self._cache.touch(self._keys(frame.keys)),
            messages.BeginLoad: self._begin_load,
            messages.EndLoad: self._end_load,
            messages.BeginStores: self._begin_stores,
            messages.EndStore: self._end_store,
            messages.Began: lambda frame: self._cache.hint_began(frame.session),
            messages.Ended: self._ended,
            messages.TakeHint: self._hint,
            messages.Poll: self._begin_poll,
            messages.Verb: self._verb,
            messages.Probe: self._probe,
        }

    def handle(self, frame: Frame) -> None:
        """Carries out one frame. Raises ProtocolError, after which the connection must be closed."""
        handler = self._handlers.get(type(frame))
        if handler is None:
            raise ProtocolError(f"a {type(frame).__name__} from a session")
        try:
            handler(frame)
        except ControlError as error:
            self._send(messages.Failed(getattr(frame, "call", 0), type(error).__name__, str(error)))

    def answer_poll(self) -> None:
        """Answers a poll that has waited long enough."""
        poll = self._poll
        if poll is not None and (self._clock() >= poll.until or poll.num_transfers != self._estimates.num_transfers):
            self._poll = None
            self._send(self._status())

    def tell(self, events: Sequence[BlockEvent], transfers: Sequence[tuple[str, int, float]]) -> None:
        """What the next answer to a poll says besides."""
        if self.wants_events:
            self._events.extend(events)
        self._transfers.extend(transfers)

    def close(self) -> None:
        """Ends the session's pins; its copies are the member's."""
        for pin_id in (*(pin_id for pin_id, _ in self._pins.values()), *self._reserved):
            self._cache.unpin(pin_id)
        self._pins.clear()
        self._reserved.clear()

    # ---- frames -------------------------------------------------------------------------------------------------

    def _resume(self, frame: messages.Resume) -> None:
        self._require_member().resume(frame.open_jobs, self._cache)

    def _match(self, frame: messages.Match) -> None:
        found = self._cache.match(self._loadable(frame.keys))
        self._send(messages.Matched(frame.call, found.hit_blocks, found.ready_blocks, found.pending))

    def _pin(self, frame: messages.Pin) -> None:
        now = self._clock()
        if len(self._pins) >= self._prune_pins_at:
            self._pins = {pin: known for pin, known in self._pins.items() if known[1] > now}
            self._prune_pins_at = max(1024, 2 * len(self._pins))
        if frame.pin in self._pins or len(self._pins) >= MAX_PINS:
            raise ProtocolError(f"pin {frame.pin} is there already, or there are too many")
        ttl_s = _seconds(frame.ttl_s)
        self._pins[frame.pin] = (self._cache.pin(self._keys(frame.keys), ttl_s), math.inf if ttl_s is None else now + ttl_s)

    def _unpin(self, frame: messages.Unpin) -> None:
        if frame.is_reserved and frame.pin in self._reserved:
            self._reserved.remove(frame.pin)
            self._cache.unpin(frame.pin)
        elif not frame.is_reserved and frame.pin in self._pins:
            self._cache.unpin(self._pins.pop(frame.pin)[0])

    def _reserve(self, verb: messages.Verb) -> tuple[int | None, int]:
        pin_id, num_blocks = self._cache.verbs.reserve(self._keys(verb.keys), _seconds(verb.number))
        if pin_id is not None:
            self._reserved.add(pin_id)
        return pin_id, num_blocks

    def _begin_load(self, frame: messages.BeginLoad) -> None:
        member = self._require_room(frame.job)
        keys = self._loadable(frame.keys)
        plan = self._cache.begin_load(keys)
        num_slots = len(plan.slots)
        member.copies[frame.job] = Copy(plan.job_id, is_load=True, num_slots=num_slots, keys=keys[:num_slots])
        self._send(messages.Slots(frame.call, *_columns(plan.slots)))

    def _end_load(self, frame: messages.EndLoad) -> None:
        copy = self._copy(frame.job, frame.failed, is_load=True)
        if copy is None:
            return
        failed = set() if copy.is_void else set(frame.failed)
        if not copy.is_void:
            self._failed_loads.discard(key for at, key in enumerate(copy.keys) if at not in failed)
            self._failed_loads.add(copy.keys[at] for at in sorted(failed))
        # Workers do not look at what they copy, so this says something of the engine and nothing of the blocks.
        self._cache.end_load(copy.plan_id, failed, partial=[at for at in frame.partial if at < copy.num_slots], forgets=False)

    def _begin_stores(self, frame: messages.BeginStores) -> None:
        orders = [self._order(store) for store in frame.stores]
        member = self._require_room(*(store.job for store in frame.stores))
        plans = self._cache.begin_stores(orders)
        answers = []
        for store, plan in zip(frame.stores, plans, strict=False):
            if plan.slots:
                member.copies[store.job] = Copy(plan.job_id, is_load=False, num_slots=len(plan.slots))
            refused, declined = plan.num_refused, plan.num_declined
            answers.append(messages.StoreSlots(*_columns(plan.slots), plan.positions, refused, declined, plan.broken))
        self._send(messages.Stores(frame.call, tuple(answers)))

    def _order(self, store: messages.Store) -> StoreOrder:
        keys = self._keys(store.parent + store.keys)
        first = 1 if store.parent else 0
        if len(keys) <= first:
            raise ProtocolError("a store without a block")
        return StoreOrder(keys, first, store.tenant, store.may_evict)

    def _end_store(self, frame: messages.EndStore) -> None:
        copy = self._copy(frame.job, frame.failed, is_load=False)
        if copy is None:
            return
        if frame.is_aborted or copy.is_void:
            self._cache.abort_store(copy.plan_id)
        else:
            self._cache.commit_store(copy.plan_id, frame.failed)

    def _ended(self, frame: messages.Ended) -> None:
        keys = self._keys(frame.keys)
        if frame.session:
            self._cache.hint_ended(frame.session, keys, frame.num_tokens)
        else:
            self._cache.hint_keep(keys)

    def _hint(self, frame: messages.TakeHint) -> None:
        try:
            hint = hint_of(frame.kind, frame.fields)
            check_hint(hint)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, ControlError):
                raise
            raise ProtocolError(f"a hint makes no sense: {error}") from error
        self._cache.hint(hint)
        self._answer(frame.call, None)

    def _begin_poll(self, frame: messages.Poll) -> None:
        for name, amount in frame.counters.items():
            if not is_counted_by_engines(name):  # by one of another version
                self._cache.stats.add("daemon.unknown_counters")
                continue
            room = MAX_COUNT - self._cache.stats[name]
            self._cache.stats.add(name, min(amount, MAX_GROWTH, room))
        for step in frame.computed:
            self._estimates.computed(*step)
        if frame.wait_s and self._cache.busy:
            self._poll = LongPoll(self._clock() + frame.wait_s, self._estimates.num_transfers)
        else:
            self._send(self._status())

    def _verb(self, frame: messages.Verb) -> None:
        self._answer(frame.call, self._verbs[frame.name](frame))

    def _probe(self, frame: messages.Probe) -> None:
        keys = self._keys(frame.parent + frame.keys)
        first = 1 if frame.parent else 0
        strangers = set(frame.tiers or ()) - set(self._cache.sharing.tiers)
        if len(keys) <= first or strangers:
            raise ProtocolError("a question for no block, or to a tier that nobody shares")
        can_load = len(self._failed_loads.loadable(keys[: first + 1])) > first
        self._answer(frame.call, can_load and self._cache.sharing.probe(keys, first, frame.tenant, tiers=frame.tiers))

    # ---- inside -------------------------------------------------------------------------------------------------

    def _status(self) -> messages.Status:
        cache = self._cache
        transfers = tuple(self._transfers)
        self._transfers.clear()
        events = tuple((one.stored, one.tier, one.meta.key, one.meta.parent, one.meta.num_bytes) for one in self._events)
        self._events.clear()
        num_workers = 0 if self._member is None else self._member.num_ready
        num_transfers = self._estimates.num_transfers
        return messages.Status(cache.busy, cache.is_growing, cache.draining_blocks, num_workers, num_transfers, transfers, events)

    def _answer(self, call: int, value: object) -> None:
        self._send(messages.Value(call, value))

    def _keys(self, joined: bytes) -> list[BlockKey]:
        try:
            return keys_of(joined)
        except ValueError as error:
            raise ProtocolError(str(error)) from error

    def _loadable(self, joined: bytes) -> Sequence[BlockKey]:
        """As far as this engine can load them."""
        return self._failed_loads.loadable(self._keys(joined))

    def _tiers(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if set(numbers) - set(self._cache.verbs.tiers.values()):
            raise ProtocolError(f"tiers {numbers}; there are {self._cache.verbs.tiers}")
        return numbers

    def _set_policy(self, verb: messages.Verb) -> None:
        if verb.text is None or verb.text not in POLICIES:
            raise ControlError(f"policy is {verb.text!r}; allowed: {', '.join(sorted(POLICIES))}")
        (tier,) = self._tiers(verb.tiers)[:1] or (0,)
        self._cache.verbs.set_policy(tier, verb.text)

    def _set_quota(self, verb: messages.Verb) -> Mapping[str, int]:
        (tier,) = self._tiers(verb.tiers)[:1] or (0,)
        if not verb.text or tier < 0 or not (verb.number is None or (type(verb.number) is int and verb.number >= 0)):
            raise ProtocolError("a quota that makes no sense")
        return self._cache.verbs.set_quota(tier, verb.text, verb.number)

    def _require_member(self) -> Member:
        if self._member is None:
            raise ProtocolError("a controller copies nothing")
        return self._member

    def _require_room(self, *jobs: int) -> Member:
        member = self._require_member()
        if len(member.copies.keys() | jobs) != len(member.copies) + len(jobs) or len(member.copies) >= MAX_COPIES:
            raise ProtocolError(f"one of the copies {jobs} is under way already, or there are too many")
        return member

    def _copy(self, job: int, failed: tuple[int, ...], *, is_load: bool) -> Copy | None:
        """Takes the books' entry of a copy that has ended; None where it was given up before."""
        member = self._require_member()
        if job in member.ended:
            member.ended.remove(job)
            return None
        copy = member.copies.get(job)
        if copy is None or copy.is_load != is_load or any(at >= copy.num_slots for at in failed):
            raise ProtocolError(f"the end of copy {job}, which is none of this engine's or has no such blocks")
        del member.copies[job]
        return copy


def _seconds(number: float | None) -> float | None:
    if number is not None and not 0 < number < math.inf:
        raise ControlError(f"a pin for {number} seconds; allowed: more than 0 and finite, or none")
    return number


def _columns(slots: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(ref.slot for ref in slots), tuple(int(ref.generation) for ref in slots)
