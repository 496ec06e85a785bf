"""The hazard policy: its statistics against a recount, its table against all horizons, what it keeps and what it turns away."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.policies import EvictionPolicy, HazardPolicy, LRUPolicy, hazard_model
from kvtier.policies.ghosts import MAX_MERGED, MIN_BYTES, PIECE_BYTES, Ghosts, Known
from kvtier.policies.hazard_model import (
    BLOCKS_PER_REQUEST,
    DECAY,
    EDGES_S,
    MIN_CHANCE,
    NUM_BINS,
    NUM_CLASSES,
    OFTEN,
    REQUESTS_PER_DECAY,
    HazardModel,
    bin_of,
    class_of_extension,
    class_of_first_use,
    class_of_reuse,
    gittins,
    prior_chances,
    time_to_live,
)
from kvtier.policies.segments import Segment, SegmentLog
from kvtier.types import BlockKey, BlockMeta

CHANCES = st.lists(st.floats(0.0, 0.98), min_size=NUM_BINS, max_size=NUM_BINS)


def key_of(*name: object) -> BlockKey:
    return BlockKey(hashlib.blake2b(repr(name).encode(), digest_size=16).digest())


def prompt_of(*names: tuple[str, int]) -> list[BlockMeta]:
    """A chain of blocks: (name, how many) after each other; equal beginnings are shared."""
    out: list[BlockMeta] = []
    path = ""
    for name, count in names:
        path += "/" + name
        for position in range(count):
            out.append(BlockMeta(key_of(path, position), out[-1].key if out else None, 1))
    return out


def serve(policy: EvictionPolicy, prompt: list[BlockMeta], now: float, capacity: int) -> int:
    """One request, as the planner would have it. Returns the leading blocks that were there."""
    hits = next((position for position, block in enumerate(prompt) if block.key not in policy), len(prompt))
    policy.touch([block.key for block in reversed(prompt[:hits])], now)
    new = prompt[hits:]
    short = len(policy) + len(new) - capacity
    if new and hits:
        policy.pin(prompt[hits - 1].key)
    if short > 0:
        asked = min(short, len(new))
        victims = policy.victims(asked, now, new[-asked:])
        new = new[: len(new) - asked + len(victims)]
    for block in reversed(new[: max(0, capacity - len(policy))]):
        policy.insert(block, now)
    if hits:
        policy.unpin(prompt[hits - 1].key, now)
    return hits


class TestTable:
    """The index and the prior."""

    @settings(max_examples=40)
    @given(CHANCES)
    def test_is_the_best_ratio_over_all_horizons(self, chances: list[float]) -> None:
        """For each age, by trying every horizon."""
        indexes = gittins(chances)
        for first in range(NUM_BINS):
            alive, cost, reward, best = 1.0, 0.0, 0.0, 0.0
            for position in range(first, NUM_BINS):
                cost += alive * (EDGES_S[position + 1] - EDGES_S[position]) * (1.0 - chances[position] / 2.0)
                reward += alive * chances[position]
                alive *= 1.0 - chances[position]
                best = max(best, reward / cost)
            assert best == pytest.approx(indexes[first], rel=1e-6, abs=1e-12)

    @settings(max_examples=40)
    @given(CHANCES | st.lists(st.floats(0.0, 0.002), min_size=NUM_BINS, max_size=NUM_BINS))
    def test_time_to_live_is_the_first_age_without_prospects(self, chances: list[float]) -> None:
        """From each edge on, the chance of a use in any later bin, summed up bin by bin: before that age it is enough."""
        prospects = []
        for first in range(NUM_BINS):
            alive, used = 1.0, 0.0
            for chance in chances[first:]:
                used += alive * chance
                alive *= 1.0 - chance
            prospects.append(used)
        expected = next((age for age, used in zip(EDGES_S, prospects, strict=False) if used < MIN_CHANCE), EDGES_S[-1])
        assert expected == time_to_live(chances) or any(used == pytest.approx(MIN_CHANCE, rel=1e-9) for used in prospects)

    def test_prior_is_a_probability_that_falls_with_the_gap(self) -> None:
        """Chances lie between 0 and 1; a longer gap means a later use; more uses, a surer one."""
        for class_id in range(NUM_CLASSES):
            assert all(0.0 < chance < 1.0 for chance in prior_chances(class_id))
        by_gap = [gittins(prior_chances(class_of_reuse(2, gap_s)))[0] for gap_s in (0.1, 3.0, 50.0, 800.0)]
        assert sorted(by_gap, reverse=True) == by_gap
        by_count = [gittins(prior_chances(class_of_reuse(count, 50.0)))[0] for count in (1, 2, 4, 8, 16)]
        assert sorted(by_count) == by_count

    @given(st.floats(0.0, 1e6), st.integers(1, 10**6), st.floats(0.0, 1e6))
    def test_every_use_has_a_class_of_its_kind(self, gap_s: float, count: int, length: float) -> None:
        """Kinds never share a class, and ages fall into the bin whose edges enclose them."""
        first, branch, other = (class_of_first_use(length, parent_uses) for parent_uses in (0, 1, OFTEN))
        assert 0 <= first < branch < other < class_of_extension(count, gap_s) < class_of_reuse(count, gap_s) < NUM_CLASSES
        assert EDGES_S[bin_of(gap_s)] <= gap_s
        assert bin_of(gap_s) == NUM_BINS - 1 or gap_s < EDGES_S[bin_of(gap_s) + 1]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("reused"), st.integers(0, 3), st.floats(0.0, 50_000.0), st.floats(0.01, 100.0)),
        st.tuples(st.just("survived"), st.integers(0, 3), st.floats(0.0, 36_000.0), st.floats(0.01, 100.0)),
        st.tuples(st.just("requests"), st.integers(1, 200), st.just(0.0), st.just(0.0)),
    ),
    max_size=40,
)


class TestStatistics:
    """What it has seen."""

    @settings(max_examples=30)
    @given(EVENTS)
    def test_hits_and_risk_are_a_recount(self, events: list[tuple[str, int, float, float]]) -> None:
        """The sums are those of a recount of all events, to the last bit."""
        classes = [class_of_reuse(2, 1.5), class_of_reuse(2, 40.0), class_of_reuse(9, 1.5), class_of_first_use(1.0, 2)]
        model = HazardModel()
        hits = {class_id: [0.0] * NUM_BINS for class_id in classes}
        risk = {class_id: [0.0] * NUM_BINS for class_id in classes}
        scale, num_requests = 1.0, 0
        for what, number, seconds, weight in events:
            if what == "requests":
                for _ in range(number):
                    model.end_request()
                    num_requests += 1
                    if num_requests % REQUESTS_PER_DECAY == 0:
                        scale /= DECAY
                continue
            class_id, position = classes[number], bin_of(seconds)
            if what == "reused":
                model.reused(class_id, seconds, weight)
                hits[class_id][position] += weight * scale
            else:
                model.survived(class_id, position, weight)
            risk[class_id][position] += weight * scale
        for class_id in classes:
            seen_hits, seen_risk = model.sums_of(class_id)
            assert hits[class_id] == seen_hits
            assert risk[class_id] == seen_risk

    def test_little_evidence_leaves_the_prior_and_much_overrules_it(self) -> None:
        """With ten thousand uses in one bin and none elsewhere the estimate is what was seen; with one, what was believed."""
        class_id = class_of_reuse(2, 40.0)
        position = bin_of(60.0)
        model = HazardModel()
        model.survived(class_id, position, 1.0)
        assert prior_chances(class_id)[position] == pytest.approx(model.chances(class_id)[position], rel=0.2)
        for _ in range(5_000):
            model.reused(class_id, 60.0, 1.0)
            model.survived(class_id, position, 1.0)
        assert pytest.approx(0.5, abs=0.01) == model.chances(class_id)[position]

    def test_what_is_known_of_others_counts_where_nothing_is_known(self) -> None:
        """Uses beyond belief raise the belief in all classes at about that age, and more so in the row (the same count) and the column
        (the same gap); at other ages in none."""
        model = HazardModel()
        position = bin_of(60.0)
        for _ in range(500):
            model.reused(class_of_reuse(2, 40.0), 60.0, 1.0)
        model.survived(class_of_reuse(2, 40.0), position, 500.0)
        classes = [class_of_reuse(20, 700.0), class_of_reuse(3, 700.0), class_of_reuse(20, 40.0)]
        for _ in range(500):
            model.reused(class_of_reuse(9, 3.0), 60.0, 1.0)
        model.survived(class_of_reuse(9, 3.0), position, 20_000.0)
        ratios = []
        for class_id in classes:
            model.survived(class_id, 0, 1e-6)  # so that something was seen of it
            prior = prior_chances(class_id)
            believed = model.chances(class_id)
            ratios.append(believed[position] / prior[position])
            for near in (-2, -1, 1, 2):
                assert ratios[-1] == pytest.approx(believed[position + near] / prior[position + near], rel=0.01)
            for far in (-3, 3):
                assert believed[position + far] == pytest.approx(prior[position + far], rel=0.01)
        assert ratios[0] < 0.7
        assert ratios[1] == ratios[2] > 1.5

    def test_an_index_changes_steadily_with_age(self) -> None:
        """Between the ages at which bins begin it lies on the line between theirs; behind the last one it stays."""
        model, class_id = HazardModel(), class_of_reuse(2, 40.0)
        for position in range(NUM_BINS - 1):
            begin, end = EDGES_S[position], EDGES_S[position + 1]
            middle = (model.index(class_id, begin) + model.index(class_id, end)) / 2.0
            assert model.index(class_id, (begin + end) / 2.0) == pytest.approx(middle, rel=1e-9)
        assert model.index(class_id, EDGES_S[NUM_BINS - 1]) == model.index(class_id, 1e9)

    def test_blocks_that_come_one_by_one_are_no_requests(self) -> None:
        """The table is brought up to date when enough blocks were asked for, once a call."""
        model = HazardModel()
        class_id = class_of_reuse(2, 40.0)
        before = model.index(class_id, 60.0)
        model.reused(class_id, 60.0, 50.0)
        for num_blocks in (0, *(1,) * (BLOCKS_PER_REQUEST - 1)):
            model.asked_for(num_blocks)
            assert before == model.index(class_id, 60.0)
        model.asked_for(1)
        after = model.index(class_id, 60.0)
        assert after > before
        model.reused(class_id, 60.0, 50.0)
        model.asked_for(100 * BLOCKS_PER_REQUEST)
        assert model.index(class_id, 60.0) > after

    def test_scale_is_taken_out_when_it_is_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the weights of what is new become huge, all are divided, and nothing else changes."""
        class_id = class_of_reuse(2, 40.0)
        chances = []
        for largest in (1e100, 1.005):
            monkeypatch.setattr(hazard_model, "_MAX_SCALE", largest)
            model = HazardModel()
            for _ in range(100 * REQUESTS_PER_DECAY):
                model.reused(class_id, 60.0, 1.0)
                model.survived(class_id, bin_of(60.0), 2.0)
                model.end_request()
            chances.append(model.chances(class_id))
            is_small = model.sums_of(class_id)[1][bin_of(60.0)] < 3.0 * 100 * REQUESTS_PER_DECAY
            assert is_small == (largest < 2.0)
        assert chances[0] == pytest.approx(chances[1], rel=1e-9)


