#!/usr/bin/env python3
"""Checks and measures kvtier on a GPU: the GPU's tests, compute-sanitizer where it runs, the GPU's benchmark. Under nine minutes.

    python3 scripts/gpu_check.py --out DIRECTORY

Needs Python with CuPy, numpy and pytest; builds and installs nothing. Leaves ``summary.json``, ``gpu.json`` (the figures) and the logs
in the directory. Exit status: 0 all is well, 1 something failed, 2 nothing was checked because there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS_S = {"tests": 240.0, "sanitizer": 120.0, "benchmark": 150.0}
"""together under nine minutes"""

NEEDS = "import cupy, numpy, pytest; from cupy.cuda import runtime; assert runtime.getDeviceCount()"
SANITIZED = "layers or calibration"
"""the tests that run under compute-sanitizer, which makes a kernel many times slower"""

NOT_SUPPORTED = ("Device not supported", "Unable to find injection library")


@dataclass(frozen=True)
class Step:
    """What became of one step."""

    name: str
    outcome: str
    """ok, FAILED, TIMEOUT or not run"""
    seconds: float
    log: str

    @property
    def is_bad(self) -> bool:
        return self.outcome in ("FAILED", "TIMEOUT")


def usable_python() -> str | None:
    """A Python that has what is needed and sees a GPU: this one, or the development environment's."""
    for python in (sys.executable, str(ROOT / ".venv" / "bin" / "python")):
        try:
            if subprocess.run([python, "-c", NEEDS], capture_output=True, timeout=120, check=False).returncode == 0:
                return python
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None


def run(name: str, out: Path, *command: str) -> Step:
    """Runs one command in the checkout; its output goes to a log and to the screen."""
    print(f"\n== {name}", flush=True)
    log = out / f"{name}.log"
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    started_s = time.monotonic()
    with log.open("w") as output:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=LIMITS_S[name],
                check=False,
            ).returncode
            outcome = "ok" if status == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            outcome = "TIMEOUT"
    print(log.read_text(errors="replace")[-6000:], flush=True)
    return Step(name, outcome, round(time.monotonic() - started_s, 1), log.name)


def sanitize(out: Path, tests: Sequence[str]) -> Step:
    """Some of the tests under compute-sanitizer; not run where there is none or it does not know the device."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Step("sanitizer", "not run", 0.0, "")
    step = run("sanitizer", out, tool, "--tool", "memcheck", "--error-exitcode", "9", *tests, "-k", SANITIZED)
    text = (out / step.log).read_text(errors="replace")
    if step.is_bad and any(words in text for words in NOT_SUPPORTED):
        return Step("sanitizer", "not run", step.seconds, step.log)
    return step


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check and measure kvtier on a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu", help="where JSON and logs go (default: .cache/gpu)")
    out: Path = parser.parse_args(arguments).out
    python = usable_python()
    if python is None:
        print(
            "NOTHING WAS CHECKED: no GPU, or no Python with CuPy, numpy and pytest (pip install '.[cuda13]' pytest numpy)", file=sys.stderr
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    tests = (python, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "tests/gpu")
    steps = [
        run("tests", out, *tests, f"--junitxml={out / 'tests.xml'}"),
        run("benchmark", out, python, "-m", "kvtier", "bench", "gpu", "--json", str(out / "gpu.json")),
        sanitize(out, tests),
    ]
    smi = shutil.which("nvidia-smi")
    gpus = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False).stdout.splitlines() if smi else []
    (out / "summary.json").write_text(json.dumps({"gpus": gpus, "steps": [asdict(step) for step in steps]}, indent=1) + "\n")
    print("\n== summary")
    for step in steps:
        print(f"  {step.name:<12} {step.outcome:<8} {step.seconds:6.1f} s   {step.log}")
    return 1 if any(step.is_bad for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
