"""How long to keep a session's blocks while its agent waits for a tool.

The rule is that of Continuum (arXiv 2511.02230): ``ttl* = argmax P(duration <= ttl) * benefit - cost * ttl``, over durations learned
for each tool.
Here ``benefit`` is the time that computing the blocks again would take, and a second costs the share of the tier that the blocks take up: a
session that holds a hundredth of host memory and saves one second may be kept for at most a hundred.
"""

from __future__ import annotations

import math
from collections import OrderedDict

MIN_S = 0.05
RATIO = 1.5
NUM_BINS = 32
"""from 0.05 s on, each 1.5 times as long: up to 4 hours"""
DECAY = 0.99
"""of what was seen before, at each new duration of a tool: about the last hundred count"""
PRIOR_WEIGHT = 0.5
"""durations that what is known otherwise (the caller's expectation, or all tools together) is worth"""
MAX_TOOLS = 1000
"""tools that are remembered; the one that was not seen for longest is forgotten"""

EDGES = tuple(MIN_S * RATIO**number for number in range(NUM_BINS))
"""upper ends of the bins"""


def bin_of(duration_s: float) -> int:
    """The bin of a duration; the last one for everything longer than all."""
    if duration_s <= MIN_S:
        return 0
    return min(NUM_BINS - 1, math.ceil(math.log(duration_s / MIN_S, RATIO) - 1e-9))


class ToolCalls:
    """Durations by tool. Pure; one thread."""

    def __init__(self) -> None:
        self._tools: OrderedDict[str, list[float]] = OrderedDict()
        self._all = [0.0] * NUM_BINS

    def observe(self, tool: str, duration_s: float) -> None:
        """A call of a tool took so long."""
        counts = self._tools.setdefault(tool, [0.0] * NUM_BINS)
        self._tools.move_to_end(tool)
        if len(self._tools) > MAX_TOOLS:
            self._tools.popitem(last=False)
        for each in (counts, self._all):
            each[:] = [DECAY * count for count in each]
            each[bin_of(duration_s)] += 1.0

    def chances(self, tool: str, expected_s: float | None = None) -> list[float]:
        """P(duration <= edge) for each of :data:`EDGES`; all zero where nothing is known.

        What was seen of this tool, and with little weight the caller's expectation, or without one what was seen of all tools.
        """
        counts = list(self._tools.get(tool, ()) or [0.0] * NUM_BINS)
        if expected_s is not None:
            # half of the calls take up to what is expected, nearly all up to about twice as long
            middle = bin_of(expected_s)
            for offset, weight in ((-1, 0.25), (0, 0.25), (1, 0.25), (2, 0.25)):
                counts[min(NUM_BINS - 1, max(0, middle + offset))] += PRIOR_WEIGHT * weight
        elif (total := sum(self._all)) > 0:
            counts = [count + PRIOR_WEIGHT * other / total for count, other in zip(counts, self._all, strict=True)]
        total = sum(counts)
        if total <= 0:
            return [0.0] * NUM_BINS
        chances, seen = [], 0.0
        for count in counts:
            seen += count
            chances.append(seen / total)
        return chances

    def typical_s(self, tool: str) -> float | None:
        """A duration that half of a tool's calls do not exceed. None: nothing is known."""
        return next((edge for edge, chance in zip(EDGES, self.chances(tool), strict=True) if chance >= 0.5), None)

    def best_ttl(self, tool: str, benefit_s: float, cost: float, expected_s: float | None = None) -> float:
        """How many seconds to keep the blocks from the call on; 0: not at all. ``cost``: the share of the tier that they take up."""
        best_s, best = 0.0, 0.0
        for edge, chance in zip(EDGES, self.chances(tool, expected_s), strict=True):
            value = chance * benefit_s - cost * edge
            if value > best:
                best_s, best = edge, value
        return best_s
