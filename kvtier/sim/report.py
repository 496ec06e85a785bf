"""Records of runs as tables for people: in the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kvtier.units import format_size

BEGIN, END = "<!-- printed by kvtier simulate -->", "<!-- end of what kvtier simulate printed -->"
"""a Markdown file with these lines keeps what is around them"""

Record = dict[str, Any]


def table_of(records: Sequence[Record]) -> Table:
    """What a run came to, one a line."""
    has_disk = any(record["disk_capacity_blocks"] for record in records)
    columns = ["trace", "policy", "size", "host", *(["disk"] if has_disk else []), "hit", "of optimum", "requests hit"]
    columns += [*(["from disk", "written"] if has_disk else []), "evicted", "TTFT p50 / p95 / p99 (s)", "without", "policy"]
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("trace", "policy") else "right")
    for record in records:
        table.add_row(*_cells(record, has_disk=has_disk))
    return table


def _cells(record: Record, *, has_disk: bool) -> list[str]:
    fraction = record["capacity_fraction"]
    block_bytes = record["capacity_bytes"] // record["capacity_blocks"]
    cells = [record["trace"], name_of(record), "" if fraction is None else f"{100 * fraction:g} %", human(record["capacity_bytes"])]
    cells += [human(record["disk_capacity_blocks"] * block_bytes)] if has_disk else []
    cells += [percent(record["token_hit_rate"]), percent(record["share_of_optimum"]), percent(record["request_hit_rate"])]
    cells += [percent(record["disk_token_hit_rate"]), human(record["disk_written_bytes"])] if has_disk else []
    cells += [f"{record['host_evicted_blocks'] + record['disk_evicted_blocks']:,}"]
    cells += [" / ".join(f"{record[f'{name}_p{share}_s']:.2f}" for share in (50, 95, 99)) for name in ("ttft", "ttft_without")]
    return [*cells, f"{record['policy_us_per_request']:.0f} us"]


def name_of(record: Record) -> str:
    """A policy, and the hints it was given."""
    if record["hints"] == "off":
        return str(record["policy"])
    wrong = f" ({record['wrong_hints']:.0%} wrong)" if record["wrong_hints"] else ""
    return f"{record['policy']} + {record['hints']}{wrong}"


def human(num_bytes: float) -> str:
    """A size to three figures: ``1.25 GiB``."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return format_size(int(num_bytes))


def percent(share: float | None) -> str:
    """A share of one to a tenth of a percent."""
    return "" if share is None else f"{100 * share:.1f} %"


def markdown_of(records: Sequence[Record]) -> str:
    """A table a trace: policies by size, each cell the token hit rate and its share of the optimum; and the means over all points."""
    sized = [record for record in records if record["capacity_fraction"] is not None]
    policies = list(dict.fromkeys(name_of(record) for record in sized))
    parts = []
    for trace in dict.fromkeys(record["trace"] for record in sized):
        of_trace = [record for record in sized if record["trace"] == trace]
        parts.append(_table_of_trace(trace, of_trace, policies))
    rows = []
    for policy in policies:
        mine = [record for record in sized if name_of(record) == policy]
        costs = _mean(record["policy_us_per_request"] for record in mine)
        rows.append([f"`{policy}`", f"{100 * _mean_share(mine):.1f} %", f"{costs:.0f}"])
    head = ["policy", f"mean share of the optimum over {len(sized) // max(1, len(policies))} points", "us per request"]
    return "\n".join([*parts, "### All traces\n", _rows(head, rows)])


def _table_of_trace(trace: str, records: Sequence[Record], policies: Iterable[str]) -> str:
    first = records[0]
    fractions = list(dict.fromkeys(record["capacity_fraction"] for record in records))
    rows = []
    for policy in policies:
        mine = {record["capacity_fraction"]: record for record in records if name_of(record) == policy}
        cells = [
            f"{100 * mine[f]['token_hit_rate']:.1f} ({100 * (mine[f]['share_of_optimum'] or 0):.1f})" if f in mine else ""
            for f in fractions
        ]
        rows.append([f"`{policy}`", *cells, f"{100 * _mean_share(mine.values()):.1f} %"])
    by_size = {record["capacity_fraction"]: record for record in records}
    rows.append(["optimum", *(f"{100 * by_size[f]['optimum_token_hit_rate']:.1f}" for f in fractions), ""])
    about = (
        f"{first['requests']:,} requests, {first['unique_blocks']:,} unique blocks of {first['block_tokens']} tokens; "
        f"an endless cache hits {percent(first['ideal_token_hit_rate'])} of the tokens."
    )
    return f"### {trace}\n\n{about}\n\n{_rows(['policy', *(f'{100 * f:g} %' for f in fractions), 'mean share'], rows)}"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _mean_share(records: Iterable[Record]) -> float:
    return _mean(record["share_of_optimum"] for record in records if record["share_of_optimum"] is not None)


def write_markdown(path: Path, text: str) -> None:
    """Writes a file; where one with the two marks is there, only what lies between them."""
    before, after = "", ""
    if path.exists():
        old = path.read_text(encoding="utf-8")
        if BEGIN in old and END in old:
            before, after = old.partition(BEGIN)[0], old.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after or chr(10)}", encoding="utf-8")
