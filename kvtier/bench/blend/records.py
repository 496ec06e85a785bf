"""The figures of a quality run as records: means over questions, each with its 95 % interval by drawing whole sets again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from kvtier.bench.blend.summary import FULL, Estimate, Row, by_variant, of_ratio, paired, with_least_margin
from kvtier.bench.blend.tasks import TASKS
from kvtier.bench.report import Record

BASELINE = "cacheblend, alone"
RETAINED: Mapping[str, float] = {"single": 0.97, "hops": 0.93}
"""targets, of the questions answered by full prefill: the share that is still answered, and F1"""
QUOTIENT: Mapping[str, float] = {"hops": 0.5}
"""targets: mean KL as a share of the baseline's"""


def records(rows: Sequence[Row], ratios: Sequence[float], min_margins: Sequence[float] = (0.0,)) -> Iterator[Record]:
    """Of each task, least margin, ratio and variant."""
    for task in TASKS:
        full = by_variant(rows, task).get(FULL)
        if full is not None and task != "prose":
            params = {"task": task, "questions": full["n"], "sets": full["sets"]}
            yield Record("answered by full prefill", params, full["answered"] / full["n"], "ratio")
        for min_margin in min_margins:
            served = with_least_margin(rows, min_margin) if min_margin else rows
            for ratio in (0.0, *sorted({*ratios, 1.0})):
                found = _of_task([row for row in served if row["ratio"] == ratio], of_ratio(rows, ratio), task, ratio)
                more = {"min_margin": min_margin} if min_margin else {}
                yield from (replace(record, params={**record.params, **more}) for record in found)


def _of_task(rows: Sequence[Row], beside: Sequence[Row], task: str, ratio: float) -> Iterator[Record]:
    for variant, figures in by_variant(rows, task).items():
        if variant == FULL:
            continue
        params = {"task": task, "method": variant, "recompute": ratio, "questions": figures["n"], "sets": figures["sets"]}
        wanted: list[tuple[str, Estimate | None, str, float | None]] = [
            ("mean KL", figures["kl"], "nats", None),
            ("KL of plain CacheBlend's", paired(rows, beside, task, variant, BASELINE), "ratio", QUOTIENT.get(task)),
            ("answers retained", figures.get("retained"), "ratio", RETAINED.get(task)),
            ("F1 retained", figures.get("retained_f1"), "ratio", RETAINED.get(task)),
            ("Rouge-L", figures.get("rouge_l"), "ratio", None),
            ("computed, of full prefill", figures["cost"], "ratio", None),
            ("computed by the engine", figures.get("unsure"), "ratio", None),
        ]
        for name, estimate, unit, target in wanted:
            if estimate is not None:
                interval = {"interval": f"{estimate.low:.3f} to {estimate.high:.3f}"}
                share = None if target is None else estimate.value / target
                yield Record(name, {**params, **interval}, estimate.value, unit, 0.0, target, share)
