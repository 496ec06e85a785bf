"""The pages of docs/ that show figures, made from the JSON under docs/benchmarks/ and from nothing else.

``kvtier bench NAME --json docs/benchmarks/NAME.json`` writes what was measured; ``make demo`` leaves ``.cache/demo/demo.json``, which is
copied to ``docs/benchmarks/demo.json``. Used by generate_reference.py.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "benchmarks"

HEAD = """<!-- printed by scripts/generate_reference.py from the JSON beside it; measure again to change it -->

# Benchmarks

Every figure is a median of one run of the command above its table. *Spread* is the distance between the quartiles, of three rounds or
fewer the range. A *limit* was measured in the same run: what the hardware gives to the plainest program that moves the same bytes. A
*target* is what the project set itself. *Peers* did the same work in the same run, in the same unit. LMCache has no copier for paged
memory on a CPU: where it copies, that is its fallback in torch, not its way to a GPU. What no machine has shown is not here.
"""

COMMANDS: Mapping[str, str] = {
    "engine": "kvtier bench engine --model .cache/smollm2",
    "chunks": "kvtier bench chunks --model .cache/smollm2 --rounds 3",
    "control": "kvtier bench control",
    "copy": "kvtier bench copy",
    "disk": "kvtier bench disk",
    "tier": "kvtier bench tier",
    "sharing": "kvtier bench sharing --model .cache/smollm2 --rounds 3",
    "remote": "kvtier bench remote --rounds 11",
    "serve": "kvtier bench serve",
    "faults": "kvtier bench faults --model .cache/smollm2",
    "gpu": "make gpu-check",
    "gpu-chunks": "kvtier bench gpu-chunks",
}
"""Benchmarks in the order of the page, and what measures them."""

NOT_MEASURED: Mapping[str, str] = {
    "faults": "Faults: not yet measured on a machine that did nothing else.",
    "gpu": "GPU: not yet measured.",
    "gpu-chunks": "Chunk reuse on a GPU: not yet measured.",
}


def benchmarks_page() -> str:
    """The page docs/benchmarks/README.md."""
    parts = [HEAD]
    for name, command in COMMANDS.items():
        path = FOLDER / f"{name}.json"
        if path.is_file():
            document = json.loads(path.read_text(encoding="utf-8"))
            parts.append(f"## {name}\n\n`{command}`\n\n{about(document['environment'])}\n\n{table(document['records'])}\n")
        elif name in NOT_MEASURED:
            parts.append(f"## {name}\n\n{NOT_MEASURED[name]}\n")
    return "\n".join(parts)


def about(environment: Mapping[str, Any]) -> str:
    """One line on the machine."""
    core = "" if environment["native_core"] else ", without the compiled core"
    return f"kvtier {environment['kvtier']}, Python {environment['python']}, {environment['cores']} cores of {environment['cpu']}{core}."


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """All figures of a benchmark."""
    has_peers = any(item["peers"] for item in records)
    rows = [
        "| What | Parameters | Median | Spread | Unit | Limit or target | Of it |" + " Peers |" * has_peers,
        "| --- | --- | ---: | ---: | --- | ---: | ---: |" + " --- |" * has_peers,
    ]
    for item in records:
        params = ", ".join(f"{key} {value}" for key, value in item["params"].items())
        limit = "" if item["limit"] is None else number(item["limit"])
        share = "" if item["fraction"] is None else f"{item['fraction']:.0%}"
        cells = [item["name"], params, number(item["value"]), number(item["spread"]), item["unit"], limit, share]
        if has_peers:
            cells.append(", ".join(f"{name} {number(value)}" for name, value in item["peers"].items()))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def number(value: float) -> str:
    """Three digits that count."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def readme() -> str:
    """README.md with its figures, each between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, make in (("demo", demo_figures), ("control", control_figures), ("engine", engine_figures)):
        pattern = rf"(<!-- figures: {name} -->\n).*?(<!-- end of figures -->)"
        text = re.sub(pattern, lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def demo_figures() -> str:
    """What ``make demo`` showed."""
    document = json.loads((FOLDER / "demo.json").read_text(encoding="utf-8"))
    exchanges = document["exchanges"]
    rows = ["| | vLLM alone | with kvtier | times faster | tokens from | same tokens |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for stage in dict.fromkeys(one["stage"] for one in exchanges):
        these = [one for one in exchanges if one["stage"] == stage]
        alone, kvtier = (1e3 * statistics.median(one[side]["ttft_s"] for one in these) for side in ("alone", "kvtier"))
        loaded = {"host memory": "host_tokens", "disk": "disk_tokens"}
        shares = {place: sum(one["kvtier"][key] for one in these) for place, key in loaded.items()}
        prompt = sum(one["kvtier"]["prompt_tokens"] for one in these)
        sources = [f"{place}: {count} of {prompt}" for place, count in shares.items() if count]
        same = "yes" if all(one["alone"]["token_ids"] == one["kvtier"]["token_ids"] for one in these) else "NO"
        cells = (stage, f"{alone:.0f} ms", f"{kvtier:.0f} ms", f"{alone / kvtier:.1f}", ", ".join(sources) or "nowhere yet", same)
        rows.append("| " + " | ".join(cells) + " |")
    sizes = [one["kvtier"]["prompt_tokens"] for one in exchanges]
    title = f"Time to first token of `make demo`, prompts of {min(sizes)} to {max(sizes)} tokens."
    return f"{title} {about(document['environment'])}\n\n" + "\n".join(rows)


def engine_figures() -> str:
    """Time to first token as a share of computing."""
    records = records_of("engine")
    shares = {(item["name"], item["params"].get("tokens")): item["value"] for item in records}
    rows = ["| Prompt | from host memory | from disk, after a restart |", "| --- | ---: | ---: |"]
    for tokens in (900, 3600):
        host, disk = (shares[f"of computing, {place}", tokens] for place in ("host", "disk"))
        rows.append(f"| {tokens} tokens | {host:.1%} of computing | {disk:.1%} |")
    overhead = shares["storing without reuse", None]
    tail = f"Where nothing is ever used again, storing everything takes {overhead:.3f} of the time without kvtier."
    return f"`{COMMANDS['engine']}`:\n\n" + "\n".join(rows) + f"\n\n{tail}"


def control_figures() -> str:
    """The figures on which the README makes a claim."""
    chosen = ("lookup, all hit", "scheduler half, one step", "put + evict, memory", "put + evict, disk, beyond the I/O")
    return f"`{COMMANDS['control']}`:\n\n" + table([item for item in records_of("control") if item["name"] in chosen])


def records_of(name: str) -> list[dict[str, Any]]:
    """The records of a benchmark."""
    records: list[dict[str, Any]] = document_of(name)["records"]
    return records


def is_there(name: str) -> bool:
    """Whether something was measured."""
    return (FOLDER / f"{name}.json").is_file()


def document_of(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return document
