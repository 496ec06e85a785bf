"""What one side measures and the other must know too: speeds of the tiers, seen by the daemon, and of computing, seen by the engines."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kvtier.control.estimates import Estimates

ANSWERED = -1
"""in place of bytes: a shared tier has said what it holds"""
_MAX_KEPT = 256
"""samples; the other side needs a few of each kind"""


class SharedEstimates(Estimates):
    """Estimates that also remember what they were told, for the other side. One thread."""

    def __init__(self) -> None:
        super().__init__()
        self.new_transfers: deque[tuple[str, int, float]] = deque(maxlen=_MAX_KEPT)
        self.new_steps: deque[tuple[int, int, float]] = deque(maxlen=_MAX_KEPT)
        self.num_transfers = 0

    def transferred(self, tier: str, num_bytes: int, seconds: float) -> None:
        super().transferred(tier, num_bytes, seconds)
        self.new_transfers.append((tier, num_bytes, seconds))
        self.num_transfers += 1

    def probed(self, tier: str, seconds: float) -> None:
        super().probed(tier, seconds)
        self.new_transfers.append((tier, ANSWERED, seconds))
        self.num_transfers += 1

    def take_over(self, samples: Iterable[tuple[str, int, float]]) -> None:
        """Takes in what the other side's ``new_transfers`` held."""
        for tier, num_bytes, seconds in samples:
            if num_bytes == ANSWERED:
                super().probed(tier, seconds)
            else:
                super().transferred(tier, num_bytes, seconds)

    def computed(self, num_tokens: int, num_context_tokens: int, seconds: float) -> None:
        super().computed(num_tokens, num_context_tokens, seconds)
        self.new_steps.append((num_tokens, num_context_tokens, seconds))
