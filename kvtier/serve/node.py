"""What the daemon serves: one cache over one arena, opened for the first engine that comes and kept until the daemon ends."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import secrets
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtier.config import Config
from kvtier.engine import CacheEngine, usable_host_bytes
from kvtier.errors import ArenaError, DaemonError
from kvtier.hashing import Namespace
from kvtier.io import round_up_to_page
from kvtier.memory.arena import Arena, remove_stale
from kvtier.memory.arena_file import is_lived_on
from kvtier.memory.slot_table import IDENTITY_BYTES, SUFFIX, SlotTable, remove_unused
from kvtier.serve import messages
from kvtier.serve.estimates import SharedEstimates
from kvtier.serve.session import Session

_LOG = logging.getLogger(__name__)
DIRECTORY = "/dev/shm"
ADOPT_WAIT_S = 5.0
"""how long an engine that attaches waits for other engines to let go of the host memory of a daemon that died"""


@dataclass(frozen=True, slots=True)
class _HostMemory:
    """An arena and its table, before there is a cache on them."""

    arena: Arena
    slots: SlotTable | None
    is_new: bool
    """nobody has left it: there is nothing in it yet"""

    def put_back(self, cache: CacheEngine | None) -> None:
        """Closes both, and the cache that is on them already. What was taken over stays for the next attempt."""
        if self.is_new:
            self.arena.unlink()
        if self.is_new and self.slots is not None:
            self.slots.unlink()
        if cache is not None:
            cache.close()
        self.arena.close()
        if self.slots is not None:
            self.slots.close()


class Node:
    """The daemon's cache and arena. One thread, the daemon's."""

    def __init__(self, config: Config, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.cache: CacheEngine | None = None
        """None before the first engine has come"""
        self._config = config
        self._clock = clock
        self._estimates = SharedEstimates()
        self._arena: Arena | None = None
        self._slots: SlotTable | None = None
        self._arena_id = secrets.token_hex(8)
        self._prefix = f"kvtierd-{os.getuid()}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}-"
        self._hello: messages.Hello | None = None
        self._socket = path
        self._wait_until: float | None = None
        if not config.daemon.adopt:
            self._clean_up()

    def must_wait(self, hello: messages.Hello) -> bool:
        """Whether host memory of a daemon that died will soon be free to be taken over: its engines' workers still have it mapped."""
        if self.cache is not None or hello.role != "scheduler" or not self._config.daemon.adopt:
            return False
        if not any(is_lived_on(path) for path in self._left_behind()):
            return False
        if self._wait_until is None:
            self._wait_until = self._clock() + ADOPT_WAIT_S
        return self._clock() < self._wait_until

    def require(self) -> tuple[CacheEngine, SharedEstimates]:
        """The cache, which is there once anybody was welcomed."""
        assert self.cache is not None, "nobody is attached before the cache is open"
        return self.cache, self._estimates

    def welcome(self, hello: messages.Hello) -> messages.Welcome:
        """The answer to an engine; opens the cache for the first one.

        Raises:
            DaemonError: the daemon serves another model or another size of blocks; names both.
            ConfigError, ArenaError, TierError: the tiers cannot be opened for this engine.
            TypeError: a namespace with fields that none has.
        """
        if hello.role == "scheduler":
            self._admit(hello)
        if self.cache is None or self._hello is None or self._arena is None:
            raise DaemonError(f"the daemon at {self._socket} waits for a scheduler: its tiers are opened for the first engine's model")
        cache = self.cache
        return messages.Welcome(
            self._arena_id,
            self._arena.path,
            self._arena.capacity_bytes,
            dict(self._hello.namespace),
            self._hello.block_bytes,
            self._hello.block_tokens,
            dict(cache.verbs.tiers),
            tuple(cache.sharing.tiers),
            cache.verbs.capacity_blocks,
            cache.verbs.max_reserved_blocks,
            cache.num_blocks(),
        )

    def poll(self, sessions: Sequence[Session]) -> None:
        """Drives the tiers and tells the sessions what they have done."""
        if self.cache is None:
            return
        self.cache.poll()
        events = self.cache.take_events()
        transfers = list(self._estimates.new_transfers)
        self._estimates.new_transfers.clear()
        if events or transfers:
            for session in sessions:
                session.tell(events, transfers)

    def close(self) -> None:
        """Writes down what is on its way and closes tiers and arena. Idempotent."""
        if self.cache is not None and self._arena is not None:
            self._arena.unlink()
            if self._slots is not None:
                self._slots.unlink()
            self.cache.close()
            self.cache = self._arena = None

    def _admit(self, hello: messages.Hello) -> None:
        namespace = Namespace(**hello.namespace)  # type: ignore[arg-type]  # checked by Namespace.digest
        digest = namespace.digest
        if self.cache is None:
            self._open(hello, namespace)
            self._hello = hello
            return
        assert self._hello is not None
        served = Namespace(**self._hello.namespace)  # type: ignore[arg-type]
        ours = (self._hello.block_bytes, self._hello.block_tokens)
        if served.digest != digest or ours != (hello.block_bytes, hello.block_tokens):
            raise DaemonError(
                f"the daemon at {self._socket} serves {_describe(served, *ours)}; "
                f"this engine has {_describe(namespace, hello.block_bytes, hello.block_tokens)}. "
                "One daemon serves one model in one layout: start another one for this engine, on a socket of its own"
            )

    def _open(self, hello: messages.Hello, namespace: Namespace) -> None:
        if not hello.block_bytes or not hello.block_tokens:
            raise DaemonError("an engine without a block size")
        usable_host_bytes(self._config, hello.block_bytes)  # a ConfigError before any memory is touched
        digest = hashlib.sha256(namespace.digest + struct.pack("=QQ", hello.block_bytes, hello.block_tokens)).digest()
        memory = self._host_memory(round_up_to_page(hello.block_bytes), digest[:IDENTITY_BYTES])
        try:
            self.cache = CacheEngine.open(
                self._config,
                namespace=namespace,
                block_bytes=hello.block_bytes,
                arena=memory.arena,
                slots=memory.slots,
                events=True,
                clock=self._clock,
                estimates=self._estimates,
            )
            self._clean_up()
            memory.arena.prefault()
        except BaseException:
            cache, self.cache = self.cache, None
            memory.put_back(cache)
            raise
        self._arena, self._slots = memory.arena, memory.slots
        _LOG.info(
            "blocks of %d tokens and %d bytes of %s; %s", hello.block_tokens, hello.block_bytes, namespace.model, self.cache.num_blocks()
        )

    def _host_memory(self, slot_bytes: int, identity: bytes) -> _HostMemory:
        """The arena of a daemon that died, with its table, where that can be had and fits; else new ones.

        What others have left is still there, unless there is no room beside it: the tiers below may not open, and the next attempt
        finds it then.
        """
        capacity_bytes = round_up_to_page(self._config.host.capacity_bytes)
        for path in self._left_behind():
            table = SlotTable.open(path, capacity_bytes, slot_bytes, identity)
            if table is not None:
                try:
                    return _HostMemory(self._open_arena(path, take_over=True), table, is_new=False)
                except ArenaError as error:
                    _LOG.warning("the host memory of the daemon before cannot be used: %s", error)
                    table.close()
        path = f"{DIRECTORY}/{self._prefix}{self._arena_id}"
        try:
            arena = self._open_arena(path)
        except ArenaError:
            self._clean_up()
            arena = self._open_arena(path)
        try:
            slots = SlotTable.create(path, capacity_bytes, slot_bytes, identity) if self._config.daemon.adopt else None
        except ArenaError as error:
            _LOG.warning("the next daemon will not find what is in host memory: %s", error)
            slots = None
        return _HostMemory(arena, slots, is_new=True)

    def _open_arena(self, path: str, *, take_over: bool = False) -> Arena:
        host = self._config.host
        capacity_bytes = round_up_to_page(host.capacity_bytes)
        return Arena.open(path, capacity_bytes, huge_pages=host.huge_pages, numa_node=host.numa_node, take_over=take_over)

    def _left_behind(self) -> list[str]:
        """Arenas that daemons of this socket have left, each beside its table."""
        tables = [name for name in os.listdir(DIRECTORY) if name.startswith(self._prefix) and name.endswith(SUFFIX)]
        paths = [os.path.join(DIRECTORY, name.removesuffix(SUFFIX)) for name in tables]
        return [path for path in paths if os.path.exists(path)]

    def _clean_up(self) -> None:
        """Removes what daemons of this socket have left, but for arenas that somebody has mapped and tables that a daemon has open."""
        remove_stale(DIRECTORY, self._prefix)
        for name in os.listdir(DIRECTORY):
            if name.startswith(self._prefix) and name.endswith(SUFFIX):
                path = os.path.join(DIRECTORY, name)
                try:
                    remove_unused(path)
                except (BlockingIOError, FileNotFoundError):
                    continue  # this daemon's own, or one's in another container; or gone meanwhile
                except OSError as error:
                    _LOG.warning("%s has the name of a table of this daemon's and cannot be removed: %s", path, error.strerror)


def _describe(namespace: Namespace, block_bytes: int, block_tokens: int) -> str:
    """A namespace and a block size, without what is empty."""
    named = {name: value for name, value in dataclasses.asdict(namespace).items() if value}
    return f"blocks of {block_tokens} tokens and {block_bytes} bytes of {', '.join(f'{name}={value}' for name, value in named.items())}"
