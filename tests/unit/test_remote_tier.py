"""The remote tier over a store in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ClosedError, RemoteError, TierError, TierFormatError
from kvtier.testing.remote import PREFIX, MemoryClient, MemoryStore, RemoteMachine, wait_for_probe
from kvtier.testing.starts import nothing_left, refused_threads
from kvtier.testing.tiers import NAMESPACE, TierContract, assert_right_bytes, load, load_job, meta_of, store, store_job, wait_for
from kvtier.tiers.base import SharedTier, Tier
from kvtier.tiers.health import FIRST_BACK_OFF_S, MAX_CONSECUTIVE_FAILURES, Health
from kvtier.tiers.record import pack_text
from kvtier.tiers.remote import Deadline, RemoteSettings, RemoteTier
from kvtier.tiers.remote.deadline import retry_pauses
from kvtier.tiers.remote.records import FORMAT_TITLE, key_of, name_of
from kvtier.tiers.remote.tasks import batches, probe_chunks
from kvtier.types import BlockKey, JobKind, Outcome, ProbeJob

TestRemoteMachine = RemoteMachine.TestCase


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def open_tier(client: MemoryClient, clock: Callable[[], float] = time.monotonic, **options: object) -> RemoteTier:
    """A tier without retries."""
    settings = RemoteSettings(**{"prefix": PREFIX, "retries": 0, "threads": 2, **options})  # type: ignore[arg-type]
    return RemoteTier(client, name="remote", settings=settings, clock=clock)


@pytest.fixture
def client() -> Iterator[MemoryClient]:
    client = MemoryClient()
    yield client
    client.gate.set()


class TestContract(TierContract):
    """The contract of every tier."""

    def make_tier(self, directory: Path) -> Tier:
        return open_tier(MemoryClient())


def test_it_is_a_shared_tier(client: MemoryClient) -> None:
    """The protocol that connectors ask for."""
    tier = open_tier(client)
    assert isinstance(tier, SharedTier)
    tier.close()


def test_two_engines_share(client: MemoryClient) -> None:
    """What one tier stored the other finds by probing and loads, and the other namespace does not see it."""
    first, second = open_tier(client), open_tier(MemoryClient(client.store))
    metas = [meta_of(number, 500) for number in range(3)]
    store(first, metas)
    keys = tuple(meta.key for meta in [*metas, meta_of(9, 500)])
    assert 0 == second.lookup(keys)
    assert (500, 500, 500) == wait_for_probe(second, ProbeJob(1, NAMESPACE, keys)).num_bytes
    assert 3 == second.lookup(keys)
    assert metas == list(second.entries())
    assert () == wait_for_probe(second, ProbeJob(2, bytes(16), keys)).num_bytes
    assert (Outcome.OK,) * 3 == load(second, metas)
    for tier in (first, second):
        tier.close()


def test_loads_of_one_block_are_one_read(client: MemoryClient) -> None:
    """Single flight: loads that meet share a read, and each gets the bytes."""
    tier = open_tier(client)
    metas = [meta_of(number, 500) for number in range(2)]
    store(tier, metas)
    client.gate.clear()
    jobs = [load_job(job_id, metas) for job_id in range(4)]
    for job in jobs:
        tier.submit(job)
    client.gate.set()
    results = {result.job_id: result for result in wait_for(tier, 4)}
    for job in jobs:
        assert (Outcome.OK,) * 2 == results[job.job_id].outcomes
        assert_right_bytes(job, results[job.job_id])
    assert 2 == sum(len(names) for what, names in client.calls if what == "get") - 1  # one more: the format at start
    assert 6 == tier.take_events()["shared_loads"]
    tier.close()


@pytest.mark.parametrize("kind", list(JobKind))
def test_released_buffers_are_failures(client: MemoryClient, kind: JobKind) -> None:
    """A buffer that its owner has released is FAILED like any other bad one; the job's other blocks and ``close`` do not suffer."""
    tier = open_tier(client)
    metas = [meta_of(number, 500) for number in range(3)]
    if kind is JobKind.LOAD:
        store(tier, metas)
    job = store_job(3, metas) if kind is JobKind.STORE else load_job(3, metas)
    job.blocks[1].buffer.release()
    tier.submit(job)
    (result,) = wait_for(tier)
    assert (Outcome.OK, Outcome.FAILED, Outcome.OK) == result.outcomes
    assert "released" in (result.error or "")
    tier.close()


def test_a_buffer_released_while_it_waits_for_anothers_read(client: MemoryClient) -> None:
    """The load that it belongs to is FAILED; the read that it waited for is not."""
    tier = open_tier(client)
    metas = [meta_of(1, 500)]
    store(tier, metas)
    client.gate.clear()
    jobs = [load_job(job_id, metas) for job_id in range(3)]
    for job in jobs:
        tier.submit(job)
    jobs[1].blocks[0].buffer.release()
    client.gate.set()
    results = {result.job_id: result.outcomes for result in wait_for(tier, 3)}
    assert {0: (Outcome.OK,), 1: (Outcome.FAILED,), 2: (Outcome.OK,)} == results
    tier.close()


