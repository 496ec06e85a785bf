#!/usr/bin/env python3
"""Runs the stages of ``make test`` and ends with one summary. Exit status 0 only where every stage passed.

    python3 scripts/run_tests.py lint unit engine engine-old

All stages run even when one fails. ``KVTIER_TEST_MODEL`` names the checkpoint for the engine's tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from system_libraries import with_libraries

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / ".cache" / "reports"
DEV, ENGINE, OLD_ENGINE = (ROOT / name / "bin" for name in (".venv", ".venv-vllm", ".venv-vllm-0.27"))
# An engine's test takes minutes on a busy machine; a dump of all stacks half-way says nothing.
# Tests take milliseconds or a minute: who has no more takes over from the other.
ENGINE_OPTIONS = ("-n", "2", "--dist", "worksteal", "-o", "faulthandler_timeout=0", "tests/engine")


@dataclass(frozen=True)
class Outcome:
    """What became of one command of a stage; the counts are of its tests, zero where it runs none."""

    title: str
    ok: bool
    seconds: float
    num_passed: int = 0
    num_failed: int = 0
    num_skipped: int = 0


def run(title: str, *command: str | Path) -> Outcome:
    """Runs a command in the checkout, its output shown as it comes."""
    print(f"\n== {title}", flush=True)
    started_s = time.monotonic()
    status = subprocess.run([str(part) for part in command], cwd=ROOT, stdin=subprocess.DEVNULL, env=environment(), check=False).returncode
    return Outcome(title, status == 0, time.monotonic() - started_s)


def run_pytest(title: str, bin_folder: Path, *arguments: str) -> Outcome:
    """Runs pytest and counts from its report. No test at all is a failure: a typing error must not pass for success."""
    report = REPORTS / f"{title.replace(' ', '-')}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    outcome = run(title, bin_folder / "python", "-m", "pytest", f"--junitxml={report}", *arguments)
    if not report.is_file():
        return outcome
    suites = ET.parse(report).getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    num_failed = counts["failures"] + counts["errors"]
    return Outcome(title, outcome.ok, outcome.seconds, counts["tests"] - num_failed - counts["skipped"], num_failed, counts["skipped"])


def environment() -> dict[str, str]:
    """The caller's, plus the model's place, what keeps the engine from looking beyond this machine, and a folder for bytecode.

    The tests start hundreds of processes; where nobody keeps bytecode, one that imports vLLM compiles for twenty seconds.
    """
    engine_settings = {
        "KVTIER_TEST_MODEL": str(ROOT / ".cache" / "smollm2"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),
        "PYTHONPYCACHEPREFIX": str(ROOT / ".cache" / "bytecode"),
    }
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return with_libraries({**engine_settings, **kept})


def lint() -> list[Outcome]:
    return [
        run("ruff check", DEV / "ruff", "check", "."),
        run("ruff format", DEV / "ruff", "format", "--check", "."),
        run("mypy", DEV / "mypy"),
    ]


def unit() -> list[Outcome]:
    return [run_pytest("unit tests", DEV, "-n", "2", "tests", "--ignore=tests/engine", "--ignore=tests/gpu")]


def engine() -> list[Outcome]:
    return [run_pytest("engine tests", ENGINE, *ENGINE_OPTIONS)]


def engine_old() -> list[Outcome]:
    return [run_pytest("engine tests in the older version", OLD_ENGINE, *ENGINE_OPTIONS, "-m", "every_version")]


STAGES = {"lint": lint, "unit": unit, "engine": engine, "engine-old": engine_old}


def summarize(outcomes: list[Outcome]) -> int:
    """Prints the table of all stages and the totals; returns the exit status."""
    print("\n== summary")
    for outcome in outcomes:
        num_tests = outcome.num_passed + outcome.num_failed + outcome.num_skipped
        counts = f"{outcome.num_passed} passed, {outcome.num_failed} failed, {outcome.num_skipped} skipped" if num_tests else ""
        print(f"  {outcome.title:<36} {'ok' if outcome.ok else 'FAILED':<8} {outcome.seconds:6.1f} s   {counts}")
    failed = [outcome.title for outcome in outcomes if not outcome.ok]
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    totals = (sum(o.num_passed for o in outcomes), sum(o.num_failed for o in outcomes), sum(o.num_skipped for o in outcomes))
    if any(totals):
        print(f"\n{totals[0]} passed, {totals[1]} failed, {totals[2]} skipped", flush=True)
    return 1 if failed else 0


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        print(f"usage: run_tests.py STAGE..., of: {' '.join(STAGES)}", file=sys.stderr)
        return 2
    return summarize([outcome for name in names for outcome in STAGES[name]()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
