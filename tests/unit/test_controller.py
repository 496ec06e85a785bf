"""The control API over a real engine with host memory and a disk: each verb's effect, threads, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import kvtier
from kvtier.controller import Controller
from kvtier.errors import ClosedError, ControlError, JobCancelledError, JobTimeoutError, QuotaError
from kvtier.hashing import KeyChain, Namespace, request_root, salt_extra
from kvtier.job import JobState
from kvtier.types import BlockKey
from tests.unit.test_engine import NAMESPACE, Cache, cache, keys_of

BLOCK_TOKENS = 4
HOST_BLOCKS = 16


@contextmanager
def controlled(directory: Path, *, name: str = "", **disk: object) -> Iterator[tuple[Cache, Controller]]:
    """A cache of 16 blocks over a disk, and its controller."""
    with cache(directory, HOST_BLOCKS, **disk) as held:  # type: ignore[arg-type]
        yield held, Controller(held.engine, namespace=NAMESPACE, block_tokens=BLOCK_TOKENS, name=name)


def ready(held: Cache, prompt: int, num_blocks: int = 8) -> int:
    return held.engine.match(keys_of(prompt, num_blocks)).ready_blocks


def fill(held: Cache, prompts: Sequence[int]) -> None:
    """Stores prompts of four blocks, each written down before the next comes."""
    for prompt in prompts:
        held.store(keys_of(prompt, 4))
        assert held.engine.drain(10.0)


def test_lookup_says_which_tier_holds_how_much(tmp_path: Path) -> None:
    """By keys and by tokens; what only the disk has is a hit that is not in host memory."""
    with controlled(tmp_path) as (held, controller):
        fill(held, range(6))  # the first two have left host memory
        found = controller.lookup(keys=keys_of(0, 5)).result()
        assert (5, 4, 16) == (found.num_blocks, found.hit_blocks, found.hit_tokens)
        assert {"host": 0, "disk": 4} == {name: share.leading_blocks for name, share in found.tiers.items()}
        assert {"host": 4, "disk": 4} == {n: s.num_blocks for n, s in controller.lookup(keys=keys_of(5, 4)).result().tiers.items()}
        assert 0 == controller.lookup([1, 2, 3, 4, 5]).result().hit_blocks


def test_tokens_name_the_same_blocks_as_keys(tmp_path: Path) -> None:
    """Token ids with a salt are the keys that a request with that salt has; a block that is not full does not count."""
    tokens = list(range(11))
    keys = KeyChain(request_root(NAMESPACE.digest, [salt_extra("tenant")]), BLOCK_TOKENS).update(tokens, len(tokens))
    with controlled(tmp_path) as (held, controller):
        held.store(keys)
        assert (2, 2) == (len(keys), controller.lookup(tokens, salt="tenant").result().hit_blocks)
        assert 0 == controller.lookup(tokens).result().hit_blocks


def test_a_pinned_prefix_outlives_pressure(tmp_path: Path) -> None:
    """Everything else leaves; after unpin it leaves as well."""
    with controlled(tmp_path) as (held, controller):
        fill(held, [1])
        pinned = controller.pin(keys=keys_of(1, 4)).result()
        assert (4, 16) == (pinned.num_blocks, pinned.num_tokens)
        fill(held, range(2, 10))
        assert [4, 0, 4] == [ready(held, prompt) for prompt in (1, 2, 9)]
        controller.unpin(pinned).result()
        controller.unpin(pinned).result()
        fill(held, range(10, 18))
        assert 0 == ready(held, 1)


def test_pins_beyond_their_share_are_refused(tmp_path: Path) -> None:
    """A quarter of host memory is theirs. What ends gives its part back."""
    with controlled(tmp_path) as (held, controller):
        fill(held, [1, 2])
        first = controller.pin(keys=keys_of(1, 4)).result()
        with pytest.raises(QuotaError, match=r"pin of 4 blocks: 4 are pinned already; allowed: 4 in all \(control\.max_pinned_fraction\)"):
            controller.pin(keys=keys_of(2, 4)).result()
        controller.unpin(first).result()
        controller.unpin(controller.pin(keys=keys_of(2, 4)).result()).result()


def test_a_prefetch_brings_blocks_from_disk(tmp_path: Path) -> None:
    """They hit in host memory afterwards; what nobody holds is not waited for."""
    with controlled(tmp_path) as (held, controller):
        fill(held, range(6))
        assert 0 == ready(held, 0)
        job = controller.prefetch(keys=keys_of(0, 8), deadline_s=10.0)
        done = job.result(10.0)
        assert (4, 0) == (done.ready_blocks, done.missing_blocks)
        assert (4, JobState.DONE) == (ready(held, 0), job.state)


def test_a_prefetch_ends_at_its_deadline_and_where_there_is_no_room(tmp_path: Path) -> None:
    """It says what is missing; nothing raises and nothing hangs."""
    with controlled(tmp_path) as (held, controller):
        fill(held, range(6))
        late = controller.prefetch(keys=keys_of(0, 4), deadline_s=1e-9).result(10.0)
        assert (0, 4) == (late.ready_blocks, late.missing_blocks)
        pins = [held.engine.pin(keys_of(prompt, 4)) for prompt in range(2, 6)]
        assert 4 == controller.prefetch(keys=keys_of(0, 4)).result(10.0).missing_blocks
        for pin in pins:
            held.engine.unpin(pin)


@pytest.mark.parametrize("write", ["through", "on_evict"])
def test_move_down_and_up(tmp_path: Path, write: str) -> None:
    """What moves is copied first, whatever the write mode, and then only in the other tier; its bytes come back."""
    with controlled(tmp_path, write=write) as (held, controller):
        held.store(keys_of(1, 4))
        down = controller.move(keys=keys_of(1, 4), from_tier="host", to_tier="disk").result(10.0)
        assert (4, 4) == (down.num_blocks, down.copied_blocks)
        shares = controller.lookup(keys=keys_of(1, 4)).result().tiers
        assert {"host": 0, "disk": 4} == {name: share.num_blocks for name, share in shares.items()}
        up = controller.move(keys=keys_of(1, 4), from_tier="disk", to_tier="host").result(10.0)
        assert 4 == up.num_blocks
        shares = controller.lookup(keys=keys_of(1, 4)).result().tiers
        assert {"host": 4, "disk": 0} == {name: share.num_blocks for name, share in shares.items()}
        assert 4 == held.load(keys_of(1, 4))
        assert 8 == controller.stats().result().counters["control.moved_blocks"]


def test_evict_names_its_tier_and_keeps_what_others_need(tmp_path: Path) -> None:
    """Two prompts share two blocks: dropping one of them keeps those."""
    with controlled(tmp_path) as (held, controller):
        first, other = keys_of(1, 4), keys_of(1, 2) + keys_of(7, 4)[2:]
        held.store(first)
        held.store(other)
        assert held.engine.drain(10.0)
        assert 2 == controller.evict(keys=first, tier="host").result().num_blocks
        assert [2, 4] == [held.engine.match(keys).ready_blocks for keys in (first, other)]
        assert 4 == held.engine.match(first).hit_blocks
        assert 2 == controller.evict(keys=first, tier="all").result().num_blocks
        assert [2, 4] == [held.engine.match(keys).hit_blocks for keys in (first, other)]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ({"tenant": "a"}, [0, 4]),
        ({"tier": "host"}, [4, 4]),
        ({"tier": "all"}, [0, 0]),
        ({"tenant": "a", "tier": "disk"}, [4, 4]),
        ({"namespace": NAMESPACE}, [0, 0]),
    ],
)
def test_clear_forgets_its_scope_and_nothing_else(tmp_path: Path, scope: dict[str, str], expected: list[int]) -> None:
    """A tenant, a tier, both, or everything."""
    with controlled(tmp_path) as (held, controller):
        for prompt, tenant in enumerate("ab"):
            plan = held.engine.begin_store(keys_of(prompt, 4), 0, tenant)
            held.engine.commit_store(plan.job_id)
        assert held.engine.drain(10.0)
        cleared = controller.clear(**scope).result()  # type: ignore[arg-type]
        assert expected == [held.engine.match(keys_of(prompt, 4)).hit_blocks for prompt in range(2)]
        shares = [controller.lookup(keys=keys_of(prompt, 4)).result().tiers for prompt in range(2)]
        if "tier" in scope and scope["tier"] != "all":
            assert 0 == shares[0][scope["tier"]].num_blocks
        assert cleared.num_blocks == (4 if "tenant" in scope else 8)


def test_set_policy_begins_with_the_old_order(tmp_path: Path) -> None:
    """Under lru the prompt that was touched stays; fifo takes over that order and ignores later touches."""
    with controlled(tmp_path, use_disk=False) as (held, controller):
        fill(held, [1, 2, 3, 4])
        held.engine.touch(keys_of(1, 4))
        controller.set_policy("host", "fifo").result()
        held.engine.touch(keys_of(2, 4))
        fill(held, [5])
        assert [4, 0, 4, 4, 4] == [ready(held, prompt) for prompt in range(1, 6)]


def test_stats_and_health(tmp_path: Path) -> None:
    """Figures by tier, and what is online."""
    with controlled(tmp_path) as (held, controller):
        fill(held, [1])
        stats = controller.stats().result()
        assert ({"host": 4, "disk": 4}, {"host": 40_000, "disk": 40_000}) == (stats.num_blocks, stats.num_bytes)
        assert (16, 4) == (stats.capacity_blocks["host"], stats.counters["host.stored_blocks"])
        health = controller.health(check_books=True).result()
        assert (True, {"host": True, "disk": True}, ()) == (health.ok, health.online, health.problems)


def test_quotas_and_their_bytes(tmp_path: Path) -> None:
    """A tenant beyond its quota makes room itself; quotas cannot exceed the tier; bytes by tenant are in the statistics."""
    with controlled(tmp_path, use_disk=False) as (held, controller):
        quota = 8 * 10_000
        assert {"a": quota} == controller.quota("a", tier="host", num_bytes=quota).result()
        with pytest.raises(QuotaError, match="quota of 'b': 90000 bytes beside 80000 of other tenants; allowed: 160000 in all"):
            controller.quota("b", tier="host", num_bytes=90_000).result()
        for prompt, tenant in ((1, "a"), (2, "a"), (3, "b"), (4, "b"), (5, "a")):
            plan = held.engine.begin_store(keys_of(prompt, 4), 0, tenant)
            held.engine.commit_store(plan.job_id)
        assert [0, 4, 4, 4, 4] == [ready(held, prompt) for prompt in (1, 2, 3, 4, 5)]
        assert {"host": {"a": 80_000, "b": 80_000}} == controller.stats().result().bytes_by_tenant
        assert {} == controller.quota("a", tier="host", num_bytes=None).result()


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_another_threads_verbs_wait_for_the_engine_to_step(tmp_path: Path) -> None:
    """Without a step the caller's time runs out and the job goes on; with the next one it is done."""
    with controlled(tmp_path) as (held, controller):
        jobs: list[kvtier.Job[object]] = []
        errors: list[BaseException] = []

        def call() -> None:
            jobs.append(controller.stats())
            try:
                jobs[0].result(0.01)
            except JobTimeoutError as error:
                errors.append(error)

        in_thread(call).join()
        assert "stats is queued after 0.01 s" in str(errors[0])
        assert (JobState.QUEUED, True) == (jobs[0].state, held.engine.busy)
        held.engine.poll()
        assert (JobState.DONE, False) == (jobs[0].state, held.engine.busy)


