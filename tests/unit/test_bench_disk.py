"""``kvtier bench disk`` and ``kvtier bench tier`` run, and say what they measured."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtier.bench import disk
from kvtier.bench.report import in_turns
from kvtier.cli import main


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """One record for writing and one for reading, each with its limit; nothing is left behind. Without fio a plain loop is the limit."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    options = ["--block-mib", "4", "--batch-mib", "16", "--rounds", "1", "--places", "1", "--engine", engine]
    result = tmp_path / "result.json"
    assert 0 == main(["bench", "disk", *options, "--directory", str(tmp_path), "--json", str(result)])
    records = json.loads(result.read_text())["records"]
    assert ["write", "cold read"] == [record["name"] for record in records]
    for record in records:
        assert "GB/s" == record["unit"]
        assert record["value"] > 0
        assert record["limit"] * record["fraction"] == pytest.approx(record["value"])
        assert ("plain loop", 4) == (record["params"]["beside"], record["params"]["block_mib"])
        assert engine in ("auto", record["params"]["io"])
    assert [result] == list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_disk_beside_fio(tmp_path: Path) -> None:
    """With fio the limit is what fio says, in the tier's own files, which still hold what they must."""
    result = tmp_path / "result.json"
    options = ["--block-mib", "4", "--batch-mib", "16", "--rounds", "1", "--places", "1"]
    assert 0 == main(["bench", "disk", *options, "--directory", str(tmp_path), "--json", str(result)])
    assert {"fio"} == {record["params"]["beside"] for record in json.loads(result.read_text())["records"]}


def test_a_failing_disk_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What was not stored or loaded is an error."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(disk.Loop, "write", lambda _: 1.0)
    real = disk.Batch.load

    def load(batch: disk.Batch) -> float:
        for path in batch.files:
            path.write_bytes(b"")
        return real(batch)

    monkeypatch.setattr(disk.Batch, "load", load)
    assert 2 == main(["bench", "disk", "--block-mib", "4", "--batch-mib", "16", "--rounds", "1", "--directory", str(tmp_path)])
    assert "the disk tier failed" in capsys.readouterr().err


def test_tier(tmp_path: Path) -> None:
    """Store and load of each shape, each beside the bare copy."""
    result = tmp_path / "result.json"
    assert 0 == main(["bench", "tier", "--rounds", "1", "--batch-mib", "8", "--json", str(result)])
    records = json.loads(result.read_text())["records"]
    assert [("store", 32), ("load", 32), ("store", 6), ("load", 6)] == [
        (record["name"], record["params"]["piece_kib"]) for record in records
    ]
    assert all(record["value"] > 0 and record["limit"] > 0 for record in records)


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    """Whoever stops a benchmark has no gigabytes to look for, and sees by the status that it was stopped."""
    command = [sys.executable, "-m", "kvtier", "bench", "disk", "--block-mib", "4", "--batch-mib", "16", "--rounds", "1000"]
    with subprocess.Popen([*command, "--directory", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as bench:
        deadline = time.monotonic() + 60
        while not any(path.is_file() for path in tmp_path.rglob("*")):
            assert bench.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        bench.send_signal(signal.SIGTERM)
        _, said = bench.communicate(timeout=60)
    assert (128 + signal.SIGTERM, "") == (bench.returncode, said)
    assert [] == list(tmp_path.iterdir())


def test_in_turns() -> None:
    """Whoever goes first changes from round to round; the first round warms up and does not count."""
    order: list[str] = []
    ticks = iter(range(100))

    def step(name: str) -> float:
        order.append(name)
        return float(next(ticks))

    first, second = in_turns([lambda: step("a"), lambda: step("b")], 3)
    assert "baabbaab" == "".join(order)
    assert ([2.0, 5.0, 6.0], [3.0, 4.0, 7.0]) == (first, second)
