"""Host memory of a daemon that died, as the next one deals with it: taken over, kept for another attempt, or removed."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.config import Config
from kvtier.errors import ConfigError, KVTierError
from kvtier.memory import arena_file
from kvtier.memory.arena import Arena
from kvtier.memory.arena_file import PAGE_BYTES
from kvtier.memory.slot_table import IDENTITY_BYTES, SUFFIX, SlotTable
from kvtier.serve.node import DIRECTORY, Node
from kvtier.testing.daemons import BLOCK_BYTES, hello, payload_of
from kvtier.testing.starts import refused_threads
from kvtier.types import BlockKey

HOST_BYTES = 64 * BLOCK_BYTES
KEYS = [BlockKey(bytes(15) + bytes([position])) for position in range(8)]


class Place:
    """A socket's path, and the daemons that come and go there without any socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "socket"
        self.prefix = f"kvtierd-{os.getuid()}-{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]}-"

    def node(self, *lower: dict[str, Any], **daemon: Any) -> Node:
        tiers = [{"type": "host", "capacity": HOST_BYTES}, *lower]
        return Node(Config.from_mapping({"tiers": tiers, "daemon": daemon}), self.path)

    def left(self) -> set[str]:
        """What lies in shared memory, without the prefix."""
        return {name.removeprefix(self.prefix) for name in os.listdir(DIRECTORY) if name.startswith(self.prefix)}

    def leave_blocks(self) -> None:
        """A daemon that stores and dies."""
        node = self.node()
        welcome(node)
        store(node)
        die(node)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for name in made.left():
        path = f"{DIRECTORY}/{made.prefix}{name}"
        if os.path.isdir(path):
            os.rmdir(path)
        else:
            os.unlink(path)


def welcome(node: Node, **more: Any) -> None:
    node.welcome(hello("scheduler", "engine", **more))


def store(node: Node) -> None:
    """Until all checksums are noted."""
    cache, _ = node.require()
    plan = cache.begin_store(KEYS, 0)
    assert node._arena is not None
    for position, ref in zip(plan.positions, plan.slots, strict=True):
        node._arena.view(ref.slot * PAGE_BYTES, BLOCK_BYTES)[:] = payload_of(KEYS[position])
    cache.commit_store(plan.job_id)
    settle(node)


def settle(node: Node) -> None:
    cache, _ = node.require()
    assert cache._recorder is not None
    until = time.monotonic() + 20.0
    cache.poll()
    while cache._recorder.num_waiting or cache.is_growing:
        assert time.monotonic() < until
        cache.poll()


def ready_blocks(node: Node) -> int:
    settle(node)
    return node.require()[0].match(KEYS).ready_blocks


def die(node: Node) -> None:
    """As kill -9."""
    cache, _ = node.require()
    assert cache._recorder is not None
    assert node._arena is not None
    cache._recorder.close()
    node._arena.close()
    node.cache = node._arena = None
    del cache
    gc.collect()  # the last view of the memory is gone, as with a process


# ---- a first opening that fails -----------------------------------------------------------------------------------------


def test_a_tier_that_does_not_open_costs_no_block(place: Place) -> None:
    """The blocks are there for the next attempt, of the same daemon or of another one; also where one is stopped in between."""
    place.leave_blocks()
    (place.folder / "disk").write_text("in the way")
    node = place.node({"type": "disk", "path": str(place.folder / "disk"), "capacity": "64MiB", "segment": "1MiB"})
    for _ in range(2):
        with pytest.raises(KVTierError, match="disk"):
            welcome(node)
        assert 2 == len(place.left())
    node.close()
    (place.folder / "disk").unlink()
    node = place.node()
    welcome(node)
    assert len(KEYS) == ready_blocks(node)
    node.close()
    assert set() == place.left()


@pytest.mark.parametrize("has_room", [True, False])
def test_a_hello_that_no_host_memory_fits_costs_no_block(place: Place, monkeypatch: pytest.MonkeyPatch, has_room: bool) -> None:
    """It is refused for its configuration, before anybody looks whether there is room beside what was left."""
    place.leave_blocks()
    node = place.node()
    if not has_room:
        monkeypatch.setattr(arena_file, "available_memory_bytes", lambda: 0)
    with pytest.raises(ConfigError, match="hold no block"):
        welcome(node, block_bytes=1 << 40)
    monkeypatch.undo()
    welcome(node)
    assert len(KEYS) == ready_blocks(node)
    node.close()


