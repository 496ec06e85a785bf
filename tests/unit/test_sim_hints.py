"""Hints in a replay: who makes which request, and what saying so brings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvtier.cli import main
from kvtier.sim.hinting import Agents, Hinting, HintKind, num_common
from kvtier.sim.model import Machine
from kvtier.sim.replay import Replay
from kvtier.sim.runs import Run, Task, replay_all
from kvtier.sim.setup import Setup, TierSetup
from kvtier.sim.trace import NO_SESSION, Trace, TraceBuilder

BLOCK = 64


def two_agents() -> Trace:
    """A session whose main agent and whose helper take turns, and a request of no session."""
    builder = TraceBuilder(BLOCK)
    for time_s, session, blocks in (
        (0.0, 5, [1, 2, 3, 4]),
        (1.0, 5, [1, 20, 21, 22]),
        (2.0, 5, [1, 2, 3, 4, 5]),
        (3.0, NO_SESSION, [1, 2, 3, 4]),
        (7.0, 5, [1, 20, 21, 22, 23]),
    ):
        builder.add(time_s, blocks, len(blocks) * BLOCK, 1, session=session)
    return builder.build("two agents")


def chats(num: int = 60, turns: int = 12) -> Trace:
    """Conversations begin one after the other; after each turn all pause alike, for a short or for a long time."""
    builder = TraceBuilder(BLOCK)
    random = np.random.default_rng(3)
    for chat in range(num):
        now = 7.0 * chat
        for turn in range(1, turns):
            builder.add(now, [1000 * chat + block for block in range(4 * turn)], 4 * turn * BLOCK, 1, session=chat)
            now += float(random.choice([20.0, 100.0]))
    return builder.build("chats")


def replayed(trace: Trace, kind: HintKind, *, wrong: float = 0.0, kept: float = 0.25) -> tuple[int, Hinting]:
    """Blocks that are hit in a small tier under the default policy."""
    setup = Setup(TierSetup(200, "default"), max_kept_fraction=kept)
    hinting = Hinting(trace, Agents(trace), kind, wrong=wrong)
    replay = Replay(trace, setup, Machine(), observer=hinting)
    if kind != "off":
        hinting.attach(replay.planner, Machine(), setup)
    done = replay.run()
    assert {"pins"} >= {problem.split()[1] for problem in replay.check()}
    return int(done.hit_blocks.sum()), hinting


def test_agents_of_a_session_are_told_apart_by_what_their_prompts_share() -> None:
    """Who goes on with at least half of a prompt is its agent; the time to an agent's next request is known, the last has none."""
    agents = Agents(two_agents())
    assert ["5.0", "5.1", "5.0", "", "5.1"] == agents.names
    assert [2.0, 6.0, None, None, None] == agents.next_s


@pytest.mark.parametrize(("shared", "is_same"), [(2, False), (3, True)])
def test_an_agent_goes_on_with_half_of_its_prompt(shared: int, is_same: bool) -> None:
    """Of six blocks, three are enough."""
    builder = TraceBuilder(BLOCK)
    builder.add(0.0, [1, 2, 3, 4, 5, 6], 6 * BLOCK, 1, session=0)
    builder.add(1.0, [*range(1, shared + 1), 7, 8], (shared + 2) * BLOCK, 1, session=0)
    names = Agents(builder.build("half")).names
    assert (names[0] == names[1]) == is_same


@pytest.mark.parametrize(("one", "other", "expected"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 6], 1), ([4], [5], 0)])
def test_common_beginning(one: list[int], other: list[int], expected: int) -> None:
    """As many as are equal from the first on."""
    assert expected == num_common(one, other)


@pytest.mark.parametrize("kind", ["next_use", "tool_call"])
@pytest.mark.parametrize("kept", [0.0, 0.25])
def test_to_know_the_next_use_raises_hits(kind: HintKind, kept: float) -> None:
    """With the word of the agents a tenth more is hit than without, with pins or without any."""
    trace = chats()
    hits, hinting = replayed(trace, kind, kept=kept)
    assert hinting.stats.snapshot()["hint.taken"] == 600
    assert hits > 1.1 * replayed(trace, "off")[0]


def test_wrong_hints_cost_hits_and_not_many() -> None:
    """All wrong: less is hit than with true ones, and nearly as much as with none; each replay gives the same hints."""
    trace = chats()
    wrong = replayed(trace, "next_use", wrong=1.0, kept=0.0)[0]
    assert wrong == replayed(trace, "next_use", wrong=1.0, kept=0.0)[0]
    assert wrong < replayed(trace, "next_use", kept=0.0)[0]
    assert wrong > 0.95 * replayed(trace, "off")[0]


def test_records_say_which_hints_were_given() -> None:
    """One record a run, in their order."""
    trace = two_agents()
    runs = [Run(Setup(TierSetup(4)), 0.5, "off"), Run(Setup(TierSetup(4)), 0.5, "next_use", 0.5)]
    records = list(replay_all(Task(trace, Machine(), agents=Agents(trace)), runs))
    assert [("off", 0.0), ("next_use", 0.5)] == [(record["hints"], record["wrong_hints"]) for record in records]


def test_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown kind, and a trace that does not know sessions."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}\n')
    assert 2 == main(["simulate", str(path), "--hints", "off,often"])
    assert "--hints: 'often' is none; allowed: off, tool_call, next_use" in capsys.readouterr().err
    assert 2 == main(["simulate", str(path), "--hints", "next_use"])
    assert "does not say which requests belong together" in capsys.readouterr().err
