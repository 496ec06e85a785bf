"""Hit rate against capacity as a picture. Needs matplotlib (the extra ``bench``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kvtier.sim.report import name_of

GIB = 1 << 30


def plot_hit_rates(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One panel a trace; a line a policy, the optimum dashed, the endless cache dotted."""
    traces = list(dict.fromkeys(record["trace"] for record in records))
    figure = Figure(figsize=(5.5 * len(traces), 4.2), layout="constrained")
    panels = figure.subplots(1, len(traces), squeeze=False)
    for panel, trace in zip(panels[0], traces, strict=True):
        mine = sorted((record for record in records if record["trace"] == trace), key=lambda record: record["capacity_blocks"])
        for policy in sorted({name_of(record) for record in mine}):
            points = [(r["capacity_bytes"] / GIB, 100 * r["token_hit_rate"]) for r in mine if name_of(r) == policy]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=policy)
        best = {record["capacity_bytes"] / GIB: 100 * record["optimum_token_hit_rate"] for record in mine}
        panel.plot(list(best), list(best.values()), "k--", linewidth=1, label="optimum")
        panel.axhline(100 * mine[0]["ideal_token_hit_rate"], color="0.5", linestyle=":", linewidth=1, label="endless cache")
        panel.set(xscale="log", xlabel="capacity (GiB)", ylabel="token hit rate (%)", title=trace)
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_costs(path: Path, points: Sequence[dict[str, Any]], target_s: float) -> None:
    """Cost against the 95th percentile of the time to first token; what meets the target is filled."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    panel = figure.subplots()
    for is_met, colour in ((True, "C0"), (False, "none")):
        part = [point for point in points if (point["ttft_p95_s"] <= target_s) == is_met]
        panel.scatter([p["ttft_p95_s"] for p in part], [p["cost_per_month"] for p in part], s=18, facecolors=colour, edgecolors="C0")
    panel.axvline(target_s, color="k", linestyle="--", linewidth=1)
    panel.set(xlabel="time to first token, 95th percentile (s)", ylabel="cost per month")
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