class TestSegments:
    """Books by the run of blocks."""

    @given(st.lists(st.floats(0.0, 2_000.0), min_size=1, max_size=8), st.floats(0.0, 40_000.0))
    def test_each_segment_survives_each_bin_once(self, times: list[float], later_s: float) -> None:
        """However the time is cut into steps, a bin counts a segment when its age has passed the bin."""
        model, log = HazardModel(), SegmentLog[object]()
        times = sorted(times)
        class_id = class_of_reuse(2, 40.0)
        for time_s in times:
            log.advance(time_s, model)
            segment = log.new(time_s)
            segment.class_id, segment.num_blocks, segment.num_alive = class_id, 4, 4
        now = times[-1] + later_s
        log.advance(now, model)
        expected = [float(sum(2.0 for time_s in times if time_s <= now - EDGES_S[position + 1])) for position in range(NUM_BINS)]
        assert expected == model.sums_of(class_id)[1]


def segment_of(num_blocks: int) -> Segment[object]:
    """A segment with so many blocks."""
    segment = Segment[object](1, 0.0)
    segment.num_blocks = segment.num_alive = num_blocks
    return segment


class TestGhosts:
    """What is remembered of blocks that are not here."""

    @given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
    def test_as_much_is_known_as_is_the_same(self, length: int, asked: int, common: int) -> None:
        """A prompt that parts from a piece in its middle learns of what it shares, and the rest of the piece stays."""
        common = min(common, length, asked)
        ghosts, segment = Ghosts[object](), segment_of(length)
        mine = [key_of("mine", n) for n in range(length)]
        other = mine[:common] + [key_of("other", n) for n in range(asked - common)]
        ghosts.put(mine, segment, had_child=False)

        known = [Known(segment, common, common < length)] if common else []
        assert known + ([Known(None, asked - common, False)] if asked > common else []) == ghosts.take(other)
        rest = mine[common:]
        assert ([Known(segment, len(rest), False)] if rest else []) == ghosts.take(rest)
        assert [Known(None, length, False)] == ghosts.take(mine)

    def test_what_left_before_it_is_taken_in(self) -> None:
        """Blocks that leave from the end on, one by one, are one piece, up to a length; those of another segment are not taken in."""
        ghosts, segment = Ghosts[object](), segment_of(2 * MAX_MERGED)
        keys = [key_of(n) for n in range(MAX_MERGED + 2)]
        following = None
        for key in reversed(keys):
            ghosts.put([key], segment, had_child=following is not None, following=following)
            following = key
        assert [Known(segment, MAX_MERGED + 1, False)] == ghosts.take(keys[1:])
        assert [Known(segment, 1, True)] == ghosts.take(keys[:1])

        ghosts.put(keys[1:2], segment, had_child=False)
        ghosts.put(keys[:1], segment_of(1), had_child=True, following=keys[1])
        assert [1, 1] == [known.num_blocks for known in ghosts.take(keys[:2])]

    def test_the_oldest_are_forgotten(self) -> None:
        """Memory is bounded; what is forgotten cannot be seen to be used again, so its segment counts it no more."""
        ghosts, segment = Ghosts[object](), segment_of(300_000)
        keys = [[key_of(number, n) for n in range(10)] for number in range(30_000)]
        for piece in keys:
            ghosts.put(piece, segment, had_child=True)
        fit = MIN_BYTES // (PIECE_BYTES + 160)
        assert 10 * fit == segment.num_alive == segment.num_blocks
        assert [Known(None, 10, False)] == ghosts.take(keys[-fit - 1])
        assert [Known(segment, 10, True)] == ghosts.take(keys[-fit])

    def test_a_larger_tier_remembers_more(self) -> None:
        """And never less again."""
        ghosts, segment = Ghosts[object](), segment_of(300_000)
        ghosts.resize(1_000_000)
        ghosts.resize(0)
        for number in range(30_000):
            ghosts.put([key_of(number, n) for n in range(10)], segment, had_child=True)
        assert 300_000 == segment.num_alive


