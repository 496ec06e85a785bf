"""``kvtier bench policies`` runs, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from kvtier.bench.policies import SHARES_NEW
from kvtier.cli import main


def test_policies(tmp_path: Path) -> None:
    """For each policy a time for each kind of request, and the memory of a block."""
    result = tmp_path / "result.json"
    options = ["--resident", "600", "--request-blocks", "40", "--rounds", "3", "--policy", "hazard", "arc", "--json", str(result)]
    assert 0 == main(["bench", "policies", *options])
    records = json.loads(result.read_text())["records"]
    names = [f"one request, {what}" for what in SHARES_NEW] + ["memory per block"]
    assert [(policy, name) for policy in ("hazard", "arc") for name in names] == [(r["params"]["policy"], r["name"]) for r in records]
    for record in records:
        assert record["value"] > 0
        assert record["value"] == record["fraction"] * record["limit"]
