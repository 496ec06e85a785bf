"""Arguments of ``kvtier simulate`` and ``kvtier plan``. Imports nothing heavy: the command line always reads it."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from kvtier.sim.model import Machine
from kvtier.units import parse_duration, parse_size

FORMATS = ("bailian", "kv-events", "mooncake", "recording", "sessions")
_MACHINE_HELP = {
    "kv_bytes_per_token": "bytes of KV a token, all layers and ranks",
    "prefill_tokens_per_s": "prefill speed at the beginning of a prompt",
    "double_cost_context": "tokens of context at which a token costs twice as much to compute as the first",
    "overhead_s": "seconds before a first token besides loading and computing",
    "host_bytes_per_s": "bytes per second from host memory to the GPU",
    "disk_read_bytes_per_s": "bytes per second read from the disk",
    "disk_write_bytes_per_s": "bytes per second written to the disk",
    "disk_latency_s": "seconds of one disk transfer besides its bytes",
}


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``kvtier simulate``."""
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="a trace; its format is seen, or named by --format")
    _add_trace(parser)
    parser.add_argument("--verify", action="store_true", help="compare a recording with the simulator event by event, and do nothing else")
    parser.add_argument("--config", type=Path, metavar="FILE", help="take tiers and settings from this YAML file")
    parser.add_argument("--policy", default="default", metavar="P[,P...]", help="eviction policies, or all (default: default)")
    parser.add_argument(
        "--capacity-fraction",
        type=fractions,
        metavar="F[,F...]",
        help="sizes of host memory as shares of the trace's unique blocks (without --config: 0.001,0.01,0.05,0.1,0.2,0.5)",
    )
    parser.add_argument(
        "--hints",
        type=lambda text: text.split(","),
        default=["off"],
        metavar="KIND[,KIND...]",
        help="give hints, where the trace knows sessions: off, tool_call, next_use (default: off)",
    )
    parser.add_argument(
        "--wrong-hints",
        type=_shares,
        default=[0.0],
        metavar="F[,F...]",
        help="shares of wrong hints, 0 to 1 (default: 0)",
    )
    _add_machine(parser)
    parser.add_argument("--jobs", type=_positive, metavar="N", default=os.cpu_count() or 1, help="runs at the same time (default: CPUs)")
    parser.add_argument("--json", type=file_to_write, metavar="OUT", help="write one record per run")
    parser.add_argument("--plot", type=file_to_write, metavar="PNG", help="draw hit rate against capacity")
    parser.add_argument(
        "--markdown", type=file_to_write, metavar="FILE", help="write the tables of hit rates; between marks, where FILE has them"
    )


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``kvtier plan``."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a trace or a recording")
    _add_trace(parser)
    parser.add_argument(
        "--target-p95", type=_duration, required=True, metavar="TIME", help="time to first token to meet, 95th percentile: 0.5s"
    )
    parser.add_argument("--gpu-hour-price", type=_price, required=True, metavar="X", help="price of a GPU for an hour")
    parser.add_argument("--dram-gib-month", type=_price, required=True, metavar="X", help="price of a GiB of host memory for a month")
    parser.add_argument(
        "--ssd-gib-month", type=_price, metavar="X", help="price of a GiB of disk for a month; without it no disk is planned"
    )
    parser.add_argument("--object-gib-month", type=_price, metavar="X", help="price of a GiB of object store for a month")
    parser.add_argument("--object-bytes-per-s", type=_rate, default=1e9, metavar="X", help="speed of the object store (default: 1GB/s)")
    parser.add_argument(
        "--gpu-utilisation", type=_share, default=0.6, metavar="F", help="busy share of the GPUs to plan for (default: 0.6)"
    )
    parser.add_argument("--max-host", type=_size, metavar="SIZE", help="host memory at most")
    parser.add_argument("--max-disk", type=_size, metavar="SIZE", help="disk at most")
    parser.add_argument("--policy", default="default", metavar="P", help="eviction policy of all tiers (default: default)")
    _add_machine(parser)
    parser.add_argument("--jobs", type=_positive, metavar="N", default=os.cpu_count() or 1, help="runs at the same time (default: CPUs)")
    parser.add_argument("--json", type=file_to_write, metavar="OUT", help="write every point that was tried")
    parser.add_argument("--plot", type=file_to_write, metavar="PNG", help="draw cost against time to first token")


def file_to_write(text: str) -> Path:
    """The type of an option that names a file, which may be there already."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} is not a file that this process may write")
    return path


def machine_of(options: argparse.Namespace) -> Machine:
    """The machine that the options describe. Raises ValueError."""
    return Machine(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Machine)})


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, help="format of the trace (default: what it looks like)")
    parser.add_argument("--group", type=_positive, metavar="N", help="make one block of N (default: 4 for sessions, else 1)")
    parser.add_argument("--hours", type=_hours, metavar="H", help="sessions: start them within H hours, 0: all at once (default: 8)")
    parser.add_argument("--seed", type=int, metavar="N", help="sessions: seed of their starts (default: 7)")
    parser.add_argument("--skip-bad", action="store_true", help="count broken lines and go on")
    parser.add_argument(
        "--engine-block-tokens", type=_positive, default=16, metavar="N", help="tokens of the engine's own blocks (default: 16)"
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the machine (a model; the defaults stand for Llama-3.1-8B on one GPU of the H100 class)")
    for field in dataclasses.fields(Machine):
        kind = _size if field.name == "kv_bytes_per_token" else _rate if field.name.endswith("_bytes_per_s") else float
        text = f"{_MACHINE_HELP[field.name]} (default: {field.default:g})"
        group.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, metavar="X", help=text)


def fractions(text: str) -> list[float]:
    """Shares of one, separated by commas."""
    return [_share(part) for part in text.split(",")]


def _shares(text: str) -> list[float]:
    return [_number(part, lambda value: 0 <= value <= 1, "a number from 0 to 1") for part in text.split(",")]


def _share(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "a number above 0 and up to 1")


def _price(text: str) -> float:
    return _number(text, lambda value: 0 <= value < 1e12, "a number of at least 0")


def _hours(text: str) -> float:
    return _number(text, lambda value: 0 <= value < 1e6, "a number of at least 0")


def _number(text: str, is_allowed: object, allowed: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (callable(is_allowed) and is_allowed(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _rate(text: str) -> float:
    try:
        return float(parse_size(text.removesuffix("/s")))
    except ValueError:
        return _number(text, lambda value: 0 < value < 1e18, "a rate: 50GB, or bytes per second")


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
