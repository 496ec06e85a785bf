"""The figures of docs/explanation/chunk-reuse.md, made from the JSON under docs/benchmarks/ and from nothing else.

Used by generate_reference.py. Each table stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmark_pages import ROOT, about, document_of, is_there

PAGE = ROOT / "docs" / "explanation" / "chunk-reuse.md"
TASKS = ("single", "hops", "border", "prose")
CURVES = ("combined, primed", "epic, primed", "cacheblend, alone")
OPTIONS = "--model .cache/smollm2 --dtype bfloat16 --threads 1 --only-answered"
COMMANDS: dict[str, str] = {
    "blend": f"kvtier bench blend {OPTIONS} --items SETS"
    ' --variants "cacheblend, alone" "epic, primed" "prophetkv, primed" "combined, primed" "combined, served"',
    "blend-f1": f'kvtier bench blend {OPTIONS} --items SETS --tasks hops --variants "combined, served elsewhere"',
    "blend-methods": f"kvtier bench blend {OPTIONS} --items SETS --variants alone primed",
    "blend-ratios": f"kvtier bench blend {OPTIONS} --items SETS --ratio 0.05 0.15 0.3 0.5"
    ' --variants "cacheblend, alone" "epic, primed" "combined, primed" "none, primed" "none, alone"',
    "blend-margins": f"kvtier bench blend {OPTIONS} --items SETS --ratio 0.05 0.15"
    ' --min-margin 0 0.03 0.05 0.1 0.2 0.3 0.5 --variants "combined, primed"',
    "blend-served": f'kvtier bench blend {OPTIONS} --items SETS --min-margin 0 0.05 0.1 0.2 0.3 --variants "combined, served"',
    "blend-layers": f"kvtier bench blend {OPTIONS} --first 1000 --items SETS --questions 3 --tasks single hops border --layers 3",
}
"""What wrote each JSON, with ``--json``; the number of sets is the JSON's."""
TARGET_METHODS = ("combined, primed", "combined, served again", "combined, served elsewhere")
TARGETS = (
    ("single: answers kept", ("answers retained", "single"), 0.97, True),
    ("single: F1 kept", ("F1 retained", "single"), 0.97, True),
    ("hops: answers kept", ("answers retained", "hops"), 0.93, True),
    ("hops: F1 kept", ("F1 retained", "hops"), 0.93, True),
    ("hops: KL, of plain CacheBlend's", ("KL of plain CacheBlend's", "hops"), 0.5, False),
    ("prose: KL, of plain CacheBlend's", ("KL of plain CacheBlend's", "prose"), 1.0, False),
)
"""what, which figure, the bound, and whether it is the least that was wanted"""
VERDICTS = ("missed", "not met", "met, but not beyond doubt", "met")
"""by how many of the figure and the two ends of its interval are good enough"""


