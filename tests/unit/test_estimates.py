"""Load or recompute: what is learned, when it is acted on, and that single outliers change nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.connectors.step_meter import StepMeter, StepTokens
from kvtier.control.estimates import MARGIN, MIN_SAMPLES, PROBE_EVERY, WINDOW, Estimates, Piece, Rate

MIB = 1 << 20
HOST, DISK = ("host",), ("disk", "host")


def learned(*, load_mib_s: float = 1000.0, disk_mib_s: float = 100.0, tokens_s: float = 1000.0, contexts: int = 8192) -> Estimates:
    """Enough of everything was seen, at constant speeds."""
    estimates = Estimates()
    for _ in range(MIN_SAMPLES):
        estimates.transferred("host", 8 * MIB, 8 / load_mib_s)
        estimates.transferred("disk", 8 * MIB, 8 / disk_mib_s)
        context = 1
        while context <= contexts:
            estimates.computed(100, context, 100 / tokens_s)
            context *= 2
    return estimates


def test_nothing_is_refused_before_enough_was_seen() -> None:
    """Whatever is missing - computing, or the tier that holds the blocks - the hit is loaded, and the choice says what it does not know."""
    piece = Piece(DISK, 1000, 1000 * MIB)
    for missing in ("disk", "compute"):
        estimates = Estimates()
        for _ in range(MIN_SAMPLES - (missing == "compute")):
            estimates.computed(100, 512, 0.001)
        for tier in ("host", "disk"):
            for _ in range(MIN_SAMPLES - (missing == tier)):
                estimates.transferred(tier, MIB, 1.0)
        choice = estimates.choose(0, [piece])
        assert (1, False) == (choice.num_pieces, choice.is_probe)
        assert (choice.compute_s is None) == (missing == "compute")
        assert (choice.load_s is None) == (missing != "compute")


def test_a_slow_disk_is_refused_also_where_copies_to_the_engine_cannot_be_timed() -> None:
    """Loads by layer give no times; what the disk alone takes is too long already. From host memory everything is loaded then."""
    estimates = Estimates()
    for _ in range(MIN_SAMPLES):
        estimates.computed(100, 512, 0.001)
        estimates.transferred("disk", MIB, 1.0)
    assert [0, 1] == [estimates.choose(0, [Piece(path, 1000, 1000 * MIB)]).num_pieces for path in (DISK, HOST)]


def test_a_slow_tier_is_refused_and_a_fast_one_is_not() -> None:
    """1000 tokens take a second to compute: from host memory they take a tenth, from the disk eleven."""
    estimates = learned(disk_mib_s=10.0)
    assert 1 == estimates.choose(0, [Piece(HOST, 1000, 100 * MIB)]).num_pieces
    choice = estimates.choose(0, [Piece(DISK, 1000, 100 * MIB)])
    assert 0 == choice.num_pieces
    assert choice.refused_load_s == pytest.approx(10.1)
    assert choice.refused_compute_s == pytest.approx(1.0)
    both = [Piece(HOST, 1000, 100 * MIB), Piece(DISK, 1000, 100 * MIB)]
    assert 1 == estimates.choose(0, both).num_pieces, "what lies in host memory is loaded, the rest computed"


def test_a_slow_beginning_is_worth_a_fast_rest() -> None:
    """Behind a small piece on the disk lies a large one that saves more than the small one costs."""
    estimates = learned(disk_mib_s=10.0)
    assert 2 == estimates.choose(0, [Piece(DISK, 100, 10 * MIB), Piece(HOST, 4000, 400 * MIB)]).num_pieces


def test_longer_contexts_than_were_seen_are_loaded() -> None:
    """Computing behind 8,192 tokens takes longer than behind 512, by how much is not known."""
    estimates = learned(disk_mib_s=10.0, contexts=512)
    assert estimates.compute_s(0, 1024) == pytest.approx(1.024)
    assert estimates.compute_s(0, 1025) is None
    assert 1 == estimates.choose(0, [Piece(DISK, 8192, 800 * MIB)]).num_pieces


def test_computing_gets_slower_with_the_context() -> None:
    """Each part of a prompt is estimated at the speed of its own context."""
    estimates = Estimates()
    for _ in range(MIN_SAMPLES):
        estimates.computed(10, 1, 0.01)
        estimates.computed(10, 600, 0.04)
    assert estimates.compute_s(512, 512) == pytest.approx(512 * 0.004)
    assert estimates.compute_s(0, 1) == pytest.approx(0.001)


@given(st.lists(st.floats(1e-6, 1e6), max_size=(MIN_SAMPLES - 1) // 2), st.integers(MIN_SAMPLES, WINDOW), st.randoms())
def test_a_few_outliers_flip_nothing(outliers: list[float], num_good: int, random: object) -> None:
    """As long as most of the samples are right, the choice is the one that they ask for, wherever the others come."""
    seconds = [0.08] * num_good + outliers
    random.shuffle(seconds)  # type: ignore[attr-defined]
    estimates = learned()
    slow = learned(tokens_s=1e6)
    for each in seconds[-WINDOW:]:
        estimates.transferred("disk", 8 * MIB, each)
        slow.transferred("disk", 8 * MIB, each)
    pieces = [Piece(DISK, 1000, 80 * MIB)]
    assert 1 == estimates.choose(0, pieces).num_pieces
    assert 0 == slow.choose(0, pieces).num_pieces


def test_what_has_changed_is_found_out() -> None:
    """Every sixteenth refusal is loaded all the same, and once the disk has become fast again loads go on."""
    estimates = learned(disk_mib_s=10.0)
    pieces = [Piece(DISK, 1000, 100 * MIB)]
    choices = [estimates.choose(0, pieces) for _ in range(2 * PROBE_EVERY)]
    assert [PROBE_EVERY - 1, 2 * PROBE_EVERY - 1] == [number for number, choice in enumerate(choices) if choice.num_pieces]
    assert all(choice.is_probe == bool(choice.num_pieces) for choice in choices)
    for _ in range(WINDOW // 2 + 1):
        estimates.transferred("disk", 100 * MIB, 0.1)
    assert (1, False) == ((choice := estimates.choose(0, pieces)).num_pieces, choice.is_probe)


@given(st.floats(0.2, 5.0))
def test_loading_wins_within_the_margin(ratio: float) -> None:
    """It is refused only where it takes more than MARGIN times as long."""
    estimates = learned(load_mib_s=100.0 / ratio)
    choice = estimates.choose(0, [Piece(HOST, 1000, 100 * MIB)])
    if abs(ratio - MARGIN) > 1e-6:
        assert (ratio < MARGIN) == bool(choice.num_pieces)


@given(st.lists(st.tuples(st.sampled_from([HOST, DISK]), st.integers(1, 2000), st.integers(1, 200)), max_size=4), st.integers(0, 4000))
def test_no_other_part_would_take_less_time(shape: list[tuple[tuple[str, ...], int, int]], first_token: int) -> None:
    """Against trying all."""
    estimates = learned(disk_mib_s=50.0, contexts=1 << 14)
    pieces = [Piece(path, tokens, mib * MIB) for path, tokens, mib in shape]
    costs, position = [0.0], first_token
    for piece in pieces:
        load_s, compute_s = estimates.load_s(piece.path, piece.num_bytes), estimates.compute_s(position, piece.num_tokens)
        assert load_s is not None
        assert compute_s is not None
        costs.append(costs[-1] + load_s - MARGIN * compute_s)
        position += piece.num_tokens
    assert costs[estimates.choose(first_token, pieces).num_pieces] == pytest.approx(min(costs))


def test_figures_name_sizes_and_speeds() -> None:
    """What the statistics show."""
    figures = learned(contexts=1).figures()
    assert {"disk.bytes_per_s@8388608": 100 * MIB, "host.bytes_per_s@8388608": 1000 * MIB, "prefill.tokens_per_s@1": 1000} == {
        name: pytest.approx(value) for name, value in figures.items()
    }


def test_impossible_samples_are_ignored() -> None:
    """No work or no time says nothing about speed."""
    rate = Rate(unknown=min)
    for units, seconds in ((0, 1.0), (1, 0.0), (-1, 1.0), (1, -1.0)):
        for _ in range(MIN_SAMPLES):
            rate.observe(1, units, seconds)
    assert rate.per_unit(1) is None


class Clock:
    """Tells the time that was set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tokens_of(*requests: tuple[int, int]) -> StepTokens:
    tokens = StepTokens()
    for num_new, num_computed in requests:
        tokens.add(num_new, num_computed)
    return tokens