def test_a_block_on_its_way_out_is_readable(client: MemoryClient) -> None:
    """A load behind a store ends before the store does; the store's memory is given back only afterwards."""
    tier = open_tier(client)
    metas = [meta_of(1, 500)]
    client.gate.clear()
    tier.submit(store_job(1, metas))
    assert (Outcome.OK,) == load(tier, metas, job_id=2)
    client.gate.set()
    (result,) = wait_for(tier)
    assert (1, (Outcome.OK,)) == (result.job_id, result.outcomes)
    tier.close()


def test_a_bad_value_is_deleted_and_can_be_stored_again(client: MemoryClient) -> None:
    """A flipped byte is CORRUPT and counted; the value leaves the store, so that the right one can come."""
    tier = open_tier(client)
    metas = [meta_of(1, 500)]
    store(tier, metas)
    name = name_of(PREFIX, NAMESPACE, metas[0].key)
    value = client.store.values[name]
    for position in (0, 40, 127, 128, len(value) - 1):
        client.store.values[name] = value[:position] + bytes([value[position] ^ 1]) + value[position + 1 :]
        assert 1 == len(tier.check())
        assert (Outcome.CORRUPT,) == load(tier, metas)
        assert (Outcome.MISS,) == load(tier, metas)
        assert 1 == tier.take_events()["damaged_records"]
        assert (Outcome.OK,) == store(tier, metas)
    assert value == client.store.values[name]
    tier.close()


def test_many_removals_are_divided(client: MemoryClient) -> None:
    """Each call has its own deadline; one that fails costs its own blocks, and what has come meanwhile is not kept waiting."""
    tier = open_tier(client, threads=1)
    metas = [meta_of(number, 10) for number in range(2500)]
    for first in range(0, len(metas), 500):
        assert {Outcome.OK} == set(store(tier, metas[first : first + 500], job_id=first))
    client.calls.clear()
    client.gate.clear()
    tier.remove([meta.key for meta in metas])
    while not client.calls:
        time.sleep(0.001)
    client.faults.extend([None, None, "cut"])
    tier.submit(load_job(9999, [meta_of(9999, 10)]))
    client.gate.set()
    tier.close()
    assert [("delete", 1000), ("get", 1), ("delete", 1000), ("delete", 500)] == [(what, len(names)) for what, names in client.calls]
    assert 1000 == tier.take_events()["failed_removals"]
    assert set(client.calls[2][1]) == {name for name in client.store.values if not name.endswith("format")}


def test_closing_gives_up_removals(client: MemoryClient) -> None:
    """Those that were not begun fail as well, and are counted."""
    tier = open_tier(client, threads=1, close_timeout_s=0.2)
    metas = [meta_of(number, 10) for number in range(2500)]
    for first in range(0, len(metas), 500):
        store(tier, metas[first : first + 500], job_id=first)
    client.gate.clear()
    tier.remove([meta.key for meta in metas])
    began = time.monotonic()
    tier.close()
    assert time.monotonic() - began < 5
    assert 2500 == tier.take_events()["failed_removals"]


@pytest.mark.parametrize(("position", "value"), [(8, 2), (9, 99)], ids=["version", "codec"])
def test_what_another_version_wrote_stays(client: MemoryClient, position: int, value: int) -> None:
    """Its header is whole, so somebody can read it: a miss, and nothing is deleted."""
    tier = open_tier(client)
    metas = [meta_of(1, 500)]
    store(tier, metas)
    name = name_of(PREFIX, NAMESPACE, metas[0].key)
    content = bytearray(client.store.values[name])
    content[position] = value
    content[120:128] = xxhash.xxh3_64_digest(content[:120])
    client.store.values[name] = bytes(content)
    assert (Outcome.MISS,) == load(tier, metas)
    tier.close()
    assert bytes(content) == client.store.values[name]
    events = tier.take_events()
    assert (1, 0) == (events["other_version_records"], events.get("damaged_records", 0))


def test_a_foreign_value_is_corrupt(client: MemoryClient) -> None:
    """A valid record of another block under this name is not handed out."""
    tier = open_tier(client)
    metas = [meta_of(1, 500), meta_of(2, 500)]
    store(tier, metas)
    names = [name_of(PREFIX, NAMESPACE, meta.key) for meta in metas]
    client.store.values[names[0]] = client.store.values[names[1]]
    assert (Outcome.CORRUPT, Outcome.OK) == load(tier, metas)
    assert 1 == tier.take_events()["foreign_records"]
    tier.close()