def test_another_models_blocks_go_once_the_tiers_are_open(place: Place) -> None:
    """A new arena lies beside what was left until then, and only its own memory is reserved afterwards."""
    place.leave_blocks()
    before = place.left()
    (place.folder / "disk").write_text("in the way")
    node = place.node({"type": "disk", "path": str(place.folder / "disk"), "capacity": "64MiB", "segment": "1MiB"})
    with pytest.raises(KVTierError, match="disk"):
        welcome(node, namespace={"model": "other"})
    assert before == place.left()
    (place.folder / "disk").unlink()
    welcome(node, namespace={"model": "other"})
    assert 2 == len(place.left())
    assert not before & place.left()
    node.close()


def test_another_models_blocks_make_room_where_there_is_none(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arenas do not fit: what nobody can use goes first."""
    place.leave_blocks()
    before = place.left()
    monkeypatch.setattr(arena_file, "available_memory_bytes", lambda: 0 if place.left() & before else 1 << 40)
    node = place.node()
    welcome(node, namespace={"model": "other"})
    assert not before & place.left()
    assert not ready_blocks(node)
    node.close()


def test_a_cache_that_is_open_is_closed_where_its_memory_cannot_be_prepared(place: Place) -> None:
    """The last step of opening fails: nothing stays open, and the next attempt has the blocks."""
    place.leave_blocks()
    node = place.node()
    with refused_threads("kvtier-prefault"), pytest.raises(KVTierError, match="cannot be prepared"):
        welcome(node)
    assert node.cache is None
    gc.collect()
    welcome(node)
    assert len(KEYS) == ready_blocks(node)
    node.close()
    assert set() == place.left()


# ---- what is not the daemon's to remove ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adopt", [True, False])
@pytest.mark.parametrize("what", ["folder", "pipe", "link", "not ours"])
def test_what_has_a_tables_name_is_named_and_passed_over(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str, adopt: bool
) -> None:
    """Anybody can make a name in shared memory: the daemon serves all the same, and removes what it can."""
    stale, bad = (f"{DIRECTORY}/{place.prefix}{name}{SUFFIX}" for name in ("0", "1"))
    Path(stale).touch()
    make: dict[str, Callable[[str], object]] = {
        "folder": os.mkdir,
        "pipe": os.mkfifo,
        "link": lambda path: os.symlink("/dev/null", path),
        "not ours": lambda path: Path(path).touch(),
    }
    make[what](bad)
    if what == "not ours":
        fstat, number = os.fstat, os.stat(bad).st_ino

        def as_of_another_user(fd: int) -> os.stat_result:
            status = fstat(fd)
            return os.stat_result([*status[:4], os.geteuid() + 1, *status[5:10]]) if status.st_ino == number else status

        monkeypatch.setattr(os, "fstat", as_of_another_user)
    Path(bad.removesuffix(SUFFIX)).touch()
    node = place.node(adopt=adopt)
    welcome(node)
    assert os.path.lexists(bad)
    assert not os.path.exists(stale)
    assert f"{bad} has the name of a table of this daemon's and cannot be removed: " in caplog.text
    node.close()


def test_a_table_of_another_user_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may lay one beside an arena that was left without."""
    arena_path, identity = str(tmp_path / "arena"), bytes(IDENTITY_BYTES)
    SlotTable.create(arena_path, HOST_BYTES, BLOCK_BYTES, identity).close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert SlotTable.open(arena_path, HOST_BYTES, BLOCK_BYTES, identity) is None
    monkeypatch.undo()
    table = SlotTable.open(arena_path, HOST_BYTES, BLOCK_BYTES, identity)
    assert table is not None
    table.close()


def test_a_daemon_that_lives_keeps_its_table(place: Place) -> None:
    """Two of one user at the same path in two containers share /dev/shm: each keeps what the next one at its place will look for."""
    first, second = place.node(), place.node()
    welcome(first)
    store(first)
    welcome(second)
    assert 4 == len(place.left())
    assert not ready_blocks(second), "nobody takes over what is in use"
    second.close()
    die(first)
    third = place.node()
    welcome(third)
    assert len(KEYS) == ready_blocks(third)
    third.close()


def test_a_table_that_only_workers_outlive_is_removed(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Its arena is never taken over later: what was forgotten meanwhile would come back."""
    caplog.set_level(logging.ERROR)  # a record of an error knows the frames that it passed, and they the arena
    node = place.node()
    welcome(node)
    store(node)
    assert node._arena is not None
    worker = Arena.open(node._arena.path, node._arena.capacity_bytes, huge_pages=False)
    die(node)
    node = place.node()
    welcome(node)
    assert not ready_blocks(node)
    worker.close()
    die(node)
    node = place.node()
    welcome(node)
    assert not ready_blocks(node)
    node.close()
    assert set() == place.left()
