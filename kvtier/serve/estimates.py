"""What one side measures and the other must know too: speeds of the tiers, seen by the daemon, and of computing, seen by the engines."""

from __future__ import annotations

from collections import deque

from kvtier.control.estimates import Estimates

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

    def computed(self, num_tokens: int, num_context_tokens: int, seconds: float) -> None:
        super().computed(num_tokens, num_context_tokens, seconds)
        self.new_steps.append((num_tokens, num_context_tokens, seconds))
