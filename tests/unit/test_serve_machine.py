"""Two engines on one daemon, any interleaving of what they and it may do: they see exactly what one cache in one process would show."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kvtier.config import Config
from kvtier.engine import CacheEngine
from kvtier.hashing import Namespace
from kvtier.testing.daemons import BLOCK_BYTES, DaemonThread, EngineWithoutModel, break_link
from kvtier.types import BlockKey, LoadPlan, StorePlan

NAMES = ("first", "second")
HOST_BLOCKS = 512
engines = st.sampled_from(NAMES)
prompts = st.integers(1, 2)
lengths = st.integers(1, 3)
indexes = st.integers(0, 2)


def keys_of(prompt: int, num_blocks: int) -> list[BlockKey]:
    return [BlockKey(prompt.to_bytes(8, "little") + position.to_bytes(8, "little")) for position in range(1, num_blocks + 1)]


@dataclass
class Open:
    """A copy under way: the engine's plan and the oracle's."""

    keys: Sequence[BlockKey]
    plan: StorePlan | LoadPlan
    twin: StorePlan | LoadPlan
    is_void: bool = False


@dataclass
class Actor:
    """An engine, what it has under way, and what its predecessor of the same name left."""

    engine: EngineWithoutModel
    view: str = ""
    """engines with the same view see the same blocks"""
    stores: list[Open] = field(default_factory=list)
    loads: list[Open] = field(default_factory=list)


class DaemonMachine(RuleBasedStateMachine):
    """The oracle is a CacheEngine that is told the same; what is lost with an engine is given up there when the daemon may give it up."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        folder = Path(self._directory.name) / "run"
        folder.mkdir(mode=0o700)
        self._path = folder / "socket"
        self._config = Config.from_mapping({"tiers": [{"type": "host", "capacity": HOST_BLOCKS * BLOCK_BYTES}]})
        self._views = 0
        self._start()
        self.actors = {name: self._new_actor(name) for name in NAMES}
        self.ghosts: list[Actor] = []
        """engines whose scheduler is dead and whose worker is not"""

    def _start(self) -> None:
        self._daemon = DaemonThread(self._config, self._path)
        self._oracle = CacheEngine.open(self._config, namespace=Namespace(model="test"), block_bytes=BLOCK_BYTES)

    def _new_actor(self, name: str) -> Actor:
        engine = EngineWithoutModel(self._path, name, reconnect="5ms", deadline="20s")
        engine.wait_until_usable()
        while self._oracle.is_growing:
            self._oracle.poll()
        return Actor(engine)

    def _seen(self, actor: Actor, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """The oracle's names of an engine's keys."""
        if not actor.view:
            return list(keys)
        return [BlockKey(hashlib.sha256(actor.view.encode() + key).digest()[:16]) for key in keys]

    def _wait_for(self, condition: Callable[[], Any]) -> None:
        until = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.001)

    def _poll_until(self, actor: Actor, condition: Callable[[], bool]) -> None:
        def is_so() -> bool:
            actor.engine.cache.poll()
            return condition()

        self._wait_for(is_so)

    # ---- what engines do ----------------------------------------------------------------------------------------

    @rule(name=engines, prompt=prompts, length=lengths)
    def match(self, name: str, prompt: int, length: int) -> None:
        actor, keys = self.actors[name], keys_of(prompt, length)
        assert self._oracle.match(self._seen(actor, keys)) == actor.engine.cache.match(keys)

    @rule(name=engines, prompt=prompts, first=st.integers(0, 2), length=lengths)
    def begin_store(self, name: str, prompt: int, first: int, length: int) -> None:
        actor, keys = self.actors[name], keys_of(prompt, first + length)
        twin = self._oracle.begin_store(self._seen(actor, keys), first)
        plan = actor.engine.cache.begin_store(keys, first)
        assert (twin.positions, twin.broken, twin.num_refused) == (plan.positions, plan.broken, plan.num_refused)
        if plan.slots:
            actor.stores.append(Open([keys[first + position] for position in plan.positions], plan, twin))

    @rule(name=engines, index=indexes, is_good=st.booleans())
    def end_store(self, name: str, index: int, is_good: bool) -> None:
        actor = self.actors[name]
        if not actor.stores:
            return
        store = actor.stores.pop(index % len(actor.stores))
        actor.engine.write(store.keys, store.plan.slots)
        if is_good:
            actor.engine.cache.commit_store(store.plan.job_id)
        else:
            actor.engine.cache.abort_store(store.plan.job_id)
        if is_good and not store.is_void:
            self._oracle.commit_store(store.twin.job_id)
        else:
            self._oracle.abort_store(store.twin.job_id)
        actor.engine.cache.match(keys_of(1, 1))  # an answer: what was said before has arrived

    @rule(name=engines, prompt=prompts, length=lengths)
    def begin_load(self, name: str, prompt: int, length: int) -> None:
        actor, keys = self.actors[name], keys_of(prompt, length)
        twin, plan = self._oracle.begin_load(self._seen(actor, keys)), actor.engine.cache.begin_load(keys)
        assert len(twin.slots) == len(plan.slots)
        assert all(actor.engine.is_right(keys, plan.slots)), "wrong KV"
        actor.loads.append(Open(keys, plan, twin))

    @rule(name=engines, index=indexes)
    def end_load(self, name: str, index: int) -> None:
        actor = self.actors[name]
        if actor.loads:
            load = actor.loads.pop(index % len(actor.loads))
            assert all(actor.engine.is_right(load.keys, load.plan.slots)), "wrong KV"
            actor.engine.cache.end_load(load.plan.job_id)
            self._oracle.end_load(load.twin.job_id)

    @rule(name=engines)
    def reset(self, name: str) -> None:
        """It shares nothing any more; what it stores at the moment comes to nothing."""
        actor = self.actors[name]
        self._views += 1
        actor.engine.cache.reset()
        actor.view = f"view {self._views}"
        for store in actor.stores:
            store.is_void = True

    # ---- what goes wrong ----------------------------------------------------------------------------------------

    @rule(name=engines)
    def lose_the_connection(self, name: str) -> None:
        """And find the daemon again: copies under way are void, their slots taken until they end."""
        actor = self.actors[name]
        link = actor.engine.cache._channel._link
        assert link is not None
        session = actor.engine.cache._channel.session
        break_link(link)
        self._poll_until(actor, lambda: actor.engine.cache._channel.session > session)
        actor.engine.wait_until_usable()
        for store in actor.stores:
            store.is_void = True

    @precondition(lambda self: len(self.ghosts) < 2)
    @rule(name=engines)
    def kill_the_scheduler(self, name: str) -> None:
        """A new engine takes the name; the old worker is not gone yet."""
        actor = self.actors[name]
        connection = self._daemon.daemon._members[name].scheduler
        actor.engine.cache.close()
        self._wait_for(lambda: connection not in self._daemon.daemon._connections)
        self.ghosts.append(actor)
        self.actors[name] = self._new_actor(name)

    @precondition(lambda self: self.ghosts)
    @rule(index=indexes)
    def ghosts_write(self, index: int) -> None:
        """Workers of the dead fill what they were told, with anything."""
        ghost = self.ghosts[index % len(self.ghosts)]
        assert ghost.engine.arena is not None
        for store in ghost.stores:
            for ref in store.plan.slots:
                ghost.engine.arena.view(ref.slot * 4096, BLOCK_BYTES)[:] = b"\xee" * BLOCK_BYTES
        for load in ghost.loads:
            assert all(ghost.engine.is_right(load.keys, load.plan.slots))

    @precondition(lambda self: self.ghosts)
    @rule(index=indexes)
    def lay_a_ghost(self, index: int) -> None:
        """Its worker dies too: its slots are free."""
        ghost = self.ghosts.pop(index % len(self.ghosts))
        num_connections = len(self._daemon.daemon._connections)
        ghost.engine.detach_worker()
        self._wait_for(lambda: len(self._daemon.daemon._connections) < num_connections)
        for store in ghost.stores:
            self._oracle.abort_store(store.twin.job_id)
        for load in ghost.loads:
            self._oracle.end_load(load.twin.job_id)

    @rule()
    def restart_the_daemon(self) -> None:
        """Nothing is left of what was there; engines find the new one by themselves."""
        while self.ghosts:
            self.lay_a_ghost(0)
        self._daemon.stop()
        self._oracle.close()
        for actor in self.actors.values():
            assert 0 == actor.engine.cache.match(keys_of(1, 1)).hit_blocks
            for load in actor.loads:
                assert all(actor.engine.is_right(load.keys, load.plan.slots))
        self._start()
        for actor in self.actors.values():
            self._poll_until(actor, lambda actor=actor: actor.engine.cache._channel.is_open)  # type: ignore[misc]
            actor.engine.attach_worker()
            actor.engine.wait_until_usable()
            for copy in (*actor.stores, *actor.loads):
                actor.engine.cache.end_load(copy.plan.job_id)
            actor.stores, actor.loads = [], []
        while self._oracle.is_growing:
            self._oracle.poll()

    def teardown(self) -> None:
        """In the end nothing is left open, and the books are right."""
        while self.ghosts:
            self.lay_a_ghost(0)
        for actor in self.actors.values():
            actor.engine.close()
        daemon = self._daemon.daemon
        self._wait_for(lambda: not daemon._connections)
        assert daemon.node.cache is not None
        books = daemon.node.cache
        self._wait_for(lambda: {0} == set(books.leftovers().values()))  # given back after the connection is gone
        assert [] == daemon.node.cache.check()
        self._daemon.stop()
        self._oracle.close()
        self._directory.cleanup()


TestDaemonMachine = DaemonMachine.TestCase
TestDaemonMachine.settings = hypothesis_settings(max_examples=20, stateful_step_count=50, deadline=None)  # each starts a daemon
