"""The fake engine: it behaves like an engine, it notices wrong KV, and kvtier works under it from end to end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvtier.connectors.messages import StepMessage
from kvtier.connectors.requests import DefaultSettings
from kvtier.hashing import Namespace
from kvtier.testing.fake_blocks import BlockPool
from kvtier.testing.fake_engine import FakeEngine, HangError, WrongKVError
from kvtier.testing.fake_kv import FakeKVMemory, token_states
from kvtier.testing.fake_system import FakeSystem, FakeSystemOptions
from kvtier.tiers.disk import DiskTier

NAMESPACE = Namespace(model="fake")


@contextmanager
def system_of(directory: Path, **options: object) -> Iterator[FakeSystem]:
    """A system that must be healthy in the end."""
    system = FakeSystem(directory, NAMESPACE, FakeSystemOptions(**options))  # type: ignore[arg-type]
    try:
        yield system
        system.settle()
        assert [] == system.problems()
        for request in system.engine.finished.values():
            if len(request.output) == request.max_new_tokens and request.weights is not None:
                assert request.expected_output() == request.output
    finally:
        system.close()


def prompt(number: int, length: int) -> list[int]:
    return [(number * 31 + position) % 89 for position in range(length)]


def ask(engine: FakeEngine, name: str, tokens: list[int], max_new_tokens: int = 4) -> int:
    """Runs one request to its end. Returns how many tokens were loaded for it."""
    request = engine.submit(name, tokens, max_new_tokens)
    engine.run()
    assert request.expected_output() == request.output
    return request.num_loaded_tokens


# ---- the engine itself --------------------------------------------------------------------------------------------


def test_states_depend_on_everything_before() -> None:
    """A token's state changes with any earlier token and with the seed, and can be continued."""
    states = token_states([1, 2, 3, 4], 7)
    assert states == token_states([1, 2, 3, 4], 7, states[:2])
    assert states[:1] == token_states([1, 9, 3, 4], 7)[:1]
    assert all(one != other for one, other in zip(states[1:], token_states([1, 9, 3, 4], 7)[1:], strict=True))
    assert states[0] != token_states([1], 8)[0]


def test_wrong_kv_makes_wrong_kv() -> None:
    """One wrong byte in one layer of one rank is seen, and what is computed on it is wrong as well."""
    memory = FakeKVMemory(num_ranks=2, num_layers=2, num_blocks=4, block_tokens=4)
    states = token_states(list(range(8)), 1)
    assert memory.forward([1, 2], states, 0)
    assert memory.is_right([1, 2], states)
    memory.ranks[1][1, 1, 3] ^= 1
    assert not memory.is_right([1, 2], states)
    assert not memory.forward([1, 2], states, 4)
    memory.ranks[1][1, 1, 3] ^= 1
    assert memory.is_right([1, 2], states[:4])
    assert not memory.is_right([1, 2], states)


def test_the_layout_is_where_the_bytes_are() -> None:
    """The layout's segments are the layers of a block."""
    memory = FakeKVMemory(num_ranks=1, num_layers=3, num_blocks=5, block_tokens=4)
    layout = memory.layout(0)
    assert (3, 5, memory.engine_block_bytes) == (len(layout.segments), layout.num_blocks, layout.block_bytes)
    assert memory.ranks[0][2, 4:].ctypes.data == layout.segments[2].base_address + 4 * layout.segments[2].stride_bytes


def test_the_pool_counts_users() -> None:
    """A shared block is free when its last user has freed it; named ones are found until they are handed out anew."""
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.name(blocks[0], 11)
    pool.share(pool.find([11, 12]))
    pool.free(blocks)
    assert 2 == pool.num_free
    pool.free(blocks[:1])
    assert ([blocks[0]], 1) == (pool.find([11]), pool.num_unused(blocks[:1]))
    assert 3 == len(set(pool.allocate(3)))
    assert ([], 0) == (pool.find([11]), pool.num_free)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([1, 1])


def test_it_works_without_a_cache(tmp_path: Path) -> None:
    """Neither loads nor stores: requests are chunked, run together, are preempted, and get their tokens."""
    settings = DefaultSettings(load=False, store=False)
    with system_of(tmp_path, settings=settings, num_engine_blocks=20, token_budget=10) as system:
        for number in range(6):
            system.engine.submit(f"r{number}", prompt(number, 30), 12)
        system.settle()
        assert system.engine.num_preemptions > 0
        assert {} == {name: count for name, count in system.cache.stats.snapshot().items() if count}


def test_its_own_prefix_cache_works(tmp_path: Path) -> None:
    """With prefix caching a second request computes only what the first did not leave; a reset ends that."""
    with system_of(tmp_path, settings=DefaultSettings(load=False, store=False), prefix_caching=True) as system:
        counts = []
        for name in "abc":
            if name == "c":
                system.engine.reset()
            request = system.engine.submit(name, prompt(1, 21), 1)
            system.settle()
            counts.append(request.num_forward_tokens)
        assert [21, 1, 21] == counts


