"""Figures with intervals from many rows. Questions of one set share its documents, so whole sets are drawn again, not questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FULL = "full"
"""the label of full prefill's own rows"""
ROUNDED = "full, float32"
"""the label of full prefill's in another precision: what rounding alone changes"""
NUM_DRAWS = 2000
Row = Mapping[str, Any]


class MissingMarginError(Exception):
    """Rows do not say how sure the model was, or what full prefill answers."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(rows: Sequence[Row], field: str, *, over: str | None = None) -> Estimate:
    """The mean of a field; with ``over``, the quotient of its sum and that of another one. By 2,000 draws of sets.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no rows")
    sums: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        pair = sums[row["set"]]
        pair[0] += float(row[field])
        pair[1] += 1.0 if over is None else float(row[over])
    table = np.array(list(sums.values()))
    draws = np.random.default_rng(1).integers(0, len(table), (NUM_DRAWS, len(table)))
    drawn = table[draws].sum(1)
    values = drawn[:, 0] / np.maximum(drawn[:, 1], 1e-12)
    low, high = np.quantile(values, (0.025, 0.975))
    total = table.sum(0)
    return Estimate(float(total[0] / max(total[1], 1e-12)), float(low), float(high))


def by_variant(rows: Sequence[Row], task: str) -> dict[str, dict[str, Any]]:
    """For each variant the figures of one task.

    ``retained``: of the questions that full prefill answers, those that are still answered; absent where it answers none, and
    ``retained_f1``: F1 of what is written to them, 1 with full prefill. ``f1``, and ``rouge_l`` for prose: of what is written.
    ``unsure``: with a least margin, what full prefill answers in the method's place.
    """
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["task"] == task:
            groups[row["variant"]].append(row)
    table = {}
    for variant, members in groups.items():
        answered = [row for row in members if row["full_is_right"] or task == "prose"]
        figures: dict[str, Any] = {"n": len(members), "answered": len(answered), "sets": len({row["set"] for row in members})}
        figures |= {field: estimate(members, field) for field in ("kl", "agreement", "nll_change", "share", "cost")}
        if all("is_unsure" in row for row in members):
            figures["unsure"] = estimate(members, "is_unsure")
        overlap = "rouge_l" if task == "prose" else "f1"
        if all(overlap in row for row in members):
            figures[overlap] = estimate(members, overlap)
        if task != "prose" and answered:
            figures |= {"retained": estimate(answered, "is_right"), "kl_answered": estimate(answered, "kl")}
            if overlap in figures:
                figures["retained_f1"] = estimate(answered, overlap)
        table[variant] = figures
    return table


def of_ratio(rows: Sequence[Row], ratio: float) -> list[Row]:
    """Those of one ratio, with full reuse and full prefill, both of them, to compare with."""
    return [row for row in rows if row["ratio"] in (0.0, ratio) or row["variant"] in (FULL, ROUNDED)]


def with_least_margin(rows: Sequence[Row], min_margin: float) -> list[Row]:
    """As served with ``blend.min_margin``: answers whose first token has less are full prefill's, which costs as much as that on top.

    Full prefill in another precision is not served: its rows are left out.

    Raises:
        MissingMarginError: rows of a method lack their margin, or full prefill's row.
    """
    full = {(row["set"], row["question"]): row for row in rows if row["variant"] == FULL}
    return [row if row["variant"] == FULL else _served(row, full, min_margin) for row in rows if row["variant"] != ROUNDED]


def _served(row: Row, full: Mapping[tuple[int, int], Row], min_margin: float) -> Row:
    where = (row["set"], row["question"])
    if "margin" not in row or where not in full:
        raise MissingMarginError(f"question {where[1]} of set {where[0]}, {row['variant']}: no margin, or no row of full prefill")
    if row["margin"] >= min_margin:
        return {**row, "is_unsure": False}
    own = {name: row[name] for name in ("variant", "ratio", "share")}
    return {**full[where], **own, "cost": row["cost"] + 1.0, "is_unsure": True}


def paired(rows: Sequence[Row], beside: Sequence[Row], task: str, variant: str, baseline: str) -> Estimate | None:
    """The quotient of two variants' mean KL over the same questions; ``None`` where they share none.

    The baseline's rows are those in ``beside``: without a least margin, whatever ``rows`` were served with.
    """
    values: defaultdict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    for group, name in ((rows, variant), (beside, baseline)):
        for row in group:
            if row["task"] == task and row["variant"] == name:
                values[row["set"], row["question"]][name] = row["kl"]
    both = [{"set": key[0], "ours": pair[variant], "theirs": pair[baseline]} for key, pair in values.items() if len(pair) == 2]
    return estimate(both, "ours", over="theirs") if both else None
