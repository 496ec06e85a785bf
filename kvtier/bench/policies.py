"""``kvtier bench policies``: what an eviction policy costs by itself, and how much memory its books take.

A request is used as the planner would have it: what is there is touched, tail first; room is asked for what is not, and what is admitted
comes, tail first. The targets hold for the default policy.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
import tracemalloc
from collections.abc import Iterator

from kvtier.bench.options import MOST_BLOCKS, add_json, add_rounds, whole
from kvtier.bench.report import Record, publish, record
from kvtier.policies import POLICIES, create_policy
from kvtier.policies.base import EvictionPolicy
from kvtier.types import BlockKey, BlockMeta

TARGET_MS = 1.0
TARGET_BYTES = 200.0
SECONDS_BETWEEN = 0.25
SHARES_NEW = {"all there": 0.0, "half new": 0.5, "all new": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    add_json(parser)
    add_rounds(parser, 101, "timed requests per figure")
    parser.add_argument(
        "--resident", type=whole(2, MOST_BLOCKS), default=1_000_000, metavar="N", help="blocks in the tier (default: 1000000)"
    )
    parser.add_argument("--request-blocks", type=whole(1, MOST_BLOCKS), default=512, metavar="N", help="blocks of a request (default: 512)")
    parser.add_argument("--policy", nargs="+", default=["default", "lru"], choices=list(POLICIES), help="default: default and lru")


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status: 2 for a tier that holds too little."""
    if args.resident < 2 * args.request_blocks:
        print(f"--resident is {args.resident}: allowed are two requests of {args.request_blocks} blocks, or more", file=sys.stderr)
        return 2
    records: list[Record] = []
    for name in args.policy:
        records += requests(name, args.resident, args.request_blocks, args.rounds)
        records.append(memory(name, args.resident, args.request_blocks))
    publish("kvtier bench policies", records, args.json)
    return 0


def requests(name: str, resident: int, request_blocks: int, rounds: int) -> Iterator[Record]:
    """Milliseconds of policy a request, in a tier that is full."""
    bench = _Tier(name, resident, request_blocks)
    bench.fill()
    for what, share_new in SHARES_NEW.items():
        num_new = round(share_new * request_blocks)
        bench.use(num_new)
        times = [bench.use(num_new) for _ in range(rounds)]
        params = {"policy": name, "resident": resident, "blocks": request_blocks}
        yield record(f"one request, {what}", params, times, "ms", limit=TARGET_MS)


def memory(name: str, resident: int, request_blocks: int) -> Record:
    """Bytes a block of the policy's books, once as much has left as is there. The blocks' keys are the caller's and not counted."""
    bench = _Tier(name, resident, request_blocks)
    prompts = [bench.prompt(request_blocks) for _ in range(2 * resident // request_blocks)]
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    bench.reset()
    for prompt in prompts:
        bench.serve(prompt, request_blocks)
    del prompt
    gc.collect()
    num_bytes = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    params = {"policy": name, "resident": resident}
    per_block = num_bytes / len(bench.policy)
    return Record("memory per block", params, per_block, "bytes", limit=TARGET_BYTES, fraction=per_block / TARGET_BYTES)


class _Tier:
    """A tier with one policy. Prompts are used in turn, so that all classes of use are met."""

    def __init__(self, name: str, resident: int, request_blocks: int) -> None:
        self._name = name
        self._resident = resident
        self._request_blocks = request_blocks
        self._numbers = itertools.count(1)
        self._now = 0.0
        self._last: list[BlockMeta] = []
        self.reset()

    def reset(self) -> None:
        """An empty policy."""
        self.policy: EvictionPolicy = create_policy(self._name)

    def prompt(self, num_new: int, before: list[BlockMeta] | None = None) -> list[BlockMeta]:
        """A prompt whose last blocks are new, behind the first ones of another."""
        out = list(before or [])[: self._request_blocks - num_new]
        for _ in range(num_new):
            out.append(BlockMeta(BlockKey(next(self._numbers).to_bytes(16, "little")), out[-1].key if out else None, 1))
        return out

    def fill(self) -> None:
        """As many prompts as there is room for, and then some, a quarter of them used again."""
        for number in range(self._resident // self._request_blocks + 8):
            self._last = self.prompt(self._request_blocks)
            self.serve(self._last, self._request_blocks)
            if number % 4 == 0:
                self.serve(self._last, 0)

    def use(self, num_new: int) -> float:
        """A request of which so many blocks are new, behind the beginning of the one before. Returns seconds."""
        if num_new < self._request_blocks and self._last[self._request_blocks - num_new - 1].key not in self.policy:
            raise RuntimeError("the prompt that is used again has left")
        self._last = self.prompt(num_new, self._last)
        return self.serve(self._last, num_new)

    def serve(self, prompt: list[BlockMeta], num_new: int) -> float:
        """Calls the policy as the planner does. Returns seconds."""
        self._now += SECONDS_BETWEEN
        policy, now = self.policy, self._now
        there, new = prompt[: len(prompt) - num_new], prompt[len(prompt) - num_new :]
        keys = [block.key for block in reversed(there)]
        start = time.perf_counter()
        if keys:
            policy.touch(keys, now)
            policy.pin(keys[0])
        short = len(policy) + len(new) - self._resident
        victims = policy.victims(min(short, len(new)), now, new[-short:]) if short > 0 else ()
        admitted = new[: len(new) - max(0, min(short, len(new))) + len(victims)]
        for block in reversed(admitted):
            policy.insert(block, now)
        if keys:
            policy.unpin(keys[0], now)
        return time.perf_counter() - start
