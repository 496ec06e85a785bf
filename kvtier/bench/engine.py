"""``kvtier bench engine``: the whole path in the real vLLM, in the environment where vLLM is installed.

Time to first token of prompts that hit, beside computing them in the same engine; and what storing costs when nothing is ever used
again, beside a vLLM without kvtier that gets the same prompts in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvtier.bench.options import add_json, add_rounds
from kvtier.bench.report import Record, publish, record
from kvtier.bench.scratch import scratch_directory

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
ARGUMENTS = {"block_size": 32, "max_model_len": 4096, "max_num_seqs": 8, "enable_prefix_caching": False}
LIMITS = {(3600, "host"): 0.02, (3600, "disk"): 0.04, (900, "host"): 0.08, (900, "disk"): None}
OVERHEAD_LIMIT = 1.03
FORGET: list[list[int]] = []
"""in place of prompts: the engine forgets what it has in host memory and what it knows of other tiers"""
ENGINE_STARTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--model", required=True, help="directory of a checkpoint that vLLM can load")
    add_json(parser)
    add_rounds(parser, 5)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status."""
    os.environ.update(ENVIRONMENT)
    with scratch_directory() as directory:
        records = [*first_tokens(args.model, args.rounds, directory), overhead(args.model, args.rounds, directory)]
    publish("kvtier bench engine", records, args.json)
    return 0


