"""Runs a scenario in a process of its own and compares what came out with vLLM alone."""

from __future__ import annotations

import fcntl
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from tests.engine import scenarios

ROOT = Path(__file__).resolve().parents[2]
LOGPROB_TOLERANCE = 1e-4
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # each engine would compile the counting of its log-probabilities, for seconds
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "KVTIER_TEST_MODEL": str(ROOT / ".cache" / "smollm2"),
}
Result = dict[str, Any]


class Engine:
    """A scenario in a process of its own."""

    def __init__(self, out: Path, log: Path, environment: dict[str, str], settings: Result) -> None:
        self._log = log
        self.process = _template().Process(target=scenarios.main, args=(out, log, settings, environment))
        self.process.start()

    def kill(self) -> None:
        """kill -9, all of its processes. Fails where it has ended before."""
        assert self.process.is_alive(), self.last_words
        assert self.process.pid is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    @property
    def last_words(self) -> str:
        """The end of what it said."""
        return f"the engine's process ended with {self.process.exitcode}:\n{self._log.read_text()[-6000:]}"


def start(folder: Path, scenario: str, **settings: object) -> Engine:
    """A scenario that is to be killed; ``folder`` is for what it says."""
    return Engine(folder / f"{scenario}.json", folder / f"{scenario}.log", {}, {"scenario": scenario, **settings})


def run(scenario: str, *, environment: dict[str, str] | None = None, timeout_s: float = 240.0, **settings: object) -> Result:
    """What the scenario wrote. Fails with the end of the process's output where it did not end well."""
    with tempfile.TemporaryDirectory() as directory:
        out, log = Path(directory) / "out.json", Path(directory) / "log"
        engine = Engine(out, log, environment or {}, {"scenario": scenario, **settings})
        engine.process.join(timeout_s)
        if engine.process.is_alive():
            engine.kill()
        assert engine.process.exitcode == 0, engine.last_words
        result: Result = json.loads(out.read_text())
        return result


@functools.cache
def _template() -> ForkServerContext:
    """Makes processes from one that has imported vLLM."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.template"])
    return context


def host(capacity: str = "512MiB", **more: Any) -> Result:
    """kvtier's settings with host memory alone. ``more``: top-level keys. Whatever is there is loaded, however fast the engine is."""
    more["connector"] = {"load_or_recompute": "always", **more.get("connector", {})}
    return {"tiers": [{"type": "host", "capacity": capacity}], **more}


def host_and_disk(path: Path, capacity: str = "512MiB", **more: Any) -> Result:
    """kvtier's settings with a disk below host memory."""
    settings = host(capacity, **more)
    settings["tiers"].append({"type": "disk", "path": str(path), "capacity": "1GiB"})
    return settings


def assert_same(expected: list[Result], got: list[Result]) -> None:
    """Equal tokens for every prompt, and log-probabilities that float32 cannot tell apart."""
    assert [one["tokens"] for one in expected] == [one["tokens"] for one in got]
    for one, other in zip(expected, got, strict=True):
        worst = max(abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True))
        assert worst < LOGPROB_TOLERANCE


def loaded_tokens(results: list[Result]) -> dict[str, int]:
    """Tokens taken from kvtier, by tier, over all prompts."""
    loads = [one["loaded"] or {} for one in results]
    return {name: sum(load.get(name, 0) for load in loads) for name in ("host_tokens", "disk_tokens")}


def make_tiny_model(kind: str, directory: Path) -> Path:
    """A checkpoint of one of the kinds of ``tiny.py``."""
    tokenizer = {**ENVIRONMENT, **os.environ}["KVTIER_TEST_MODEL"]
    command = [sys.executable, str(Path(__file__).with_name("tiny.py")), kind, str(directory), tokenizer]
    subprocess.run(command, check=True, capture_output=True)
    return directory


def made_once(factory: pytest.TempPathFactory, worker_id: str, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is filled by ``make`` once for all worker processes of this run of pytest; whoever comes second waits."""
    base = factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / name
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = Path(f"{folder}.done")
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
