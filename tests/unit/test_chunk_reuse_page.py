"""The figures of the page on chunk reuse are those of the JSON, and its verdicts follow from them."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_pages
import chunk_reuse_page
import pytest


def item(name: str, task: str, value: float, interval: str, *, ratio: float = 0.15, method: str = "combined, primed") -> dict[str, object]:
    """A record of the quality benchmark."""
    params = {"task": task, "method": method, "recompute": ratio, "questions": 7, "sets": 2, "interval": interval}
    return {"name": name, "params": params, "value": value}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of docs/benchmarks."""
    monkeypatch.setattr(benchmark_pages, "FOLDER", tmp_path)
    return tmp_path


def write(folder: Path, name: str, records: list[dict[str, object]]) -> None:
    """A document of these records."""
    environment = {"kvtier": "1", "python": "3", "cores": 2, "cpu": "x", "native_core": True}
    (folder / f"{name}.json").write_text(json.dumps({"environment": environment, "records": records}))


def test_a_target_is_met_where_the_whole_interval_is(folder: Path) -> None:
    """Met, met in the mean, not met in the mean, missed; of a figure that has to be small the other way round."""
    intervals = {"answers retained": ("0.970 to 0.990", "0.910 to 0.920"), "KL of plain CacheBlend's": ("0.300 to 0.700", "0.900 to 1.100")}
    values = iter((0.98, 0.915, 0.4, 1.05))
    tasks = {"answers retained": ("single", "hops"), "KL of plain CacheBlend's": ("hops", "prose")}
    pairs = [(name, task, interval) for name in tasks for task, interval in zip(tasks[name], intervals[name], strict=True)]
    found = [item(name, task, next(values), interval) for name, task, interval in pairs]
    others = [item(name, task, 0.5, "0.500 to 0.500", method="combined, served again") for name, task, _ in pairs[:3]]
    write(folder, "blend", [*found, *others])
    head, _, *rows = (line.split("|")[3:-1] for line in chunk_reuse_page.targets().splitlines())
    assert [" primed ", " served again "] == head
    assert ["met", "missed", "met, but not beyond doubt", "not met"] == [row[0].split(": ")[1].strip() for row in rows]
    assert ["missed", "missed", "met", "not measured"] == [row[1].split(": ")[-1].strip() for row in rows]
    write(folder, "blend", [*found, item("F1 retained", "hops", 0.95, "0.940 to 0.960"), *others])
    assert "| hops: F1 kept | at least 0.93 | 0.950 [0.94, 0.96]: met | not measured |" in chunk_reuse_page.targets()


def test_tables_show_the_records(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By method and task; by method and ratio, with the time to first token where it was measured."""
    records = [
        item("mean KL", "hops", 0.1234, "0.100 to 0.200"),
        item("answers retained", "hops", 0.75, "0.600 to 0.900"),
        item("computed, of full prefill", "prose", 0.18, "0.180 to 0.180"),
        item("computed, of full prefill", "prose", 0.02, "0.020 to 0.020", ratio=0.0, method="none, primed"),
    ]
    write(folder, "some", records)
    write(folder, "chunks", [{"name": "of computing, combined", "params": {"ratio": 0.15}, "value": 0.28}])
    monkeypatch.setitem(chunk_reuse_page.COMMANDS, "some", "kvtier bench blend")
    page = chunk_reuse_page.quality("some")
    assert "| combined, primed |  | 0.123 [0.10, 0.20] |  |  |" in page
    assert "hops 7 of 2 sets" in page
    assert "| combined, primed |  | 0.750 [0.60, 0.90] |  |  |" in page
    assert "F1" not in page
    curve = chunk_reuse_page.curves("some")
    assert "| none, primed | 0% | 2% |  |" in curve
    assert "| combined, primed | 15% | 18% | 28% | 0.123 [0.10, 0.20] |  |  | 0.75 [0.60, 0.90] |" in curve


def test_margins_stand_beside_what_they_cost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ratio and least margin; nothing is computed by the engine where nobody looks, and prose has no answers to keep. A file of rows
    may hold other methods."""
    records = [
        item("answers retained", "hops", 0.75, "0.600 to 0.900"),
        item("computed, of full prefill", "hops", 0.17, "0.170 to 0.170"),
        item("answers retained", "hops", 0.9, "0.800 to 0.950"),
        item("computed by the engine", "hops", 0.12, "0.100 to 0.200"),
        item("computed, of full prefill", "hops", 0.29, "0.200 to 0.300"),
        item("computed by the engine", "prose", 0.5, "0.400 to 0.600"),
    ]
    for each in records[2:]:
        each["params"] = {**each["params"], "min_margin": 0.2}  # type: ignore[dict-item]
    records.append(item("answers retained", "hops", 0.1, "0.000 to 0.200", method="epic, primed"))
    write(folder, "some", records)
    monkeypatch.setitem(chunk_reuse_page.COMMANDS, "some", "kvtier bench blend")
    head, _, plain, checked = chunk_reuse_page.margins("some", "combined, primed").splitlines()[-4:]
    assert 11 == head.count(": ")
    assert "| 15% | 0 |  |  |  | 0.750 [0.60, 0.90] |  | 17% |  |  |  |  |  |" == plain
    assert "| 15% | 0.2 |  |  |  | 0.900 [0.80, 0.95] | 12% | 29% |  |  |  | 50% |  |" == checked


def test_layers_stand_in_their_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each group, a column for each kind of question that was asked."""
    groups = {"reused in layers 0 to 2, primed": 0.01, "reused in layers 3 to 5, primed": 0.25}
    records = [
        item("mean KL", task, kl, "0.000 to 0.500", method=name, ratio=0.0) for task in ("single", "hops") for name, kl in groups.items()
    ]
    write(folder, "some", records)
    monkeypatch.setitem(chunk_reuse_page.COMMANDS, "some", "kvtier bench blend")
    table = chunk_reuse_page.layers("some").splitlines()[-4:]
    assert "| Layers reused | KL, single | KL, hops |" == table[0]
    assert "| 0 to 2 | 0.010 [0.00, 0.50] | 0.010 [0.00, 0.50] |" == table[2]
    assert "| 3 to 5 | 0.250 [0.00, 0.50] | 0.250 [0.00, 0.50] |" == table[3]


def test_figures_of_one_kind_of_questions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each method; a target is shown that only this file has."""
    records = [item("mean KL", "hops", 0.0512, "0.040 to 0.068"), item("F1 retained", "hops", 0.936, "0.912 to 0.958")]
    write(folder, "blend-f1", records)
    write(folder, "blend", [item("answers retained", "hops", 0.75, "0.600 to 0.900")])
    monkeypatch.setitem(chunk_reuse_page.COMMANDS, "blend-f1", "kvtier bench blend")
    assert (
        "| combined, primed | 0.051 [0.04, 0.07] |  | 0.936 [0.91, 0.96] |  |"
        == chunk_reuse_page.one_kind("blend-f1", "hops").splitlines()[-1]
    )
    assert "| hops: F1 kept | at least 0.93 | 0.936 [0.91, 0.96]: met, but not beyond doubt |" in chunk_reuse_page.targets()