def chunk_reuse() -> str:
    """The page with its figures."""
    text = PAGE.read_text(encoding="utf-8")
    makers: Mapping[str, Callable[[], str]] = {
        "blend": lambda: quality("blend"),
        "blend-f1": lambda: one_kind("blend-f1", "hops"),
        "blend-targets": targets,
        "blend-methods": lambda: quality("blend-methods"),
        "blend-ratios": lambda: curves("blend-ratios"),
        "blend-margins": lambda: margins("blend-margins", TARGET_METHODS[0]),
        "blend-served": lambda: margins("blend-served", TARGET_METHODS[-1]),
        "blend-layers": lambda: layers("blend-layers"),
    }
    for name, make in makers.items():
        if not is_there(name.removesuffix("-targets")):
            continue
        pattern = rf"(<!-- figures: {name} -->\n).*?(<!-- end of figures -->)"
        text = re.sub(pattern, lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def quality(name: str) -> str:
    """Of each method: KL, and what is left of the answers, by task."""
    document = document_of(name)
    records = document["records"]
    found = {(item["name"], item["params"].get("method"), item["params"]["task"]): item for item in records}
    methods = list(dict.fromkeys(item["params"]["method"] for item in records if "method" in item["params"]))
    lines = _above(name, document)
    head = ["| Method, entries | " + " | ".join(TASKS) + " |", "| --- |" + " --- |" * len(TASKS)]
    for title, figures in (
        ("Mean KL", ["mean KL"]),
        ("KL, of `cacheblend, alone`'s on the same questions", ["KL of plain CacheBlend's"]),
        ("Answers that full prefill gives and that are kept; Rouge-L for prose", ["answers retained", "Rouge-L"]),
        ("F1 of what is written in place of these answers", ["F1 retained"]),
    ):
        rows = [(method, [_cell(found, figures, method, task) for task in TASKS]) for method in methods]
        body = [f"| {method} | " + " | ".join(cells) + " |" for method, cells in rows if any(cells)]
        lines += [f"{title}:", "", *head, *body, ""] if body else []
    return "\n".join(lines[:-1])


def one_kind(name: str, task: str) -> str:
    """Of each method all figures, of one kind of questions."""
    document = document_of(name)
    found = {(item["name"], item["params"].get("method"), item["params"]["task"]): item for item in document["records"]}
    figures = {"mean KL": "KL", "answers retained": "kept", "F1 retained": "F1 kept", "computed, of full prefill": "computed"}
    lines = [*_above(name, document), "| Method, entries | " + " | ".join(figures.values()) + " |", "| --- |" + " --- |" * len(figures)]
    methods = dict.fromkeys(key[1] for key in found if key[1])
    rows = [[method, *(_cell(found, [figure], method, task) for figure in figures)] for method in methods]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def targets() -> str:
    """What was wanted of ``combined``, and whether the figures show it, by where the entries come from."""
    records = [item for name in ("blend-f1", "blend") if is_there(name) for item in document_of(name)["records"]]  # the latter's count
    found = {(item["params"].get("method"), item["name"], item["params"]["task"]): item for item in records}
    methods = [method for method in TARGET_METHODS if any(key[0] == method for key in found)]
    head = " | ".join(method.removeprefix("combined, ") for method in methods)
    rows = [f"| At 15 % | wanted | {head} |", "| --- | --- |" + " --- |" * len(methods)]
    for what, key, wanted, is_least in TARGETS:
        if not any((method, *key) in found for method in methods):
            continue
        cells = [_found(found.get((method, *key)), wanted, is_least=is_least) for method in methods]
        rows.append(f"| {what} | {'at least' if is_least else 'at most'} {wanted} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _found(item: Mapping[str, Any] | None, wanted: float, *, is_least: bool) -> str:
    if item is None:
        return "not measured"
    low, high = (float(part) for part in item["params"]["interval"].split(" to "))
    bounds = (low, item["value"], high) if is_least else (-high, -item["value"], -low)
    verdict = VERDICTS[sum(bound >= (wanted if is_least else -wanted) for bound in bounds)]
    return f"{item['value']:.3f} [{low:.2f}, {high:.2f}]: {verdict}"


def _above(name: str, document: Mapping[str, Any]) -> list[str]:
    num_sets = max(item["params"]["sets"] for item in document["records"])
    command = COMMANDS[name].replace("SETS", str(num_sets))
    return [f"`{command}`", "", about(document["environment"]), "", counts(document["records"]), ""]


def counts(records: Sequence[Mapping[str, Any]]) -> str:
    """How many questions the figures are of."""
    parts = []
    for task in TASKS:
        params = next((item["params"] for item in records if item["params"]["task"] == task and item["name"] == "mean KL"), None)
        if params is None:
            continue
        full = next((item for item in records if item["params"]["task"] == task and item["name"] == "answered by full prefill"), None)
        asked = "" if full is None else f" (of {full['params']['questions']} asked)"
        parts.append(f"{task} {params['questions']}{asked} of {params['sets']} sets")
    return f"Questions: {', '.join(parts)}."


def layers(name: str) -> str:
    """What reusing some layers as they are changes, where all others are full prefill's."""
    document = document_of(name)
    found = {(item["name"], item["params"].get("method", ""), item["params"]["task"]): item for item in document["records"]}
    tasks = [task for task in TASKS if any(key[2] == task for key in found)]
    lines = [*_above(name, document), "| Layers reused | " + " | ".join(f"KL, {task}" for task in tasks) + " |"]
    lines.append("| --- |" + " --- |" * len(tasks))
    for method in dict.fromkeys(key[1] for key in found if key[1]):
        cells = [_cell(found, ["mean KL"], method, task) for task in tasks]
        lines.append(f"| {method.removeprefix('reused in layers ').removesuffix(', primed')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(name: str) -> str:
    """By recompute ratio, one table for each method."""
    document = document_of(name)
    found = {
        (item["name"], item["params"].get("method"), item["params"]["task"], item["params"].get("recompute")): item
        for item in document["records"]
    }
    times = {
        (item["name"].removeprefix("of computing, "), item["params"]["ratio"]): item["value"]
        for item in document_of("chunks")["records"]
        if item["name"].startswith("of computing, ")
    }
    lines = _above(name, document)
    columns = ("KL, hops", "KL, prose", "kept, single", "kept, hops", "kept, border", "Rouge-L, prose")
    lines += [
        "| Method, entries | recompute | computed | time to first token | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * (3 + len(columns)),
    ]
    names = {"KL": "mean KL", "kept": "answers retained", "Rouge-L": "Rouge-L"}
    for method in CURVES:
        ratios = sorted({key[3] for key in found if key[1] == method and key[3] is not None} | {0.0})
        for ratio in ratios:
            label = f"none, {method.split(', ')[1]}" if ratio == 0 else method
            cost = found.get(("computed, of full prefill", label, "prose", ratio))
            if cost is None:
                continue
            time = times.get((method.split(", ")[0], ratio))
            cells = [f"{ratio:.0%}", f"{cost['value']:.0%}", "" if time is None else f"{time:.0%}"]
            for column in columns:
                figure, task = column.split(", ")
                item = found.get((names[figure], label, task, ratio))
                cells.append("" if item is None else _with_interval(item, 2 if figure != "KL" else 3))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def margins(name: str, method: str) -> str:
    """Of one method, by ratio and least margin: answers kept, and what that costs."""
    document = document_of(name)
    found = {
        (item["name"], item["params"]["task"], item["params"]["recompute"], item["params"].get("min_margin", 0.0)): item
        for item in document["records"]
        if item["params"].get("method") == method
    }
    columns = [("answers retained", "kept"), ("computed by the engine", "by the engine"), ("computed, of full prefill", "computed")]
    head = [f"{task}: {text}" for task in TASKS for figure, text in columns if (task, figure) != ("prose", "answers retained")]
    lines = [*_above(name, document), "| recompute | least margin | " + " | ".join(head) + " |", "| ---: |" + " ---: |" * (1 + len(head))]
    for ratio, margin in sorted({key[2:] for key in found}):
        cells = [f"{ratio:.0%}", f"{margin:g}"]
        for task in TASKS:
            for figure, _ in columns[task == "prose" :]:
                item = found.get((figure, task, ratio, margin))
                cells.append("" if item is None else _with_interval(item, 3) if figure == "answers retained" else f"{item['value']:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: Mapping[tuple[str, str, str], Mapping[str, Any]], figures: Sequence[str], method: str, task: str) -> str:
    for figure in figures:
        item = found.get((figure, method, task))
        if item is not None:
            return _with_interval(item, 3)
    return ""


def _with_interval(item: Mapping[str, Any], digits: int) -> str:
    low, _, high = item["params"]["interval"].partition(" to ")
    return f"{item['value']:.{digits}f} [{float(low):.2f}, {float(high):.2f}]"
