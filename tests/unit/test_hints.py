"""Hints: durations of tools, steps of a workflow, the order of a batch, and what the planner does for sessions."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.control.commands import Promote
from kvtier.control.estimates import Estimates
from kvtier.control.grouping import order
from kvtier.control.hints import MAX_SESSIONS, MAX_TTL_S, SETTLE_S, Hint, Hints, NextUse, SessionOver, ToolCall, Workflow, check_hint
from kvtier.control.host_space import PAGE_BYTES
from kvtier.control.planner import Planner
from kvtier.control.steps import StepGraph
from kvtier.control.tool_calls import EDGES, MAX_TOOLS, NUM_BINS, ToolCalls, bin_of
from kvtier.errors import ControlError, QuotaError, UnknownSessionError
from kvtier.stats import Stats
from kvtier.types import BlockKey, BlockMeta, StoreOrder
from tests.unit.test_planner import keys_of, make_planner, store

# ---- durations of tools --------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e6))
def test_a_duration_lies_in_its_bin(duration_s: float) -> None:
    """Not above the bin's end, nor at or below the end of the bin before; the last bin holds all that is longer."""
    number = bin_of(duration_s)
    assert duration_s <= EDGES[number] * (1 + 1e-6) or number == NUM_BINS - 1
    assert number == 0 or duration_s > EDGES[number - 1] * (1 - 1e-6)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(0.01, 1e5)), max_size=20),
    st.floats(0.01, 100.0),
    st.floats(1e-4, 1.0),
    st.none() | st.floats(0.01, 1e4),
)
def test_the_time_to_live_is_the_best_there_is(
    seen: list[tuple[str, float]], benefit_s: float, cost: float, expected_s: float | None
) -> None:
    """Against trying every bin; chances never fall and end at one."""
    calls = ToolCalls()
    for tool, duration_s in seen:
        calls.observe(tool, duration_s)
    chances = calls.chances("a", expected_s)
    assert chances == sorted(chances)
    assert chances[-1] == pytest.approx(1.0 if seen or expected_s is not None else 0.0)
    values = {0.0: 0.0} | {edge: chance * benefit_s - cost * edge for edge, chance in zip(EDGES, chances, strict=True)}
    assert values[calls.best_ttl("a", benefit_s, cost, expected_s)] == max(values.values())


def test_a_quick_tool_is_waited_for_and_a_slow_one_is_not() -> None:
    """A hundredth of the tier, one second to compute: up to a hundred seconds may be worth it."""
    calls = ToolCalls()
    for _ in range(20):
        calls.observe("grep", 2.0)
        calls.observe("build", 1000.0)
    assert 2.0 <= calls.best_ttl("grep", 1.0, 0.01) <= 3.0
    assert 0.0 == calls.best_ttl("build", 1.0, 0.01)
    assert 1000.0 <= calls.best_ttl("build", 1.0, 0.0001) < 2000.0


def test_what_is_seen_outweighs_what_is_expected() -> None:
    """An unknown tool is believed; a known one by what it did."""
    calls = ToolCalls()
    assert 0.0 == calls.best_ttl("test", 1.0, 0.01), "nothing is known, nothing expected"
    assert 8.0 <= calls.best_ttl("test", 1.0, 0.01, expected_s=8.0) <= 30.0
    for _ in range(50):
        calls.observe("test", 500.0)
    assert 0.0 == calls.best_ttl("test", 1.0, 0.01, expected_s=8.0)


def test_old_durations_fade_and_old_tools_are_forgotten() -> None:
    """A tool that has become fast is learned within some hundred calls; memory is bounded."""
    calls = ToolCalls()
    for duration_s in [1000.0] * 100 + [1.0] * 300:
        calls.observe("tool", duration_s)
    assert calls.chances("tool")[bin_of(1.0)] > 0.9
    for number in range(MAX_TOOLS):
        calls.observe(f"tool {number}", 1.0)
    assert calls.chances("tool", 1000.0)[bin_of(1.0)] == 0.0


# ---- steps ---------------------------------------------------------------------------------------------------------


