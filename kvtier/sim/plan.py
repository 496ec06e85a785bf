"""What ``kvtier plan`` does: tries sizes of host memory and disk by simulation and prices them.

Cost per month of a point = GPUs that prefill keeps busy (seconds of loading and computing per second of the trace, over the busy share
planned for) x 730 hours x price of an hour, and GiB of each tier x price. Decoding costs the same at every point and is left out.
Times to first token are those of the replay: no request waits for another one, so the target is met on engines with room to spare, not
at their limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from kvtier.config import Config
from kvtier.sim.arguments import machine_of
from kvtier.sim.command import console, policies_of, progress_bar, read_trace
from kvtier.sim.report import human, percent
from kvtier.sim.runs import Run, Task, replay_all
from kvtier.sim.setup import Setup, TierSetup
from kvtier.sim.trace import Trace

HOURS_A_MONTH = 730
HOST_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""sizes of host memory that are tried, as shares of all unique blocks"""
LOWER_SHARES = (0.1, 0.3, 1.0)
"""sizes of the tier below that are tried where they are larger than host memory"""
_GIB, _MIB = 1 << 30, 1 << 20
_SHOWN = 12

Point = dict[str, Any]


def plan(options: argparse.Namespace) -> bool:
    """Prints the cheapest configuration that meets the target, and the curve. False: no point meets it.

    Raises:
        ConfigError, TraceError, ValueError, OSError: as :func:`kvtier.sim.command.simulate`.
    """
    (policy,) = policies_of(options.policy)
    trace = read_trace(options.trace, options)
    if trace.span_s <= 0:
        raise ValueError(f"{options.trace}: all requests come at the same time; a plan needs their rate")
    if options.plot is not None:
        _draw([], options)
    points = search(trace, policy, options)
    best = cheapest(points, options.target_p95)
    console().print(_table(points, best, options.target_p95))
    if options.json is not None:
        options.json.write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        _draw(points, options)
    out = console()
    if best is None:
        fastest = min(points, key=lambda point: float(point["ttft_p95_s"]))
        out.print(f"No point meets {options.target_p95:g} s; the fastest has {fastest['ttft_p95_s']:.3g} s.", highlight=False)
        return False
    out.print(_answer(best, points[0]), highlight=False, markup=False)
    out.print(configuration(best, None if options.policy == "default" else policy), highlight=False, markup=False, soft_wrap=True)
    return True


def search(trace: Trace, policy: str, options: argparse.Namespace) -> list[Point]:
    """Every point that is tried, with its cost. The first one is an engine without kvtier."""
    machine, size = machine_of(options), options.engine_block_tokens
    block_bytes = trace.block_tokens * machine.kv_bytes_per_token
    hosts = _sizes(HOST_SHARES, trace, block_bytes, options.max_host)
    if not hosts:
        raise ValueError(f"--max-host: {options.max_host} bytes hold no block; allowed: at least {block_bytes} bytes, one block")
    lowers = _sizes(LOWER_SHARES, trace, block_bytes, options.max_disk)
    pairs = [(host, lower) for host in hosts for lower in lowers if lower > host]
    kinds: list[tuple[str, Task, list[Run]]] = [("", Task(trace, machine, size), [Run(Setup(TierSetup(host, policy))) for host in hosts])]
    below = [Run(Setup(TierSetup(host, policy), TierSetup(lower, policy))) for host, lower in pairs]
    if options.ssd_gib_month is not None:
        kinds.append(("disk", Task(trace, machine, size), below))
    if options.object_gib_month is not None:
        speed = options.object_bytes_per_s
        remote = dataclasses.replace(machine, disk_read_bytes_per_s=speed, disk_write_bytes_per_s=speed, disk_latency_s=0.03)
        kinds.append(("object", Task(trace, remote, size), below))
    points: list[Point] = []
    with progress_bar(trace.name, len(trace) * sum(len(runs) for _, _, runs in kinds)) as progress:
        for kind, task, runs in kinds:
            points += ({**record, "lower": kind} for record in replay_all(task, runs, jobs=options.jobs, progress=progress))
    points.insert(0, _without(points[0]))
    return [priced(point, trace.span_s, options) for point in points]


def priced(point: Point, span_s: float, options: argparse.Namespace) -> Point:
    """A point with what it costs a month."""
    gpus = point["gpu_s"] / span_s / options.gpu_utilisation
    gib = {"host": point["capacity_bytes"] / _GIB, "lower": point["disk_capacity_bytes"] / _GIB}
    price = {"": 0.0, "disk": options.ssd_gib_month, "object": options.object_gib_month}[point["lower"]]
    costs = {
        "gpu": gpus * HOURS_A_MONTH * options.gpu_hour_price,
        "host": gib["host"] * options.dram_gib_month,
        "lower": gib["lower"] * price,
    }
    return {
        **point,
        "gpus": gpus,
        **{f"{name}_cost_per_month": cost for name, cost in costs.items()},
        "cost_per_month": sum(costs.values()),
    }


