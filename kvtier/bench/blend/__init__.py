"""``kvtier bench blend``: how near answers with reused chunks come to those of full prefill, by method, on a real model.

Every row is written to a file as soon as it is known, and sets that are in the file are not run again: a long run can be
interrupted and continued, or extended. Needs transformers and a checkpoint; slow on a CPU: minutes for each set of documents.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier.bench.blend.summary import by_variant, paired
from kvtier.bench.blend.tasks import TASKS, make_set

if TYPE_CHECKING:
    from kvtier.bench.blend.quality import Encode, Variant
    from kvtier.blend.model import BlendModel

__all__ = ["BASELINE", "add_arguments", "report", "run"]

BASELINE = "cacheblend, alone"
OVERLAPS = {"retained": "retained", "f1": "F1", "rouge_l": "Rouge-L"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--model", metavar="DIR", help="a checkpoint of a supported family (default: KVTIER_TEST_MODEL)")
    parser.add_argument("--rows", type=Path, metavar="FILE", default=Path("blend-rows.jsonl"), help="where rows are kept and continued")
    parser.add_argument("--items", type=int, default=4, help="sets of documents, fourteen questions each (default: 4)")
    parser.add_argument("--first", type=int, default=0, help="number of the first set (default: 0)")
    parser.add_argument("--ratio", type=float, default=0.15, help="share of the chunks' tokens computed anew (default: 0.15)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only variants whose label contains one of these")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="only questions of these kinds (default: all)")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model and its KV (default: float32)")
    parser.add_argument("--report-only", action="store_true", help="print what the file holds, run nothing")


def run(args: argparse.Namespace) -> int:
    """Measures what is missing, prints the tables. Returns the exit status: 2 without a model."""
    if not args.report_only:
        path = args.model or os.environ.get("KVTIER_TEST_MODEL")
        if not path:
            print("--model: names no checkpoint, and KVTIER_TEST_MODEL is not set", file=sys.stderr)
            return 2
        _measure(args, path)
    rows = [row for row in _read(args.rows) if row["ratio"] == args.ratio]
    report(rows)
    return 0


def _measure(args: argparse.Namespace, path: str) -> None:
    import torch  # noqa: PLC0415 - --help works without it

    from kvtier.bench.blend.quality import VARIANTS, SetRun  # noqa: PLC0415 - as above

    if args.threads:
        torch.set_num_threads(args.threads)
    wanted = [variant for variant in VARIANTS if not args.variants or any(name in variant.label for name in args.variants)]
    done = {(row["set"], row["ratio"], row["question"], row["variant"]) for row in _read(args.rows)}
    model, encode = _load(path, args.device, args.dtype)
    with args.rows.open("a", encoding="utf-8") as file:
        for number in range(args.first, args.first + args.items):
            documents = make_set(number)
            missing: dict[int, list[Variant]] = {}
            asked = [question for question, item in enumerate(documents.questions) if item.task in args.tasks]
            for question in asked:
                variants = [variant for variant in wanted if (number, args.ratio, question, variant.label) not in done]
                if variants:
                    missing[question] = variants
            if not missing:
                continue
            started_s = time.monotonic()
            for row in SetRun(model, encode, documents).rows(missing, args.ratio):
                file.write(json.dumps({**row, "dtype": args.dtype}) + "\n")
                file.flush()
            print(f"set {number}: {time.monotonic() - started_s:.0f} s", flush=True)


def _load(path: str, device: str, dtype: str) -> tuple[BlendModel, Encode]:
    import torch  # noqa: PLC0415 - as above
    from transformers import AutoModelForCausalLM, AutoTokenizer  # type: ignore[import-not-found]  # noqa: PLC0415 - as above

    from kvtier.blend.transformers_models import TransformersModel  # noqa: PLC0415 - as above

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
    return TransformersModel(model), lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a table for each task, each figure with its 95 % interval."""
    for task in TASKS:
        table = by_variant(rows, task)
        if not table:
            continue
        sample = next(iter(table.values()))
        full = "" if task == "prose" else f", {sample['answered']} of them answered by full prefill"
        print(f"\n{task}: {sample['n']} questions{full}")
        for variant, figures in table.items():
            ratio = paired(rows, task, variant, BASELINE)
            cells = [f"KL {figures['kl']}", f"of {BASELINE}'s {ratio}" if ratio else "", f"top-1 {figures['agreement']}"]
            cells += [f"NLL {figures['nll_change']}"]
            cells += [f"{name} {figures[field]}" for field, name in OVERLAPS.items() if field in figures]
            print(f"  {variant:<24} " + "  ".join(cell for cell in [*cells, f"cost {figures['cost'].value:.2f}"] if cell))