def test_steps_of_a_workflow() -> None:
    """A branch counts its nearest way, a join its farthest; who cannot be reached is left out."""
    graph = StepGraph(
        {
            "plan": [],
            "code": ["plan"],
            "test": ["code"],
            "docs": ["plan"],
            "merge": ["test", "docs"],
            "any": ["test", "docs"],
            "lost": ["x"],
        },
        joins=frozenset({"merge"}),
    )
    assert {"plan": 0, "code": 1, "docs": 1, "test": 2, "any": 2, "merge": 3} == graph.steps(["plan"])
    assert {"test": 0, "any": 1} == graph.steps(["test"]), "a join waits for what nobody will do"


def test_cycles_end() -> None:
    """Two agents that call each other."""
    graph = StepGraph({"a": ["b"], "b": ["a"], "c": ["a", "b"]}, joins=frozenset({"c"}))
    assert {"a": 0, "b": 1, "c": 2} == graph.steps(["a"])


_NAMES = "abcdef"


@given(
    st.dictionaries(st.sampled_from(_NAMES), st.sets(st.sampled_from(_NAMES), max_size=3)),
    st.sets(st.sampled_from(_NAMES)),
    st.sets(st.sampled_from(_NAMES)),
)
def test_steps_solve_their_equations(before: dict[str, set[str]], joins: set[str], running: set[str]) -> None:
    """Against iterating min and max to the least fixed point."""
    values = {agent: 0.0 if agent in running else math.inf for agent in _NAMES}
    for _ in _NAMES:
        for agent, others in before.items():
            if agent not in running and others:
                values[agent] = (max if agent in joins else min)(values[other] for other in others) + 1
    graph = StepGraph(before, frozenset(joins))
    assert {agent: steps for agent, steps in values.items() if steps < math.inf} == graph.steps(running)


# ---- the order of a batch ------------------------------------------------------------------------------------------

_CHAINS = st.lists(st.lists(st.sampled_from([BlockKey(bytes([number] * 16)) for number in range(3)]), max_size=4), max_size=8)


@given(_CHAINS)
def test_requests_with_a_common_prefix_follow_each_other(chains: list[list[BlockKey]]) -> None:
    """Nobody is lost, and for every prefix those that have it stand together."""
    ordered = order(chains)
    assert sorted(ordered) == list(range(len(chains)))
    for length in range(1, 5):
        prefixes = [tuple(chains[index][:length]) for index in ordered if len(chains[index]) >= length]
        positions: dict[tuple[BlockKey, ...], list[int]] = {}
        for position, index in enumerate(ordered):
            if len(chains[index]) >= length:
                positions.setdefault(tuple(chains[index][:length]), []).append(position)
        assert len(positions) == len(set(prefixes))
        assert all(where == list(range(where[0], where[0] + len(where))) for where in positions.values())


# ---- sessions ------------------------------------------------------------------------------------------------------


class Served:
    """A planner for 16 blocks, of which hints may keep four, with hints over it. Time passes by ``now``."""

    def __init__(self, max_blocks: int = 4, *, has_disk: bool = False, capacity_blocks: int = 16) -> None:
        self.planner: Planner = make_planner(16, has_disk=has_disk)
        self.stats = Stats()
        self.hints = Hints(self.planner, Estimates(), self.stats, max_blocks=max_blocks, capacity_blocks=capacity_blocks)
        self.now = 0.0

    def request(self, session: str, prompt: int, num_blocks: int = 2) -> None:
        self.hints.began(session, self.now)
        store(self.planner, keys_of(prompt, num_blocks), now=self.now)
        self.hints.ended(session, keys_of(prompt, num_blocks), 16 * num_blocks, self.now)

    def press(self, first: int = 100) -> None:
        """Everything that can leave leaves."""
        for prompt in range(first, first + 16):
            store(self.planner, keys_of(prompt, 2), now=self.now)

    def ready(self, prompt: int) -> int:
        return self.planner.match(keys_of(prompt, 4)).ready_blocks

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.hints.tick(self.now)
        self.planner.tick(self.now)


def test_a_tool_call_keeps_the_session_for_its_time() -> None:
    """Under pressure it stays as long as the tool may take, and no longer."""
    served = Served()
    served.request("agent", 1)
    served.request("other", 2)
    served.hints.take(ToolCall("agent", "grep", expected_s=2.0), served.now)
    served.press()
    assert [2, 0] == [served.ready(prompt) for prompt in (1, 2)]
    served.pass_time(30.0)
    served.press(200)
    assert 0 == served.ready(1)