def test_a_broken_call_goes_on_where_it_broke(client: MemoryClient) -> None:
    """A retry asks only for what did not come."""
    tier = open_tier(client, retries=1, threads=1)
    metas = [meta_of(number, 500) for number in range(3)]
    store(tier, metas)
    client.calls.clear()
    client.faults.extend([None, "cut"])
    assert (Outcome.OK,) * 3 == load(tier, metas)
    assert [3, 2] == [len(names) for _, names in client.calls]
    events = tier.take_events()
    assert (1, 1) == (events["timeouts"], events["retries"])
    tier.close()


def test_down_and_back(client: MemoryClient) -> None:
    """After a few failures nothing is asked any more; a trial after the back-off brings the hits back."""
    clock = Clock()
    tier = open_tier(client, clock)
    metas = [meta_of(1, 500)]
    store(tier, metas)
    client.is_down = True
    for _ in range(MAX_CONSECUTIVE_FAILURES):
        assert tier.online
        assert (Outcome.FAILED,) == load(tier, metas)
    assert not tier.online
    client.calls.clear()
    assert 0 == tier.lookup([metas[0].key])
    assert (Outcome.FAILED,) == load(tier, metas)
    assert (Outcome.FAILED,) == store(tier, [meta_of(2, 500)])
    assert not wait_for_probe(tier, ProbeJob(1, NAMESPACE, (metas[0].key,))).is_complete
    assert [] == client.calls
    clock.now += FIRST_BACK_OFF_S
    client.is_down = False
    wait_until(lambda: tier.online)
    assert (Outcome.OK,) == load(tier, metas)
    assert 1 == tier.offline_count
    tier.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """Half a minute at most."""
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen")


def test_a_full_store_is_still_read(client: MemoryClient) -> None:
    """Refused stores are REJECTED; after a few, others are refused without asking, and loads go on."""
    clock = Clock()
    tier = open_tier(client, clock)
    metas = [meta_of(number, 500) for number in range(9)]
    store(tier, metas[:1])
    client.faults.extend(["full"] * MAX_CONSECUTIVE_FAILURES)
    for number in range(MAX_CONSECUTIVE_FAILURES):
        assert (Outcome.REJECTED,) == store(tier, [metas[1 + number]])
    client.calls.clear()
    assert (Outcome.REJECTED,) == store(tier, [metas[5]])
    assert [] == client.calls
    assert tier.online
    assert (Outcome.OK,) == load(tier, metas[:1])
    assert MAX_CONSECUTIVE_FAILURES == tier.take_events()["refusals"]
    clock.now += FIRST_BACK_OFF_S
    assert (Outcome.OK,) == store(tier, [metas[5]])
    tier.close()


def test_bytes_in_flight_are_bounded(client: MemoryClient) -> None:
    """Stores beyond the bound are REJECTED at once; one block is always let through."""
    tier = open_tier(client, max_in_flight_bytes=1000)
    client.gate.clear()
    tier.submit(store_job(1, [meta_of(1, 600), meta_of(2, 600)]))
    tier.submit(store_job(2, [meta_of(3, 600)]))
    client.gate.set()
    outcomes = {result.job_id: result.outcomes for result in wait_for(tier, 2)}
    assert {1: (Outcome.OK, Outcome.REJECTED), 2: (Outcome.REJECTED,)} == outcomes
    assert (Outcome.OK,) == store(tier, [meta_of(4, 5000)])
    tier.close()


def test_close_ends_what_hangs(client: MemoryClient) -> None:
    """A store that never answers cannot keep ``close`` waiting: the job fails, and its result can be polled."""
    tier = open_tier(client, close_timeout_s=0.05)
    client.gate.clear()
    tier.submit(store_job(1, [meta_of(number, 500) for number in range(20)]))
    tier.submit(load_job(2, [meta_of(30, 500)]))
    tier.close()
    outcomes = {result.job_id: set(result.outcomes) for result in tier.poll()}
    assert {1: {Outcome.FAILED}, 2: {Outcome.FAILED}} == outcomes
    assert client.is_closed
    with pytest.raises(ClosedError):
        tier.probe(ProbeJob(1, NAMESPACE, ()))


def test_known_keys_are_bounded(client: MemoryClient) -> None:
    """The oldest key is forgotten, and the owner hears of it."""
    tier = open_tier(client, max_known_blocks=2, threads=1)
    metas = [meta_of(number, 500) for number in range(3)]
    store(tier, metas[:2])
    tier.submit(store_job(1, metas[2:]))
    (result,) = wait_for(tier)
    assert ((Outcome.OK,), (metas[0].key,)) == (result.outcomes, result.dropped)
    assert metas[1:] == list(tier.entries())
    assert (Outcome.OK,) == load(tier, metas[:1])
    tier.close()


