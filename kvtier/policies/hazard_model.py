"""What ``hazard`` learns: how likely blocks of a class are used again at an age, and the index that follows from it.

**Statistics.** A class is a kind of use (below); time since the last use, the *age*, falls into bins that grow by the same
factor. Per class and bin two sums are kept: *hits*, the weight of what was used again in that bin, and *risk*, the weight of all
that came to that bin and left it again, used or not. Their ratio is the Kaplan-Meier estimate of the probability ``q`` of a use
within the bin. Where little has been seen it is shrunk towards a prior, which is scaled by what was seen in the class's row
(equal counts) and column (equal gaps).

**Prior.** Not fitted to anything. If uses come at a constant but unknown rate (Jeffreys-like ignorance of scale), then after a
gap ``g`` the next one comes later than ``a`` with probability ``g / (g + a)`` (Lomax, the Gamma-Poisson predictive of shape 1),
if it comes at all, and for that Laplace's rule of succession gives ``n / (n + 1)`` after ``n`` uses. A block seen for the first
time counts as half a use, and as its gap ``FIRST_GAP_S``.

**Index.** ``G(class, age)`` is the largest ratio, over all horizons, of the probability of a use within the horizon to the expected time
until then or the use: Gittins' index of a job that pays one when it is used and costs its time in the cache (Gittins 1979; as a
caching rule it orders blocks by what a place yields per second). One pass from the right gives
all ages of a class: a bin takes in the stretch behind it as long as that pays at least as well as what it has.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right

NUM_BINS = 40
FIRST_EDGE_S = 0.5
LAST_EDGE_S = 36_000.0
FIRST_GAP_S = 300.0
NUM_COUNTS = 6
NUM_GAPS = 15
NUM_LENGTHS = 10
_ROOT, _BRANCH, _EXTENSION, _KNOWN = 0, NUM_LENGTHS, 2 * NUM_LENGTHS, 2 * NUM_LENGTHS + NUM_COUNTS * NUM_GAPS
NUM_CLASSES = _KNOWN + NUM_COUNTS * NUM_GAPS
"""prompts that begin anew or branch off, by length; what prolongs a prompt, and what was used again, by count and gap"""

SHRINK_CELL = 32.0
"""so many uses must a cell have seen for its own figures to count half"""
SHRINK_MARGIN = 8.0
"""the same for a row or column"""
DECAY = 0.999
REQUESTS_PER_DECAY = 64
_MAX_SCALE = 1e100
_MAX_CHANCE = 0.98
_RATIO = (LAST_EDGE_S / FIRST_EDGE_S) ** (1.0 / (NUM_BINS - 1))
EDGES_S = (0.0, *(FIRST_EDGE_S * _RATIO**power for power in range(NUM_BINS)))
_INNER_EDGES = EDGES_S[1:-1]


def bin_of(age_s: float) -> int:
    """The bin of an age; the last one is open."""
    return bisect_right(_INNER_EDGES, age_s)


def class_of_first_use(length: float, *, is_branch: bool) -> int:
    """``length``: blocks that the prompt adds, relative to the mean."""
    bucket = int(math.log2(length) + NUM_LENGTHS // 2) if length > 0 else 0
    return (_BRANCH if is_branch else _ROOT) + max(0, min(NUM_LENGTHS - 1, bucket))


def class_of_extension(num_turns: int, gap_s: float) -> int:
    """What a prompt adds to the end of an earlier one: its place in the conversation, and how long ago that one was."""
    return _EXTENSION + _bucket_of_count(num_turns) * NUM_GAPS + _bucket_of_gap(gap_s)


def class_of_reuse(num_uses: int, gap_s: float) -> int:
    """What was used ``num_uses`` times, the last two times ``gap_s`` apart."""
    return _KNOWN + _bucket_of_count(num_uses) * NUM_GAPS + _bucket_of_gap(gap_s)


def _bucket_of_count(count: int) -> int:
    return min(NUM_COUNTS, count.bit_length()) - 1


def _bucket_of_gap(gap_s: float) -> int:
    return 0 if gap_s < 1.0 else min(NUM_GAPS - 1, 1 + int(math.log2(gap_s)))


def prior_chances(class_id: int) -> list[float]:
    """The probability of a use in each bin, of what came there, before anything was seen."""
    if class_id < _EXTENSION:
        uses, gap_s = 0.5, FIRST_GAP_S
    else:
        bucket, gap = divmod(class_id - (_EXTENSION if class_id < _KNOWN else _KNOWN), NUM_GAPS)
        uses = float(1 << bucket) / (2.0 if class_id < _KNOWN else 1.0)
        gap_s = 2.0 ** (gap - 0.5)
    ever = uses / (uses + 1.0)
    survival = [1.0 - ever + ever * gap_s / (gap_s + edge) for edge in EDGES_S]
    return [min(_MAX_CHANCE, 1.0 - after / before) for before, after in itertools.pairwise(survival)]


def gittins(chances: list[float]) -> list[float]:
    """The index at the beginning of each bin, in uses per second, from the probability of a use in each bin."""
    indexes = [0.0] * len(chances)
    later: list[tuple[float, float, float]] = []
    """stretches of bins behind the present one: (expected time, chance of a use, chance to outlive it), given that it is come to"""
    for position in range(len(chances) - 1, -1, -1):
        reward = chances[position]
        cost = (EDGES_S[position + 1] - EDGES_S[position]) * (1.0 - reward / 2.0)
        alive = 1.0 - reward
        while later and later[-1][1] * cost >= reward * later[-1][0]:
            more_cost, more_reward, still_alive = later.pop()
            cost += alive * more_cost
            reward += alive * more_reward
            alive *= still_alive
        indexes[position] = reward / cost
        later.append((cost, reward, alive))
    return indexes


class Sums:
    """Hits and what the prior expected of them, per bin."""

    __slots__ = ("expected", "hits")

    def __init__(self) -> None:
        self.hits = [0.0] * NUM_BINS
        self.expected = [0.0] * NUM_BINS


class HazardModel:
    """The statistics of all classes and their table of indexes. Pure.

    Older figures count less (``DECAY`` per ``REQUESTS_PER_DECAY`` requests): instead of shrinking all sums, what is new is added
    with a growing scale. The table is brought up to date one class a request.
    """

    __slots__ = (
        "_classes",
        "_columns",
        "_hits",
        "_next_class",
        "_num_requests",
        "_priors",
        "_risk",
        "_rows",
        "_scale",
        "_squares",
        "_table",
        "_weights",
    )

    def __init__(self) -> None:
        self._priors = [prior_chances(class_id) for class_id in range(NUM_CLASSES)]
        self._table = [gittins(chances) for chances in self._priors]
        self._hits: dict[int, list[float]] = {}
        self._risk: dict[int, list[float]] = {}
        rows = {_row_of(class_id) for class_id in range(NUM_CLASSES)}
        columns = {_column_of(class_id) for class_id in range(NUM_CLASSES)}
        self._rows = {row: Sums() for row in sorted(rows)}
        self._columns = {column: Sums() for column in sorted(columns)}
        self._classes: list[int] = []
        """those that something was seen of"""
        self._next_class = 0
        self._scale = 1.0
        self._weights = self._squares = 0.0
        self._num_requests = 0

    def index(self, class_id: int, age_s: float) -> float:
        """The index of blocks of a class that were last used ``age_s`` ago."""
        return self._table[class_id][bisect_right(_INNER_EDGES, age_s)]

    def reused(self, class_id: int, age_s: float, weight: float) -> None:
        """Blocks were used again at an age."""
        position = bin_of(age_s)
        self._add(class_id, position, weight, 1.0)
        self._weights += weight * self._scale
        self._squares += weight * weight * self._scale

    def survived(self, class_id: int, position: int, weight: float) -> None:
        """Blocks left the bin at ``position`` unused."""
        self._add(class_id, position, weight, 0.0)

    def end_request(self) -> None:
        """Brings part of the table up to date. Call it once a request."""
        self._num_requests += 1
        if self._num_requests % REQUESTS_PER_DECAY == 0:
            self._scale /= DECAY
            if self._scale > _MAX_SCALE:
                self._rescale()
        if self._classes:
            self._next_class = (self._next_class + 1) % len(self._classes)
            class_id = self._classes[self._next_class]
            self._table[class_id] = gittins(self.chances(class_id))

    def chances(self, class_id: int) -> list[float]:
        """The probability of a use in each bin, of what came there, as it is believed now."""
        prior = self._priors[class_id]
        if class_id not in self._hits:
            return prior
        hits, risk = self._hits[class_id], self._risk[class_id]
        row, column = self._rows[_row_of(class_id)], self._columns[_column_of(class_id)]
        # Weights differ, so a use counts as many as a typical one weighs.
        unit = self._scale * (self._squares / self._weights if self._weights else 1.0)
        cell, margin = SHRINK_CELL * unit, SHRINK_MARGIN * unit
        out: list[float] = []
        for position, chance in enumerate(prior):
            by_row = (row.hits[position] + margin) / (row.expected[position] + margin)
            by_column = (column.hits[position] + margin) / (column.expected[position] + margin)
            believed = min(_MAX_CHANCE, chance * math.sqrt(by_row * by_column))
            out.append(min(_MAX_CHANCE, (hits[position] + cell * believed) / (risk[position] + cell)))
        return out

    def sums_of(self, class_id: int) -> tuple[list[float], list[float]]:
        """Hits and risk of a class by bin, in the present scale."""
        nothing = [0.0] * NUM_BINS
        return list(self._hits.get(class_id, nothing)), list(self._risk.get(class_id, nothing))

    def _add(self, class_id: int, position: int, weight: float, hit: float) -> None:
        risk = self._risk.get(class_id)
        if risk is None:
            risk = self._risk[class_id] = [0.0] * NUM_BINS
            self._hits[class_id] = [0.0] * NUM_BINS
            self._classes.append(class_id)
        scaled = weight * self._scale
        expected = scaled * self._priors[class_id][position]
        risk[position] += scaled
        self._hits[class_id][position] += scaled * hit
        for sums in (self._rows[_row_of(class_id)], self._columns[_column_of(class_id)]):
            sums.expected[position] += expected
            sums.hits[position] += scaled * hit

    def _rescale(self) -> None:
        factor = 1.0 / self._scale
        sums = [*self._rows.values(), *self._columns.values()]
        for column in (*self._hits.values(), *self._risk.values(), *(s.hits for s in sums), *(s.expected for s in sums)):
            column[:] = [value * factor for value in column]
        self._weights *= factor
        self._squares *= factor
        self._scale = 1.0


def _row_of(class_id: int) -> int:
    """Classes of a row have the kind and the count in common."""
    return class_id // NUM_LENGTHS if class_id < _EXTENSION else 2 + (class_id - _EXTENSION) // NUM_GAPS


def _column_of(class_id: int) -> int:
    """Classes of a column have the gap in common, or the length."""
    return class_id % NUM_LENGTHS if class_id < _EXTENSION else NUM_LENGTHS + (class_id - _EXTENSION) % NUM_GAPS