def cheapest(points: Iterable[Point], target_s: float) -> Point | None:
    """The cheapest point that meets the target and that kvtier can be configured for."""
    meeting = [point for point in points if point["ttft_p95_s"] <= target_s and point["lower"] != "object"]
    return min(meeting, key=lambda point: float(point["cost_per_month"]), default=None)


def configuration(point: Point, policy: str | None) -> str:
    """The YAML of a point. Raises ConfigError where it would not be accepted."""
    if not point["capacity_blocks"]:
        return "# cheapest without kvtier"
    more = {} if policy is None else {"policy": policy}
    tiers: list[dict[str, Any]] = [{"type": "host", "capacity": f"{-(-point['capacity_bytes'] // _MIB)}MiB", **more}]
    if point["lower"] == "disk":
        tiers.append({"type": "disk", "path": "/var/lib/kvtier", "capacity": f"{-(-point['disk_capacity_bytes'] // _MIB)}MiB", **more})
    Config.from_mapping({"tiers": tiers})
    items = ("\n    ".join(f"{key}: {value}" for key, value in tier.items()) for tier in tiers)
    return "\n".join(["tiers:", *(f"  - {item}" for item in items)])


def _sizes(shares: Sequence[float], trace: Trace, block_bytes: int, limit_bytes: int | None) -> list[int]:
    """Numbers of blocks to try, at most those that fit into the limit, which is tried as well."""
    limit = trace.num_unique if limit_bytes is None else limit_bytes // block_bytes
    sizes = {max(1, round(share * trace.num_unique)) for share in shares}
    return sorted({size for size in sizes if size <= limit} | ({limit} if 1 <= limit < trace.num_unique else set()))


def _without(record: Point) -> Point:
    """The same workload on an engine that computes everything."""
    zeros = {name: 0 for name, value in record.items() if name.endswith(("_rate", "_blocks", "_bytes")) and isinstance(value, (int, float))}
    times = {f"ttft_p{share}_s": record[f"ttft_without_p{share}_s"] for share in (50, 95, 99)}
    return {**record, **zeros, **times, "policy": "none", "lower": "", "share_of_optimum": None, "gpu_s": record["gpu_without_s"]}


def _table(points: Sequence[Point], best: Point | None, target_s: float) -> Table:
    """The points on the lower edge (nothing is both faster and cheaper), fastest last; the cheapest that meets the target is marked."""
    edge: list[Point] = []
    for point in sorted(points, key=lambda point: (point["cost_per_month"], point["ttft_p95_s"])):
        if not edge or point["ttft_p95_s"] < edge[-1]["ttft_p95_s"]:
            edge.append(point)
    shown = [points[0], *(point for point in edge if point is not points[0])][:_SHOWN]
    table = Table()
    for column in ("", "host", "below", "", "tokens hit", "TTFT p50 / p95 / p99 (s)", "GPUs", "GPU", "host", "below", "cost per month"):
        table.add_column(column, justify="right")
    for point in shown:
        mark = "->" if point is best else "ok" if point["ttft_p95_s"] <= target_s else ""
        times = " / ".join(f"{point[f'ttft_p{share}_s']:.2f}" for share in (50, 95, 99))
        costs = [f"{point[f'{name}cost_per_month']:,.2f}" for name in ("gpu_", "host_", "lower_", "")]
        sizes = [human(point["capacity_bytes"]), human(point["disk_capacity_bytes"]), point["lower"]]
        table.add_row(mark, *sizes, percent(point["token_hit_rate"]), times, f"{point['gpus']:.2f}", *costs)
    return table


def _answer(best: Point, without: Point) -> str:
    saved = without["cost_per_month"] - best["cost_per_month"]
    than = f"{abs(saved):,.2f} {'less' if saved >= 0 else 'more'} a month than without kvtier"
    return f"# p95 {best['ttft_p95_s']:.3g} s, {best['cost_per_month']:,.2f} a month, {than}; by simulation, prefill only"


def _draw(points: Sequence[Point], options: argparse.Namespace) -> None:
    try:
        from kvtier.sim.plot import plot_costs  # noqa: PLC0415 - takes matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib; install kvtier with the extra bench") from None
    if points:
        plot_costs(options.plot, points, options.target_p95)
