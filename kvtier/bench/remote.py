"""``kvtier bench remote``: a remote tier beside the best raw transfer to the same server, in the same run.

Raw means: bare sockets (Redis) or bare requests (objects) that move the same bytes to and from the same kind of memory, with one to four
of them at once, whichever is the fastest, and without header, checksum, batching or book-keeping. A peer that is installed and has a
way to the server does the same in turn.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from kvtier.bench.options import MOST_MIB, add_json, add_rounds, whole
from kvtier.bench.peers import Peer
from kvtier.bench.report import Record, in_turns, publish, rates
from kvtier.bench.scratch import scratch_directory
from kvtier.bench.servers import STORES, Store, start_stores
from kvtier.tiers.remote import RemoteSettings, RemoteTier
from kvtier.types import BlockIO, BlockKey, BlockMeta, JobKind, Outcome, TransferJob

NAMESPACE = bytes(16)
MAX_RAW_LANES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    add_json(parser)
    add_rounds(parser, 7)
    parser.add_argument("--batch-mib", type=whole(1, MOST_MIB), default=128, help="MiB moved per round (default: 128)")
    parser.add_argument("--block-mib", type=whole(1, MOST_MIB), nargs="+", default=[4, 32], help="MiB of one block (default: 4 32)")
    parser.add_argument(
        "--stores", nargs="+", choices=STORES, default=list(STORES), metavar="STORE", help=f"{', '.join(STORES)} (default: all)"
    )


def run(args: argparse.Namespace) -> int:
    """Starts the servers, measures, prints, writes. Returns the exit status."""
    records: list[Record] = []
    with ExitStack() as stack:
        directory = stack.enter_context(scratch_directory())
        for store in start_stores(stack, directory, args.stores):
            for block_mib in args.block_mib:
                records += measure(store, block_mib << 20, args.batch_mib << 20, args.rounds)
    publish("kvtier bench remote", records, args.json)
    return 0


def measure(store: Store, block_bytes: int, batch_bytes: int, rounds: int) -> Iterator[Record]:
    """Put and get of one block size."""
    num_blocks = max(1, batch_bytes // block_bytes)
    bench = Bench(store, block_bytes, num_blocks)
    params: dict[str, object] = {"store": store.name, "block_mib": block_bytes >> 20, "batch_mib": bench.num_bytes >> 20}
    try:
        bench.verify()  # the first round may begin with a read
        bench.raw(store.raw_put, 1, "w")
        lanes = [1, 2, MAX_RAW_LANES]
        steps: list[Callable[[], float]] = [bench.put]
        steps += [lambda count=count: bench.raw(store.raw_put, count, "w") for count in lanes]  # type: ignore[misc]
        steps += [bench.get]
        steps += [lambda count=count: bench.raw(store.raw_get, count, "r") for count in lanes]  # type: ignore[misc]
        with ExitStack() as stack:
            peer = None
            if store.peer_url:
                peer = stack.enter_context(Peer("remote", url=store.peer_url, block_bytes=block_bytes, num_blocks=num_blocks))
                steps += [lambda: peer.run("put"), lambda: peer.run("get")]
            puts, *raw_puts, gets, raw_1, raw_2, raw_4 = in_turns(steps, rounds)[:8]
        for name, own, raw in (("put", puts, raw_puts), ("get", gets, [raw_1, raw_2, raw_4])):
            peers = {} if peer is None else peer.rate(name, bench.num_bytes)
            yield rates(name, params, own, max(raw, key=np.median), peers=peers)
    finally:
        bench.close()


class Bench:
    """A tier and as many blocks as one batch has; each method moves the batch and returns bytes per second."""

    def __init__(self, store: Store, block_bytes: int, num_blocks: int) -> None:
        settings = RemoteSettings(prefix=f"bench-{block_bytes}/", total_timeout_s=60.0, max_in_flight_bytes=1 << 40, **store.options)
        self.num_bytes = block_bytes * num_blocks
        data = np.random.default_rng(5).integers(0, 255, (2, num_blocks, block_bytes), np.uint8)
        self._tier = RemoteTier(store.open_client((data.ctypes.data, data.nbytes)), name=store.kind, settings=settings)
        self._out = [memoryview(block).cast("B") for block in data[0]]
        self._in = [memoryview(block).cast("B") for block in data[1]]
        self._metas = [BlockMeta(BlockKey(number.to_bytes(16, "big")), None, block_bytes) for number in range(num_blocks)]
        self._next_id = 0
        self._raw_names = [f"raw-{block_bytes}-{number}" for number in range(num_blocks)]
        self._raw_delete = store.raw_delete

    def put(self) -> float:
        """Stores the batch, which the server does not have."""
        self._tier.remove([meta.key for meta in self._metas])
        while self._tier._num_erasing:
            time.sleep(0.001)
        self._raw_delete(self._raw_names)
        return self._move(JobKind.STORE, self._out)

    def verify(self) -> None:
        """Stores the batch and loads it. Raises RuntimeError where other bytes come back."""
        self.put()
        self.get()
        if self._out != self._in:
            raise RuntimeError(f"the {self._tier.name} tier gave back other bytes than it got")

    def get(self) -> float:
        """Loads the batch."""
        return self._move(JobKind.LOAD, self._in)

    def raw(self, move: Callable[[str, memoryview], None], num_lanes: int, side: str) -> float:
        """Moves the batch with bare transfers, some at once; like ``put``, only to where nothing is."""
        buffers, names = self._out if side == "w" else self._in, self._raw_names
        if side == "w":
            self._raw_delete(names)
        lanes = [
            threading.Thread(target=_move_all, args=(move, names[lane::num_lanes], buffers[lane::num_lanes])) for lane in range(num_lanes)
        ]
        start = time.perf_counter()
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        return self.num_bytes / (time.perf_counter() - start)

    def close(self) -> None:
        """Leaves nothing behind."""
        self._tier.remove([meta.key for meta in self._metas])
        self._tier.close()

    def _move(self, kind: JobKind, buffers: Sequence[memoryview]) -> float:
        self._next_id += 1
        blocks = tuple(BlockIO(meta, buffer) for meta, buffer in zip(self._metas, buffers, strict=True))
        start = time.perf_counter()
        self._tier.submit(TransferJob(self._next_id, kind, NAMESPACE, blocks))
        results = self._tier.poll(120.0)
        seconds = time.perf_counter() - start
        if not results or set(results[0].outcomes) != {Outcome.OK}:
            raise RuntimeError(f"the {self._tier.name} tier failed: {results}")
        return self.num_bytes / seconds


def _move_all(move: Callable[[str, memoryview], None], names: Sequence[str], buffers: Sequence[memoryview]) -> None:
    for name, buffer in zip(names, buffers, strict=True):
        move(name, buffer)
