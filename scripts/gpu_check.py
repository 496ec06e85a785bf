#!/usr/bin/env python3
"""Checks and measures kvtier on a GPU: the GPU's tests, its benchmarks, compute-sanitizer where it runs. Under nine minutes.

    python3 scripts/gpu_check.py --out DIRECTORY

Needs Python with CuPy, numpy, pytest, pytest-timeout and hypothesis; builds and installs nothing; with torch and transformers chunk reuse
is checked too. Leaves ``summary.json`` (what machine it was, and what became of each step so far), ``gpu.json`` and ``gpu-chunks.json``
(the figures) and the logs in the directory. Exit status: 0 all is well, 1 something failed, 2 nothing was checked because there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from xml.etree import ElementTree as ET

import gpu_machine

ROOT = Path(__file__).resolve().parent.parent
DEVICE_TESTS = "tests/gpu/test_device.py"
TESTS = {
    "dma": (DEVICE_TESTS, "-k", "TestDma"),
    "staged": (DEVICE_TESTS, "-k", "TestStaged"),
    "direct": (DEVICE_TESTS, "-k", "TestDirect"),
    "bulk": (DEVICE_TESTS, "-k", "TestBulk"),
    "rest": (DEVICE_TESTS, "-k", "not TestDma and not TestStaged and not TestDirect and not TestBulk"),
    "torch": ("tests/gpu/test_torch.py",),
    "chunks": ("tests/gpu/test_chunks.py",),
}
"""step -> its tests. A process for each: what a kernel breaks, it breaks for the whole process"""

LIMITS_S = {**dict.fromkeys(TESTS, 40.0), "benchmark": 115.0, "chunk-benchmark": 80.0, "sanitizer": 60.0}
"""what each step gets at least, where those before it have kept to theirs"""

DEADLINE_S = 540.0
"""of all together"""

COUNTED = ("tests", "failures", "errors", "skipped")
TAIL_CHARACTERS = 3000
"""of each step's log on the screen"""

NEEDS = "import cupy, numpy, pytest, pytest_timeout, hypothesis; from cupy.cuda import runtime; assert runtime.getDeviceCount()"
SANITIZED = "layers_arrive or calibration"
"""the tests that run under compute-sanitizer: it makes a kernel many times slower, so none that asks for a stream that is busy still"""

SANITIZER = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
"""calls that CUDA refuses are errors in Python already, and libraries try some that they know may be refused"""

NOT_SUPPORTED = ("Device not supported", "Unable to find injection library")


@dataclass(frozen=True)
class Step:
    """What became of one step."""

    name: str
    outcome: str
    """ok, FAILED, TIMEOUT or not run"""
    seconds: float
    log: str
    detail: str = ""

    @property
    def is_bad(self) -> bool:
        return self.outcome in ("FAILED", "TIMEOUT")


