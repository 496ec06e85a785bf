"""Host memory that outlives its process: the table of slots, and what the next process makes of it. Nothing wrong is ever taken over."""

from __future__ import annotations

import gc
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.config import Config
from kvtier.engine import CacheEngine
from kvtier.errors import ArenaError
from kvtier.hashing import Namespace
from kvtier.memory import slot_table
from kvtier.memory.arena import Arena
from kvtier.memory.arena_file import PAGE_BYTES
from kvtier.memory.slot_table import SlotEntry, SlotTable
from kvtier.testing.starts import refused_threads
from kvtier.types import BlockKey, BlockMeta

SLOT_BYTES = 2 * PAGE_BYTES
BLOCK_BYTES = SLOT_BYTES - 100
NUM_SLOTS = 12
IDENTITY = b"i" * 16
ENTRY_BYTES = 128


def key_of(prompt: int, position: int) -> BlockKey:
    return BlockKey(prompt.to_bytes(8, "little") + position.to_bytes(8, "little"))


def keys_of(prompt: int, num_blocks: int) -> list[BlockKey]:
    return [key_of(prompt, position) for position in range(1, num_blocks + 1)]


def payload_of(key: bytes) -> bytes:
    return (hashlib.sha256(key).digest() * (SLOT_BYTES // 32))[:BLOCK_BYTES]


def entry_of(prompt: int, **more: object) -> SlotEntry:
    fields: dict[str, object] = {"tenant": "", "generation": 7, "checksum": b"c" * 16, **more}
    return SlotEntry(BlockMeta(key_of(prompt, 1), None if prompt % 2 else key_of(prompt, 0), BLOCK_BYTES), **fields)  # type: ignore[arg-type]


class Machine:
    """Host memory in a folder, and the process that uses it, which may die at any moment."""

    def __init__(self, folder: Path, num_slots: int = NUM_SLOTS) -> None:
        self.path = str(folder / "arena")
        self.capacity_bytes = num_slots * SLOT_BYTES
        self.start()

    def start(self) -> None:
        table = SlotTable.open(self.path, self.capacity_bytes, SLOT_BYTES, IDENTITY)
        self.arena = Arena.open(self.path, self.capacity_bytes, huge_pages=False, take_over=table is not None)
        self.table = table or SlotTable.create(self.path, self.capacity_bytes, SLOT_BYTES, IDENTITY)
        config = Config.from_mapping({"tiers": [{"type": "host", "capacity": self.capacity_bytes, "policy": "lru"}]})
        namespace = Namespace(model="test")
        self.cache = CacheEngine.open(config, namespace=namespace, block_bytes=BLOCK_BYTES, arena=self.arena, slots=self.table)

    def die(self) -> None:
        """As kill -9: what is in memory stays as it is at this moment."""
        recorder = self.cache._recorder
        assert recorder is not None
        recorder.close()
        self.arena.close()
        del self.cache, self.arena, recorder
        gc.collect()  # the last view of the memory is gone, as with a process

    def settle(self) -> None:
        """Until all checksums are computed and used."""
        recorder = self.cache._recorder
        assert recorder is not None
        until = time.monotonic() + 20.0
        self.cache.poll()
        while recorder.num_waiting:
            assert time.monotonic() < until
            self.cache.poll()

    def store(self, keys: list[BlockKey], tenant: str = "") -> int:
        plan = self.cache.begin_store(keys, 0, tenant)
        for position, ref in zip(plan.positions, plan.slots, strict=True):
            self.arena.view(ref.slot * PAGE_BYTES, BLOCK_BYTES)[:] = payload_of(keys[position])
        if plan.slots:
            self.cache.commit_store(plan.job_id)
        return len(plan.slots)

    def load(self, keys: list[BlockKey]) -> list[bytes]:
        plan = self.cache.begin_load(keys)
        found = [bytes(self.arena.view(ref.slot * PAGE_BYTES, BLOCK_BYTES)) for ref in plan.slots]
        self.cache.end_load(plan.job_id)
        return found

    def slot_of(self, key: BlockKey) -> int:
        plan = self.cache.begin_load([key])
        self.cache.end_load(plan.job_id)
        return plan.slots[0].slot


def test_no_thread_to_be_had(tmp_path: Path) -> None:
    """A limit on processes is an ArenaError that says so."""
    with refused_threads("kvtier-checksums"), pytest.raises(ArenaError, match="cannot be recorded: can't start new thread"):
        Machine(tmp_path)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    assert [] == made.cache.check()
    made.cache.close()


# ---- the table ----------------------------------------------------------------------------------------------------------


def test_a_table_gives_back_what_was_written(tmp_path: Path) -> None:
    """Whole entries, with parent, tenant and slot, for whoever opens the file next; erased ones are gone."""
    path = str(tmp_path / "arena")
    table = SlotTable.create(path, 8 * SLOT_BYTES, SLOT_BYTES, IDENTITY)
    written = {2 * slot + slot % 2: entry_of(slot, tenant="ä" * slot, generation=slot + 1) for slot in range(8)}
    for slot, entry in written.items():
        table.write(slot, entry)
    table.erase(4)
    assert (True, False, False) == (table.holds(7, 4), table.holds(7, 5), table.holds(4, 3))
    table.close()
    again = SlotTable.open(path, 8 * SLOT_BYTES, SLOT_BYTES, IDENTITY)
    assert again is not None
    assert {slot: entry for slot, entry in written.items() if slot != 4} == dict(again.entries())
    with pytest.raises(ValueError, match="54 bytes; allowed: 52"):
        again.write(0, entry_of(1, tenant="ä" * 27))
    again.close()


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 9, 30, 127])
def test_an_entry_cut_short_is_none(tmp_path: Path, num_bytes: int) -> None:
    """A process that dies in the middle of writing leaves nothing, whatever was there before."""
    path = str(tmp_path / "arena")
    table = SlotTable.create(path, 8 * SLOT_BYTES, SLOT_BYTES, IDENTITY)
    at = PAGE_BYTES + ENTRY_BYTES
    table.write(2, entry_of(1))
    old = table._mapping[at : at + ENTRY_BYTES]
    table.write(2, entry_of(2, tenant="t" * 52))
    new = table._mapping[at : at + ENTRY_BYTES]
    table._mapping[at : at + ENTRY_BYTES] = new[:num_bytes] + old[num_bytes:]
    assert ([] if num_bytes else [(2, entry_of(1))]) == list(table.entries())
    table.close()


