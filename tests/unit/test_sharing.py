"""What one engine stored, others find: the planner's probes, and engines over one store."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import Controller
from kvtier.connectors.requests import DefaultSettings
from kvtier.control.absent import ABSENT_S, AbsentKeys
from kvtier.control.commands import Probe
from kvtier.control.host_space import PAGE_BYTES
from kvtier.control.probing import MAX_PROBES
from kvtier.hashing import Namespace, request_root
from kvtier.testing.fake_requests import FakeRequest
from kvtier.testing.fake_system import FakeSystem, FakeSystemOptions
from kvtier.testing.planner_machine import chain
from kvtier.testing.remote import PREFIX, MemoryClient, MemoryStore
from kvtier.testing.sharing_machine import SHARED, SharingPlannerMachine, TwoEnginesMachine
from kvtier.tiers.remote import RemoteSettings, RemoteTier
from kvtier.tiers.remote.records import key_of
from kvtier.types import BlockKey, BlockMeta, Outcome


class FewKnownMachine(SharingPlannerMachine):
    """The engine may know of hardly any block in the store."""

    known_blocks = 5


TestSharing = SharingPlannerMachine.TestCase
TestFewKnown = FewKnownMachine.TestCase
TestTwoEngines = TwoEnginesMachine.TestCase
TestTwoEngines.settings = settings(stateful_step_count=12, max_examples=25, deadline=None)

BLOCK_TOKENS = 4
PROMPT = list(range(1, 42))
NUM_BLOCKS = 10
NAMESPACE = Namespace(model="sharing")


class Fleet:
    """Engines over one store."""

    def __init__(self, directory: Path) -> None:
        self.store = MemoryStore()
        self.directory = directory
        self.clients: list[MemoryClient] = []
        self.systems: list[FakeSystem] = []

    def add(self, **more: object) -> FakeSystem:
        """One more engine. ``more``: connector settings."""
        directory = self.directory / str(len(self.systems))
        directory.mkdir()
        client = MemoryClient(self.store)
        tier = RemoteTier(client, name="redis", settings=RemoteSettings(prefix=PREFIX, threads=2, retries=0))
        system = FakeSystem(
            directory,
            NAMESPACE,
            FakeSystemOptions(host_blocks=40, num_engine_blocks=60, settings=DefaultSettings(**more)),  # type: ignore[arg-type]
            tiers=[tier],
        )
        self.clients.append(client)
        self.systems.append(system)
        return system

    def run(self, system: FakeSystem, prompt: list[int] = PROMPT, name: str = "r") -> FakeRequest:
        """A prompt, and all that it leaves to be written."""
        request = system.engine.submit(name, list(prompt), 2)
        system.settle()
        assert request.expected_output() == request.output
        return request


@contextmanager
def opened(directory: Path) -> Iterator[Fleet]:
    fleet = Fleet(directory)
    try:
        yield fleet
    finally:
        for client in fleet.clients:
            client.gate.set()
        for system in fleet.systems:
            system.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with opened(tmp_path) as fleet:
        yield fleet


def asked(client: MemoryClient) -> int:
    """How often the store was asked what it holds, the greeting aside."""
    return sum(1 for what, names in client.calls if what == "sizes" and not names[0].endswith("format"))


def test_the_second_engine_loads_what_the_first_computed(fleet: Fleet) -> None:
    """All full blocks, by one question; a prompt that lies in host memory then asks nothing."""
    first, second = fleet.add(), fleet.add()
    assert 0 == fleet.run(first).num_loaded_tokens
    request = fleet.run(second)
    assert NUM_BLOCKS * BLOCK_TOKENS == request.num_loaded_tokens
    assert 1 == asked(fleet.clients[1])
    assert (1, NUM_BLOCKS) == (second.cache.stats["redis.probes"], second.cache.stats["redis.probed_blocks"])
    assert NUM_BLOCKS * BLOCK_TOKENS == fleet.run(second, name="again").num_loaded_tokens
    assert 1 == asked(fleet.clients[1])


def test_requests_that_wait_for_the_same_blocks_ask_once(fleet: Fleet) -> None:
    """Three requests with one prompt: one question, one read of each block."""
    first, second = fleet.add(), fleet.add(async_load=True, max_pinned_fraction=1.0)
    fleet.run(first)
    requests = [second.engine.submit(f"r{number}", list(PROMPT), 2) for number in range(3)]
    second.settle()
    assert {NUM_BLOCKS * BLOCK_TOKENS} == {request.num_loaded_tokens for request in requests}
    assert 1 == asked(fleet.clients[1])
    assert NUM_BLOCKS == sum(len(names) for what, names in fleet.clients[1].calls if what == "get" and "format" not in names[0])


def test_an_answer_that_does_not_come_is_not_waited_for(fleet: Fleet) -> None:
    """After ``promote_wait`` the prompt is computed; the answer is used by the next request."""
    first, second = fleet.add(), fleet.add(promote_wait_s=0.1)
    fleet.run(first)
    fleet.clients[1].gate.clear()
    start = time.monotonic()
    request = second.engine.submit("late", list(PROMPT), 1)
    second.engine.run(500)
    assert time.monotonic() - start < 5.0
    assert 0 == request.num_loaded_tokens
    assert 1 == second.cache.stats["probe.timeouts"]
    fleet.clients[1].gate.set()
    second.settle()
    assert NUM_BLOCKS == second.cache.num_blocks()["redis"]


def test_without_time_to_wait_the_next_request_has_the_answer(fleet: Fleet) -> None:
    """``promote_wait: 0`` delays nobody; what was found meanwhile is not lost."""
    first, second = fleet.add(), fleet.add(promote_wait_s=0.0)
    fleet.run(first)
    assert 0 == fleet.run(second).num_loaded_tokens
    assert NUM_BLOCKS <= second.cache.num_blocks()["redis"]


def test_a_slow_store_is_not_asked(fleet: Fleet) -> None:
    """Where asking and loading were measured to take longer than computing, the tier is skipped, and once in a while asked all the same."""
    first, second = fleet.add(), fleet.add(load_or_recompute="auto")
    fleet.run(first)
    num_bytes = NUM_BLOCKS * second.cache.block_bytes
    for _ in range(5):
        second.cache.estimates.transferred("redis", num_bytes, 0.1)
        second.cache.estimates.probed("redis", 30.0)
        second.cache.estimates.computed(40, 40, 1.0)
    for number in range(1, 16):
        second.engine.submit(f"r{number}", [number + 50, *PROMPT], 1)
        second.settle()
        assert (0, number) == (asked(fleet.clients[1]), second.cache.stats["probe.skipped"])
    second.engine.submit("r16", [80, *PROMPT], 1)
    second.settle()
    assert 1 == asked(fleet.clients[1])


def test_questions_under_way_are_bounded(fleet: Fleet) -> None:
    """More than so many are not asked, and whoever wanted to ask goes on."""
    system = fleet.add()
    fleet.clients[0].gate.clear()
    answers = [system.cache.sharing.probe([BlockKey(number.to_bytes(16, "big"))], 0) for number in range(MAX_PROBES + 3)]
    assert [True] * MAX_PROBES + [False] * 3 == answers
    assert 3 == system.cache.stats["probe.refused"]


def test_a_store_that_is_down_costs_nothing(fleet: Fleet) -> None:
    """While the breaker is open nobody asks; when the store is back, hits are back."""
    first, second = fleet.add(), fleet.add()
    fleet.run(first)
    fleet.clients[1].is_down = True
    for number in range(4):
        fleet.run(second, [60 + number, *PROMPT], f"r{number}")
    assert not second.cache.verbs.online()["redis"]
    num_asked = asked(fleet.clients[1])
    fleet.run(second, [70, *PROMPT], "offline")
    assert num_asked == asked(fleet.clients[1])
    fleet.clients[1].is_down = False
    while not second.cache.verbs.online()["redis"]:
        second.cache.poll(0.01)
    second.cache.poll()  # the planner hears of it
    assert NUM_BLOCKS * BLOCK_TOKENS == fleet.run(second, name="back").num_loaded_tokens


def test_prefetch_asks_too(fleet: Fleet) -> None:
    """``Controller.prefetch`` of a prompt that another engine computed brings it to host memory."""
    first, second = fleet.add(), fleet.add()
    fleet.run(first)
    controller = Controller(second.cache, namespace=NAMESPACE, block_tokens=BLOCK_TOKENS)
    assert NUM_BLOCKS == controller.prefetch(PROMPT, deadline_s=30.0).result(60.0).ready_blocks
    assert 0 == controller.prefetch([5] * 40, deadline_s=30.0).result(60.0).ready_blocks


def test_forgetting_is_not_deleting(fleet: Fleet) -> None:
    """``clear`` and ``evict`` leave a shared store as it is, unless they are told ``everywhere``."""
    first, second = fleet.add(), fleet.add()
    fleet.run(first)
    held = dict(fleet.store.values)
    controller = Controller(first.cache, namespace=NAMESPACE, block_tokens=BLOCK_TOKENS)
    assert NUM_BLOCKS <= controller.evict(PROMPT, tier="all").result().num_blocks
    assert held == fleet.store.values
    assert NUM_BLOCKS * BLOCK_TOKENS == fleet.run(first).num_loaded_tokens
    controller.clear(tier="all").result()
    assert held == fleet.store.values
    assert NUM_BLOCKS * BLOCK_TOKENS == fleet.run(second).num_loaded_tokens
    other = Controller(second.cache, namespace=NAMESPACE, block_tokens=BLOCK_TOKENS)
    assert NUM_BLOCKS <= other.evict(PROMPT, tier="redis", everywhere=True).result().num_blocks
    second.settle()
    wait_until(lambda: len(fleet.store.values) == 1)  # the format


def test_other_namespaces_find_nothing(fleet: Fleet) -> None:
    """Blocks of another model, or of another salt, are not found."""
    first, second = fleet.add(), fleet.add()
    fleet.run(first)
    second.cache._runner._shared_namespace = dataclasses.replace(NAMESPACE, model="other").digest
    assert 0 == fleet.run(second).num_loaded_tokens
    assert request_root(NAMESPACE.digest, [b"salt"]) != request_root(NAMESPACE.digest, [])


def asked_machine() -> tuple[SharingPlannerMachine, list[BlockKey]]:
    """A planner whose question for a prompt that others have stored is under way."""
    machine = SharingPlannerMachine()
    keys = chain(0, 4)
    machine.store |= set(keys)
    assert machine.planner.probe(keys, 0, PAGE_BYTES, 0.0)
    machine.carry_on()
    return machine, keys


def test_an_answer_from_before_a_clear_is_not_used() -> None:
    """What was asked before everything was forgotten does not bring it back; what is asked afterwards does."""
    machine, keys = asked_machine()
    machine.planner.clear({SHARED}, None)
    machine.settle()
    assert 0 == machine.planner.match(keys).hit_blocks
    assert machine.planner.probe(keys, 0, PAGE_BYTES, 0.0)
    machine.carry_on()
    machine.settle()
    assert 4 == machine.planner.match(keys).hit_blocks


def test_a_value_of_another_length_is_no_hit() -> None:
    """Nor is anything behind it."""
    machine, keys = asked_machine()
    (command,) = machine.queue
    assert isinstance(command, Probe)
    machine.planner.probed(command.job_id, [PAGE_BYTES, PAGE_BYTES + 1, PAGE_BYTES, PAGE_BYTES], 0.0)
    assert 1 == machine.planner.match(keys).hit_blocks


@pytest.mark.parametrize("outcome", [Outcome.MISS, Outcome.CORRUPT, Outcome.FAILED])
def test_what_could_not_be_loaded_is_not_asked_for_at_once(outcome: Outcome) -> None:
    """A block that is found and cannot be loaded (another key, say) must not cost every request a load."""
    machine, keys = asked_machine()
    machine.settle()
    machine.planner.promote(keys, 0.0)
    machine.carry_on()
    (command,) = machine.queue
    machine.do(command, lambda count: [outcome] * count)
    assert 0 == machine.planner.match(keys).hit_blocks
    assert not machine.planner.probe(keys, 0, PAGE_BYTES, 0.0)
    assert machine.planner.probe(keys, 0, PAGE_BYTES, ABSENT_S)


def test_several_shared_tiers_give_what_they_have(tmp_path: Path) -> None:
    """A prompt whose beginning only one store holds and whose end only the other one does is loaded from both."""
    stores = [MemoryStore(), MemoryStore()]

    def system(number: int) -> FakeSystem:
        (tmp_path / str(number)).mkdir()
        settings = RemoteSettings(prefix=PREFIX, threads=2, retries=0)
        tiers = [
            RemoteTier(MemoryClient(store), name=name, settings=settings) for name, store in zip(("redis", "object"), stores, strict=True)
        ]
        options = FakeSystemOptions(host_blocks=40, num_engine_blocks=60)
        return FakeSystem(tmp_path / str(number), NAMESPACE, options, tiers=tiers)

    first, second = system(0), system(1)
    try:
        first.engine.submit("first", list(PROMPT), 2)
        first.settle()
        half = first.half
        half.add_request("keys", PROMPT, num_prompt_tokens=len(PROMPT))
        keys = half._requests["keys"].keys(NUM_BLOCKS, BLOCK_TOKENS)
        half.request_finished("keys")
        for store, gone in zip(stores, (keys[6:], keys[:4]), strict=True):
            for name in list(store.values):
                if (found := key_of(PREFIX, name)) and found[1] in gone:
                    del store.values[name]
        request = second.engine.submit("second", list(PROMPT), 2)
        second.settle()
        assert request.expected_output() == request.output
        assert NUM_BLOCKS * BLOCK_TOKENS == request.num_loaded_tokens
        assert (6, 4) == (second.cache.stats["redis.loaded_blocks"], second.cache.stats["object.loaded_blocks"])
    finally:
        first.close()
        second.close()


def test_blocks_of_a_tenant_among_blocks_of_nobody() -> None:
    """What a restarted disk holds is nobody's; a probe for a tenant finds the same blocks and others: the books are right."""
    machine = SharingPlannerMachine()
    keys = chain(0, 4)
    for position in (1, 2):
        machine.planner.recover(1, [BlockMeta(keys[position], keys[position - 1], PAGE_BYTES)], 0.0)
    machine.store |= set(keys)
    assert machine.planner.probe(keys, 0, PAGE_BYTES, 0.0, "acme")
    machine.settle()
    assert 4 == machine.planner.match(keys).hit_blocks
    assert {"": 2 * PAGE_BYTES, "acme": 2 * PAGE_BYTES} == machine.planner.bytes_by_tenant()["redis"]
    assert [] == machine.planner.check()


def wait_until(condition: Callable[[], object]) -> None:
    """Half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.floats(0, 3)), max_size=60))
def test_absent_keys(steps: list[tuple[int, bool, float]]) -> None:
    """Against a dict: a key counts for its time, unless it was found meanwhile or four others came after it."""
    absent = AbsentKeys(max_keys=4)
    added: dict[BlockKey, float] = {}
    now = 0.0
    for number, is_added, seconds in steps:
        now += seconds
        key = BlockKey(bytes([number]) * 16)
        if is_added:
            absent.add(key, now)
            added.pop(key, None)
            added[key] = now
        expected = key in list(added)[-4:] and now < added[key] + ABSENT_S
        assert expected == absent.holds(key, now)
        if key in added and now >= added[key] + ABSENT_S:
            del added[key]  # being asked it is found out, and makes room
        assert len(absent) <= 4