class TestPolicy:
    """What it keeps."""

    def test_a_scan_does_not_flush_what_is_used(self) -> None:
        """One conversation that goes on beside prompts that never come again: it hits nearly always; under LRU never."""
        hits = {}
        for name, policy in (("hazard", HazardPolicy()), ("lru", LRUPolicy())):
            hits[name] = 0
            for turn in range(400):
                hits[name] += serve(policy, prompt_of(("chat", 20)), turn * 10.0, 50) == 20
                for other in range(4):
                    serve(policy, prompt_of((f"scan {turn} {other}", 20)), turn * 10.0 + other + 1.0, 50)
        assert hits["lru"] == 0
        assert hits["hazard"] > 350

    def test_what_is_worth_less_is_turned_away_and_counted(self) -> None:
        """Blocks used every second stay; prompts that come once are declined."""
        policy = HazardPolicy()
        hot = prompt_of(("hot", 8))
        for second in range(200):
            serve(policy, hot, float(second), 8)
        new = prompt_of(("cold", 8))
        assert policy.victims(8, 200.5, new) == []
        assert policy.num_declined == 8
        assert len(policy.victims(8, 200.5)) == 8

    def test_without_incoming_everything_is_given(self) -> None:
        """Room that must be had is had."""
        policy = HazardPolicy()
        for block in reversed(prompt_of(("a", 5))):
            policy.insert(block, 0.0)
        assert [block.key for block in reversed(prompt_of(("a", 5)))] == policy.victims(9, 1.0)

    def test_what_is_hardly_used_any_more_expires(self) -> None:
        """What is used every minute stays; a prompt that never came again goes after hours, its last block first, unless it is pinned."""
        policy = HazardPolicy()
        for block in reversed(prompt_of(("once", 3))):
            policy.insert(block, 0.0)
        for minute in range(1, 601):
            serve(policy, prompt_of(("hot", 3)), minute * 60.0, 100)
            if minute == 60:
                assert [] == policy.expired(minute * 60.0)
        policy.pin(key_of("/once", 0))
        assert [key_of("/once", 2), key_of("/once", 1)] == policy.expired(36_060.0)
        policy.unpin(key_of("/once", 0), 36_060.0)
        assert [key_of("/once", 0)] == policy.expired(36_060.0)
        assert 3 == len(policy)

    def test_equal_calls_give_equal_answers(self) -> None:
        """There is no chance in it."""
        answers = []
        for _ in range(2):
            policy = HazardPolicy()
            answers.append([serve(policy, prompt_of((f"p{n * n % 7}", 6), (f"q{n % 5}", 3)), float(n), 30) for n in range(300)])
        assert answers[0] == answers[1]

    def test_is_not_worse_than_lru_where_lru_is_right(self) -> None:
        """Conversations in turn, all of which fit but one: nearly as many hits as LRU, whose case this is."""
        hits = {"hazard": 0, "lru": 0}
        for name, policy in (("hazard", HazardPolicy()), ("lru", LRUPolicy())):
            for turn in range(600):
                talk, step = divmod(turn, 10)
                hits[name] += serve(policy, prompt_of((f"talk {talk}", 2 + step)), turn * 5.0, 40)
        assert hits["hazard"] >= 0.97 * hits["lru"] > 0
