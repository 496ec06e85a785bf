"""``kvtier simulate`` and ``kvtier plan``, as a user meets them."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvtier import cli
from kvtier.config import Config
from kvtier.policies import POLICIES
from kvtier.sim import arguments
from kvtier.sim.model import Machine
from kvtier.sim.optimum import look_ahead, optimal_hits, token_hit_rate
from kvtier.sim.plan import cheapest, configuration
from kvtier.sim.readers import FORMATS, open_trace
from kvtier.sim.report import BEGIN, END, write_markdown
from kvtier.sim.runs import Task, host_runs, replay_all
from kvtier.sim.setup import Setup, TierSetup
from tests.unit.test_sim_recording import chats, served

SIZE = 40
"""requests of the trace"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Chats over a few documents, every two seconds."""
    path = tmp_path / "chat.jsonl"
    with path.open("w") as file:
        for number in range(SIZE):
            document = number * number % 7
            ids = [document * 100 + position for position in range(4 + document)] + [10_000 + number]
            record = {
                "timestamp": 2000 * number,
                "input_length": 512 * len(ids) + 9,
                "output_length": 5,
                "hash_ids": [*ids, 77_000 + number],
            }
            file.write(json.dumps(record) + "\n")
    return path


def run(*words: str | Path) -> tuple[int, str, str]:
    """``kvtier WORDS...`` in a process of its own: status, output, errors."""
    done = subprocess.run([sys.executable, "-m", "kvtier", *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def test_every_run_is_a_record(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what was asked for, shares of the real optimum, and hits that add up."""
    out = tmp_path / "out.json"
    words = ["simulate", str(trace), "--policy", "lru,fifo", "--capacity-fraction", "0.1,0.5", "--json", str(out), "--jobs", "1"]
    assert 0 == cli.main(words)
    records = json.loads(out.read_text())
    read = open_trace(trace)
    assert [("lru", 0.1), ("fifo", 0.1), ("lru", 0.5), ("fifo", 0.5)] == [(r["policy"], r["capacity_fraction"]) for r in records]
    for record in records:
        assert ("chat", SIZE, 512) == (record["trace"], record["requests"], record["block_tokens"])
        assert round(record["capacity_fraction"] * read.num_unique) == record["capacity_blocks"]
        best = token_hit_rate(read, optimal_hits(look_ahead(read), record["capacity_blocks"]))
        assert best == record["optimum_token_hit_rate"]
        assert math.isclose(record["share_of_optimum"], record["token_hit_rate"] / best)
        assert 0 < record["token_hit_rate"] <= best <= record["ideal_token_hit_rate"]
        assert record["token_hit_rate"] == record["host_token_hit_rate"] + record["disk_token_hit_rate"]
        assert record["ttft_p50_s"] <= record["ttft_p95_s"] <= record["ttft_p99_s"] <= record["ttft_without_p99_s"]
        assert record["host_stored_bytes"] // (512 * 131072) - record["host_evicted_blocks"] <= record["capacity_blocks"]
    assert "of optimum" in capsys.readouterr().out


def test_processes_give_the_same_records(trace: Path) -> None:
    """Whatever their number, in the same order; only times differ. Progress adds up to all requests."""
    read = open_trace(trace)
    task = Task(read, Machine())
    runs = host_runs(read, Setup(TierSetup(1)), ["lru"], [0.1, 0.3, 0.6])
    timed = ("policy_us_per_request", "accesses_per_s", "replay_s")
    done: list[int] = []
    alone, together = (
        [
            {name: value for name, value in record.items() if name not in timed}
            for record in replay_all(task, runs, jobs=jobs, progress=done.append)
        ]
        for jobs in (1, 3)
    )
    assert alone == together
    assert 2 * 3 * SIZE == sum(done)


INTERRUPTIBLE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from kvtier.cli import main; raise SystemExit(main())"
)
"""``kvtier`` as a terminal starts it; in the background of a shell it would ignore Ctrl-C"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [0.0, 0.4, 1.5])
def test_an_interrupt_ends_all_processes(seconds: float, number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group. What is under way is not waited for, nothing is said of it, and no process is left."""
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for line in range(3000):
            ids = list(range(line % 50 * 1000, line % 50 * 1000 + 300))
            file.write(json.dumps({"timestamp": line, "input_length": 512 * 300, "output_length": 5, "hash_ids": ids}) + "\n")
    words = ["simulate", str(path), "--policy", "all", "--jobs", "2"]
    command = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while len(children := _children(command.pid)) < 2:
            assert time.monotonic() < deadline, "the runs do not begin"
            assert command.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(command.pid, number)
        _, errors = command.communicate(timeout=30)
    finally:
        command.kill()
    assert (130 if number == signal.SIGINT else -number, "") == (command.returncode, errors)
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline + 60, "a process is left"
        time.sleep(0.05)


def test_processes_that_end_by_themselves(trace: Path) -> None:
    """An error names what happened, and the others end; so do all where nobody wants the rest."""
    opened = open_trace(trace)
    runs = host_runs(opened, Setup(TierSetup(1)), ["lru", "hazard"], [0.1, 0.2])
    records = replay_all(Task(opened, Machine()), runs, jobs=2)
    next(records)
    before = _children(os.getpid())
    assert len(before) == 2
    records.close()
    assert not [child for child in before if Path(f"/proc/{child}").exists()]

    records = replay_all(Task(opened, Machine()), runs * 50, jobs=2)
    next(records)
    first, _ = before = _children(os.getpid())
    os.kill(first, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=f"{first}, was ended by signal 9 before its time"):
        list(records)
    assert not [child for child in before if Path(f"/proc/{child}").exists()]


def test_what_a_process_raises_is_raised(trace: Path) -> None:
    """As if it had been done here."""
    opened = open_trace(trace)
    runs = host_runs(opened, Setup(TierSetup(1, "none such")), ["none such"], [0.1, 0.2])
    with pytest.raises(ValueError, match="none such"):
        list(replay_all(Task(opened, Machine()), runs, jobs=2))


def _children(pid: int) -> list[int]:
    """The processes of this package that a process has started and not waited for."""
    try:
        pids = [int(word) for thread in Path(f"/proc/{pid}/task").iterdir() for word in (thread / "children").read_text().split()]
        return [child for child in pids if b"kvtier.sim.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:  # one of them has gone meanwhile
        return []


def test_all_stands_for_each_policy_once(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert 0 == cli.main(["simulate", str(trace), "--policy", "all", "--capacity-fraction", "0.3", "--json", str(out), "--jobs", "1"])
    assert sorted(set(POLICIES) - {"default"}) == sorted(record["policy"] for record in json.loads(out.read_text()))


def test_a_configuration(trace: Path, tmp_path: Path) -> None:
    """Tiers and settings come from the file; the disk's hits and writes are told apart."""
    config, out = tmp_path / "c.yaml", tmp_path / "out.json"
    config.write_text("tiers:\n  - {type: host, capacity: 1GiB, policy: fifo}\n  - {type: disk, path: nowhere, capacity: 8GiB}\n")
    assert 0 == cli.main(["simulate", str(trace), "--config", str(config), "--json", str(out), "--jobs", "1"])
    (record,) = json.loads(out.read_text())
    assert ("fifo", "lru", None) == (record["policy"], record["disk_policy"], record["capacity_fraction"])
    assert (16, 128) == (record["capacity_blocks"], record["disk_capacity_blocks"])
    assert record["disk_token_hit_rate"] > 0
    assert 0 < record["disk_written_bytes"] <= 8 << 30
    read = open_trace(trace)
    assert math.isclose(record["disk_read_bytes"] / 131072, record["disk_token_hit_rate"] * read.input_tokens.sum())
    assert not (tmp_path / "nowhere").exists()
    config.write_text("tiers: [{type: host, capacity: 1MiB}]\n")
    assert 2 == cli.main(["simulate", str(trace), "--config", str(config)])


def test_markdown_keeps_what_is_around(trace: Path, tmp_path: Path) -> None:
    """Between its marks, and only there."""
    path = tmp_path / "p.md"
    path.write_text(f"# Policies\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    assert 0 == cli.main(
        ["simulate", str(trace), "--policy", "lru", "--capacity-fraction", "0.1,0.5", "--markdown", str(path), "--jobs", "1"]
    )
    text = path.read_text()
    assert text.startswith(f"# Policies\n\n{BEGIN}\n\n### chat\n")
    assert text.endswith(f"\n{END}\n\nThe end.\n")
    assert "old" not in text
    assert "| policy | 10 % | 50 % | mean share |" in text
    assert "mean share of the optimum over 2 points" in text
    write_markdown(tmp_path / "new.md", "x")
    assert f"{BEGIN}\n\nx\n{END}\n" == (tmp_path / "new.md").read_text()


def test_pictures(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = [
        "simulate",
        str(trace),
        "--policy",
        "lru,fifo",
        "--capacity-fraction",
        "0.1,0.5",
        "--plot",
        str(tmp_path / "p.png"),
        "--jobs",
        "1",
    ]
    assert 0 == cli.main(words)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


PRICES = ["--gpu-hour-price", "2", "--dram-gib-month", "3", "--ssd-gib-month", "0.1", "--jobs", "1"]


def test_plan(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cheapest point that meets the target, as a configuration that is accepted; the points add up."""
    out = tmp_path / "points.json"
    assert 0 == cli.main(["plan", str(trace), "--target-p95", "0.2s", *PRICES, "--json", str(out), "--object-gib-month", "0.02"])
    points = json.loads(out.read_text())
    assert points[0]["policy"] == "none"
    assert {"", "disk", "object"} == {point["lower"] for point in points}
    for point in points:
        assert math.isclose(point["cost_per_month"], sum(point[f"{part}_cost_per_month"] for part in ("gpu", "host", "lower")))
    best = cheapest(points, 0.2)
    assert best is not None
    assert best["ttft_p95_s"] <= 0.2 < points[0]["ttft_p95_s"]
    assert not [p for p in points if p["lower"] != "object" and p["ttft_p95_s"] <= 0.2 and p["cost_per_month"] < best["cost_per_month"]]
    text = configuration(best, "lru")
    (tmp_path / "kvtier.yaml").write_text(text)
    assert Config.load(tmp_path / "kvtier.yaml").host.capacity_bytes >= best["capacity_bytes"]
    assert configuration(best, None) in capsys.readouterr().out


def test_plan_within_bounds(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No tier is larger than it may be. Where nothing meets the target the status says so."""
    out = tmp_path / "points.json"
    words = ["plan", str(trace), "--target-p95", "1ms", *PRICES, "--json", str(out), "--max-host", "640MiB", "--max-disk", "2GiB"]
    assert 1 == cli.main(words)
    assert "No point meets 0.001 s" in capsys.readouterr().out
    points = json.loads(out.read_text())
    assert 640 << 20 == max(point["capacity_bytes"] for point in points)
    assert 2 << 30 == max(point["disk_capacity_bytes"] for point in points)


def test_plan_below_one_block(trace: Path) -> None:
    """A bound that no block fits into is named."""
    prices = ("--target-p95", "1s", "--gpu-hour-price", "1", "--dram-gib-month", "1")
    status, _, errors = run("plan", trace, *prices, "--max-host", "1")
    assert 2 == status
    assert errors.startswith("--max-host: 1 bytes hold no block; allowed: at least ")


@pytest.mark.parametrize("name", ["--json", "--markdown", "--plot"])
def test_files_are_tried_before_the_work(name: str, trace: Path, tmp_path: Path) -> None:
    """A result that cannot be written is refused before anything is computed."""
    status, printed, errors = run("simulate", trace, name, tmp_path / "missing" / "out")
    assert (2, "") == (status, printed)
    assert f"argument {name}: " in errors


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0 where serving and simulator agree, 1 where not, with the differences."""
    path = served(tmp_path, chats(40))
    assert 0 == cli.main(["simulate", str(path), "--verify"])
    assert "the same in the simulator" in capsys.readouterr().out
    path.write_text(path.read_text().replace('"host_blocks": 16', '"host_blocks": 15'))
    assert 1 == cli.main(["simulate", str(path), "--verify"])
    assert "different in the simulator:\n  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simulate", "none.jsonl"], "none.jsonl: cannot be read: No such file"),
        (["simulate", "TRACE", "--policy", "best"], "--policy: 'best' is none; allowed: all, "),
        (["simulate", "TRACE", "--capacity-fraction", "2"], "'2' is not a number above 0 and up to 1"),
        (["simulate", "TRACE", "--hours", "2", "--policy", "lru"], "--hours and --seed are for the format sessions, this is mooncake"),
        (["simulate", "TRACE", "--kv-bytes-per-token", "0", "--policy", "lru"], "kv_bytes_per_token is 0; allowed: more than 0"),
        (["simulate", "TRACE", "--host-bytes-per-s", "fast"], "'fast' is not a rate"),
        (["simulate", "TRACE", "--jobs", "0"], "'0' is not a whole number of at least 1"),
        (["simulate", "TRACE", "--config", "none.yaml", "--policy", "lru"], "none.yaml: there is no such file"),
        (["plan", "TRACE"], "the following arguments are required: --target-p95"),
        (["plan", "TRACE", "--target-p95", "soon"], "'soon': not a duration"),
        (["plan", "TRACE", "--target-p95", "1s", "--gpu-hour-price", "-1"], "'-1' is not a number of at least 0"),
    ],
)
def test_bad_input(words: list[str], message: str, trace: Path) -> None:
    """Status 2 and one message that says what is wrong and what is allowed."""
    status, _, errors = run(*(str(trace) if word == "TRACE" else word for word in words))
    assert 2 == status
    assert message in errors
    assert "Traceback" not in errors


def test_broken_lines(trace: Path) -> None:
    """Named and refused, or counted and skipped."""
    with trace.open("a") as file:
        file.write('{"timestamp": -1}\n')
    status, _, errors = run("simulate", trace, "--policy", "lru")
    assert (2, f"{trace}:{SIZE + 1}: expected `timestamp` to be a number of at least 0, found -1\n") == (status, errors)
    status, _, errors = run("simulate", trace, "--policy", "lru", "--skip-bad", "--jobs", "1")
    assert (0, f"{trace}: 1 broken lines skipped") == (status, " ".join(errors.split()))


def test_the_arguments_name_what_is_there() -> None:
    """Formats and fields of the machine are listed by hand, so that the command line loads nothing for them."""
    assert sorted(FORMATS) == sorted(arguments.FORMATS)
    parser = argparse.ArgumentParser()
    arguments.add_simulate(parser)
    assert Machine() == arguments.machine_of(parser.parse_args(["trace"]))


def test_the_command_line_loads_little() -> None:
    """Parsing brings no numpy."""
    code = "import sys, kvtier.cli; kvtier.cli._parser(); print(sorted({'numpy', 'rich', 'pydantic', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "[]" == done.stdout.strip()


def points_of(*costs: tuple[float, float, str]) -> list[dict[str, Any]]:
    return [{"ttft_p95_s": time_s, "cost_per_month": cost, "lower": lower} for time_s, cost, lower in costs]


def test_cheapest() -> None:
    """Of those that are fast enough and can be configured."""
    points = points_of((0.1, 9.0, ""), (0.4, 5.0, "disk"), (0.3, 4.0, "object"), (0.9, 1.0, ""))
    assert points[1] == cheapest(points, 0.5)
    assert points[0] == cheapest(points, 0.2)
    assert cheapest(points, 0.05) is None
