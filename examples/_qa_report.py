"""The table, the chart and the JSON of multi_round_qa.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from _qa_engine import Answer
from rich.console import Console
from rich.table import Table

from kvtier.bench.report import environment


@dataclass(frozen=True)
class Exchange:
    """One question on one document, answered with and without kvtier."""

    stage: str
    document: str
    alone: Answer
    kvtier: Answer

    @property
    def is_identical(self) -> bool:
        """Whether both gave the same tokens."""
        return self.alone.token_ids == self.kvtier.token_ids


def print_table(console: Console, exchanges: Sequence[Exchange]) -> None:
    """One row per stage."""
    table = Table(title="Time to first token, median over the documents")
    for column in ("", "vLLM alone", "with kvtier", "times faster", "prompt tokens", "engine's own", "host memory", "disk", "same tokens"):
        table.add_column(column, justify="right" if column else "left")
    for stage in dict.fromkeys(one.stage for one in exchanges):
        row = [one for one in exchanges if one.stage == stage]
        alone = statistics.median(one.alone.ttft_s for one in row)
        kvtier = statistics.median(one.kvtier.ttft_s for one in row)
        table.add_row(
            stage,
            f"{1e3 * alone:.0f} ms",
            f"{1e3 * kvtier:.0f} ms",
            f"{alone / kvtier:.1f}",
            str(sum(one.kvtier.prompt_tokens for one in row)),
            str(sum(one.kvtier.engine_tokens for one in row)),
            str(sum(one.kvtier.host_tokens for one in row)),
            str(sum(one.kvtier.disk_tokens for one in row)),
            "yes" if all(one.is_identical for one in row) else "NO",
        )
    console.print(table)


def write_json(path: Path, exchanges: Sequence[Exchange]) -> None:
    """Everything that was measured."""
    document = {"environment": environment(), "exchanges": [asdict(one) for one in exchanges]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def write_chart(path: Path, exchanges: Sequence[Exchange]) -> None:
    """Time to first token of every question, side by side."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, needed once

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    places = range(len(exchanges))
    axes.bar([place - 0.2 for place in places], [one.alone.ttft_s for one in exchanges], 0.4, label="vLLM alone", color="#b8b8b8")
    axes.bar([place + 0.2 for place in places], [one.kvtier.ttft_s for one in exchanges], 0.4, label="with kvtier", color="#2a6fbb")
    axes.set_xticks(list(places), [f"{one.stage}\n{one.document.replace(': ', chr(10))}" for one in exchanges], fontsize=8)
    axes.set_ylabel("time to first token, s")
    axes.set_title("Questions over long documents that do not fit the engine's KV memory together")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def verdict(exchanges: Sequence[Exchange]) -> str | None:
    """What went wrong, or None."""
    if not all(one.is_identical for one in exchanges):
        return "tokens differ between vLLM alone and vLLM with kvtier"
    if not any(one.kvtier.host_tokens for one in exchanges):
        return "nothing was reused from host memory"
    if not any(one.kvtier.disk_tokens for one in exchanges):
        return "nothing was reused from disk after the restart"
    return None