def test_a_store_that_does_not_answer_at_start(client: MemoryClient) -> None:
    """By setting: an error, or a tier that comes in later."""
    client.is_down = True
    with pytest.raises(RemoteError, match="memory: down"):
        open_tier(client)
    assert client.is_closed
    clock = Clock()
    tier = open_tier(client, clock, must_answer=False)
    assert not tier.online
    client.is_down = False
    clock.now += FIRST_BACK_OFF_S
    wait_until(lambda: tier.online)
    assert (Outcome.OK,) == store(tier, [meta_of(1, 500)])
    tier.close()


def test_no_thread_to_be_had(client: MemoryClient) -> None:
    """A limit on processes is a TierError that says so; the client is closed, and no thread is left."""
    problem = r"the tier at memory cannot be opened: can't start new thread \(kvtier-remote-1\): raise the limit"
    with nothing_left(), refused_threads("kvtier-remote-1"), pytest.raises(TierError, match=problem):
        open_tier(client)
    assert client.is_closed


def test_another_format_version_is_refused() -> None:
    """Both versions are named, and nothing is changed."""
    memory = MemoryStore()
    memory.values[f"{PREFIX}format"] = pack_text(FORMAT_TITLE, {"format": "9"})
    before = dict(memory.values)
    with pytest.raises(TierFormatError, match=r"format version 9.* version 1"):
        open_tier(MemoryClient(memory))
    assert before == memory.values
    memory.values[f"{PREFIX}format"] = b"something else"
    with pytest.raises(TierFormatError, match="not kvtier's"):
        open_tier(MemoryClient(memory))


def test_a_note_of_the_version_that_is_far_too_long_is_not_read() -> None:
    """Whatever length the store names, no memory is taken for it."""

    class Boasting(MemoryClient):
        def sizes(self, names: Sequence[str], deadline: Deadline) -> list[int | None]:
            return [1 << 62 for _ in names]

    with pytest.raises(TierFormatError, match="not kvtier's"):
        open_tier(Boasting())


def test_a_trial_is_given_to_one(client: MemoryClient) -> None:
    """With trials the breaker opens only after one that worked; each back-off gives one trial, twice as late as the one before."""
    clock = Clock()
    health = Health("the test", clock, by_trial=True)
    health.trial_failed(OSError())
    pauses = []
    for _ in range(8):
        start = clock.now
        while not health.take_trial():
            clock.now += 0.5
        assert not health.take_trial()
        assert not health.is_online
        pauses.append(clock.now - start)
        health.trial_failed(OSError())
    assert [1, 2, 4, 8, 16, 32, 60, 60] == pauses
    health.succeeded()
    assert health.is_online


@given(st.lists(st.integers(1, 5 << 20), max_size=30), st.integers(1, 16 << 20), st.integers(1, 8))
def test_batches_are_the_items(sizes: list[int], batch_bytes: int, num_threads: int) -> None:
    """Every item once, in order; no group is empty; one of several items keeps to the bound."""
    items = list(range(len(sizes)))
    groups = list(batches(items, sizes, batch_bytes, num_threads))
    assert items == [item for group in groups for item in group]
    assert all(groups)
    assert all(len(group) == 1 or sum(sizes[item] for item in group) <= batch_bytes for group in groups)


@given(st.integers(0, 5000))
def test_probe_chunks_are_the_keys(count: int) -> None:
    """Every key once, in order."""
    keys = [BlockKey(index.to_bytes(16, "big")) for index in range(count)]
    assert keys == [key for chunk in probe_chunks(keys) for key in chunk]


@given(st.integers(0, 10), st.randoms())
def test_pauses_double_at_most(count: int, random: object) -> None:
    """One pause for each retry, under a bound that doubles."""
    pauses = list(retry_pauses(count, 0.1, random.uniform))  # type: ignore[attr-defined]
    assert count == len(pauses)
    assert all(0 <= pause <= 0.1 * 2**index for index, pause in enumerate(pauses))


def test_deadline() -> None:
    """It counts down to zero and stays there."""
    clock = Clock()
    deadline = Deadline(2.0, clock)
    clock.now += 1.5
    assert (0.5, False) == (deadline.remaining_s(), deadline.is_over)
    clock.now += 5
    assert (0.0, True) == (deadline.remaining_s(), deadline.is_over)


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_names_say_what_they_name(namespace: bytes, key: bytes) -> None:
    """Name -> namespace and key, and other names say nothing."""
    name = name_of("kv/", namespace, BlockKey(key))
    assert (namespace, key) == key_of("kv/", name)
    assert key_of("kv/", name[:-2]) is None
    assert key_of("kx/", name) is None
    assert key_of("kv/", "kv/format") is None
