"""How much of a waiting request's prompt can be brought: match, promote, pin, and wait in bounds."""

from __future__ import annotations

from collections.abc import Callable

from kvtier.cache import Cache
from kvtier.connectors.requests import ConnectorSettings, Geometry, Lookup, Matched, Request
from kvtier.control.estimates import Piece
from kvtier.types import PrefixMatch

PIN_TTL_S = 30.0
"""a pin that is not asked for again ends after this time: the engine has forgotten the request"""
_NOTHING = Matched(0)
_LATER = Matched(None)


class Matcher:
    """Answers for waiting requests and keeps their hits from eviction. One thread.

    All pins together keep at most ``settings.max_pinned_fraction`` of host memory; what is beyond is looked up afresh whenever
    the engine asks.  A request waits at most ``promote_wait_s`` in all for promotions, and for stores that are shared with other engines
    to say what they hold, each time it wants to start.
    """

    def __init__(self, engine: Cache, geometry: Geometry, settings: ConnectorSettings, *, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._settings = settings
        self._block_tokens = geometry.block_tokens
        self._engine_block_tokens = geometry.engine_block_tokens
        self._max_pinned_blocks = int(settings.max_pinned_fraction * geometry.host_blocks)
        self._clock = clock
        self._is_sharing = bool(engine.sharing.tiers)
        self._pinned: dict[str, Lookup] = {}
        self._num_pinned_blocks = 0
        self._waiting: dict[str, Lookup] = {}

    @property
    def num_waiting(self) -> int:
        """Requests that wait for promotions, or to hear what shared tiers hold."""
        return len(self._waiting)

    @property
    def num_pinned_blocks(self) -> int:
        """Blocks that waiting requests keep from eviction; shared ones count for each."""
        return self._num_pinned_blocks

    def match(self, request: Request, num_tokens: int, num_computed_tokens: int) -> Matched:
        """See :meth:`SchedulerHalf.match`."""
        request.num_computed_tokens = num_computed_tokens
        block_tokens, engine_block_tokens = self._block_tokens, self._engine_block_tokens
        num_usable = (num_tokens - 1) // engine_block_tokens * engine_block_tokens
        if not request.can_load or num_usable <= num_computed_tokens or num_computed_tokens % engine_block_tokens:
            return _NOTHING
        first = num_computed_tokens // block_tokens
        limit = min(-(-num_usable // block_tokens), num_tokens // block_tokens)
        lookup = request.lookup
        if lookup is None or lookup.first_block != first or lookup.limit_block != limit:
            lookup = self._look(request, first, limit)
        elif lookup.is_probing:
            self._find(request, lookup)
        elif lookup.is_waiting:
            self._look_at_promotions(request, lookup)
        else:
            self._look_again(request, lookup)
        if lookup.is_waiting:
            return _LATER
        num_tokens = min((first + lookup.num_ready) * block_tokens, num_usable) - num_computed_tokens
        return Matched(num_tokens, bool(self._settings.async_load)) if num_tokens > 0 else _NOTHING

    def release(self, request: Request) -> None:
        """Ends what ``match`` keeps for a request: it starts, or is gone."""
        lookup = request.lookup
        if lookup is not None:
            self._unpin(request, lookup)
            self._waiting.pop(request.request_id, None)
            request.lookup = None

    def _look(self, request: Request, first: int, limit: int) -> Lookup:
        """The first question, or one for other blocks than before."""
        is_new = request.lookup is None
        self.release(request)
        request.lookup = lookup = Lookup(first, limit, limit, is_new=is_new)
        self._find(request, lookup)
        return lookup

    def _find(self, request: Request, lookup: Lookup) -> None:
        """What is a hit, once shared tiers have said what they hold of it or the request cannot wait for them."""
        first, limit = lookup.first_block, lookup.limit_block
        found = self._engine.match(request.keys_from(first, limit, self._block_tokens))
        if self._is_sharing and found.hit_blocks < limit - first and self._probe(request, lookup, found):
            return
        if lookup.is_probing:
            lookup.is_probing = False
            self._stop_waiting(request, lookup)
        if lookup.is_new:
            self._engine.stats.add("lookup.blocks", limit - first)
            self._engine.stats.add("lookup.hit_blocks", found.hit_blocks)
        found = self._worth(request, found, lookup)
        lookup.num_ready = lookup.num_promised = found.ready_blocks
        if lookup.is_new:
            request.num_found_ready = first + found.ready_blocks
        if found.hit_blocks > found.ready_blocks:
            self._promote(request, lookup, found.hit_blocks)
        self._pin(request, lookup)

    def _probe(self, request: Request, lookup: Lookup, found: PrefixMatch) -> bool:
        """Has shared tiers be asked for what lies behind a hit. Whether the request waits for an answer."""
        engine, first = self._engine, lookup.first_block
        known, num_missing = first + found.hit_blocks, lookup.limit_block - first - found.hit_blocks
        if lookup.ask_tiers is None:
            lookup.ask_tiers = engine.sharing.tiers
            if self._settings.load_or_recompute == "auto":
                lookup.ask_tiers = engine.sharing.worth_probing(known * self._block_tokens, num_missing * self._block_tokens, num_missing)
                engine.stats.add("probe.skipped", int(len(lookup.ask_tiers) < len(engine.sharing.tiers)))
        if not lookup.ask_tiers:
            return False
        now = self._clock()
        keys = request.keys(lookup.limit_block, self._block_tokens)
        if not engine.sharing.probe(keys, known, request.tenant, tiers=lookup.ask_tiers):
            return False
        if now >= request.begin_waiting(now, self._settings.promote_wait_s):
            engine.stats.add("probe.timeouts", int(lookup.is_probing))
            return False
        if not lookup.is_probing or found.ready_blocks > lookup.num_ready:
            lookup.num_ready = lookup.num_promised = found.ready_blocks
            self._pin(request, lookup)
        lookup.is_probing = lookup.is_waiting = True
        self._waiting[request.request_id] = lookup
        return True

    def _worth(self, request: Request, found: PrefixMatch, lookup: Lookup) -> PrefixMatch:
        """The part of a hit that is loaded faster than it is computed."""
        if self._settings.load_or_recompute == "always" or not found.hit_blocks:
            return found
        sizes: list[tuple[tuple[str, ...], int]] = [(("host",), found.ready_blocks)] if found.ready_blocks else []
        if found.hit_blocks > found.ready_blocks:
            end = lookup.first_block + found.hit_blocks
            keys = request.keys(end, self._block_tokens)[lookup.first_block + found.ready_blocks :]
            sizes += [((name,) if name == "host" else (name, "host"), count) for name, count in self._engine.verbs.sources(keys)]
        engine = self._engine
        pieces = [Piece(path, num_blocks * self._block_tokens, num_blocks * engine.block_bytes) for path, num_blocks in sizes]
        choice = engine.estimates.choose(lookup.first_block * self._block_tokens, pieces)
        num_blocks = sum(num_blocks for _, num_blocks in sizes[: choice.num_pieces])
        if num_blocks == found.hit_blocks:
            engine.stats.add("recompute.probes", int(choice.is_probe))
            return found
        lookup.end_block = lookup.first_block + num_blocks
        engine.stats.add("recompute.refused_blocks", found.hit_blocks - num_blocks)
        engine.stats.add("recompute.estimated_load_ms", round(1000 * (choice.refused_load_s or 0.0)))
        engine.stats.add("recompute.estimated_compute_ms", round(1000 * (choice.refused_compute_s or 0.0)))
        return PrefixMatch(num_blocks, min(num_blocks, found.ready_blocks), found.pending)

    def _promote(self, request: Request, lookup: Lookup, num_blocks: int) -> None:
        """Starts promotions as far as waiting requests may hold host memory, while the request may still wait.

        Where slots must be written down before they are free, it comes in parts: the request waits for those as well.
        """
        now = self._clock()
        deadline = request.begin_waiting(now, self._settings.promote_wait_s)
        lookup.num_wanted = min(num_blocks, self._room(now, lookup))
        if now >= deadline or lookup.num_wanted <= lookup.num_ready:
            self._stop_waiting(request, lookup)
            return
        keys = request.keys(lookup.first_block + lookup.num_wanted, self._block_tokens)[lookup.first_block :]
        lookup.num_promised = max(lookup.num_ready, self._engine.promote(keys))
        lookup.num_draining = self._engine.draining_blocks if lookup.num_promised < lookup.num_wanted else 0
        if lookup.num_promised > lookup.num_ready or lookup.num_draining:
            lookup.is_waiting = True
            self._waiting[request.request_id] = lookup
        else:
            self._stop_waiting(request, lookup)

    def _look_at_promotions(self, request: Request, lookup: Lookup) -> None:
        """Are they here, will they ever be, or is it too late?"""
        end = lookup.first_block + lookup.num_wanted
        found = self._engine.match(request.keys_from(lookup.first_block, end, self._block_tokens))
        has_grown = found.ready_blocks > lookup.num_ready
        lookup.num_ready = found.ready_blocks
        is_coming = found.pending and found.ready_blocks < lookup.num_promised
        is_refused = found.hit_blocks > found.ready_blocks and lookup.num_promised < lookup.num_wanted
        if has_grown:
            self._pin(request, lookup)
        if not is_coming and not is_refused:
            self._stop_waiting(request, lookup)
        elif request.deadline is not None and self._clock() >= request.deadline:
            self._engine.stats.add("promote.timeouts")
            self._stop_waiting(request, lookup)
        elif not is_coming and (has_grown or self._engine.draining_blocks != lookup.num_draining):
            self._promote(request, lookup, found.hit_blocks)
        if not lookup.is_waiting:
            self._pin(request, lookup)

    def _stop_waiting(self, request: Request, lookup: Lookup) -> None:
        lookup.is_waiting = False
        self._waiting.pop(request.request_id, None)

    def _look_again(self, request: Request, lookup: Lookup) -> None:
        """What is pinned is certain; what lies behind is asked anew (one miss costs one look)."""
        now = self._clock()
        if lookup.num_pinned and now >= lookup.pinned_until:
            self._unpin(request, lookup)
        known = lookup.num_pinned
        if lookup.first_block + known < lookup.end_block:
            found = self._engine.match(request.keys_from(lookup.first_block + known, lookup.end_block, self._block_tokens))
            lost = known + found.ready_blocks < lookup.num_ready
            lookup.num_ready = lookup.num_promised = known + found.ready_blocks
            if lost and found.hit_blocks > found.ready_blocks:
                self._promote(request, lookup, known + found.hit_blocks)
        if lookup.num_ready > known or now >= lookup.pinned_until - PIN_TTL_S / 2:
            self._pin(request, lookup)

    def _room(self, now: float, lookup: Lookup) -> int:
        """Blocks that a request may have pinned in all, given what others have or are promised. Forgets pins past their deadline."""
        if self._num_pinned_blocks >= self._max_pinned_blocks:
            for request_id, other in list(self._pinned.items()):
                if now >= other.pinned_until and other is not lookup:
                    self._forget_pin(request_id, other)
        promised = sum(max(0, other.num_promised - other.num_pinned) for other in self._waiting.values() if other is not lookup)
        return self._max_pinned_blocks - (self._num_pinned_blocks - lookup.num_pinned) - promised

    def _pin(self, request: Request, lookup: Lookup) -> None:
        """Pins the ready blocks, or as many leading ones as may be, with a new deadline."""
        now = self._clock()
        num_blocks = min(lookup.num_ready, self._room(now, lookup))
        old = lookup.pin_id if lookup.num_pinned else 0
        if lookup.num_pinned:
            self._forget_pin(request.request_id, lookup)
        if num_blocks > 0:
            end = lookup.first_block + num_blocks
            keys = request.keys(end, self._block_tokens)[lookup.first_block :]
            lookup.pin_id = self._engine.pin(keys, PIN_TTL_S)
            lookup.num_pinned = num_blocks
            lookup.pinned_until = now + PIN_TTL_S
            self._pinned[request.request_id] = lookup
            self._num_pinned_blocks += num_blocks
        if old:
            self._engine.unpin(old)

    def _unpin(self, request: Request, lookup: Lookup) -> None:
        if lookup.num_pinned:
            pin_id = lookup.pin_id
            self._forget_pin(request.request_id, lookup)
            self._engine.unpin(pin_id)

    def _forget_pin(self, request_id: str, lookup: Lookup) -> None:
        del self._pinned[request_id]
        self._num_pinned_blocks -= lookup.num_pinned
        lookup.num_pinned = 0
