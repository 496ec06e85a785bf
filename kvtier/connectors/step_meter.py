"""How fast the engine computes prompts, seen from its steps: tokens computed between the order and the answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvtier.control.estimates import Estimates

MIN_TOKENS = 16
"""steps with fewer prompt tokens say more about the step than about the tokens"""
MAX_DECODE_SHARE = 0.1
MAX_OPEN = 8
"""steps under way; more means that answers are missing"""


@dataclass(slots=True)
class StepTokens:
    """What one step computes."""

    num_prefill: int = 0
    num_decode: int = 0
    weighted_context: int = 0
    """sum over prefill tokens of the tokens before the middle of their chunk"""

    def add(self, num_new: int, num_computed: int) -> None:
        """A request computes ``num_new`` tokens and has ``num_computed`` afterwards."""
        if num_new > 1:
            self.num_prefill += num_new
            self.weighted_context += num_new * (num_computed - num_new // 2)
        elif num_new == 1:
            self.num_decode += 1


class StepMeter:
    """Times steps, also where the engine orders the next one before the answer to the last one is there. One thread.

    Steps in which nothing is computed are not timed, and an engine need not answer them: so steps are known by their numbers.
    """

    def __init__(self, estimates: Estimates, clock: Callable[[], float]) -> None:
        self._estimates = estimates
        self._clock = clock
        self._open: deque[tuple[int, float, StepTokens | None]] = deque()
        self._last_end = 0.0
        self._last_step = 0

    @property
    def is_computing(self) -> bool:
        """Whether a step that computes was ordered and not answered."""
        return bool(self._open)

    def begin(self, tokens: StepTokens, *, is_pure: bool) -> int:
        """A step was ordered. ``is_pure``: its time goes into computing, not into loads. Returns its number; 0: it computes nothing."""
        if not tokens.num_prefill and not tokens.num_decode:
            return 0
        if len(self._open) >= MAX_OPEN:
            self._open.clear()
        is_sample = is_pure and tokens.num_prefill >= MIN_TOKENS and tokens.num_decode <= MAX_DECODE_SHARE * tokens.num_prefill
        self._last_step += 1
        self._open.append((self._last_step, self._clock(), tokens if is_sample else None))
        return self._last_step

    def end(self, step: int) -> None:
        """The answer to the step of this number is there; to one that computes nothing (0) there may be one or none."""
        if not step:
            return
        now = self._clock()
        while self._open and self._open[0][0] <= step:
            number, started, tokens = self._open.popleft()
            if tokens is not None and number == step:
                num_tokens = tokens.num_prefill + tokens.num_decode
                context = tokens.weighted_context // tokens.num_prefill
                self._estimates.computed(num_tokens, context, now - max(started, self._last_end))
        self._last_end = now