def test_a_table_of_something_else_is_not_opened(tmp_path: Path) -> None:
    """Another model, another size of slots or memory, a damaged header, no file: there is nothing to take over."""
    path = str(tmp_path / "arena")
    SlotTable.create(path, 8 * SLOT_BYTES, SLOT_BYTES, IDENTITY).close()
    assert SlotTable.open(path, 8 * SLOT_BYTES, SLOT_BYTES, b"j" * 16) is None
    assert SlotTable.open(path, 8 * SLOT_BYTES, 2 * SLOT_BYTES, IDENTITY) is None
    assert SlotTable.open(path, 9 * SLOT_BYTES, SLOT_BYTES, IDENTITY) is None
    with open(path + slot_table.SUFFIX, "r+b") as file:
        file.seek(10)
        file.write(b"x")
    assert SlotTable.open(path, 8 * SLOT_BYTES, SLOT_BYTES, IDENTITY) is None
    assert SlotTable.open(str(tmp_path / "none"), 8 * SLOT_BYTES, SLOT_BYTES, IDENTITY) is None
    with pytest.raises(ArenaError, match="cannot make the table of slots"):
        SlotTable.create(path, 8 * SLOT_BYTES, SLOT_BYTES, IDENTITY)


# ---- what the next process finds ----------------------------------------------------------------------------------------


