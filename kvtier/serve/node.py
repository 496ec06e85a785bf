"""What the daemon serves: one cache over one arena, opened for the first engine that comes and kept until the daemon ends."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvtier.config import Config
from kvtier.engine import CacheEngine
from kvtier.errors import DaemonError
from kvtier.hashing import Namespace
from kvtier.memory.arena import Arena, remove_stale
from kvtier.serve import messages
from kvtier.serve.estimates import SharedEstimates
from kvtier.serve.session import Session

_LOG = logging.getLogger(__name__)
DIRECTORY = "/dev/shm"


class Node:
    """The daemon's cache and arena. One thread, the daemon's."""

    def __init__(self, config: Config, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.cache: CacheEngine | None = None
        """None before the first engine has come"""
        self._config = config
        self._clock = clock
        self._estimates = SharedEstimates()
        self._arena: Arena | None = None
        self._arena_id = secrets.token_hex(8)
        self._prefix = f"kvtierd-{os.getuid()}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}-"
        self._hello: messages.Hello | None = None
        self._socket = path
        remove_stale(DIRECTORY, self._prefix)

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
        host = self._config.host
        path = f"{DIRECTORY}/{self._prefix}{self._arena_id}"
        arena = Arena.open(path, host.capacity_bytes, huge_pages=host.huge_pages, numa_node=host.numa_node)
        try:
            arena.prefault()
            self.cache = CacheEngine.open(
                self._config,
                namespace=namespace,
                block_bytes=hello.block_bytes,
                arena=arena,
                events=True,
                clock=self._clock,
                estimates=self._estimates,
            )
        except BaseException:
            arena.unlink()
            arena.close()
            raise
        self._arena = arena
        _LOG.info(
            "blocks of %d tokens and %d bytes of %s; %s", hello.block_tokens, hello.block_bytes, namespace.model, self.cache.num_blocks()
        )


def _describe(namespace: Namespace, block_bytes: int, block_tokens: int) -> str:
    """A namespace and a block size, without what is empty."""
    named = {name: value for name, value in dataclasses.asdict(namespace).items() if value}
    return f"blocks of {block_tokens} tokens and {block_bytes} bytes of {', '.join(f'{name}={value}' for name, value in named.items())}"