def test_uses_announced_anew_take_no_memory() -> None:
    """A program that says once a second when it goes on, an hour before, is remembered once; the last moment counts."""
    served = Served(has_disk=True)
    served.request("agent", 1)
    served.request("patient", 2)
    served.hints.take(NextUse("patient", eta_s=2600.0), served.now)
    for second in range(10_000):
        served.hints.take(NextUse("agent", eta_s=3600.0 - second / 10), served.now)
    assert len(served.hints._due) < 100
    served.pass_time(2600.0)
    assert 2 == served.stats.snapshot()["hint.prefetches"]


def test_what_arrives_after_the_hint_is_kept_too() -> None:
    """A request ends before its stores do: its blocks are pinned as they become readable, for some seconds."""
    for delay_s, expected in ((1.0, 2), (SETTLE_S + 1.0, 0)):
        served = Served(capacity_blocks=1600)
        plan = served.planner.begin_store(StoreOrder(keys_of(1, 2), 0), PAGE_BYTES, 0.0)
        served.hints.ended("agent", keys_of(1, 2), 32, 0.0)
        served.hints.take(ToolCall("agent", "grep", expected_s=5.0), 0.0)
        served.pass_time(delay_s)
        served.planner.commit_store(plan.job_id, (), served.now)
        served.pass_time(0.0)
        assert expected == served.planner.reserved_blocks
        served.press()
        assert expected == served.ready(1)
        served.pass_time(MAX_TTL_S)
        assert {0} == set(served.planner.leftovers().values())


def test_a_session_that_is_over_keeps_nothing_that_arrives() -> None:
    """Its stores end after it."""
    served = Served(capacity_blocks=1600)
    plan = served.planner.begin_store(StoreOrder(keys_of(1, 2), 0), PAGE_BYTES, 0.0)
    served.hints.ended("agent", keys_of(1, 2), 32, 0.0)
    served.hints.take(ToolCall("agent", "grep", expected_s=5.0), 0.0)
    served.hints.take(SessionOver("agent"), 0.0)
    served.planner.commit_store(plan.job_id, (), 0.0)
    served.pass_time(0.1)
    assert 0 == served.planner.reserved_blocks


def test_tool_calls_teach_how_long_they_take() -> None:
    """From the call to the session's next request; after that an hour is not waited for, whatever is expected."""
    served = Served()
    for _ in range(20):
        served.request("agent", 1)
        served.hints.take(ToolCall("agent", "deploy"), served.now)
        served.pass_time(3600.0)
    served.request("agent", 1)
    served.hints.take(ToolCall("agent", "deploy", expected_s=2.0), served.now)
    assert 0 == served.planner.reserved_blocks
    assert served.hints.tool_calls.chances("deploy")[bin_of(1800.0)] < 0.1


def test_the_next_use_is_prepared() -> None:
    """What is on the lower tier only is promoted in time, once."""
    served = Served(has_disk=True)
    metas = [BlockMeta(key, parent, PAGE_BYTES) for key, parent in zip(keys_of(1, 2), [None, *keys_of(1, 1)], strict=True)]
    served.planner.recover(1, metas, 0.0)
    served.hints.ended("agent", keys_of(1, 2), 32, 0.0)
    served.hints.take(NextUse("agent", eta_s=100.0), served.now)
    served.hints.take(NextUse("agent", eta_s=60.0), served.now)
    promotes = []
    for seconds in (50.0, 9.0, 9.0, 40.0):
        served.pass_time(seconds)
        promotes.append(sum(isinstance(command, Promote) for command in served.planner.take_commands()))
    assert [0, 1, 0, 0] == promotes
    assert 1 == served.stats["hint.prefetches"]


def test_agents_that_run_soon_are_kept_and_the_others_let_go() -> None:
    """Those that run and those one step away; as the workflow goes on, others take their place."""
    served = Served()
    for number, agent in enumerate(("plan", "code", "test")):
        served.request(agent, number)
    graph = StepGraph({"code": ["plan"], "test": ["code"]})
    served.hints.take(Workflow(graph, ("plan",)), served.now)
    served.press()
    assert [2, 2, 0] == [served.ready(prompt) for prompt in range(3)]
    served.request("test", 2)
    served.hints.take(Workflow(graph, ("test",)), served.now)
    served.press(200)
    assert [0, 0, 2] == [served.ready(prompt) for prompt in range(3)]


