"""``kvtier bench blend``: how near answers with reused chunks come to those of full prefill, by method, on a real model.

Every row is written to a file as soon as it is known, and sets that are in the file are not run again: a long run can be
interrupted and continued, or extended. Needs transformers and a checkpoint; slow on a CPU: about a minute for each set of documents.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier.bench.blend.records import BASELINE, records
from kvtier.bench.blend.summary import FULL, ROUNDED, MissingMarginError, Row, by_variant, of_ratio, paired, with_least_margin
from kvtier.bench.blend.tasks import TASKS, DocumentSet, make_set
from kvtier.bench.options import MOST_ROUNDS, MOST_THREADS, add_json, whole
from kvtier.bench.report import publish

if TYPE_CHECKING:
    from kvtier.bench.blend.quality import Case, Encode
    from kvtier.bench.blend.variants import Variant
    from kvtier.blend.model import BlendModel

__all__ = ["add_arguments", "report", "run"]

SHOWN = {"retained": "retained", "retained_f1": "F1 retained", "f1": "F1", "rouge_l": "Rouge-L", "unsure": "unsure"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--model", metavar="DIR", help="a checkpoint of a supported family (default: KVTIER_TEST_MODEL)")
    parser.add_argument("--rows", type=Path, metavar="FILE", default=Path("blend-rows.jsonl"), help="where rows are kept and continued")
    parser.add_argument("--items", type=whole(1, MOST_ROUNDS), default=4, help="sets of documents, 28 questions each (default: 4)")
    parser.add_argument("--first", type=whole(0, MOST_ROUNDS), default=0, help="number of the first set (default: 0)")
    parser.add_argument(
        "--ratio", type=float, nargs="+", default=[0.15], help="share of the chunks' tokens computed anew; one or several (default: 0.15)"
    )
    parser.add_argument(
        "--min-margin",
        type=float,
        nargs="+",
        default=[0.0],
        help="figures as with blend.min_margin: answers with a less sure first token are full prefill's; one or several (default: 0)",
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only variants whose label contains one of these")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="only questions of these kinds (default: all)")
    parser.add_argument(
        "--questions", type=whole(0, MOST_ROUNDS), default=0, metavar="N", help="only the first N of each kind in each set (default: all)"
    )
    parser.add_argument("--only-answered", action="store_true", help="leave out what full prefill does not answer")
    add_json(parser)
    parser.add_argument("--threads", type=whole(0, MOST_THREADS), default=0, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model and its KV (default: float32)")
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="only this: full prefill's KV but for N neighbouring layers, which are reused as they are; N by N, from the first on",
    )
    parser.add_argument(
        "--telling-layers",
        type=float,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="blend.first_layer and blend.last_layer of combined (default: those of the configuration)",
    )
    parser.add_argument("--rounding", action="store_true", help="full prefill in float32 as well: what rounding alone changes")
    parser.add_argument("--report-only", action="store_true", help="print what the file holds, run nothing")


def run(args: argparse.Namespace) -> int:
    """Measures what is missing, prints the tables. Returns the exit status: 2 without a model."""
    if not all(0 <= each <= 1 for each in args.min_margin):
        print(f"--min-margin is {args.min_margin}: 0 to 1 is allowed", file=sys.stderr)
        return 2
    if not args.report_only:
        path = args.model or os.environ.get("KVTIER_TEST_MODEL")
        if not path:
            print("--model: names no checkpoint, and KVTIER_TEST_MODEL is not set", file=sys.stderr)
            return 2
        if args.layers is not None and args.layers < 1:
            print(f"--layers is {args.layers}: a whole number from 1 is allowed", file=sys.stderr)
            return 2
        if args.telling_layers and not 0 <= args.telling_layers[0] < args.telling_layers[1] <= 1:
            print(f"--telling-layers is {args.telling_layers}: two growing shares of the depth are allowed, 0 to 1", file=sys.stderr)
            return 2
        _measure(args, path)
    rows = _read(args.rows)
    if not rows:
        print(f"--rows: {args.rows} holds none", file=sys.stderr)
        return 2
    try:
        for min_margin in args.min_margin:
            for ratio in args.ratio:
                report(rows, ratio, min_margin)
        if args.json is not None:
            publish("kvtier bench blend", list(records(rows, args.ratio, args.min_margin)), args.json)
    except MissingMarginError as error:
        print(f"--min-margin: {args.rows}: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(args: argparse.Namespace, path: str) -> None:
    import torch  # noqa: PLC0415 - --help works without it

    from kvtier.bench.blend.quality import Primer, SetRun  # noqa: PLC0415 - as above

    if args.threads:
        torch.set_num_threads(args.threads)
    done = _read(args.rows)
    model, encode = _load(path, args.device, args.dtype)
    in_float32 = _load(path, args.device, "float32")[0] if args.rounding else None
    primer = Primer(model, encode)
    variants = _variants(args, model.num_layers)
    with args.rows.open("a", encoding="utf-8") as file:
        for number in range(args.first, args.first + args.items):
            documents = make_set(number)
            known = {(row["question"], row["variant"], row["ratio"]): row["is_right"] for row in done if row["set"] == number}
            missing = _missing(args, variants, documents, known)
            if not missing:
                continue
            started_s = time.monotonic()
            for row in SetRun(model, encode, documents, primer, in_float32).rows(missing, only_answered=args.only_answered):
                if (row["question"], row["variant"], row["ratio"]) not in known:
                    file.write(json.dumps({**row, "dtype": args.dtype}) + "\n")
                    file.flush()
            print(f"set {number}: {time.monotonic() - started_s:.0f} s", flush=True)


def _variants(args: argparse.Namespace, num_layers: int) -> list[Variant]:
    from kvtier.bench.blend.variants import VARIANTS, layer_variants, with_telling_layers  # noqa: PLC0415 - --help works without torch

    if args.layers:
        return layer_variants(num_layers, args.layers)
    variants = [variant for variant in VARIANTS if not args.variants or any(name in variant.label for name in args.variants)]
    return [with_telling_layers(variant, *args.telling_layers) for variant in variants] if args.telling_layers else variants


def _missing(
    args: argparse.Namespace, variants: Sequence[Variant], documents: DocumentSet, known: Mapping[tuple[int, str, float], bool]
) -> dict[int, list[Case]]:
    """What is to be measured of a set, by question; an empty list: full prefill alone. ``known``: the rows there are, and who was right."""
    from kvtier.bench.blend.quality import Case  # noqa: PLC0415 - --help works without torch

    cases = dict.fromkeys(Case(variant, 0.0 if variant.is_reuse else ratio) for variant in variants for ratio in args.ratio)
    missing: dict[int, list[Case]] = {}
    asked: Counter[str] = Counter()
    for question, item in enumerate(documents.questions):
        asked[item.task] += 1
        if item.task not in args.tasks or 0 < args.questions < asked[item.task]:
            continue
        left_out = args.only_answered and item.answer is not None and not known.get((question, FULL, 1.0), True)
        wanted = [] if left_out else [case for case in cases if (question, case.variant.label, case.ratio) not in known]
        full = [FULL, ROUNDED] if args.rounding and not left_out else [FULL]
        if wanted or any((question, label, 1.0) not in known for label in full):
            missing[question] = wanted
    return missing


def _load(path: str, device: str, dtype: str) -> tuple[BlendModel, Encode]:
    import torch  # noqa: PLC0415 - as above
    from transformers import AutoModelForCausalLM, AutoTokenizer  # type: ignore[import-not-found]  # noqa: PLC0415 - as above

    from kvtier.blend.transformers_models import TransformersModel  # noqa: PLC0415 - as above

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
    return TransformersModel(model), lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def report(rows: Sequence[Row], ratio: float, min_margin: float = 0.0) -> None:
    """Prints a table for each task at one ratio, each figure with its 95 % interval, and which share full prefill answers.

    Raises:
        MissingMarginError: as ``with_least_margin`` does.
    """
    beside = of_ratio(rows, ratio)
    rows = with_least_margin(beside, min_margin) if min_margin else beside
    checked = f", margin {min_margin:g}" if min_margin else ""
    for task in TASKS:
        table = by_variant(rows, task)
        full = table.pop(FULL, None)
        if not table:
            continue
        answered = "" if full is None or task == "prose" else f", of {full['n']} that were asked full prefill answers {full['answered']}"
        sample = next(iter(table.values()))
        print(f"\n{task}, {ratio:.0%}{checked}: {sample['n']} questions of {sample['sets']} sets{answered}")
        for variant, figures in table.items():
            quotient = paired(rows, beside, task, variant, BASELINE)
            cells = [f"KL {figures['kl']}", f"of {BASELINE}'s {quotient}" if quotient else "", f"top-1 {figures['agreement']}"]
            cells += [f"NLL {figures['nll_change']}"]
            cells += [f"{name} {figures[field]}" for field, name in SHOWN.items() if field in figures]
            print(f"  {variant:<24} " + "  ".join(cell for cell in [*cells, f"cost {figures['cost'].value:.2f}"] if cell))