def test_a_request_that_can_never_run_is_refused(tmp_path: Path) -> None:
    """Otherwise it would wait for ever."""
    with system_of(tmp_path, num_engine_blocks=10) as system, pytest.raises(ValueError, match="do not fit the engine"):
        system.engine.submit("a", prompt(1, 60), 1)


def test_a_hang_is_noticed(tmp_path: Path) -> None:
    """A run that does not come to an end says who is waiting for what."""
    with system_of(tmp_path) as system:
        system.engine.submit("a", prompt(1, 20), 30)
        with pytest.raises(HangError, match=r"'a', <Status\.RUNNING"):
            system.engine.run(3)


# ---- kvtier under it ----------------------------------------------------------------------------------------------

MODES = [
    {"num_ranks": ranks, "num_polls": polls, "blocks_per_slot": per_slot, "prefix_caching": caching, "settings": settings}
    for ranks in (1, 2)
    for polls in (0, 3)
    for per_slot, caching in ((1, False), (2, True))
    for settings in (DefaultSettings(), DefaultSettings(async_load=True))
]


@pytest.mark.parametrize("options", MODES, ids=lambda mode: "-".join(str(int(v)) for v in mode.values() if isinstance(v, int)))
def test_a_second_request_is_loaded(tmp_path: Path, options: dict[str, object]) -> None:
    """In every mode the same prompt is loaded the second time, up to its last block, with the right tokens."""
    with system_of(tmp_path, **options) as system:
        tokens = prompt(1, 37)
        assert 0 == ask(system.engine, "a", tokens)
        system.settle()
        system.engine.pool.forget_names()
        per_slot = int(str(options.get("blocks_per_slot", 1)))
        assert 36 // (4 * per_slot) * 4 * per_slot == ask(system.engine, "b", tokens)
        assert 0 == ask(system.engine, "c", prompt(2, 37))


def test_generated_blocks_are_loaded(tmp_path: Path) -> None:
    """The next round of a conversation finds the answer of the last one too."""
    with system_of(tmp_path) as system:
        first = system.engine.submit("a", prompt(1, 10), 13)
        system.settle()
        assert 20 == ask(system.engine, "b", first.tokens + prompt(2, 5))


def test_blocks_of_the_first_chunk_are_hit_by_the_same_batch(tmp_path: Path) -> None:
    """A request that waits behind a chunked prefill of the same prompt loads what that has stored so far."""
    with system_of(tmp_path, token_budget=16) as system:
        system.engine.submit("a", prompt(1, 40), 2)
        second = system.engine.submit("b", prompt(1, 44), 2)
        system.settle()
        assert second.num_loaded_tokens >= 16


def test_a_preempted_request_is_loaded(tmp_path: Path) -> None:
    """What a preempted request had computed comes back from the cache."""
    with system_of(tmp_path, num_engine_blocks=22, host_blocks=60) as system:
        requests = [system.engine.submit(f"r{number}", prompt(number, 30), 14) for number in range(4)]
        system.settle()
        assert system.engine.num_preemptions > 0
        assert sum(request.num_loaded_tokens for request in requests) > 0


def test_adapters_do_not_share(tmp_path: Path) -> None:
    """The same tokens under another adapter have other KV and are not loaded."""
    with system_of(tmp_path) as system:
        ask(system.engine, "a", prompt(1, 21))
        request = system.engine.submit("b", prompt(1, 21), adapter=b"lora")
        system.settle()
        assert 0 == request.num_loaded_tokens


def test_new_weights_find_nothing(tmp_path: Path) -> None:
    """After a reset with new weights no old KV is used: not cached, not running, not being copied."""
    with system_of(tmp_path, num_polls=3) as system:
        system.engine.submit("a", prompt(1, 30), 20)
        for _ in range(5):
            system.engine.step()
        assert system.engine.reset(new_weights=True)
        second = system.engine.submit("b", prompt(1, 30), 1)
        system.settle()
        assert second.expected_output() == second.output


def test_wrong_bytes_in_the_arena_are_noticed(tmp_path: Path) -> None:
    """The check that all others rest on: KV that was damaged in host memory stops the engine."""
    system = FakeSystem(tmp_path, NAMESPACE, FakeSystemOptions())
    ask(system.engine, "a", prompt(1, 21))
    for slot in range(16):
        system.arena.buffer[slot * 4096 + 17] ^= 1
    with pytest.raises(WrongKVError, match="'b'"):
        ask(system.engine, "b", prompt(1, 21))
    system.close()


