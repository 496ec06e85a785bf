"""``kvtier bench serve``: what a daemon in between costs, beside a cache in the engine's own process. No KV is moved.

Both are asked by turns in the same run. The daemon is a process of its own, started by the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping

from kvtier.bench.control import decode_steps
from kvtier.bench.options import add_json, add_rounds
from kvtier.bench.report import Record, publish, record, time_rounds
from kvtier.bench.scratch import scratch_directory
from kvtier.cache import Cache
from kvtier.config import Config
from kvtier.engine import CacheEngine
from kvtier.hashing import Namespace
from kvtier.serve.channel import Attaching
from kvtier.serve.client import ServedCache
from kvtier.testing.daemons import BLOCK_BYTES, DaemonProcess, hello, settings
from kvtier.types import BlockKey

NUM_REQUESTS = 64
CAPACITY_BYTES = NUM_REQUESTS * 256 * BLOCK_BYTES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    add_json(parser)
    add_rounds(parser, 501)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status."""
    publish("kvtier bench serve", list(measure(args.rounds)), args.json)
    return 0


def measure(rounds: int) -> Iterator[Record]:
    """The same calls on both."""
    with caches() as found:
        for what, work in CALLS.items():
            for place, cache in found.items():
                times = time_rounds(work(cache), rounds=rounds)
                yield record(f"{what}, {place}", {"blocks": 64}, times, "us")
        for place, cache in found.items():
            params = {"running": NUM_REQUESTS, "block_tokens": 32}
            yield record(f"scheduler half, one step, {place}", params, decode_steps(cache, rounds, NUM_REQUESTS), "us")


def match(cache: Cache) -> Callable[[], object]:
    """Looks up a prompt of 64 blocks that are there."""
    keys = _keys(1)
    plan = cache.begin_store(keys, 0)
    cache.commit_store(plan.job_id)
    cache.poll()

    def work() -> None:
        assert len(keys) == cache.match(keys).ready_blocks
        cache.poll()

    return work


def load(cache: Cache) -> Callable[[], object]:
    """What a request with a hit costs: match, pin, begin_load, touch, unpin, end_load."""
    keys = _keys(1)

    def work() -> None:
        cache.match(keys)
        pin = cache.pin(keys, 30.0)
        plan = cache.begin_load(keys)
        assert len(keys) == len(plan.slots)
        cache.touch(keys)
        cache.unpin(pin)
        cache.end_load(plan.job_id)
        cache.poll()

    return work


def store(cache: Cache) -> Callable[[], object]:
    """Stores a prompt of 64 new blocks."""
    numbers = iter(range(2, 1 << 30))

    def work() -> None:
        keys = _keys(next(numbers))
        plan = cache.begin_store(keys, 0)
        assert len(keys) == len(plan.slots)
        cache.commit_store(plan.job_id)
        cache.poll()

    return work


CALLS: Mapping[str, Callable[[Cache], Callable[[], object]]] = {
    "match": match,
    "a request that loads": load,
    "a request that stores": store,
}


def _keys(prompt: int) -> list[BlockKey]:
    return [BlockKey(prompt.to_bytes(8, "little") + position.to_bytes(8, "little")) for position in range(64)]


@contextlib.contextmanager
def caches() -> Iterator[Mapping[str, Cache]]:
    """Two caches of the same size: one here, one in a daemon."""
    content = {"tiers": [{"type": "host", "capacity": CAPACITY_BYTES}]}
    with scratch_directory() as directory:
        path = directory / "socket"
        file = directory / "kvtier.yaml"
        file.write_text(json.dumps(content))
        embedded = CacheEngine.open(Config.from_mapping(content), namespace=Namespace(model="test"), block_bytes=BLOCK_BYTES)
        daemon = DaemonProcess(file, path)
        served = ServedCache(Attaching(settings(path, deadline="5s"), hello("scheduler", "bench")))
        try:
            while embedded.is_growing or served.is_growing:
                embedded.poll(0.01)
                served.poll(0.01)
            yield {"embedded": embedded, "daemon": served}
        finally:
            served.close()
            daemon.close()
            embedded.close()