def test_steps_are_timed_also_when_they_overlap() -> None:
    """With one step ahead of the answers, a step's time is what lies between two answers."""
    for is_ahead in (False, True):
        clock, estimates = Clock(), Estimates()
        meter = StepMeter(estimates, clock)
        for number in range(1, 21):
            assert number == meter.begin(tokens_of((100, 700)), is_pure=True)
            if number > 1 or not is_ahead:
                clock.now += 0.2
                meter.end(number - is_ahead)
        assert estimates.figures() == {"prefill.tokens_per_s@512": pytest.approx(500.0)}


def test_steps_without_computing_change_no_time() -> None:
    """An engine that runs ahead answers them after it has ordered the next one, or not at all."""
    clock, estimates = Clock(), Estimates()
    meter = StepMeter(estimates, clock)
    for number in range(20):
        empty = meter.begin(tokens_of(), is_pure=True)
        step = meter.begin(tokens_of((100, 700)), is_pure=True)
        clock.now += 0.001
        if number % 2:
            meter.end(empty)
        assert meter.is_computing
        clock.now += 0.199
        meter.end(step)
    assert estimates.figures() == {"prefill.tokens_per_s@512": pytest.approx(500.0)}


def test_only_steps_that_say_something_count() -> None:
    """Not those with loads, with few prompt tokens, or with many decoding requests; nor an answer without a step."""
    clock, estimates = Clock(), Estimates()
    meter = StepMeter(estimates, clock)
    for tokens, is_pure in (
        (tokens_of((100, 700)), False),
        (tokens_of((15, 700)), True),
        (tokens_of((100, 700), *[(1, 50)] * 20), True),
        (tokens_of((1, 50)), True),
        (tokens_of(), True),
    ):
        for _ in range(WINDOW):
            step = meter.begin(tokens, is_pure=is_pure)
            clock.now += 1.0
            meter.end(step)
    meter.end(0)
    assert {} == estimates.figures()