class Deadline:
    """Shares the time of all steps among them: what one leaves over goes to those behind it."""

    def __init__(self, total_s: float = DEADLINE_S, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._end_s = now_s() + total_s
        self._limits_s = dict(LIMITS_S)
        """of the steps that have not begun"""

    def begin(self, name: str) -> float:
        """How long a step may take that begins now: its limit, or its share of what is left where that is more."""
        left_s = max(0.0, self._end_s - self._now_s())
        share = self._limits_s[name] / sum(self._limits_s.values())
        return min(left_s, max(self._limits_s.pop(name), share * left_s))


class Summary:
    """``summary.json``, which has every step as soon as it is over."""

    def __init__(self, out: Path, machine: dict[str, object], gpus: Sequence[str]) -> None:
        self.steps: list[Step] = []
        self._path = out / "summary.json"
        self._about = {"machine": machine, "gpus": [*gpus]}
        print(json.dumps(self._about, indent=1), flush=True)
        self._write()

    def add(self, step: Step) -> None:
        """One more is over."""
        self.steps.append(step)
        self._write()

    def print(self) -> None:
        """A line for each step."""
        print("\n== summary")
        for step in self.steps:
            print(f"  {step.name:<16} {step.outcome:<8} {step.seconds:6.1f} s   {step.log:<14} {step.detail}")

    def _write(self) -> None:
        self._path.write_text(json.dumps({**self._about, "steps": [asdict(step) for step in self.steps]}, indent=1) + "\n")


def usable_python() -> str | None:
    """A Python that has what is needed and sees a GPU: this one, or the development environment's."""
    for python in (sys.executable, str(ROOT / ".venv" / "bin" / "python")):
        try:
            if subprocess.run([python, "-c", NEEDS], capture_output=True, timeout=120, check=False).returncode == 0:
                return python
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None


def run(name: str, out: Path, limit_s: float, *command: str) -> Step:
    """Runs one command in the checkout, for ``limit_s`` at most; its output goes to a log and to the screen."""
    print(f"\n== {name}", flush=True)
    log = out / f"{name}.log"
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    started_s = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            outcome = "ok" if process.wait(limit_s) == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            outcome = "TIMEOUT"
            os.killpg(process.pid, signal.SIGKILL)  # what it started too, or the next step shares the GPU with that
            process.wait()
    print(log.read_text(errors="replace")[-TAIL_CHARACTERS:], flush=True)
    return Step(name, outcome, round(time.monotonic() - started_s, 1), log.name)


def test(name: str, out: Path, limit_s: float, pytest: Sequence[str]) -> Step:
    """One group of tests. It is ``ok`` only where tests have passed; where all were skipped it was not run."""
    report = out / f"{name}.xml"
    report.unlink(missing_ok=True)
    step = run(name, out, limit_s, *pytest, *timeout(limit_s), f"--junitxml={report}", *TESTS[name])
    if not report.is_file():
        return step if step.is_bad else replace(step, outcome="FAILED", detail="no report")
    counts = {what: sum(int(suite.get(what, "0")) for suite in ET.parse(report).iter("testsuite")) for what in COUNTED}
    num_passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    detail = f"{num_passed} passed, {counts['failures'] + counts['errors']} failed, {counts['skipped']} skipped"
    outcome = step.outcome if step.is_bad or num_passed else "not run"
    return replace(step, outcome=outcome, detail=detail)


def timeout(limit_s: float) -> tuple[str, str]:
    """pytest's own limit: a little less, so that it says which test hangs."""
    return "--timeout", str(max(1.0, limit_s - 5))


def benchmark(out: Path, limit_s: float, python: str, broken: Sequence[str]) -> Step:
    """The figures, without the ways whose tests failed: they may hang."""
    without = [argument for way in broken for argument in ("--without", way)]
    step = run("benchmark", out, limit_s, python, "-m", "kvtier", "bench", "gpu", "--json", str(out / "gpu.json"), *without)
    text = (out / step.log).read_text(errors="replace")
    return replace(step, detail=f"{text.count('TARGET MISSED')} targets missed, {text.count('WRONG BYTES')} figures of wrong bytes")


def benchmark_chunks(out: Path, limit_s: float, python: str) -> Step:
    """The figures of chunk reuse; not run where transformers is missing."""
    command = (python, "-m", "kvtier", "bench", "gpu-chunks", "--json", str(out / "gpu-chunks.json"))
    step = run("chunk-benchmark", out, limit_s, *command)
    is_missing = "nothing was measured" in (out / step.log).read_text(errors="replace")
    return replace(step, outcome="not run") if is_missing else step


def sanitize(out: Path, limit_s: float, tests: Sequence[str]) -> Step:
    """Some of the tests under compute-sanitizer; not run where there is none or it does not know the device."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Step("sanitizer", "not run", 0.0, "")
    step = run("sanitizer", out, limit_s, tool, *SANITIZER, *tests, *timeout(limit_s), DEVICE_TESTS, "-k", SANITIZED)
    text = (out / step.log).read_text(errors="replace")
    if step.is_bad and any(words in text for words in NOT_SUPPORTED):
        return replace(step, outcome="not run")
    return step


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check and measure kvtier on a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu", help="where JSON and logs go (default: .cache/gpu)")
    out: Path = parser.parse_args(arguments).out
    deadline = Deadline()
    python = usable_python()
    if python is None:
        print(
            "NOTHING WAS CHECKED: no GPU, or no Python with what it needs (pip install '.[cuda13]' pytest pytest-timeout hypothesis)",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    tests = (python, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider")
    summary = Summary(out, gpu_machine.facts(python), gpu_machine.gpus())
    for name in TESTS:
        summary.add(test(name, out, deadline.begin(name), tests))
    broken = [step.name for step in summary.steps if step.is_bad and step.name in ("dma", "staged", "direct", "bulk")]
    summary.add(benchmark(out, deadline.begin("benchmark"), python, broken))
    summary.add(benchmark_chunks(out, deadline.begin("chunk-benchmark"), python))
    summary.add(sanitize(out, deadline.begin("sanitizer"), tests))
    summary.print()
    return 1 if any(step.is_bad for step in summary.steps) or all(step.outcome != "ok" for step in summary.steps) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