def test_many_threads_at_once(tmp_path: Path) -> None:
    """Every call gets its own answer while one thread drives the engine."""
    with controlled(tmp_path) as (held, controller):
        fill(held, range(4))
        answers: list[int] = []

        def call(prompt: int) -> None:
            answers.extend(controller.lookup(keys=keys_of(prompt, length)).result(20.0).hit_blocks - length for length in (1, 2, 3, 4))

        threads = [in_thread(lambda prompt=prompt: call(prompt)) for prompt in range(4)]  # type: ignore[misc]
        while any(thread.is_alive() for thread in threads):
            held.engine.poll()
        assert [0] * 16 == answers


def test_jobs_can_be_cancelled(tmp_path: Path) -> None:
    """One that was not begun at once, one that runs when the engine comes to it; a finished one not at all."""
    with controlled(tmp_path) as (held, controller):
        fill(held, range(6))
        queued: list[kvtier.Job[object]] = []
        in_thread(lambda: queued.append(controller.stats())).join()
        assert queued[0].cancel()
        with pytest.raises(JobCancelledError, match="stats was cancelled"):
            queued[0].result()
        running = controller.prefetch(keys=keys_of(0, 4))
        assert (JobState.RUNNING, (0, 4)) == (running.state, running.progress)
        assert running.cancel()
        with pytest.raises(JobCancelledError):
            running.result(10.0)
        done = controller.stats()
        assert not done.cancel()
        assert done.result().counters["control.moved_blocks"] == 0


