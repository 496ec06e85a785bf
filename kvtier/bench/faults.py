"""``kvtier bench faults``: what a store that goes wrong adds to a request, beside vLLM without kvtier. Needs vLLM and a Valkey.

Two engines by turns: one without kvtier, and one that shares a Valkey, which is slowed down, frozen, killed and so on while it is asked.
Both get the same prompts. The second one has them nowhere but in the store; ``load_or_recompute`` is ``always``, so that it goes there
each time. What a request takes longer than in the first one is to stay below ``promote_wait``: that is checked for each request. The
first engine is asked before and after the second one. By how much its two answers differ in time is what computing differs by itself: the
time of a whole request may be above the bound by that, the part before the engine begins may not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from kvtier.bench.engine import ENVIRONMENT, FORGET, open_engine, prompt_of
from kvtier.bench.options import MOST_TOKENS, add_json, add_rounds, whole
from kvtier.bench.report import Record, publish, record
from kvtier.bench.scratch import scratch_directory
from kvtier.testing.faults import FAULTS, FaultyValkey
from kvtier.units import format_duration

DEADLINE_S = 0.5
"""``promote_wait``"""
_SETTLE_S = 2.5
"""until the last write has arrived, and an answer "not here" counts no longer"""
_RECOVERY_S = 120.0


class Asked(NamedTuple):
    """The answers to one prompt, with how long they took."""

    before: dict[str, Any]
    """without kvtier"""
    served: dict[str, Any]
    after: dict[str, Any]
    """without kvtier"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--model", required=True, help="directory of a checkpoint that vLLM can load")
    add_json(parser)
    add_rounds(parser, 6, "requests per fault")
    parser.add_argument("--tokens", type=whole(1, MOST_TOKENS), default=128, help="tokens of a prompt (default: 128)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="what goes wrong (default: all)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns 1 where a request was delayed by more than the deadline."""
    os.environ.update(ENVIRONMENT)
    with scratch_directory() as directory:
        records = list(measure(args.model, args.tokens, args.rounds, args.faults, directory))
    publish("kvtier bench faults", records, args.json)
    return is_late(records)


def is_late(records: Sequence[Record]) -> bool:
    """Whether any figure that has a limit is above it; says which."""
    late = [item for item in records if item.limit is not None and item.value > item.limit]
    for item in late:
        print(f"over the deadline: {item.params['fault']}, {item.name}: {item.value:.0f} of {item.limit:.0f} ms", file=sys.stderr)
    return bool(late)


def measure(model: str, num_tokens: int, rounds: int, faults: Sequence[str], directory: Path) -> Iterator[Record]:
    """Without a fault, then fault by fault. Raises RuntimeError for other tokens, and where hits do not come back."""
    prompts = [prompt_of(num_tokens, number) for number in range(1, rounds + 1)]
    with ExitStack() as stack:
        store = stack.enter_context(FaultyValkey(directory))
        alone = stack.enter_context(open_engine(model, directory, None, dtype="float32"))
        served = stack.enter_context(open_engine(model, directory, tiers(store.url), dtype="float32", **connector()))
        expected = [alone([prompt])["tokens"] for prompt in prompts]
        for prompt in prompts:
            served([prompt])
        for fault in ("none", *faults):
            recover(served, prompts[0])
            if fault != "none":
                store.begin(fault)
            asked = []
            for number, prompt in enumerate(prompts):
                served(FORGET)
                asked.append(Asked(alone([prompt]), served([prompt]), alone([prompt])))
                if any(answer["tokens"] != expected[number] for answer in asked[-1]):
                    raise RuntimeError(f"other tokens than vLLM alone has, with the fault {fault!r}")
            if fault != "none":
                store.end(fault)
            yield from records_of(fault, num_tokens, asked)
        recover(served, prompts[0])


def records_of(fault: str, num_tokens: int, asked: Sequence[Asked]) -> Iterator[Record]:
    """What requests took, and what the store added to them beside the deadline: until the engine began with them, and in all."""
    params = {"fault": fault, "tokens": num_tokens, "requests": len(asked), "promote_wait": format_duration(DEADLINE_S)}
    yield record("a request without kvtier", params, [one.before["seconds"] for one in asked], "ms")
    noise_s = max(abs(one.after["seconds"] - one.before["seconds"]) for one in asked)
    yield record("the same twice without kvtier, largest difference", params, [noise_s], "ms")
    for what, key, more_s in (("waiting", "waited_s", 0.0), ("in all", "seconds", noise_s)):
        added = [one.served[key] - (one.before[key] + one.after[key]) / 2 for one in asked]
        yield record(f"added by the store, {what}, median", params, added, "ms", limit=1e3 * DEADLINE_S)
        yield record(f"added by the store, {what}, worst", params, [max(added)], "ms", limit=1e3 * (DEADLINE_S + more_s))


def recover(served: Any, prompt: list[int]) -> None:
    """Asks until the prompt comes from the store. One that the store has lost is computed and stored by the way."""
    deadline = time.monotonic() + _RECOVERY_S
    while True:
        time.sleep(_SETTLE_S)
        served(FORGET)
        if served([prompt])["loaded_tokens"]:
            return
        if time.monotonic() > deadline:
            raise RuntimeError("no hits although the store is well")


def tiers(url: str) -> list[dict[str, Any]]:
    """Host memory over the store, whose own deadlines are what one would set beside such a ``promote_wait``."""
    waits = {"connect_timeout": "500ms", "stall_timeout": "500ms", "total_timeout": "2s"}
    return [{"type": "host", "capacity": "1GiB"}, {"type": "redis", "url": url, **waits}]


def connector() -> dict[str, Any]:
    """Goes to the store however fast computing is."""
    return {"connector": {"promote_wait": DEADLINE_S, "load_or_recompute": "always"}}
