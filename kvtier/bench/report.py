"""What all benchmarks share: medians, the table, and the JSON document.

The JSON is ``{"environment": {...}, "records": [{"name", "params", "value", "unit", "limit", "fraction", "peers"}]}`` and stays so.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import kvtier
from kvtier import _native
from kvtier.machine import cpu_model, version_of


@dataclass(frozen=True, slots=True)
class Record:
    """One figure: the median ``value`` in ``unit``; ``spread``: from quartile to quartile, of three values or fewer the range."""

    name: str
    params: Mapping[str, object]
    value: float
    unit: str
    spread: float = 0.0
    limit: float | None = None
    """the physical limit measured in the same run, or the stated target, in the same unit"""
    fraction: float | None = None
    """value / limit"""
    peers: Mapping[str, float] = field(default_factory=dict)


def time_rounds(function: Callable[[], object], *, rounds: int, warm_up: int = 2) -> list[float]:
    """Seconds of each of ``rounds`` calls, after ``warm_up`` that are not counted."""
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def record(name: str, params: Mapping[str, object], times_s: Sequence[float], unit: str, **more: object) -> Record:
    """A record of times given in seconds, as ``us`` or ``ms``. ``more``: ``limit`` and ``peers``, in ``unit``."""
    scale = {"us": 1e6, "ms": 1e3, "s": 1.0}[unit]
    values = sorted(scale * seconds for seconds in times_s)
    spread = values[(3 * len(values)) // 4] - values[len(values) // 4] if len(values) > 3 else values[-1] - values[0]
    value = statistics.median(values)
    limit = more.get("limit")
    peers = more.get("peers", {})
    assert limit is None or isinstance(limit, float)
    assert isinstance(peers, Mapping)
    return Record(name, params, value, unit, spread, limit, None if limit is None else value / limit, peers)


def in_turns(functions: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """What each function returned in each round; the order changes from round to round, and the first round does not count."""
    values: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        order = list(range(len(functions)))
        for index in order if number % 2 else order[::-1]:
            values[index].append(functions[index]())
    return [each[1:] for each in values]


def rates(
    name: str, params: dict[str, object], values: Sequence[float], limits: Sequence[float], *, peers: Mapping[str, float] | None = None
) -> Record:
    """A record of rates in bytes per second beside their limit; ``peers`` in GB/s."""
    ordered = sorted(value / 1e9 for value in values)
    value, limit = statistics.median(ordered), statistics.median(limits) / 1e9
    spread = ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]
    return Record(name, params, value, "GB/s", spread, limit, value / limit, peers or {})


def environment() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "kvtier": kvtier.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "native_core": _native.is_native,
        "lmcache": version_of("lmcache"),
    }


def publish(title: str, records: Sequence[Record], json_path: Path | None) -> None:
    """Prints the table and, where a path is given, writes the JSON."""
    rows = [_cells(item) for item in records]
    try:
        from rich.console import Console  # noqa: PLC0415 - a machine lent for its GPU may have nothing but numpy
        from rich.table import Table  # noqa: PLC0415
    except ImportError:
        print("\n".join([title, *(" | ".join(row) for row in rows)]))
    else:
        table = Table(title=title)
        for column in ("what", "parameters", "median", "spread", "unit", "target or limit", "of it", "peers"):
            table.add_column(column, justify="left" if column in ("what", "parameters", "peers") else "right")
        for row in rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    if json_path is not None:
        write(records, json_path)


def write(records: Sequence[Record], json_path: Path) -> None:
    """The JSON of these figures, in place of what the file had."""
    document = {"environment": environment(), "records": [asdict(item) for item in records]}
    json_path.write_text(json.dumps(document, indent=1) + "\n")


def _cells(item: Record) -> tuple[str, ...]:
    return (
        item.name,
        ", ".join(f"{key}={value}" for key, value in item.params.items()),
        f"{item.value:.3g}",
        f"{item.spread:.2g}",
        item.unit,
        "" if item.limit is None else f"{item.limit:.3g}",
        "" if item.fraction is None else f"{item.fraction:.0%}",
        ", ".join(f"{name} {value:.3g}" for name, value in item.peers.items()),
    )
