"""What a daemon's cache is asked of shared tiers. In place of :class:`~kvtier.sharing.Sharing`, which documents the methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvtier.serve import messages
from kvtier.serve.channel import Channel
from kvtier.serve.estimates import SharedEstimates
from kvtier.types import BlockKey


class RemoteSharing:
    """Belongs to a :class:`~kvtier.serve.client.ServedCache`, which leaves the others by its keys."""

    def __init__(self, channel: Channel, estimates: SharedEstimates, join: Callable[[Iterable[BlockKey]], bytes]) -> None:
        self._channel = channel
        self._estimates = estimates
        self._join = join

    @property
    def tiers(self) -> Sequence[str]:
        return self._channel.welcome.shared_tiers

    def probe(self, keys: Sequence[BlockKey], first: int, tenant: str = "", *, tiers: Sequence[str] | None = None) -> bool:
        if not self.tiers:
            return False
        parent, new = self._join(keys[first - 1 : first]) if first else b"", self._join(keys[first:])
        asked = None if tiers is None else tuple(tiers)
        reply = self._channel.call(lambda call: messages.Probe(call, parent, new, tenant, asked), messages.Value)
        return reply is not None and bool(reply.value)

    def worth_probing(self, first_token: int, num_tokens: int, num_blocks: int) -> list[str]:
        num_bytes = num_blocks * self._channel.welcome.block_bytes
        return [tier for tier in self.tiers if self._estimates.is_worth_probing(tier, first_token, num_tokens, num_bytes)]
