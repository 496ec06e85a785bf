"""The planner where both tiers are full all the time: little else happens than blocks coming, going down and coming up again.

The state machines of ``test_planner.py`` try everything that there is; this tries what fleets do most, and so gets further into it.
"""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.control.commands import Command, Demote, Promote
from kvtier.control.lower import WriteMode
from kvtier.control.planner import Planner
from kvtier.types import BlockKey, Outcome
from tests.unit.test_planner import keys_of, make_planner, store

HOST_BLOCKS = 8


class Step(NamedTuple):
    """Something is done with the first blocks of a prompt, time passes, and some copies that run end."""

    what: str
    prompt: int
    num_blocks: int
    first: int
    seconds: float
    num_ended: int


STEPS = st.builds(
    Step,
    st.sampled_from(["store", "store", "promote", "touch", "tick"]),
    st.integers(0, 4),
    st.integers(1, 8),
    st.sampled_from([0, 0, 1, 3]),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.integers(0, 3),
)


def take(planner: Planner, step: Step, now: float) -> None:
    """What the step says."""
    keys = keys_of(step.prompt, step.num_blocks)
    if step.what == "store" and step.first < step.num_blocks:
        store(planner, keys, first=step.first, now=now)
    elif step.what == "promote":
        promised = planner.promote(keys, now)
        assert promised <= planner.match(keys).hit_blocks
    elif step.what == "touch":
        planner.touch(keys[::-1], now)
    else:
        planner.tick(now)


def end(planner: Planner, command: Command, now: float) -> None:
    """A copy is over."""
    if isinstance(command, Demote):
        planner.demoted(command.job_id, [Outcome.OK] * len(command.blocks), (), now)
    elif isinstance(command, Promote):
        planner.promoted(command.job_id, [Outcome.OK] * len(command.blocks), now)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=20, max_size=80),
    write=st.sampled_from(list(WriteMode)),
    policy=st.sampled_from(["lru", "hazard", "arc"]),
    disk_blocks=st.sampled_from([4, 8, 12]),
)
def test_blocks_go_down_and_come_up(steps: list[Step], write: WriteMode, policy: str, disk_blocks: int) -> None:
    """Whatever leaves to make room: the books are right after each step, every promotion reads what the disk has, and no slot is lost."""
    planner = make_planner(HOST_BLOCKS, extent_blocks=HOST_BLOCKS, disk_blocks=disk_blocks, write=write, policy=policy)
    running: list[Command] = []
    on_disk: set[BlockKey] = set()
    now = 0.0
    for step in steps:
        now += step.seconds
        take(planner, step, now)
        new = planner.take_commands()
        for command in new:
            if isinstance(command, Promote):
                assert {block.key for block in command.blocks} <= on_disk
        running += [command for command in new if isinstance(command, Demote | Promote)]
        ended, running = running[: step.num_ended], running[step.num_ended :]
        for command in ended:
            end(planner, command, now)
            if isinstance(command, Demote):
                on_disk |= {block.key for block in command.blocks}
        assert [] == planner.check()
    for command in running:
        end(planner, command, now)
    while more := [command for command in planner.take_commands() if isinstance(command, Demote | Promote)]:
        for command in more:
            end(planner, command, now)
    assert [] == planner.check()
