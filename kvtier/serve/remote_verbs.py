"""What the control API asks of a daemon's cache: one call each. In place of :class:`~kvtier.verbs.Verbs`, which documents the methods."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from kvtier import errors
from kvtier.control.moves import Move
from kvtier.control.operations import Holding
from kvtier.controlled import Snapshot
from kvtier.errors import ControlError
from kvtier.serve.messages import Failed, Verb, Welcome
from kvtier.types import BlockKey

_REFUSALS = {kind.__name__: kind for kind in (errors.ControlError, errors.QuotaError, errors.UnknownSessionError)}


class RemoteVerbs:
    """Belongs to a :class:`~kvtier.serve.client.ServedCache`. Pins made here end with the connection.

    Raises, from all methods that ask: ControlError, or DaemonError where there is no daemon.
    """

    def __init__(self, welcome: Welcome, ask: Callable[[Verb], Any], ask_in_step: Callable[[Verb], Any]) -> None:
        """``ask_in_step`` gives None where there is no answer."""
        self.welcome = welcome
        self._ask = ask
        self._ask_in_step = ask_in_step

    @property
    def tiers(self) -> Mapping[str, int]:
        return self.welcome.tiers

    @property
    def max_reserved_blocks(self) -> int:
        return self.welcome.max_reserved_blocks

    @property
    def reserved_blocks(self) -> int:
        return int(self._ask(Verb(0, "reserved_blocks")))

    def holdings(self, keys: Sequence[BlockKey]) -> Mapping[int, Holding]:
        return msgspec.convert(self._ask(Verb(0, "holdings", b"".join(keys))), dict[int, Holding])

    def reserve(self, keys: Sequence[BlockKey], ttl_s: float | None) -> tuple[int | None, int]:
        """Numbers of these pins are negative: others count the pins of the connector."""
        pin_id, num_blocks = self._ask(Verb(0, "reserve", b"".join(keys), number=ttl_s))
        return (None if pin_id is None else -pin_id), num_blocks

    def sources(self, keys: Sequence[BlockKey]) -> list[tuple[str, int]]:
        """Nothing where there is no daemon: a step asks."""
        return [(str(tier), int(count)) for tier, count in self._ask_in_step(Verb(0, "sources", b"".join(keys))) or ()]

    def evict(self, keys: Sequence[BlockKey], tiers: Collection[int], *, everywhere: bool = False) -> int:
        return int(self._ask(Verb(0, "evict", b"".join(keys), tuple(tiers), everywhere=everywhere)))

    def move(self, keys: Sequence[BlockKey], source: int, target: int) -> Move:
        raise ControlError("move: a daemon's tiers are shared; allowed here: prefetch, evict, clear")

    def cancel_move(self, move: Move) -> None:
        """There is none."""

    def clear(self, tiers: Collection[int], tenant: str | None, *, everywhere: bool = False) -> int:
        return int(self._ask(Verb(0, "clear", tiers=tuple(tiers), text=tenant, everywhere=everywhere)))

    def set_policy(self, tier: int, name: str) -> None:
        self._ask(Verb(0, "set_policy", tiers=(tier,), text=name))

    def set_quota(self, tier: int, tenant: str, num_bytes: int | None) -> Mapping[str, int]:
        return msgspec.convert(self._ask(Verb(0, "set_quota", tiers=(tier,), text=tenant, number=num_bytes)), dict[str, int])

    def snapshot(self, counters: Mapping[str, int], figures: Mapping[str, float]) -> Snapshot:
        """The daemon's figures, over all engines."""
        return msgspec.convert(self._ask(Verb(0, "snapshot")), Snapshot)

    def online(self) -> Mapping[str, bool]:
        return msgspec.convert(self._ask(Verb(0, "online")), dict[str, bool])


def refusal(answer: Failed) -> ControlError:
    """The error that the daemon names."""
    return _REFUSALS.get(answer.kind, ControlError)(answer.message)