@pytest.mark.parametrize("settings", [DefaultSettings(), DefaultSettings(async_load=True)], ids=["sync", "async"])
@pytest.mark.parametrize("fault", ["start", "end"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_load_is_computed(tmp_path: Path, settings: DefaultSettings, fault: str, rank: int) -> None:
    """When one rank cannot load, the engine computes the blocks, the tokens are right, and the next request loads again."""
    with system_of(tmp_path, num_ranks=2, settings=settings) as system:
        tokens = prompt(1, 37)
        ask(system.engine, "a", tokens)
        system.copiers[rank].load_faults.append(fault)
        ask(system.engine, "b", tokens)
        assert 9 == system.cache.stats["load.failed_blocks"]
        assert 36 == ask(system.engine, "c", tokens)


def test_loads_that_always_fail_do_not_hang(tmp_path: Path) -> None:
    """With a copier that never loads anything every request still ends, in about as many steps as without a cache."""
    tier = DiskTier(tmp_path / "disk", 4 << 20, segment_bytes=1 << 20, durable=False)
    options = FakeSystemOptions(host_blocks=12, settings=DefaultSettings(async_load=True))
    system = FakeSystem(tmp_path, NAMESPACE, options, tiers=[tier])
    system.copiers[0].load_faults.extend(["start", "end"] * 1000)
    for round_number in range(40):  # how many are needed depends on when the disk has what was evicted
        for number in range(3):
            system.engine.submit(f"r{round_number}.{number}", prompt(number, 37), 2)
        system.settle(500_000)  # steps are short beside the disk
        if round_number >= 4 and system.copiers[0].num_failed > 5:
            break
    assert system.copiers[0].num_failed > 5
    assert [] == system.problems()
    system.close()


def test_a_failed_load_may_end_the_request(tmp_path: Path) -> None:
    """With vLLM's policy "fail" the request ends at once and leaves nothing behind."""
    with system_of(tmp_path, recompute=False) as system:
        ask(system.engine, "a", prompt(1, 37))
        system.copiers[0].load_faults.append("start")
        request = system.engine.submit("b", prompt(1, 37), 4)
        system.settle()
        assert [] == request.output


def test_stolen_slots_are_computed(tmp_path: Path) -> None:
    """Slots that get a new tenant between decision and copy cost a load, never wrong KV."""
    with system_of(tmp_path) as system:

        def steal(message: StepMessage) -> None:
            for job in message.loads:
                for slot in job.slots[1:]:
                    system.arena.generations[slot] += 1
                    system.arena.buffer[slot * 4096 : slot * 4096 + 64] = bytes(64)

        ask(system.engine, "a", prompt(1, 37))
        system.engine.tamper = steal
        ask(system.engine, "b", prompt(1, 37))
        assert 8 == system.cache.stats["load.stale_slots"]


@pytest.mark.parametrize("state", ["waiting", "loading", "running", "storing"])
def test_aborts_leave_nothing(tmp_path: Path, state: str) -> None:
    """A request that is aborted in any state leaves no pin, lease, plan or block."""
    with system_of(tmp_path, num_ranks=2, num_polls=3, settings=DefaultSettings(async_load=True), token_budget=8) as system:
        engine = system.engine
        ask(engine, "a", prompt(1, 37))
        system.settle()
        engine.submit("b", prompt(1, 37) if state == "loading" else prompt(2, 37), 4)
        for _ in range({"waiting": 0, "loading": 1, "running": 2, "storing": 6}[state]):
            engine.step()
        engine.abort("b")
        system.settle()
        assert {"a", "b"} == set(engine.finished)


def test_blocks_of_a_finished_request_are_held_for_its_stores(tmp_path: Path) -> None:
    """With slow copies the blocks stay until every rank has copied, though others want them; then all of it is a hit."""
    with system_of(tmp_path, num_ranks=2, num_polls=6, num_engine_blocks=12, host_blocks=40) as system:
        for number in range(4):
            system.engine.submit(f"r{number}", prompt(number, 36), 1)
        system.settle()
        for number in range(4):
            assert 32 == ask(system.engine, f"again{number}", prompt(number, 36), 1)


def test_a_restart_finds_the_disk(tmp_path: Path) -> None:
    """What one system stored the next one loads from disk, after its host memory is gone."""

    def tier() -> DiskTier:
        return DiskTier(tmp_path / "disk", 8 << 20, segment_bytes=1 << 20, durable=False)

    # Room for all of it, so that nothing is evicted before it was written.
    system = FakeSystem(tmp_path, NAMESPACE, FakeSystemOptions(num_ranks=2, host_blocks=64), tiers=[tier()])
    for number in range(5):
        ask(system.engine, f"r{number}", prompt(number, 37))
    system.settle()
    system.close()
    system = FakeSystem(tmp_path, NAMESPACE, FakeSystemOptions(num_ranks=2, host_blocks=24), tiers=[tier()])
    for number in range(5):
        assert 36 == ask(system.engine, f"r{number}", prompt(number, 37))
    assert 45 == system.cache.stats["disk.loaded_blocks"]
    assert system.engine.num_asked_again > 0
    system.close()