def test_the_next_process_has_the_blocks(machine: Machine) -> None:
    """Verified blocks are hits again, with their bytes, their order in the prompt and their tenant."""
    keys = keys_of(1, 5)
    assert 5 == machine.store(keys, "tenant")
    machine.settle()
    machine.die()
    machine.start()
    assert 0 == machine.cache.match(keys).ready_blocks, "nothing is verified yet"
    machine.settle()
    assert 5 == machine.cache.match(keys).ready_blocks
    assert [payload_of(key) for key in keys] == machine.load(keys)
    assert 5 == machine.cache.stats["host.adopted_blocks"]
    assert {"tenant": 5 * BLOCK_BYTES} == machine.cache._planner.bytes_by_tenant()["host"]
    assert 0 == machine.store(keys), "what is there is not stored again"
    machine.die()
    machine.start()
    machine.settle()
    assert 5 == machine.cache.match(keys).ready_blocks, "what was taken over once is taken over again"


def test_bytes_that_changed_are_not_taken_over(machine: Machine) -> None:
    """A slot whose bytes have another checksum is free, and counted; what lies behind it is no hit before it is stored again."""
    keys = keys_of(1, 5)
    machine.store(keys)
    machine.settle()
    at = machine.slot_of(keys[2]) * PAGE_BYTES
    machine.arena.view(at + BLOCK_BYTES - 1, 1)[:] = bytes([machine.arena.view(at + BLOCK_BYTES - 1, 1)[0] ^ 1])
    machine.die()
    machine.start()
    machine.settle()
    assert 2 == machine.cache.match(keys).hit_blocks
    assert [4, 1] == [machine.cache.stats[f"host.{name}_blocks"] for name in ("adopted", "damaged")]
    assert 1 == machine.store(keys)
    assert [payload_of(key) for key in keys] == machine.load(keys)


def test_what_was_forgotten_stays_forgotten(machine: Machine) -> None:
    """Cleared blocks do not come back, although their bytes still lie there."""
    machine.store(keys_of(1, 3))
    machine.store(keys_of(2, 3))
    machine.settle()
    machine.cache.verbs.clear((0,), None)
    machine.store(keys_of(3, 1))
    machine.settle()
    machine.die()
    machine.start()
    machine.settle()
    assert [0, 0, 1] == [machine.cache.match(keys_of(prompt, 3)).hit_blocks for prompt in (1, 2, 3)]


def test_what_is_cleared_while_it_is_verified_stays_away(machine: Machine) -> None:
    """A verb counts from the moment it is said."""
    machine.store(keys_of(1, 5))
    machine.settle()
    machine.die()
    machine.start()
    machine.cache.verbs.clear((0,), None)
    machine.settle()
    assert 0 == machine.cache.match(keys_of(1, 5)).hit_blocks
    assert 5 == machine.store(keys_of(1, 5))


def test_an_arena_that_is_in_use_is_not_taken_over(machine: Machine) -> None:
    """Who still maps it might still write to it."""
    other = Arena.open(machine.path, machine.capacity_bytes, huge_pages=False)
    machine.die()
    with pytest.raises(ArenaError, match="is still in use; nobody can take it over"):
        Arena.open(machine.path, machine.capacity_bytes, huge_pages=False, take_over=True)
    other.close()
    machine.start()


def test_blocks_beyond_what_is_recorded_are_counted(machine: Machine) -> None:
    """A tenant with a name that has no room in the table is served, and its blocks are not found again."""
    machine.store(keys_of(1, 3), "t" * 60)
    machine.settle()
    assert 3 == machine.cache.stats["host.unrecorded_blocks"]
    machine.die()
    machine.start()
    machine.settle()
    assert 0 == machine.cache.match(keys_of(1, 3)).hit_blocks


# ---- any sequence, a crash at any point -----------------------------------------------------------------------------------

prompts = st.integers(1, 5)
lengths = st.integers(1, 5)


