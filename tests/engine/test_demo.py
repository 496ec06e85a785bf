"""The demonstration, from its command line to its exit status, with a model that is quick to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.harness import ROOT, make_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


def test_the_demonstration_ends_well(tmp_path: Path) -> None:
    """Both engines give the same tokens; KV comes from host memory, and after the kill from disk; a table and a chart are left."""
    model, work = make_tiny_model("llama", tmp_path / "model"), tmp_path / "work"
    command = [sys.executable, str(ROOT / "examples" / "multi_round_qa.py"), "--model", str(model), "--work", str(work)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=380, check=False)
    assert 0 == done.returncode, done.stdout[-4000:] + "".join(path.read_text()[-2000:] for path in work.glob("*.log"))
    assert "same tokens" in done.stdout
    exchanges = json.loads((work / "demo.json").read_text())["exchanges"]
    assert ["round 1", "round 2", "restarted"] == list(dict.fromkeys(one["stage"] for one in exchanges))
    assert [] == [one["document"] for one in exchanges if one["alone"]["token_ids"] != one["kvtier"]["token_ids"]]
    assert all(one["kvtier"]["host_tokens"] > 500 for one in exchanges if one["stage"] == "round 2")
    assert all(one["kvtier"]["disk_tokens"] > 500 for one in exchanges if one["stage"] == "restarted")
    assert (work / "demo.png").stat().st_size > 10_000
