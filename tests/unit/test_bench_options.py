"""A benchmark that cannot be run, or fails, says so in a line and ends with status 2; no traceback, no figure."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from kvtier.bench import copy, disk, engine, options, policies
from kvtier.cli import BENCHMARKS, main
from kvtier.copy.cpu import NativeCopier

BAD = [
    *((name, "--rounds", number) for name in sorted({*BENCHMARKS} - {"blend"}) for number in ("0", "-1", "1.5", "many", "9" * 30)),
    *((name, "--json", place) for name in sorted(BENCHMARKS) for place in ("/nonexistent/file", "/")),
    *(("policies", option, number) for option in ("--resident", "--request-blocks") for number in ("0", "-1", "9" * 30)),
    *(("copy", option, number) for option in ("--mib", "--threads") for number in ("0", "-1", "9" * 30)),
    *(("copy", "--mib", "1"), ("tier", "--batch-mib", "1")),
    *(("tier", "--batch-mib", number) for number in ("0", "-1", "9" * 30)),
    *(("control", "--resident", number) for number in ("0", "-1", "1", "9" * 30)),
    *((name, "--directory", place) for name in ("control", "disk") for place in ("/nonexistent", "/proc", "/etc/hostname")),
    *(("disk", option, number) for option in ("--places", "--block-mib", "--batch-mib", "--queue-depth") for number in ("0", "-1")),
    *(("disk", "--block-mib", "4096"), ("disk", "--queue-depth", "100000")),
    *(("remote", option, number) for option in ("--batch-mib", "--block-mib") for number in ("0", "-1")),
    *((name, "--tokens", number) for name in ("faults", "sharing") for number in ("0", "5000")),
    *(("blend", option, "-1") for option in ("--items", "--first", "--questions", "--threads")),
]


@pytest.mark.parametrize(("name", "option", "value"), BAD)
def test_options_that_are_none(name: str, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is measured, by name and with what is allowed."""
    if os.geteuid() == 0 and value == "/proc":
        pytest.skip("root may write anywhere, as far as the system calls say")
    needed = ["--model", "nowhere"] if name in ("chunks", "engine", "faults", "sharing") else []
    with pytest.raises(SystemExit) as ended:
        main(["bench", name, *needed, option, value])
    assert 2 == ended.value.code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"kvtier bench {name}: error: argument {option}: {value} is not a ")


def test_a_tier_of_less_than_two_requests(capsys: pytest.CaptureFixture[str]) -> None:
    """Two options that do not fit each other."""
    assert 2 == main(["bench", "policies", "--resident", "20", "--request-blocks", "11"])
    assert "--resident is 20: allowed are two requests of 11 blocks, or more\n" == capsys.readouterr().err


def test_no_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A report on nothing is none."""
    assert 2 == main(["bench", "blend", "--report-only", "--rows", str(tmp_path / "rows")])
    assert f"--rows: {tmp_path / 'rows'} holds none\n" == capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("no 95 TiB"), "no 95 TiB"),
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (ImportError("libibverbs.so.1: cannot open"), "libibverbs.so.1: cannot open"),
        (RuntimeError("the tier failed"), "the tier failed"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "the other end of a connection has gone: [Errno 32] Broken pipe"),
    ],
)
def test_what_fails_while_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    """Is told; the end of somebody else's connection is not the end of the reader of what is printed."""

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(policies, "requests", fail)
    assert 2 == main(["bench", "policies"])
    assert capsys.readouterr().err.endswith(f"{said}\n")


def test_a_client_that_is_missing_costs_its_store_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Help is there without it."""
    for module in ("kvtier.tiers.mooncake", "kvtier.tiers.object"):
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("kvtier.bench.servers", "kvtier.bench.remote", "kvtier.bench.sharing"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for name in ("remote", "sharing"):
        with pytest.raises(SystemExit) as ended:
            main(["bench", name, "--help"])
        assert 0 == ended.value.code
    assert "mooncake" in capsys.readouterr().out


def _die(pipe: Connection, model: str, directory: Path, *_: object) -> None:
    (directory / "engines.log").write_text(f"no {model} here")
    if model == "later":
        pipe.send("ready")
        pipe.recv()
    os._exit(1)


@pytest.mark.parametrize("model", ["at once", "later"])
def test_an_engine_that_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    """Its last words are told, whenever that is."""
    monkeypatch.setattr(engine, "_serve", _die)
    with pytest.raises(RuntimeError, match=f"its last words:\nno {model} here"), engine.open_engine(model, tmp_path, None) as ask:  # noqa: PT012 - in either
        ask([[1]])
        ask([[1]])


def test_what_moves_other_bytes_is_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each benchmark that moves bytes looks once whether it does."""
    monkeypatch.setattr(NativeCopier, "scatter", lambda *_: None)
    assert 2 == main(["bench", "copy", "--rounds", "1", "--mib", "2"])
    assert 2 == main(["bench", "tier", "--rounds", "1", "--batch-mib", "2"])
    monkeypatch.setattr(disk.Batch, "load", lambda _: 1.0)
    assert 2 == main(["bench", "disk", "--rounds", "1", "--block-mib", "1", "--batch-mib", "1", "--directory", str(tmp_path)])
    assert 3 == capsys.readouterr().err.count("what was stored and loaded is not what there was\n")
    assert [] == list(tmp_path.iterdir())


def test_copy(tmp_path: Path) -> None:
    """The smallest run there is; its JSON has what is promised, and nothing else."""
    result = tmp_path / "result.json"
    assert 0 == main(["bench", "copy", "--rounds", "1", "--mib", str(copy.LEAST_MIB), "--json", str(result)])
    document = json.loads(result.read_text())
    assert {"environment", "records"} == document.keys()
    for record in document["records"]:
        assert {"name", "params", "value", "unit", "spread", "limit", "fraction", "peers"} == record.keys()
        assert record["value"] == pytest.approx(record["limit"] * record["fraction"])


def test_the_least_and_the_most_are_allowed() -> None:
    """Bounds belong to what they bound."""
    read = options.whole(1, 5)
    assert [1, 5] == [read("1"), read("5")]


def test_control_weighs_what_can_be_weighed() -> None:
    """The memory of an entry is what the process grew by, not its peak; of a few entries it is not told. In a process of its own,
    since one that has freed much grows by less."""
    code = (
        "from kvtier.bench import control\n"
        "peak = bytearray(200 << 20)\n"
        "peak[:] = b'1' * len(peak)\n"
        "del peak\n"
        "assert 'memory per entry, host' not in [item.name for item in control.evictions([1000], 1)]\n"
        "control.LEAST_TO_WEIGH = 20_000\n"
        "print(*(item.value for item in control.evictions([1000, 20_000], 1) if item.name == 'memory per entry, host'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (weight,) = map(float, done.stdout.split())
    assert 100 < weight < 5000


def test_prompts_that_were_not_found_are_no_figure() -> None:
    """Neither those that were there before they were computed."""
    engine._check_hits(900, [0, 0], [896, 836])
    for computed, loaded in (([0], [835]), ([32], [896])):
        with pytest.raises(RuntimeError, match="of prompts of 900 tokens"):
            engine._check_hits(900, computed, loaded)
