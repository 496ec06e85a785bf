"""What ``hazard`` learns: how likely blocks of a class are used again at an age, and the index that follows from it.

**Statistics.** A class is a kind of use (below); time since the last use, the *age*, falls into bins that grow by the same
factor. Per class and bin two sums are kept: *hits*, the weight of what was used again in that bin, and *risk*, the weight of all
that came to that bin and left it again, used or not. Their ratio is the Kaplan-Meier estimate of the probability ``q`` of a use
within the bin. Where little has been seen it is shrunk towards a prior, which is scaled by what was seen of all classes, and
beyond that of the class's row (equal counts) and column (equal gaps), each in the bin and two on either side of it. Classes that
rest on somebody's word share with each other alone: what words are worth says nothing about the rest.

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
from bisect import bisect_right
from collections.abc import Sequence
from math import log2, sqrt

NUM_BINS = 40
FIRST_EDGE_S = 0.5
LAST_EDGE_S = 36_000.0
FIRST_GAP_S = 300.0
NUM_COUNTS = 6
NUM_GAPS = 15
NUM_LENGTHS = 10
OFTEN = 4
"""uses from which on what a prompt branches off from is much used"""
_ROOT, _BRANCH, _EXTENSION = 0, NUM_LENGTHS, 3 * NUM_LENGTHS
_KNOWN = _EXTENSION + NUM_COUNTS * NUM_GAPS
_EXPECTED = _KNOWN + NUM_COUNTS * NUM_GAPS
NUM_CLASSES = _EXPECTED + NUM_GAPS
"""prompts that begin anew, and what branches off from little and from much used ones, by length; what prolongs a prompt, and what was used
again, by count and gap; and what somebody expects to be used, by how soon"""

SHRINK_CELL = 32.0
"""so many uses must a cell have seen for its own figures to count half"""
SHRINK_MARGIN = 8.0
"""the same for a row or column"""
DECAY = 0.999
REQUESTS_PER_DECAY = 64
BLOCKS_PER_REQUEST = 8
"""so many blocks count as a request: those that are being generated come one by one, and must not cost what a request costs"""
MIN_CHANCE = 0.01
"""what is used with a smaller chance, as far as the table reaches, is past its time to live"""
_MAX_SCALE = 1e100
_MAX_CHANCE = 0.98
_RATIO = (LAST_EDGE_S / FIRST_EDGE_S) ** (1.0 / (NUM_BINS - 1))
EDGES_S: tuple[float, ...] = (0.0, *(FIRST_EDGE_S * _RATIO**power for power in range(NUM_BINS)))
_INNER_EDGES = EDGES_S[1:-1]
_ONES = (1.0,) * NUM_BINS
_WIDTHS_S = tuple(end - begin for begin, end in itertools.pairwise(EDGES_S))


def bin_of(age_s: float) -> int:
    """The bin of an age; the last one is open."""
    return bisect_right(_INNER_EDGES, age_s)


def class_of_first_use(length: float, parent_uses: int) -> int:
    """``length``: blocks that the prompt adds, relative to the mean; ``parent_uses``: uses of what it branches off from, this one too, 0
    where it begins anew."""
    bucket = int(log2(length) + NUM_LENGTHS // 2) if length > 0 else 0
    kind = _ROOT if not parent_uses else _BRANCH if parent_uses < OFTEN else _BRANCH + NUM_LENGTHS
    return kind + max(0, min(NUM_LENGTHS - 1, bucket))


def class_of_extension(num_turns: int, gap_s: float) -> int:
    """What a prompt adds to the end of an earlier one: its place in the conversation, and how long ago that one was."""
    return _EXTENSION + _bucket_of_count(num_turns) * NUM_GAPS + _bucket_of_gap(gap_s)


def class_of_reuse(num_uses: int, gap_s: float) -> int:
    """What was used ``num_uses`` times, the last two times ``gap_s`` apart."""
    return _KNOWN + _bucket_of_count(num_uses) * NUM_GAPS + _bucket_of_gap(gap_s)


def class_of_expectation(seconds: float) -> int:
    """What is said to be used in so many seconds."""
    return _EXPECTED + _bucket_of_gap(seconds)


def _bucket_of_count(count: int) -> int:
    return min(NUM_COUNTS, count.bit_length()) - 1


def _bucket_of_gap(gap_s: float) -> int:
    return 0 if gap_s < 1.0 else min(NUM_GAPS - 1, 1 + int(log2(gap_s)))


def prior_chances(class_id: int) -> list[float]:
    """The probability of a use in each bin, of what came there, before anything was seen."""
    if class_id >= _EXPECTED:
        return _chances_of([_survival_of_expected(edge, 2.0 ** (class_id - _EXPECTED - 0.5)) for edge in EDGES_S])
    if class_id < _EXTENSION:
        uses, gap_s = 0.5, FIRST_GAP_S
    else:
        bucket, gap = divmod(class_id - (_EXTENSION if class_id < _KNOWN else _KNOWN), NUM_GAPS)
        uses = float(1 << bucket) / (2.0 if class_id < _KNOWN else 1.0)
        gap_s = 2.0 ** (gap - 0.5)
    ever = uses / (uses + 1.0)
    return _chances_of([1.0 - ever + ever * gap_s / (gap_s + edge) for edge in EDGES_S])


def _survival_of_expected(age_s: float, expected_s: float) -> float:
    """With even chances the word is good, and the use comes between half and twice the time; else as if nothing had been said."""
    is_over = min(1.0, max(0.0, log2(age_s / expected_s) / 2.0 + 0.5)) if age_s > 0.0 else 0.0
    return 0.5 * (1.0 - is_over) + 0.5 * FIRST_GAP_S / (FIRST_GAP_S + age_s)


def _chances_of(survival: Sequence[float]) -> list[float]:
    """The probability of a use in each bin from the share that is unused at its edges."""
    return [min(_MAX_CHANCE, 1.0 - after / before) for before, after in itertools.pairwise(survival)]


def gittins(chances: Sequence[float]) -> list[float]:
    """The index at the beginning of each bin, in uses per second, from the probability of a use in each bin."""
    indexes = [0.0] * len(chances)
    later: list[tuple[float, float, float]] = []
    """stretches of bins behind the present one: (expected time, chance of a use, chance to outlive it), given that it is come to"""
    for position in range(len(chances) - 1, -1, -1):
        reward = chances[position]
        alive = 1.0 - reward
        cost = _WIDTHS_S[position] * (1.0 - reward / 2.0)
        while later:
            more_cost, more_reward, still_alive = later[-1]
            if more_reward * cost < reward * more_cost:
                break
            later.pop()
            cost += alive * more_cost
            reward += alive * more_reward
            alive *= still_alive
        indexes[position] = reward / cost
        later.append((cost, reward, alive))
    return indexes


def time_to_live(chances: Sequence[float]) -> float:
    """The age from which on, of what is unused until then, less than ``MIN_CHANCE`` is used in all bins behind it; at most the last edge.

    ``chances``: the probability of a use in each bin. The chance for the rest never rises with age, so there is one such age.
    """
    alive = 1.0
    for position in range(len(chances) - 1, -1, -1):
        alive *= 1.0 - chances[position]
        if 1.0 - alive >= MIN_CHANCE:
            age_s: float = EDGES_S[position + 1]
            return age_s
    return 0.0


class Sums:
    """Hits and what the prior expected of them, per bin."""

    __slots__ = ("expected", "hits")

    def __init__(self) -> None:
        self.hits = [0.0] * NUM_BINS
        self.expected = [0.0] * NUM_BINS

    def ratios(self, margin: float, scales: Sequence[float]) -> list[float]:
        """Per bin, hits by what was expected of them where the prior is scaled, both of the bins around it too."""
        expected = _around([scale * value for scale, value in zip(scales, self.expected, strict=True)])
        return [(hits + margin) / (value + margin) for hits, value in zip(_around(self.hits), expected, strict=True)]


def _around(values: Sequence[float]) -> list[float]:
    """The sum of each and the two on either side of it."""
    padded = (0.0, 0.0, *values, 0.0, 0.0)
    return [a + b + c + d + e for a, b, c, d, e in zip(padded, padded[1:], padded[2:], padded[3:], padded[4:], strict=False)]


class _Seen:
    """What was seen of one class, per bin."""

    __slots__ = ("column", "common", "hits", "prior", "risk", "row")

    def __init__(self, prior: list[float], common: Sums, row: Sums, column: Sums) -> None:
        self.prior = prior
        self.common = common
        self.row = row
        self.column = column
        self.hits = [0.0] * NUM_BINS
        self.risk = [0.0] * NUM_BINS


class HazardModel:
    """The statistics of all classes and their table of indexes. Pure.

    Older figures count less (``DECAY`` per ``REQUESTS_PER_DECAY`` requests): instead of shrinking all sums, what is new is added
    with a growing scale. The table is brought up to date one class a request.
    """

    __slots__ = (
        "_all",
        "_classes",
        "_columns",
        "_next_class",
        "_num_blocks",
        "_num_requests",
        "_priors",
        "_rows",
        "_scale",
        "_seen",
        "_squares",
        "_table",
        "_ttl_s",
        "_weights",
    )

    def __init__(self) -> None:
        self._priors = _PRIORS
        self._table = list(_PRIOR_TABLE)
        self._ttl_s = list(_PRIOR_TTLS_S)
        self._seen: dict[int, _Seen] = {}
        rows = {_row_of(class_id) for class_id in range(NUM_CLASSES)}
        columns = {_column_of(class_id) for class_id in range(NUM_CLASSES)}
        self._rows = {row: Sums() for row in sorted(rows)}
        self._columns = {column: Sums() for column in sorted(columns)}
        self._all = (Sums(), Sums())
        """of classes without and with somebody's word"""
        self._classes: list[int] = []
        """those that something was seen of"""
        self._next_class = 0
        self._scale = 1.0
        self._weights = self._squares = 0.0
        self._num_requests = 0
        self._num_blocks = 0
        """since the last request"""

    def index(self, class_id: int, age_s: float) -> float:
        """The index of blocks of a class that were last used ``age_s`` ago."""
        indexes = self._table[class_id]
        position = bisect_right(_INNER_EDGES, age_s)
        if position == NUM_BINS - 1:
            return indexes[position]
        index = indexes[position]
        return index + (indexes[position + 1] - index) * (age_s - EDGES_S[position]) / _WIDTHS_S[position]

    def ttl_s(self, class_id: int) -> float:
        """The time to live of blocks of a class."""
        return self._ttl_s[class_id]

    def reused(self, class_id: int, age_s: float, weight: float) -> None:
        """Blocks were used again at an age."""
        position = bin_of(age_s)
        seen = self._seen.get(class_id) or self._begin(class_id)
        scaled = weight * self._scale
        expected = scaled * seen.prior[position]
        seen.risk[position] += scaled
        seen.hits[position] += scaled
        for sums in (seen.row, seen.column, seen.common):
            sums.expected[position] += expected
            sums.hits[position] += scaled
        self._weights += scaled
        self._squares += weight * scaled

    def survived(self, class_id: int, position: int, weight: float) -> None:
        """Blocks left the bin at ``position`` unused."""
        seen = self._seen.get(class_id) or self._begin(class_id)
        scaled = weight * self._scale
        expected = scaled * seen.prior[position]
        seen.risk[position] += scaled
        for sums in (seen.row, seen.column, seen.common):
            sums.expected[position] += expected

    def asked_for(self, num_blocks: int) -> None:
        """So many blocks were used, or room for them was made, in one call. Ends a request as soon as that is enough for one."""
        self._num_blocks += num_blocks
        if self._num_blocks >= BLOCKS_PER_REQUEST:
            self._num_blocks = 0
            self.end_request()

    def end_request(self) -> None:
        """Brings part of the table up to date."""
        self._num_requests += 1
        if self._num_requests % REQUESTS_PER_DECAY == 0:
            self._scale /= DECAY
            if self._scale > _MAX_SCALE:
                self._rescale()
        if self._classes:
            self._next_class = (self._next_class + 1) % len(self._classes)
            class_id = self._classes[self._next_class]
            chances = self.chances(class_id)
            self._table[class_id] = gittins(chances)
            self._ttl_s[class_id] = time_to_live(chances)

    def chances(self, class_id: int) -> list[float]:
        """The probability of a use in each bin, of what came there, as it is believed now."""
        seen = self._seen.get(class_id)
        if seen is None:
            return self._priors[class_id]
        # Weights differ, so a use counts as many as a typical one weighs.
        unit = self._scale * (self._squares / self._weights if self._weights else 1.0)
        cell, margin = SHRINK_CELL * unit, SHRINK_MARGIN * unit
        common = seen.common.ratios(margin, _ONES)
        rows, columns = seen.row.ratios(margin, common), seen.column.ratios(margin, common)
        out: list[float] = []
        for chance, ratio, row, column, hits, risk in zip(seen.prior, common, rows, columns, seen.hits, seen.risk, strict=True):
            believed = min(_MAX_CHANCE, chance * ratio * sqrt(row * column))
            out.append(min(_MAX_CHANCE, (hits + cell * believed) / (risk + cell)))
        return out

    def sums_of(self, class_id: int) -> tuple[list[float], list[float]]:
        """Hits and risk of a class by bin, in the present scale."""
        seen = self._seen.get(class_id)
        nothing = [0.0] * NUM_BINS
        return (nothing, list(nothing)) if seen is None else (list(seen.hits), list(seen.risk))

    def _begin(self, class_id: int) -> _Seen:
        """The first that is seen of a class."""
        self._classes.append(class_id)
        common = self._all[class_id >= _EXPECTED]
        seen = _Seen(self._priors[class_id], common, self._rows[_row_of(class_id)], self._columns[_column_of(class_id)])
        self._seen[class_id] = seen
        return seen

    def _rescale(self) -> None:
        factor = 1.0 / self._scale
        sums = [*self._all, *self._rows.values(), *self._columns.values()]
        of_classes = [column for seen in self._seen.values() for column in (seen.hits, seen.risk)]
        for column in (*of_classes, *(s.hits for s in sums), *(s.expected for s in sums)):
            column[:] = [value * factor for value in column]
        self._weights *= factor
        self._squares *= factor
        self._scale = 1.0


def _row_of(class_id: int) -> int:
    """Classes of a row have the kind and the count in common."""
    return class_id // NUM_LENGTHS if class_id < _EXTENSION else 3 + (class_id - _EXTENSION) // NUM_GAPS


def _column_of(class_id: int) -> int:
    """Classes of a column have the gap in common, or the length; what is expected is not compared with what is not."""
    if class_id >= _EXPECTED:
        return NUM_LENGTHS + NUM_GAPS
    return class_id % NUM_LENGTHS if class_id < _EXTENSION else NUM_LENGTHS + (class_id - _EXTENSION) % NUM_GAPS


_PRIORS = tuple(prior_chances(class_id) for class_id in range(NUM_CLASSES))
_PRIOR_TABLE = tuple(gittins(chances) for chances in _PRIORS)
_PRIOR_TTLS_S = tuple(time_to_live(chances) for chances in _PRIORS)
