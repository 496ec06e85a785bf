"""Load or recompute: what bringing blocks takes and what computing them takes, learned from what was seen, and the choice between them.

Every figure is a median over the last :data:`WINDOW` samples of its kind, and counts only once there are :data:`MIN_SAMPLES`: one
slow disk read or one step that the machine took away changes nothing. Where anything is not known the answer is to load, which is
what a cache is for; and so it is where a load is estimated slower by less than a :data:`MARGIN`, because loading leaves the engine's
compute to others.

Computing a token costs more the more tokens stand before it, and loading a block costs the same wherever it stands. So it pays to
load everything a tier holds or nothing of it, and only the borders between tiers are asked about.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

WINDOW = 15
"""samples that a median is taken of"""
MIN_SAMPLES = 5
"""fewer say nothing"""
MARGIN = 1.25
"""loading must take so many times as long as computing to be refused"""
PROBE_EVERY = 16
"""one refusal in so many is not kept, so that a tier that has become fast again is found out"""


class Rate:
    """Seconds per unit, by the size of the piece it was seen on (powers of two). Pure.

    ``units`` are bytes of a transfer or tokens of a step. ``unknown`` picks the answer for sizes that were not seen: ``min`` or ``max``
    of what is known.
    """

    __slots__ = ("_bins", "_known", "_unknown")

    def __init__(self, unknown: Callable[[Iterable[float]], float]) -> None:
        self._unknown = unknown
        self._bins: dict[int, deque[float]] = {}
        self._known: dict[int, float] = {}
        """medians of those of which enough was seen"""

    def observe(self, size: int, units: int, seconds: float) -> None:
        """``units`` of work took ``seconds``; ``size`` picks the bin. What cannot have been (no work, no time) is ignored."""
        if units > 0 and size > 0 and seconds > 0:
            samples = self._bins.setdefault(size.bit_length(), deque(maxlen=WINDOW))
            samples.append(seconds / units)
            if len(samples) >= MIN_SAMPLES:
                self._known[size.bit_length()] = statistics.median(samples)

    def per_unit(self, size: int) -> float | None:
        """Median seconds per unit at this size, or what ``unknown`` makes of the sizes that are known. None: none is."""
        here = self._known.get(size.bit_length())
        return here if here is not None or not self._known else self._unknown(self._known.values())

    def known_sizes(self) -> list[int]:
        """The sizes (lower ends of their bins) of which enough was seen."""
        return sorted(1 << key - 1 for key in self._known)


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks behind each other that lie in the same tier."""

    path: tuple[str, ...]
    """the tiers that its bytes pass through on their way to the engine, its own first"""
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What a request should load. Seconds are None where they are not known."""

    num_pieces: int
    """leading pieces that are worth loading"""
    load_s: float | None
    """all pieces"""
    compute_s: float | None
    """the tokens of all pieces"""
    refused_load_s: float | None
    """the pieces that are not loaded"""
    refused_compute_s: float | None
    is_probe: bool = False
    """computing is estimated faster; loaded all the same, to measure again"""


class Estimates:
    """What was measured, and the choice that follows from it. Pure; belongs to the thread that drives the engine."""

    def __init__(self) -> None:
        # Where a size was never seen, both err on the side of loading.
        self._transfers: dict[str, Rate] = {}
        self._prefill = Rate(unknown=max)
        self._probes: dict[str, Rate] = {}
        self._num_refused: dict[str, int] = {}
        self.last_choice: Choice | None = None

    def transferred(self, tier: str, num_bytes: int, seconds: float) -> None:
        """A transfer from a tier towards the engine came to its end: ``seconds`` from the order to the last byte."""
        self._transfers.setdefault(tier, Rate(unknown=min)).observe(num_bytes, num_bytes, seconds)

    def probed(self, tier: str, seconds: float) -> None:
        """A shared tier answered what it has of a prompt, so long after it was asked."""
        self._probes.setdefault(tier, Rate(unknown=min)).observe(1, 1, seconds)

    def computed(self, num_tokens: int, num_context_tokens: int, seconds: float) -> None:
        """A step computed so many prompt tokens; before a middle one of them stood ``num_context_tokens``."""
        self._prefill.observe(max(1, num_context_tokens), num_tokens, seconds)

    def compute_s(self, first_token: int, num_tokens: int) -> float | None:
        """How long the engine takes to compute tokens behind ``first_token`` others. None: not known.

        Contexts longer than any that was seen are not known: they take longer than what was seen, by how much nobody can say.
        """
        known = self._prefill.known_sizes()
        end = first_token + num_tokens
        if not known or end > 2 * known[-1]:
            return None
        seconds, position = 0.0, first_token
        while position < end:
            border = min(end, 1 << max(1, position).bit_length())
            per_token = self._prefill.per_unit(max(1, position))
            assert per_token is not None, "some size is known"
            seconds += (border - position) * per_token
            position = border
        return seconds

    def load_s(self, path: Sequence[str], num_bytes: int) -> float | None:
        """How long so many bytes take at least, through tiers one after the other. None: not known of the first, their own.

        Those behind it may never be known: loads by layer overlap with computing and cannot be timed. They count as nothing then.
        """
        per_byte = [None if (rate := self._transfers.get(tier)) is None else rate.per_unit(num_bytes) for tier in path]
        return None if per_byte[0] is None else num_bytes * sum(each for each in per_byte if each is not None)

    def is_worth_probing(self, tier: str, first_token: int, num_tokens: int, num_bytes: int) -> bool:
        """Whether to ask a shared tier for blocks: not where asking and loading take longer than computing, as far as that is known.

        Counts probes against the estimate as ``choose`` does, so ask once a request.
        """
        compute_s, load_s = self.compute_s(first_token, num_tokens), self.load_s((tier, "host"), num_bytes)
        probe = self._probes.get(tier)
        probe_s = None if probe is None else probe.per_unit(1)
        if compute_s is None or load_s is None or probe_s is None or load_s + probe_s <= MARGIN * compute_s:
            return True
        return self._is_probe(tier)

    def choose(self, first_token: int, pieces: Sequence[Piece]) -> Choice:
        """How many leading pieces to load; ``first_token`` tokens are in the engine already. Counts probes, so ask once a request.

        Least time in all wins, of loading no piece, the first, the first two, ...; a piece of which something is not known is loaded.
        """
        best, best_s, spent_s = 0, 0.0, 0.0
        position = first_token
        loads: list[float | None] = []
        computes: list[float | None] = []
        for number, piece in enumerate(pieces, start=1):
            load_s, compute_s = self.load_s(piece.path, piece.num_bytes), self.compute_s(position, piece.num_tokens)
            loads.append(load_s)
            computes.append(compute_s)
            position += piece.num_tokens
            if load_s is None or compute_s is None:
                best, best_s, spent_s = number, 0.0, 0.0  # what is not known is loaded, with everything before it
                continue
            spent_s += load_s - MARGIN * compute_s
            if spent_s <= best_s:
                best, best_s = number, spent_s
        refused = pieces[best:]
        is_probe = bool(refused) and self._is_probe(refused[0].path[0])
        num_pieces = len(pieces) if is_probe else best
        choice = Choice(num_pieces, _sum(loads), _sum(computes), _sum(loads[num_pieces:]), _sum(computes[num_pieces:]), is_probe)
        self.last_choice = choice
        return choice

    def figures(self) -> Mapping[str, float]:
        """What is known, by name.

        ``disk.bytes_per_s@1048576``: of transfers from that size on; ``redis.probe_s``: until a shared tier answers;
        ``prefill.tokens_per_s@512``: behind so many tokens.
        """
        found: dict[str, float] = {}
        for tier, rate in sorted(self._transfers.items()):
            found |= {f"{tier}.bytes_per_s@{size}": 1 / (rate.per_unit(size) or 1.0) for size in rate.known_sizes()}
        found |= {f"{tier}.probe_s": rate.per_unit(1) or 0.0 for tier, rate in sorted(self._probes.items()) if rate.known_sizes()}
        found |= {f"prefill.tokens_per_s@{size}": 1 / (self._prefill.per_unit(size) or 1.0) for size in self._prefill.known_sizes()}
        return found

    def _is_probe(self, tier: str) -> bool:
        self._num_refused[tier] = self._num_refused.get(tier, 0) + 1
        return self._num_refused[tier] % PROBE_EVERY == 0


def _sum(seconds: Sequence[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None
