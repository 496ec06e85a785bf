"""What an engine does with tiers that other engines use too: asking them what they hold, and leaving the others where it must."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtier.control.estimates import Estimates
from kvtier.control.planner import Planner
from kvtier.transfer import TransferRunner
from kvtier.types import BlockKey


class Sharing:
    """Belongs to a :class:`~kvtier.CacheEngine` (``engine.sharing``) and, like it, to the thread that drives it."""

    def __init__(
        self, planner: Planner, runner: TransferRunner, estimates: Estimates, *, block_bytes: int, clock: Callable[[], float]
    ) -> None:
        self.tiers: Sequence[str] = planner.shared_tiers
        """names of the tiers that others write to as well; empty: there is nothing to ask"""
        self._planner = planner
        self._runner = runner
        self._estimates = estimates
        self._block_bytes = block_bytes
        self._clock = clock

    def probe(self, keys: Sequence[BlockKey], first: int, tenant: str = "", *, tiers: Sequence[str] | None = None) -> bool:
        """Asks shared tiers for ``keys[first:]``, of which none is known; ``keys[:first]`` are the blocks before them.

        Returns whether an answer is under way; ``poll`` takes it in, and ``match`` knows more then. Nothing is asked twice at once, nor
        again shortly after it was found absent. ``tenant``: whose the blocks are. ``tiers``: names of those to ask; None: all.
        """
        is_awaited = self._planner.probe(keys, first, self._block_bytes, self._clock(), tenant, tiers=tiers)
        self._runner.run()
        return is_awaited

    def worth_probing(self, first_token: int, num_tokens: int, num_blocks: int) -> list[str]:
        """The tiers that are not estimated to bring so many blocks more slowly than the engine computes them. Ask once a request."""
        num_bytes = num_blocks * self._block_bytes
        return [tier for tier in self.tiers if self._estimates.is_worth_probing(tier, first_token, num_tokens, num_bytes)]

    def leave_others(self) -> None:
        """Shares nothing with others from now on, nor with a later process; see :meth:`TransferRunner.leave_others`."""
        self._runner.run()  # what was planned before belongs to what was shared before
        self._runner.leave_others()