def test_closing_the_engine_ends_jobs(tmp_path: Path) -> None:
    """What waits fails with ClosedError, and so does every later call; the name is free again."""
    held = Cache(tmp_path, HOST_BLOCKS, use_disk=False)
    controller = Controller(held.engine, namespace=NAMESPACE, block_tokens=BLOCK_TOKENS, name="one")
    assert controller is Controller.of("one") is Controller.of() is kvtier.controllers()["one"]
    held.engine.close()
    assert {} == kvtier.controllers()
    with pytest.raises(ClosedError, match="stats: the engine was closed"):
        controller.stats()
    with pytest.raises(ControlError, match="name is 'one'; engines with a controller in this process: none"):
        Controller.of("one")


KEYS = keys_of(1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.lookup(), "named by tokens or by keys; allowed: exactly one"),
        (lambda c: c.lookup([1], keys=KEYS), "exactly one"),
        (lambda c: c.lookup(keys=[BlockKey(b"short")]), r"keys: b'short'; allowed: 16 bytes"),
        (lambda c: c.lookup(keys=KEYS, salt="x"), "salt and tenant go with tokens"),
        (lambda c: c.lookup([1, -2, 3, 4]), "tokens: .*allowed: token ids"),
        (lambda c: c.pin(keys=KEYS, ttl_s=-1.0), "ttl_s is -1.0; allowed: more than 0 seconds and finite"),
        (lambda c: c.pin(keys=KEYS, ttl_s=float("inf")), "ttl_s is inf"),
        (lambda c: c.pin(keys=KEYS, ttl_s=float("nan")), "ttl_s is nan"),
        (lambda c: c.prefetch(keys=KEYS, deadline_s=0), "deadline_s is 0; allowed: more than 0"),
        (lambda c: c.prefetch(keys=KEYS, tier="gpu"), "tier is 'gpu'; allowed: 'host'"),
        (lambda c: c.move(keys=KEYS, from_tier="host", to_tier="tape"), "to_tier is 'tape'; allowed: 'host', 'disk'"),
        (lambda c: c.move(keys=KEYS, from_tier="host", to_tier="host"), "allowed: two tiers, one of them 'host'"),
        (lambda c: c.evict(keys=KEYS, tier="gpu"), "tier is 'gpu'; allowed: 'host', 'disk', 'all'"),
        (lambda c: c.clear(), "clear without a scope; allowed: at least one of namespace, tenant and tier"),
        (lambda c: c.clear(namespace=Namespace(model="other")), "namespace is not this engine's"),
        (lambda c: c.set_policy("host", "best"), "policy is 'best'; allowed: .*fifo.*lru"),
        (lambda c: c.set_policy("all", "lru"), "tier is 'all'"),
        (lambda c: c.quota("", tier="host", num_bytes=1), "tenant is ''; allowed: a tenant's name"),
        (lambda c: c.quota("a", tier="gpu", num_bytes=1), "tier is 'gpu'; allowed: 'host', 'disk'"),
        (lambda c: c.quota("a", tier="host", num_bytes=-1), "num_bytes is -1; allowed: a whole number from 0, or None"),
        (lambda c: c.quota("a", tier="host", num_bytes=0.5), "num_bytes is 0.5"),
    ],
)
def test_bad_arguments_are_refused_by_name(tmp_path: Path, call: Callable[[Controller], object], message: str) -> None:
    """At once, in the caller's thread, with the argument, its value and what is allowed."""
    with controlled(tmp_path) as (_, controller), pytest.raises(ControlError, match=message):
        call(controller)


def test_a_prefix_without_a_full_block_is_nothing(tmp_path: Path) -> None:
    """Nothing found, pinned, moved or dropped, and no error."""
    with controlled(tmp_path) as (_, controller):
        assert 0 == controller.lookup([1, 2]).result().hit_blocks
        pinned = controller.pin([1, 2], ttl_s=1.0).result()
        assert 0 == pinned.num_blocks
        controller.unpin(pinned).result()
        assert 0 == controller.prefetch([1, 2]).result().ready_blocks
        assert 0 == controller.move([1, 2], from_tier="host", to_tier="disk").result().num_blocks
        assert 0 == controller.evict([1, 2], tier="all").result().num_blocks
