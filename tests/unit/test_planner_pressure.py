"""The planner where both tiers are full all the time: little else happens than blocks coming, going down and coming up again.

The state machines of ``test_planner.py`` try everything that there is; this tries what fleets do most, and so gets further into it.
"""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.control.commands import Command, Demote, Promote
from kvtier.control.host_space import PAGE_BYTES
from kvtier.control.lower import WriteMode
from kvtier.control.operations import HOST_TIER
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


def test_slots_that_a_disk_does_not_let_go_are_no_room_to_come() -> None:
    """Where a tier goes offline with writes under way, stores evict for themselves instead of waiting for the slots those writes read."""
    planner = make_planner(12)
    assert 4 == store(planner, keys_of(1, 4))
    planner.tick(0.0)
    (demote,) = (command for command in planner.take_commands() if isinstance(command, Demote))
    planner.clear([HOST_TIER], None)
    assert 8 == store(planner, keys_of(2, 8))
    assert 4 == planner.draining_blocks(PAGE_BYTES)
    planner.set_online(1, False)
    assert 0 == planner.draining_blocks(PAGE_BYTES)
    assert 4 == store(planner, keys_of(3, 4))
    assert (4, 4) == (planner.match(keys_of(3, 4)).ready_blocks, planner.leftovers()["leases"])
    planner.demoted(demote.job_id, [Outcome.OK] * 4, [], 0.0)
    assert 4 == store(planner, keys_of(4, 4))
    assert 4 == planner.match(keys_of(3, 4)).ready_blocks, "the slots are free again"
    assert [] == planner.check()


def test_blocks_that_a_disk_does_not_let_go_are_not_waited_for() -> None:
    """What was let go and is written to a tier that went offline is not said to leave soon; when the tier is back, it is."""
    planner = make_planner(8)
    store(planner, keys_of(1, 8))
    planner.tick(0.0)
    assert 0 == store(planner, keys_of(2, 8))
    assert planner.draining_blocks(PAGE_BYTES)
    planner.set_online(1, False)
    assert 0 == planner.draining_blocks(PAGE_BYTES)
    planner.set_online(1, True)
    assert planner.draining_blocks(PAGE_BYTES)
