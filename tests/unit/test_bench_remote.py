"""``kvtier bench remote`` runs against real servers and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvtier.cli import main


def test_remote(tmp_path: Path) -> None:
    """One record for putting and one for getting, each with its limit."""
    result = tmp_path / "result.json"
    options = ["--rounds", "1", "--batch-mib", "4", "--block-mib", "2", "--stores", "redis-unix", "redis-tcp"]
    assert 0 == main(["bench", "remote", *options, "--json", str(result)])
    records = json.loads(result.read_text())["records"]
    stores = [(record["name"], record["params"]["store"]) for record in records]
    assert [("put", "redis-unix"), ("get", "redis-unix"), ("put", "redis-tcp"), ("get", "redis-tcp")] == stores
    assert all(record["value"] > 0 and record["limit"] > 0 for record in records)


def test_an_unknown_store_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """With what is allowed, and nothing but that."""
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "remote", "--stores", "redis"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--stores: invalid choice: 'redis'" in message
    assert "redis-unix" in message