def first_tokens(model: str, rounds: int, directory: Path) -> Iterator[Record]:
    """Prompts of 3,600 and 900 tokens: computed, from host memory, and from disk by a new engine."""
    sizes = (3600, 900)
    computed: dict[int, list[float]] = {}
    host: dict[int, list[float]] = {}
    with open_engine(model, directory, own_tiers(directory)) as ask:
        for size in sizes:
            prompts = [prompt_of(size, size // 10 + number) for number in range(rounds)]  # no size is a prefix of another one
            answers = [(ask([prompt]), ask([prompt])) for prompt in prompts]
            computed[size] = [cold["ttft_s"] for cold, _ in answers]
            host[size] = [warm["ttft_s"] for _, warm in answers]
            _check_hits(size, [cold["host_tokens"] for cold, _ in answers], [warm["host_tokens"] for _, warm in answers])
    with open_engine(model, directory, own_tiers(directory)) as ask:
        found = {size: [ask([prompt_of(size, size // 10 + number)]) for number in range(rounds)] for size in sizes}
    for size, again in found.items():
        _check_hits(size, [0], [answer["loaded_tokens"] for answer in again])
    disk = {size: [answer["ttft_s"] for answer in again] for size, again in found.items()}
    for size in sizes:
        yield record("time to first token, computed", {"tokens": size}, computed[size], "ms")
        for source, times in (("host", host[size]), ("disk", disk[size])):
            share = statistics.median(times) / statistics.median(computed[size])
            limit = LIMITS[size, source]
            yield record(f"time to first token, {source}", {"tokens": size}, times, "ms")
            yield Record(f"of computing, {source}", {"tokens": size}, share, "ratio", 0.0, limit, share / limit if limit else None)


def _check_hits(size: int, computed: Sequence[int], loaded: Sequence[int]) -> None:
    """Raises RuntimeError where prompts that were to be computed came from a tier, or the others did not."""
    if max(computed) or min(loaded) < size - 64:
        raise RuntimeError(f"of prompts of {size} tokens, {max(computed)} were there at first, and {min(loaded)} afterwards")


def overhead(model: str, rounds: int, directory: Path) -> Record:
    """Eight new prompts of 500 tokens a round and 16 tokens each, by turns without and with kvtier, which stores everything.

    The engines are started anew, in the other order: which one came first, and where its memory lies, makes a difference of percents.
    """
    ratios = [ratio for start in range(ENGINE_STARTS) for ratio in _overheads(model, rounds, directory, start)]
    ratios.sort()
    value = statistics.median(ratios)
    spread = ratios[3 * len(ratios) // 4] - ratios[len(ratios) // 4]
    params = {"starts": ENGINE_STARTS, "rounds": rounds}
    return Record("storing without reuse", params, value, "ratio", spread, OVERHEAD_LIMIT, value / OVERHEAD_LIMIT)


def _overheads(model: str, rounds: int, directory: Path, start: int) -> list[float]:
    order = (False, True) if start % 2 else (True, False)
    ratios = []
    with (
        open_engine(model, directory, None if not order[0] else own_tiers(directory)) as first,
        open_engine(model, directory, None if not order[1] else own_tiers(directory)) as second,
    ):
        engines = dict(zip(order, (first, second), strict=True))
        for number in range(rounds + 1):
            prompts = [prompt_of(500, 1000 + 8 * (number + start * (rounds + 1)) + index) for index in range(8)]
            turns = (False, True) if number % 2 else (True, False)
            seconds = {has_kvtier: engines[has_kvtier](prompts)["seconds"] for has_kvtier in turns}
            ratios.append(seconds[True] / seconds[False])
    return ratios[1:]  # the first round warms up


def prompt_of(num_tokens: int, number: int) -> list[int]:
    """Token ids that no other number shares, not even at the start."""
    return [1000 + number, *((7919 * number + 31 * position) % 40_000 + 1000 for position in range(num_tokens - 1))]


@contextlib.contextmanager
def open_engine(
    model: str,
    directory: Path,
    tiers: Sequence[Mapping[str, Any]] | None,
    dtype: str = "bfloat16",
    arguments: Mapping[str, Any] = ARGUMENTS,
    **more: Any,
) -> Iterator[Any]:
    """An engine in a process of its own; yields a function from prompts, and kvtier's options of each, to what was measured.

    ``tiers``: kvtier's; None: without it. ``more``: other settings of kvtier. ``dtype``: with float32 the tokens, too, can be compared.
    ``arguments``: the engine's.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    settings = None if tiers is None else {"tiers": list(tiers), **more}
    process = context.Process(target=_serve, args=(theirs, model, directory, {**arguments, "dtype": dtype}, settings), daemon=True)
    process.start()
    theirs.close()

    def receive() -> Any:
        try:
            return ours.recv()
        except (EOFError, ConnectionResetError):
            log = (directory / "engines.log").read_text(errors="replace").splitlines()
            raise RuntimeError("\n".join(["the engine has ended; its last words:", *log[-20:]])) from None

    receive()

    def ask(prompts: list[list[int]], options: Sequence[Any] = (), max_tokens: int = 16) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # as below
            ours.send((prompts, options or [None] * len(prompts), max_tokens))
        answer: dict[str, Any] = receive()
        return answer

    try:
        yield ask
    finally:
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself, which ``receive`` tells
            ours.send(None)
        process.join(60.0)


def _serve(pipe: Connection, model: str, directory: Path, arguments: Mapping[str, Any], settings: Mapping[str, Any] | None) -> None:
    with (directory / "engines.log").open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - only this process needs it
    from vllm.config import KVTransferConfig  # noqa: PLC0415

    from kvtier.controller import Controller  # noqa: PLC0415

    more = {} if settings is None else {"kv_transfer_config": KVTransferConfig(**_transfer_settings(settings))}
    llm = LLM(model=model, enforce_eager=True, disable_log_stats=False, **arguments, **more)
    clock = _StepClock(llm.llm_engine)

    def sampling(options: Any, max_tokens: int) -> SamplingParams:
        extra = None if options is None else {"kv_transfer_params": {"kvtier": options}}
        return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra)

    llm.generate([{"prompt_token_ids": prompt_of(64, 0)}], sampling(None, 16), use_tqdm=False)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        prompts, options, max_tokens = asked
        if prompts == FORGET:
            Controller.of().clear(tier="all").result(60.0)
            pipe.send({})
            continue
        start = time.perf_counter()
        wanted = [sampling(each, max_tokens) for each in options]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
        pipe.send({"seconds": time.perf_counter() - start, "longest_step_s": clock.take(), **_measured(outputs)})
    llm.llm_engine.engine_core.shutdown()


class _StepClock:
    """Takes the time of the steps of an engine in this process. In a step everybody who generates gets a token, and waits for it."""

    def __init__(self, engine: Any) -> None:
        self._step = engine.step
        self._longest_s = 0.0
        engine.step = self

    def __call__(self) -> Any:
        """A step."""
        start = time.perf_counter()
        outputs = self._step()
        self._longest_s = max(self._longest_s, time.perf_counter() - start)
        return outputs

    def take(self) -> float:
        """How long the longest one took since the last call, in seconds."""
        longest_s, self._longest_s = self._longest_s, 0.0
        return longest_s


def _measured(outputs: Any) -> dict[str, Any]:
    """What came from where; and of each prompt, since the engine got the first one, when its last token came."""
    said = [(output.kv_transfer_params or {}).get("kvtier", {}) for output in outputs]
    started = min(output.metrics.queued_ts for output in outputs)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "ttft_s": outputs[0].metrics.first_token_latency,
        "waited_s": outputs[0].metrics.scheduled_ts - outputs[0].metrics.queued_ts,
        "last_s": [output.metrics.last_token_ts - started for output in outputs],
        "loaded_tokens": sum(each.get("disk_tokens", 0) for each in said),
        "host_tokens": sum(each.get("host_tokens", 0) for each in said),
        "blended": [each.get("blend", {}).get("tokens", 0) for each in said],
        "refused": [each.get("blend", {}).get("refused", "") for each in said],
    }


def own_tiers(directory: Path) -> list[dict[str, Any]]:
    """Host memory and a disk."""
    return [{"type": "host", "capacity": "2GiB"}, {"type": "disk", "path": str(directory / "tier"), "capacity": "4GiB"}]


def _transfer_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": dict(settings),
    }
