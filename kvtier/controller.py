"""The control API: what a program may ask of a running cache beside serving, in the process that decides what is cached.

::

    controller = kvtier.Controller.of()            # the only engine of this process, or by its name
    found = controller.lookup(token_ids).result()
    pinned = controller.pin(token_ids, ttl_s=600.0).result()

Verbs may be called from any thread. They are carried out by the thread that drives the engine, in its next ``poll``, so they never race
with a decision; called on that thread itself, they are carried out at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import TypeVar

from kvtier.cache import Cache
from kvtier.control.grouping import order
from kvtier.control.hints import Hint, check_hint
from kvtier.control.operations import DEVICE_TIER, HOST_TIER
from kvtier.controlled import Cleared, Evicted, Found, Health, Moved, Pinned, Prefetched, Snapshot, TierShare
from kvtier.errors import ClosedError, ControlError, QuotaError
from kvtier.hashing import KeyChain, Namespace, request_root, salt_extra, tenant_extra
from kvtier.job import Job, Progress
from kvtier.policies import POLICIES
from kvtier.types import KEY_BYTES, BlockKey

__all__ = ["Controller", "controllers"]

T = TypeVar("T")
Work = Generator[Progress, None, T]
ALL = "all"
"""every tier, where a verb asks for one"""
MAX_QUEUED = 10_000
"""verbs that may wait for an engine that does not step"""

_registry: dict[str, Controller] = {}
_registry_lock = threading.Lock()


class Controller:
    """The control API of one :class:`~kvtier.CacheEngine`, or of a daemon's cache. Thread-safe.

    Every verb returns a :class:`~kvtier.job.Job`. What is wrong with the arguments raises :class:`~kvtier.ControlError` at once; what only
    the driving thread can find out is raised by ``Job.result``. A prefix is named by its token ids (with ``salt``, the request's
    cache salt, and ``tenant``, the one that it named), of which only full blocks count, or by the keys of its blocks.

    Args:
        engine: the cache; the controller is closed with it
        namespace: what the engine's keys begin with
        block_tokens: tokens of a block
        name: how ``Controller.of`` finds it; empty: it does not
    """

    def __init__(self, engine: Cache, *, namespace: Namespace, block_tokens: int, name: str = "") -> None:
        self.name = name
        self._engine = engine
        self._namespace = namespace
        self._block_tokens = block_tokens
        self._queued: deque[Job[object]] = deque()
        self._running: list[Job[object]] = []
        self._driver = threading.get_ident()
        self._is_serving = False
        self._is_closed = False
        engine.attach(self)
        if name:
            with _registry_lock:
                _registry[name] = self

    @classmethod
    def of(cls, name: str | None = None) -> Controller:
        """The controller of an engine in this process; without a name, of the only one.

        Raises:
            ControlError: there is none of this name, or not exactly one.
        """
        known = controllers()
        if name is None and len(known) == 1:
            return next(iter(known.values()))
        if name is None or name not in known:
            there = ", ".join(sorted(known)) or "none; an engine core in a process of its own has its controller there"
            raise ControlError(f"name is {name!r}; engines with a controller in this process: {there}")
        return known[name]

    # ---- asking -------------------------------------------------------------------------------------------------

    def lookup(
        self, tokens: Sequence[int] | None = None, *, keys: Sequence[BlockKey] | None = None, salt: str = "", tenant: str = ""
    ) -> Job[Found]:
        """Which tiers hold how much of a prefix. Changes nothing."""
        chain = self._chain(tokens, keys, salt, tenant)
        return self._submit("lookup", self._at_once(lambda: self._look(chain)))

    def stats(self) -> Job[Snapshot]:
        """Counters, blocks and bytes by tier, and what is open."""
        return self._submit(
            "stats", self._at_once(lambda: self._engine.verbs.snapshot(self._engine.stats.snapshot(), self._engine.estimates.figures()))
        )

    def health(self, *, check_books: bool = False) -> Job[Health]:
        """Which tiers are online. ``check_books``: verify the books of the control plane too, which reads every entry."""

        def look() -> Health:
            problems = [damage.what for damage in self._engine.check()] if check_books else []
            online = self._engine.verbs.online()
            return Health(all(online.values()) and not problems, online, tuple(problems))

        return self._submit("health", self._at_once(look))

    # ---- keeping ------------------------------------------------------------------------------------------------

    def pin(
        self,
        tokens: Sequence[int] | None = None,
        *,
        keys: Sequence[BlockKey] | None = None,
        salt: str = "",
        tenant: str = "",
        ttl_s: float | None = None,
    ) -> Job[Pinned]:
        """Keeps what is there of a prefix where it is, for ``ttl_s`` seconds or until ``unpin``.

        ``result`` raises QuotaError where pins would keep more than their share of host memory.
        """
        chain = self._chain(tokens, keys, salt, tenant)
        _check_seconds("ttl_s", ttl_s)

        def work() -> Pinned:
            verbs = self._engine.verbs
            pin_id, num_blocks = verbs.reserve(chain, ttl_s)
            if pin_id is None:
                raise QuotaError(
                    f"pin of {num_blocks} blocks: {verbs.reserved_blocks} are pinned already; "
                    f"allowed: {verbs.max_reserved_blocks} in all (control.max_pinned_fraction)"
                )
            return Pinned(pin_id, num_blocks, num_blocks * self._block_tokens)

        return self._submit("pin", self._at_once(work))

    def unpin(self, pin: Pinned) -> Job[None]:
        """Ends a pin. One that has ended already is fine."""
        return self._submit("unpin", self._at_once(lambda: self._engine.unpin(pin.pin_id)))

    def prefetch(
        self,
        tokens: Sequence[int] | None = None,
        *,
        keys: Sequence[BlockKey] | None = None,
        salt: str = "",
        tenant: str = "",
        tier: str = "host",
        deadline_s: float | None = None,
    ) -> Job[Prefetched]:
        """Brings what lower tiers hold of a prefix to host memory, for at most ``deadline_s`` seconds from now.

        ``tier`` can only be ``host``: device memory is filled by loads alone.
        """
        chain = self._chain(tokens, keys, salt, tenant)
        _check_seconds("deadline_s", deadline_s)
        if tier != "host":
            raise ControlError(f"tier is {tier!r}; allowed: 'host' (blocks come to device memory when they are loaded)")
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        return self._submit("prefetch", self._prefetch(chain, deadline, tenant or salt))

    # ---- hints --------------------------------------------------------------------------------------------------

    def hint(self, hint: Hint) -> Job[None]:
        """Says what is going to happen with sessions: a ToolCall, NextUse, SessionOver or Workflow.

        A session is known once a request has named it. ``result`` raises UnknownSessionError where none has, and QuotaError where
        what is to be kept does not fit into the share of pins.
        """
        check_hint(hint)
        return self._submit("hint", self._at_once(lambda: self._engine.hint(hint)))

    def order(self, prompts: Sequence[Sequence[int]], *, salt: str = "", tenant: str = "") -> list[int]:
        """In which order to run a batch so that prompts with a common prefix follow each other: indexes of ``prompts``. At once, no job."""
        return order([self._chain(prompt, None, salt, tenant) for prompt in prompts])

    # ---- moving and dropping ------------------------------------------------------------------------------------

    def move(
        self,
        tokens: Sequence[int] | None = None,
        *,
        keys: Sequence[BlockKey] | None = None,
        salt: str = "",
        tenant: str = "",
        from_tier: str,
        to_tier: str,
    ) -> Job[Moved]:
        """Copies what ``from_tier`` holds of a prefix to ``to_tier``, then drops it from ``from_tier``. One of the two is ``host``.

        What continues the prefix goes with it. What does not arrive stays where it is, and so does what
        is pinned or a beginning that others share.
        """
        chain = self._chain(tokens, keys, salt, tenant)
        allowed = [name for name, number in self._engine.verbs.tiers.items() if number != DEVICE_TIER]
        source, target = (self._tier(argument, name, allowed) for argument, name in (("from_tier", from_tier), ("to_tier", to_tier)))
        if source == target or HOST_TIER not in (source, target):
            raise ControlError(f"from_tier is {from_tier!r} and to_tier {to_tier!r}; allowed: two tiers, one of them 'host'")
        return self._submit("move", self._move(chain, source, target))

    def evict(
        self,
        tokens: Sequence[int] | None = None,
        *,
        keys: Sequence[BlockKey] | None = None,
        salt: str = "",
        tenant: str = "",
        tier: str,
        everywhere: bool = False,
    ) -> Job[Evicted]:
        """Drops a prefix and all that continues it from a tier, or from ``"all"``.

        What is pinned stays with everything before it, and so does a beginning that other prompts share. In a store that other engines
        use too the blocks stay, unless ``everywhere`` says that what this engine knows of is to be deleted there.
        """
        chain = self._chain(tokens, keys, salt, tenant)
        tiers = self._tiers(tier)
        return self._submit("evict", self._at_once(lambda: Evicted(self._engine.verbs.evict(chain, tiers, everywhere=everywhere))))

    def clear(
        self, *, namespace: Namespace | None = None, tenant: str | None = None, tier: str | None = None, everywhere: bool = False
    ) -> Job[Cleared]:
        """Forgets everything in a scope, pinned or not: the engine's whole namespace, a tenant, a tier, or a tenant in a tier.

        What is on its way there comes to nothing. Reads every entry of the index. ``everywhere``: as for ``evict``.
        """
        if namespace is None and tenant is None and tier is None:
            raise ControlError("clear without a scope; allowed: at least one of namespace, tenant and tier")
        if namespace is not None and namespace.digest != self._namespace.digest:
            raise ControlError(f"namespace is not this engine's; allowed: {self._namespace}")
        tiers = self._tiers(tier or ALL)
        return self._submit("clear", self._at_once(lambda: Cleared(self._engine.verbs.clear(tiers, tenant, everywhere=everywhere))))

    def set_policy(self, tier: str, policy: str) -> Job[None]:
        """Gives a tier another eviction policy, which begins with the order of the old one. Touches every block of the tier."""
        number = self._tier("tier", tier, self._engine.verbs.tiers)
        if policy not in POLICIES:
            raise ControlError(f"policy is {policy!r}; allowed: {', '.join(sorted(POLICIES))}")
        return self._submit("set_policy", self._at_once(lambda: self._engine.verbs.set_policy(number, policy)))

    def quota(self, tenant: str, *, tier: str, num_bytes: int | None) -> Job[Mapping[str, int]]:
        """Says how many bytes a tenant may always have in a tier; None: as all tenants without a quota. Gives all quotas of the tier.

        Nobody leaves because of it; from then on a tenant over its quota makes room for itself, and others' unused share is borrowed.
        ``result`` raises QuotaError where quotas together would exceed the tier. Touches every block of the tier.
        """
        number = self._tier("tier", tier, [name for name, number in self._engine.verbs.tiers.items() if number != DEVICE_TIER])
        if not tenant:
            raise ControlError("tenant is ''; allowed: a tenant's name")
        if num_bytes is not None and (type(num_bytes) is not int or num_bytes < 0):
            raise ControlError(f"num_bytes is {num_bytes!r}; allowed: a whole number from 0, or None")
        return self._submit("quota", self._at_once(lambda: self._engine.verbs.set_quota(number, tenant, num_bytes)))

    @property
    def namespace(self) -> Namespace:
        """What the engine's blocks belong to; ``clear`` takes it."""
        return self._namespace

    # ---- the engine's side --------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether verbs wait or run. Called by the engine."""
        return bool(self._queued or self._running)

    def serve(self) -> None:
        """Carries out what is queued and goes on with what runs. Called by the engine's ``poll``, on its thread."""
        self._driver = threading.get_ident()
        if self._is_serving or not (self._queued or self._running):
            return
        self._is_serving = True
        try:
            while self._queued:
                self._running.append(self._queued.popleft())
            for job in self._running:
                job.advance()
        finally:
            self._running = [job for job in self._running if not job.is_over]
            self._is_serving = False

    def close(self) -> None:
        """Ends all jobs with ClosedError and takes the name away. Called by the engine's ``close``. Idempotent."""
        self._is_closed = True
        with _registry_lock:
            if _registry.get(self.name) is self:
                del _registry[self.name]
        for job in (*self._running, *self._queued):
            job.abandon(ClosedError(f"{job.verb}: the engine was closed"))
        self._running.clear()
        self._queued.clear()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _submit(self, verb: str, work: Work[T]) -> Job[T]:
        if self._is_closed:
            raise ClosedError(f"{verb}: the engine was closed")
        if len(self._queued) >= MAX_QUEUED:
            raise ControlError(f"{verb}: {MAX_QUEUED} verbs are waiting for the engine to step; allowed: no more")
        job = Job(verb, work, self._drive)
        self._queued.append(job)
        if threading.get_ident() == self._driver:
            self.serve()
        return job

    def _drive(self, timeout_s: float) -> bool:
        if threading.get_ident() != self._driver or self._is_closed:
            return False
        self._engine.poll(timeout_s)
        return True

    def _at_once(self, work: Callable[[], T]) -> Work[T]:
        yield from ()
        return work()

    def _look(self, keys: Sequence[BlockKey]) -> Found:
        found = self._engine.match(keys)
        names = {number: name for name, number in self._engine.verbs.tiers.items()}
        tiers = {
            names[number]: TierShare(holding.leading_blocks, holding.leading_blocks * self._block_tokens, holding.num_blocks)
            for number, holding in self._engine.verbs.holdings(keys).items()
        }
        return Found(len(keys), found.hit_blocks, found.hit_blocks * self._block_tokens, tiers)

    def _prefetch(self, keys: Sequence[BlockKey], deadline: float | None, tenant: str) -> Work[Prefetched]:
        engine = self._engine
        last_ready = -1
        while True:
            found = engine.match(keys)
            is_late = deadline is not None and time.monotonic() >= deadline
            if found.hit_blocks < len(keys) and not is_late and engine.sharing.probe(keys, found.hit_blocks, tenant):
                yield Progress(found.ready_blocks, len(keys))
                continue
            if found.ready_blocks >= found.hit_blocks or is_late:
                break
            if not found.pending:
                if found.ready_blocks == last_ready and not engine.draining_blocks:
                    break  # no room that could be freed
                last_ready = found.ready_blocks
                engine.promote(keys[: found.hit_blocks])
            yield Progress(found.ready_blocks, found.hit_blocks)
        tokens = found.ready_blocks * self._block_tokens
        return Prefetched(found.ready_blocks, tokens, found.hit_blocks - found.ready_blocks)

    def _move(self, keys: Sequence[BlockKey], source: int, target: int) -> Work[Moved]:
        move = self._engine.verbs.move(keys, source, target)
        try:
            while not move.is_done:
                yield Progress(move.copied_blocks, len(move.keys))
        finally:
            self._engine.verbs.cancel_move(move)
        return Moved(move.moved_blocks, move.copied_blocks)

    def _chain(self, tokens: Sequence[int] | None, keys: Sequence[BlockKey] | None, salt: str, tenant: str) -> list[BlockKey]:
        """The keys that the arguments name."""
        if (tokens is None) == (keys is None):
            raise ControlError("a prefix is named by tokens or by keys; allowed: exactly one of the two")
        if keys is not None:
            wrong = [key for key in keys if type(key) is not bytes or len(key) != KEY_BYTES]
            if wrong:
                raise ControlError(f"keys: {wrong[0]!r}; allowed: {KEY_BYTES} bytes")
            if salt or tenant:
                raise ControlError("salt and tenant go with tokens, not with keys")
            return list(keys)
        assert tokens is not None
        extras = [*([salt_extra(salt)] if salt else []), *([tenant_extra(tenant)] if tenant else [])]
        root = request_root(self._namespace.digest, extras)
        try:
            return KeyChain(root, self._block_tokens).update(tokens, len(tokens))
        except (ValueError, TypeError) as error:
            raise ControlError(f"tokens: {error}; allowed: token ids") from error

    def _tiers(self, name: str) -> Collection[int]:
        tiers = self._engine.verbs.tiers
        return list(tiers.values()) if name == ALL else [self._tier("tier", name, [*tiers, ALL])]

    def _tier(self, argument: str, name: str, allowed: Collection[str]) -> int:
        if name not in allowed:
            raise ControlError(f"{argument} is {name!r}; allowed: {', '.join(map(repr, allowed))}")
        return self._engine.verbs.tiers[name]


def controllers() -> dict[str, Controller]:
    """The controllers of all engines in this process, by name."""
    with _registry_lock:
        return dict(_registry)


def _check_seconds(argument: str, seconds: float | None) -> None:
    if seconds is not None and not (0 < seconds < math.inf):
        raise ControlError(f"{argument} is {seconds}; allowed: more than 0 seconds and finite, or None")