class DyingMachine(RuleBasedStateMachine):
    """Stores, evictions, verbs and deaths in any order, also in the middle of a copy or of a note; every hit has its own bytes."""

    def __init__(self) -> None:
        super().__init__()
        gc.freeze()  # what other tests have left would be searched at every death
        self.folder = tempfile.mkdtemp()
        self.machine = Machine(Path(self.folder), 8)
        self.forgotten: set[BlockKey] = set()
        """on request, and not stored again since"""
        self.certain: set[BlockKey] = set()
        """noted at some moment, and in place since"""

    @rule(prompt=prompts, length=lengths)
    def store(self, prompt: int, length: int) -> None:
        keys = keys_of(prompt, length)
        self.machine.store(keys)
        self.forgotten -= {key for key in keys if self.has(key)}
        self.certain = {key for key in self.certain if self.has(key)}

    @rule(prompt=prompts, length=lengths, num_bytes=st.integers(0, BLOCK_BYTES))
    def die_in_a_copy(self, prompt: int, length: int, num_bytes: int) -> None:
        """A worker has filled a part of what it was to fill."""
        keys = keys_of(prompt, length)
        plan = self.machine.cache.begin_store(keys, 0)
        self.certain = {key for key in self.certain if self.has(key)}
        for ref in plan.slots:
            self.machine.arena.view(ref.slot * PAGE_BYTES, num_bytes)[:] = b"\xee" * num_bytes
        self.die()

    @rule(prompt=prompts, length=lengths)
    def settle(self, prompt: int, length: int) -> None:
        self.machine.settle()
        self.certain = {key_of(prompt, at) for prompt in range(1, 6) for at in range(1, 6) if self.has(key_of(prompt, at))}

    @rule()
    def clear(self) -> None:
        self.forgotten |= {key_of(prompt, at) for prompt in range(1, 6) for at in range(1, 6)}
        self.certain.clear()
        self.machine.cache.verbs.clear((0,), None)

    @rule(prompt=prompts, length=lengths)
    def evict(self, prompt: int, length: int) -> None:
        keys = keys_of(prompt, length)
        self.machine.cache.verbs.evict(keys[-1:], (0,))
        gone = {key_of(prompt, at) for at in range(1, 6) if not self.has(key_of(prompt, at))}
        self.forgotten |= gone
        self.certain -= gone

    @rule(slot=st.integers(0, 7), at=st.integers(0, BLOCK_BYTES - 1))
    def damage(self, slot: int, at: int) -> None:
        """Somebody wrote where he should not have, and all die of it."""
        view = self.machine.arena.view(slot * SLOT_BYTES + at, 1)
        view[:] = bytes([view[0] ^ 0x10])
        view.release()
        self.certain.clear()
        self.die()

    @rule(slot=st.integers(0, 7), num_bytes=st.integers(1, ENTRY_BYTES - 1), filler=st.binary(min_size=1, max_size=1))
    def die_in_a_note(self, slot: int, num_bytes: int, filler: bytes) -> None:
        """A part of an entry was written."""
        at = PAGE_BYTES + slot * ENTRY_BYTES
        table = self.machine.table._mapping
        is_same = bytes(table[at : at + num_bytes]) == filler * num_bytes
        table[at : at + num_bytes] = filler * num_bytes
        if not is_same:
            self.certain.clear()
        self.die()

    @rule()
    def die(self) -> None:
        self.machine.die()
        self.machine.start()
        self.machine.settle()
        assert {key for key in self.certain if not self.has(key)} == set(), "noted blocks are lost"

    @invariant()
    def every_hit_is_right(self) -> None:
        for prompt in range(1, 6):
            for key in (key_of(prompt, at) for at in range(1, 6)):
                if self.has(key):
                    assert [payload_of(key)] == self.machine.load([key])
                    assert key not in self.forgotten, "what was forgotten is back"
        assert [] == self.machine.cache.check()

    def has(self, key: BlockKey) -> bool:
        return self.machine.cache.match([key]).ready_blocks == 1

    def teardown(self) -> None:
        gc.unfreeze()
        self.machine.cache.close()
        shutil.rmtree(self.folder)


DyingMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestDying = DyingMachine.TestCase
