"""Until when, and how often: deadlines and the pauses between attempts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

LONGEST_PAUSE_S = 2.0


class Deadline:
    """A moment by which something must be over. Immutable."""

    __slots__ = ("_clock", "at")

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.at = clock() + seconds
        """the moment, by the clock"""

    def remaining_s(self) -> float:
        """Seconds that are left; 0 once it is over."""
        return max(0.0, self.at - self._clock())

    @property
    def is_over(self) -> bool:
        """Whether the moment has passed."""
        return self._clock() >= self.at


def retry_pauses(num_retries: int, first_s: float, uniform: Callable[[float, float], float]) -> Iterator[float]:
    """The pause before each further attempt, in seconds: up to a bound that doubles, to ``LONGEST_PAUSE_S`` at most ("full jitter").

    Callers that failed together because a server stumbled do not come back together.
    """
    for attempt in range(num_retries):
        yield uniform(0.0, min(LONGEST_PAUSE_S, first_s * 2.0 ** min(attempt, 20)))
