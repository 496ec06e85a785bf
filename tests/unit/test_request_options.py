"""What a request may ask for: which values are taken, and what the scheduler half makes of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.connectors.messages import RequestOptions
from kvtier.connectors.options import OPTIONS, parse_options
from tests.unit.test_connector_scheduler import Rig, prompt


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, RequestOptions()),
        ({"load": False, "store": False}, RequestOptions(load=False, store=False)),
        ({"store_only_prefix": 0, "priority": "low", "tenant": "t"}, RequestOptions(store_only_prefix=0, priority="low", tenant="t")),
        (
            {"session": "s", "tool_call": {"name": "grep", "expected_s": 8}, "next_use_s": 0},
            RequestOptions(session="s", tool="grep", expected_s=8, next_use_s=0),
        ),
        ({"session": "s", "tool_call": {"name": "grep"}}, RequestOptions(session="s", tool="grep")),
    ],
)
def test_what_makes_sense_is_taken(asked: dict[str, object], expected: RequestOptions) -> None:
    """Each option by itself and with others."""
    assert (expected, []) == parse_options(asked)


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("no", "'no'; allowed: a mapping with load, store"),
        ({"speed": 3}, "['speed'] is unknown; allowed: load, store"),
        ({"load": 1}, "['load'] is 1; allowed: true or false"),
        ({"store_only_prefix": -1}, "['store_only_prefix'] is -1; allowed: a whole number of tokens from 0"),
        ({"store_only_prefix": True}, "['store_only_prefix'] is True"),
        ({"priority": "urgent"}, "['priority'] is 'urgent'; allowed: low, normal, high"),
        ({"priority": ["low"]}, "['priority'] is ['low']"),
        ({"tenant": ""}, "['tenant'] is ''; allowed: a text of 1 to 256 characters"),
        ({"session": 7}, "['session'] is 7"),
        ({"session": "s" * 257}, "['session'] is 'sss"),
        ({"tenant": "a\ud800"}, "['tenant'] is 'a\\ud800'"),
        ({"session": "s", "next_use_s": -1}, "['next_use_s'] is -1; allowed: seconds, 0 or more and finite"),
        ({"session": "s", "next_use_s": math.inf}, "['next_use_s'] is inf"),
        ({"session": "s", "next_use_s": math.nan}, "['next_use_s'] is nan"),
        ({"next_use_s": 1.0}, "['next_use_s'] needs a session; allowed: session beside it"),
        ({"tool_call": {"name": "grep"}}, "['tool_call'] needs a session"),
        ({"session": "s", "tool_call": {"expected_s": 1}}, "['tool_call'] is {'expected_s': 1}; allowed: a mapping with name"),
        ({"session": "s", "tool_call": {"name": "grep", "expected_s": -1}}, "['tool_call'] is"),
        ({"session": "s", "tool_call": {"name": "grep", "speed": 1}}, "['tool_call'] is"),
    ],
)
def test_what_makes_no_sense_is_left_out(asked: object, problem: str) -> None:
    """It is named with what is allowed, and the rest is taken."""
    options, problems = parse_options(asked)
    assert options == RequestOptions(session="s" if isinstance(asked, dict) and asked.get("session") == "s" else "", num_problems=1)
    assert len(problems) == 1
    assert problem in problems[0]


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.sampled_from([*OPTIONS, "other"]), _ANYTHING) | _ANYTHING)
def test_nothing_raises(asked: object) -> None:
    """Whatever a request brings: options, and as many problems as are counted."""
    options, problems = parse_options(asked)
    assert options.num_problems == len(problems)


def serve(rig: Rig, name: str, tokens: list[int], **options: object) -> int:
    """A request from its beginning to its end. Returns how many blocks it stored."""
    rig.add(name, tokens, options=parse_options(options)[0])
    rig.match(name, len(tokens))
    rig.allocate(name, -(-len(tokens) // 4))
    message = rig.step(**{name: len(tokens)})
    rig.half.request_finished(name)
    return sum(len(job.slots) for job in message.stores)


def ready(rig: Rig, number: int) -> int | None:
    rig.add(f"look {rig.now} {number}", prompt(number, 20))
    found = rig.match(f"look {rig.now} {number}", 20)
    rig.half.request_finished(f"look {rig.now} {number}")
    return found


def press(rig: Rig, first: int) -> None:
    """Four prompts that fill host memory."""
    for number in range(first, first + 4):
        serve(rig, f"filler {number}", prompt(number, 16))


def test_a_session_that_waits_for_a_tool_is_kept(tmp_path: Path) -> None:
    """From the end of its request on; the one without the hint beside it leaves."""
    rig = Rig(tmp_path)
    serve(rig, "a", prompt(1, 16), session="agent", tool_call={"name": "grep", "expected_s": 0.5})
    serve(rig, "b", prompt(2, 16), session="other")
    press(rig, 3)
    assert [16, 0] == [ready(rig, number) for number in (1, 2)]
    assert 1 == rig.cache.stats["hint.taken"]
    serve(rig, "c", prompt(1, 16), session="agent")
    rig.now += 1.0
    press(rig, 10)
    assert 0 == ready(rig, 1)
    rig.half.close()


def test_requests_of_low_priority_evict_nobody(tmp_path: Path) -> None:
    """They store into what is free, and their hits refresh nothing."""
    rig = Rig(tmp_path)
    for number in (1, 2, 3):
        serve(rig, f"normal {number}", prompt(number, 16))
    assert 4 == serve(rig, "fits", prompt(4, 24), priority="low")
    assert 0 == serve(rig, "does not", prompt(5, 16), priority="low")
    serve(rig, "hit", prompt(1, 16), priority="low")
    assert [16, 16, 16, 16, 0] == [ready(rig, number) for number in (1, 2, 3, 4, 5)]
    rig.half.close()


def test_requests_of_high_priority_are_kept_for_a_while(tmp_path: Path) -> None:
    """A minute, within the share of pins: a quarter of 16 blocks."""
    rig = Rig(tmp_path)
    serve(rig, "high", prompt(1, 16), priority="high")
    serve(rig, "too much", prompt(2, 16), priority="high")
    press(rig, 3)
    assert [16, 0] == [ready(rig, number) for number in (1, 2)]
    assert 1 == rig.cache.stats["hint.refused"]
    rig.now += 60.0
    press(rig, 10)
    press(rig, 20)
    assert 0 == ready(rig, 1)
    rig.half.close()


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (7, 1), (8, 2), (1000, 4)])
def test_only_a_prefix_is_stored(tmp_path: Path, num_tokens: int, expected: int) -> None:
    """Full blocks within so many tokens."""
    rig = Rig(tmp_path)
    assert expected == serve(rig, "a", prompt(1, 16), store_only_prefix=num_tokens)
    rig.half.close()


def test_what_was_left_out_is_counted(tmp_path: Path) -> None:
    """Once a request, also for a hint that the share has no room for."""
    rig = Rig(tmp_path)
    serve(rig, "a", prompt(1, 16), speed=3, load="no")
    assert 2 == rig.cache.stats["hint.bad"]
    rig.half.close()
