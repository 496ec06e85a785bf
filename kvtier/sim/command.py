"""What ``kvtier simulate`` does, once its arguments are parsed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kvtier.config import Config
from kvtier.errors import ConfigError, TraceError
from kvtier.policies import POLICIES
from kvtier.sim.arguments import machine_of
from kvtier.sim.hinting import HINT_KINDS, Agents
from kvtier.sim.readers import detect_format, open_trace
from kvtier.sim.report import markdown_of, table_of, write_markdown
from kvtier.sim.runs import Run, Task, host_runs, replay_all
from kvtier.sim.setup import Setup, TierSetup
from kvtier.sim.trace import NO_SESSION, Trace
from kvtier.sim.verify import verify

DEFAULT_FRACTIONS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)
_WIDTH = 200
"""of a table that is not printed to a terminal"""


def simulate(options: argparse.Namespace) -> bool:
    """Runs everything asked for, prints the table and writes the files. False: ``--verify`` found a difference.

    Raises:
        ConfigError: the configuration cannot be used.
        TraceError: a trace cannot be read.
        ValueError: an argument is wrong; OSError: an output file cannot be written.
    """
    if options.verify:
        verdicts = [_verify(path) for path in options.traces]
        return all(verdicts)
    policies = policies_of(options.policy)
    config = None if options.config is None else Config.load(options.config)
    machine = machine_of(options)
    draw = _drawing(options.plot)
    records: list[dict[str, Any]] = []
    for path in options.traces:
        trace = read_trace(path, options)
        runs = _runs(trace, config, policies, options, trace.block_tokens * machine.kv_bytes_per_token)
        runs = _with_hints(runs, trace, options)
        agents = Agents(trace) if any(run.hints != "off" for run in runs) else None
        task = Task(trace, machine, options.engine_block_tokens, agents)
        with progress_bar(trace.name, len(runs) * len(trace)) as progress:
            records += replay_all(task, runs, jobs=options.jobs, progress=progress)
    console().print(table_of(records))
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if options.markdown is not None:
        write_markdown(options.markdown, markdown_of(records))
    draw(records)
    return True


def policies_of(text: str) -> list[str]:
    """Names of policies, separated by commas; ``all`` stands for each once. Raises ValueError."""
    if text == "all":
        return [name for name in POLICIES if name != "default"]
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in POLICIES:
            raise ValueError(f"--policy: {name!r} is none; allowed: all, {', '.join(POLICIES)}")
    return names


def read_trace(path: Path, options: argparse.Namespace) -> Trace:
    """Opens a trace as the options say. Raises TraceError."""
    more: dict[str, Any] = {}
    if options.hours is not None:
        more["hours"] = options.hours or None
    if options.seed is not None:
        more["seed"] = options.seed
    kind = options.format or detect_format(path)
    if more and kind != "sessions":
        raise TraceError(f"{path}: --hours and --seed are for the format sessions, this is {kind}")
    trace = open_trace(path, kind=kind, group=options.group, skip_bad=options.skip_bad, **more)
    if trace.num_skipped:
        Console(stderr=True).print(f"{path}: {trace.num_skipped} broken lines skipped", highlight=False, markup=False)
    return trace


def console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error, which the function given moves on."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda more: bar.advance(task, more)


def _verify(path: Path) -> bool:
    verdict = verify(path)
    told = f"{verdict.num_answers:,} answers, {verdict.num_hit_blocks:,} blocks loaded, {verdict.num_evicted_blocks:,} evicted"
    differs = "the same in the simulator" if not verdict.differences else "different in the simulator:"
    console().print("\n  ".join([f"{path}: {told}: {differs}", *verdict.differences]), highlight=False, markup=False, soft_wrap=True)
    return not verdict.differences


def _runs(trace: Trace, config: Config | None, policies: Sequence[str], options: argparse.Namespace, block_bytes: int) -> list[Run]:
    fractions: Sequence[float] | None = options.capacity_fraction
    base = Setup(TierSetup(1)) if config is None else Setup.of(config, block_bytes)
    if fractions is None and config is not None:
        if not base.host.capacity_blocks:
            raise ConfigError(f"{options.config}: host memory holds no block of {block_bytes} bytes")
        named = options.policy != "default"
        return [Run(base.with_policy(policy) if named else base) for policy in policies]
    return host_runs(trace, base, policies, fractions or DEFAULT_FRACTIONS)


def _with_hints(runs: Sequence[Run], trace: Trace, options: argparse.Namespace) -> list[Run]:
    """Each run with each kind of hints. Raises ValueError."""
    for kind in options.hints:
        if kind not in HINT_KINDS:
            raise ValueError(f"--hints: {kind!r} is none; allowed: {', '.join(HINT_KINDS)}")
    if set(options.hints) != {"off"} and not (trace.session != NO_SESSION).any():
        raise ValueError(f"--hints: {trace.name} does not say which requests belong together")
    out: list[Run] = []
    for run in runs:
        for kind in options.hints:
            out += [replace(run, hints=kind, wrong_hints=wrong) for wrong in (options.wrong_hints if kind != "off" else (0.0,))]
    return out


def _drawing(path: Path | None) -> Callable[[Sequence[dict[str, Any]]], None]:
    """Finds out before the work whether pictures can be drawn. Raises ValueError."""
    if path is None:
        return lambda _records: None
    try:
        from kvtier.sim.plot import plot_hit_rates  # noqa: PLC0415 - takes matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib; install kvtier with the extra bench") from None
    return lambda records: plot_hit_rates(path, records)
