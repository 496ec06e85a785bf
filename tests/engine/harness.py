"""Runs a scenario in a process of its own and compares what came out with vLLM alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOGPROB_TOLERANCE = 1e-4
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "KVTIER_TEST_MODEL": str(ROOT / ".cache" / "smollm2"),
}
Result = dict[str, Any]


def run(scenario: str, *, environment: dict[str, str] | None = None, timeout_s: float = 240.0, **settings: object) -> Result:
    """What the scenario wrote. Fails with the end of the process's output where it did not end well."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out.json"
        command = [sys.executable, str(Path(__file__).with_name("scenarios.py")), str(out), json.dumps({"scenario": scenario, **settings})]
        merged = {**ENVIRONMENT, **os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        done = subprocess.run(
            command, env=merged, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"the engine's process ended with {done.returncode}:\n{done.stdout[-6000:]}"
        result: Result = json.loads(out.read_text())
        return result


def host(capacity: str = "512MiB", **more: object) -> Result:
    """kvtier's settings with host memory alone. ``more``: top-level keys."""
    return {"tiers": [{"type": "host", "capacity": capacity}], **more}


def host_and_disk(path: Path, capacity: str = "512MiB", **more: object) -> Result:
    """kvtier's settings with a disk below host memory."""
    return {"tiers": [{"type": "host", "capacity": capacity}, {"type": "disk", "path": str(path), "capacity": "1GiB"}], **more}


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


def make_tiny_model(directory: Path) -> Path:
    """A checkpoint that two tensor-parallel workers can share."""
    tokenizer = {**ENVIRONMENT, **os.environ}["KVTIER_TEST_MODEL"]
    subprocess.run([sys.executable, str(Path(__file__).with_name("tiny.py")), str(directory), tokenizer], check=True, capture_output=True)
    return directory