def test_hints_keep_no_more_than_their_share() -> None:
    """The fifth and sixth block are refused by name; nobody else's are touched, and pins of users count too."""
    served = Served(max_blocks=4)
    for number, session in enumerate("abc"):
        served.request(session, number)
    for session in "ab":
        served.hints.take(ToolCall(session, "grep", expected_s=2.0), served.now)
    with pytest.raises(QuotaError, match=r"session 'c': 2 blocks beside 4 that are kept already; allowed: 4 in all"):
        served.hints.take(ToolCall("c", "grep", expected_s=2.0), served.now)
    assert (1, 4) == (served.stats["hint.refused"], served.planner.reserved_blocks)
    served.hints.take(SessionOver("a"), served.now)
    served.hints.take(ToolCall("c", "grep", expected_s=2.0), served.now)
    with pytest.raises(UnknownSessionError, match="session is 'a', which no request has named; 2 sessions are known"):
        served.hints.take(SessionOver("a"), served.now)
    assert 1 == served.stats["hint.unknown_sessions"]


class _Says:
    tool_calls = st.builds(ToolCall, st.sampled_from("abc"), st.sampled_from(["x", "y"]), st.none() | st.floats(0.0, 1e4))
    next_uses = st.builds(NextUse, st.sampled_from("abc"), st.floats(0.0, 1e4))
    ends = st.builds(SessionOver, st.sampled_from("abc"))
    graphs = st.builds(
        lambda before, joins, running: Workflow(StepGraph(before, frozenset(joins)), tuple(running)),
        st.dictionaries(st.sampled_from("abc"), st.sets(st.sampled_from("abc"))),
        st.sets(st.sampled_from("abc")),
        st.sets(st.sampled_from("abc")),
    )


@given(
    st.lists(st.one_of(_Says.tool_calls, _Says.next_uses, _Says.ends, _Says.graphs, st.integers(0, 5), st.floats(0.0, 100.0)), max_size=25)
)
def test_whatever_is_said_others_find_room(events: list[Hint | int | float]) -> None:
    """Any hints in any order: the share is kept, everything they keep ends, and then everything can leave."""
    served = Served(max_blocks=6)
    for number, event in enumerate(events):
        if isinstance(event, int):
            served.request("abc"[event % 3], event)
        elif isinstance(event, float):
            served.pass_time(event)
        else:
            with contextlib.suppress(QuotaError, UnknownSessionError):
                served.hints.take(event, served.now)
        assert served.planner.reserved_blocks <= 6
        assert [] == served.planner.check()
        served.planner.take_commands()
        assert 2 == store(served.planner, keys_of(50 + number, 2), now=served.now)
    served.pass_time(MAX_TTL_S)
    assert (0, 0) == (served.planner.reserved_blocks, served.planner.leftovers()["pins"])


def test_sessions_are_forgotten_when_there_are_too_many() -> None:
    """The one that was used least recently goes, with what was kept for it."""
    served = Served()
    served.request("first", 1)
    served.hints.take(ToolCall("first", "grep", expected_s=2.0), served.now)
    for number in range(MAX_SESSIONS):
        served.hints.ended(f"session {number}", (), 0, served.now)
    assert (MAX_SESSIONS, 0) == (served.hints.num_sessions, served.planner.reserved_blocks)


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        (ToolCall("a", "x", -1.0), "expected_s is -1.0; allowed: seconds, 0 or more and finite"),
        (ToolCall("a", "x", math.inf), "expected_s is inf"),
        (ToolCall("a", ""), "tool is empty; allowed: the tool's name"),
        (NextUse("a", math.nan), "eta_s is nan"),
        (NextUse("a", -0.5), "eta_s is -0.5"),
        (Workflow(StepGraph({"a": ["b"]}), ("c",)), "running names c; allowed: agents of the graph"),
    ],
)
def test_hints_that_cannot_be_are_refused_by_name(hint: Hint, message: str) -> None:
    """With what is allowed."""
    with pytest.raises(ControlError, match=message):
        check_hint(hint)
