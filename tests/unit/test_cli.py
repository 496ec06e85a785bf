"""The command line, as a user meets it: the real program, its output and its exit status."""

from __future__ import annotations

import errno
import importlib
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvtier
from kvtier import _native, cli, machine
from kvtier.config import Config, commented_defaults
from kvtier.testing.tiers import meta_of, store
from kvtier.tiers.disk import DiskTier

SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = (1 << 20) + (32 << 10) + 6 * SEGMENT_BYTES


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``kvtier ARGUMENTS...`` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "kvtier", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


def run_on_a_terminal(*arguments: str | Path) -> str:
    """What a terminal would show."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kvtier", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:
            pass  # how Linux says that the other side is closed
        process.wait(60)
    os.close(ours)
    return shown.decode()


@pytest.fixture
def tier_directory(tmp_path: Path) -> Path:
    """A closed disk tier with eight blocks."""
    directory = tmp_path / "tier"
    tier = DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES)
    store(tier, [meta_of(number, 4000) for number in range(8)])
    tier.close()
    return directory


class TestEnv:
    """``kvtier env``."""

    def test_text_and_json_tell_the_same(self, tmp_path: Path) -> None:
        """Every fact of the JSON stands in the text; the directory asked about is left as it was."""
        text, as_json = run("env", "--no-measure", "--path", tmp_path), run("env", "--no-measure", "--json", "--path", tmp_path)
        assert (0, 0, "") == (text.returncode, as_json.returncode, text.stderr)
        topics = json.loads(as_json.stdout)
        assert ["software", "processor", "memory", "disk", "GPU"] == list(topics)
        assert kvtier.__version__ == topics["software"]["kvtier"]
        assert str(tmp_path) == topics["disk"]["path"]
        steady = {f"{name} {answer}" for facts in topics.values() for name, answer in facts.items() if "ree" not in name + answer}
        shown = {" ".join(line.split()) for line in text.stdout.splitlines()}
        assert {" ".join(fact.split()) for fact in steady if not fact.startswith("available")} <= shown
        assert [] == list(tmp_path.iterdir())

    def test_what_is_refused_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine that forbids io_uring or direct I/O gets the reason."""

        def no_ring(num_entries: int) -> int:
            raise PermissionError(errno.EPERM, f"forbidden here ({num_entries})")

        def no_direct(path: Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "not on this file system")
            return plain_open(path, flags, mode, dir_fd=dir_fd)

        plain_open = os.open
        monkeypatch.setattr(_native, "ring_open", no_ring)
        monkeypatch.setattr(os, "open", no_direct)
        disk = machine.describe(tmp_path, measure_gpus=False)["disk"]
        assert disk["io_uring"].startswith("no: [Errno 1] forbidden here")
        assert "no: [Errno 22] not on this file system" == disk["direct I/O"]

    def test_a_machine_without_shared_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Has no /dev/shm to ask about; the rest is told."""
        plain = shutil.disk_usage

        def usage(path: str | Path) -> object:
            if path == "/dev/shm":
                raise FileNotFoundError(errno.ENOENT, "none here", path)
            return plain(path)

        monkeypatch.setattr("shutil.disk_usage", usage)
        facts = machine.describe(tmp_path, measure_gpus=False)
        assert "unknown: [Errno 2] none here: '/dev/shm'" == facts["memory"]["/dev/shm"]
        assert " of " in facts["disk"]["free"]

    def test_a_path_that_is_none(self, tmp_path: Path) -> None:
        """Named, with status 2."""
        done = run("env", "--path", tmp_path / "absent")
        assert 2 == done.returncode
        assert "--path" in done.stderr
        assert "absent" in done.stderr


class TestVersion:
    """``kvtier version``."""

    def test_version(self) -> None:
        """The version is the package's."""
        done = run("version")
        assert (0, f"kvtier {kvtier.__version__}\n", "") == (done.returncode, done.stdout, done.stderr)

    def test_imports_nothing_heavy(self) -> None:
        """A command pays only for what it needs."""
        code = (
            "import sys; from kvtier.cli import main; main(['version'])\n"
            "sys.exit(str(sorted({'numpy', 'pydantic', 'yaml', 'lmdb', 'xxhash', 'rich', 'torch'} & set(sys.modules))))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert "[]" == done.stderr.strip()


class TestConfigCheck:
    """``kvtier config check FILE``."""

    def test_right_file(self, tmp_path: Path) -> None:
        """A right file: all settings on stdout, and what is printed is a file that means the same."""
        path = tmp_path / "kvtier.yaml"
        path.write_text("tiers: [{type: host, capacity: 1GiB}]\n")
        done = run("config", "check", path)
        assert (0, Config.load(path).effective(), "") == (done.returncode, done.stdout, done.stderr)

    def test_wrong_file(self, tmp_path: Path) -> None:
        """A wrong file: everything that is wrong on stderr, status 2."""
        path = tmp_path / "kvtier.yaml"
        path.write_text("tiers: [{type: host, capacity: 1G}]\nblok_tokens: 3\n")
        done = run("config", "check", path)
        assert (2, "") == (done.returncode, done.stdout)
        assert "capacity" in done.stderr
        assert "blok_tokens" in done.stderr
        assert "Traceback" not in done.stderr

    def test_missing_file(self, tmp_path: Path) -> None:
        """A missing file is named, status 2."""
        done = run("config", "check", tmp_path / "absent.yaml")
        assert 2 == done.returncode
        assert "absent.yaml" in done.stderr
        assert "Traceback" not in done.stderr

    def test_on_a_terminal(self, tmp_path: Path) -> None:
        """A terminal gets colours."""
        path = tmp_path / "kvtier.yaml"
        path.write_text("tiers: [{type: host, capacity: 1GiB}]\n")
        shown = run_on_a_terminal("config", "check", path)
        assert "\x1b[" in shown
        assert "capacity" in shown


class TestConfigShowDefaults:
    """``kvtier config show-defaults``."""

    def test_is_a_file_to_start_from(self, tmp_path: Path) -> None:
        """What it prints is a right file with comments."""
        done = run("config", "show-defaults")
        assert (0, commented_defaults(), "") == (done.returncode, done.stdout, done.stderr)
        path = tmp_path / "kvtier.yaml"
        path.write_text(done.stdout)
        assert 0 == run("config", "check", path).returncode


class TestCheck:
    """``kvtier check PATH``."""

    def test_healthy(self, tier_directory: Path) -> None:
        """A healthy directory: one line, status 0, nothing is changed."""
        before = {path.name: path.read_bytes() for path in tier_directory.iterdir()}
        done = run("check", tier_directory)
        assert (0, f"{tier_directory}: healthy, every record was verified\n", "") == (done.returncode, done.stdout, done.stderr)
        assert before == {path.name: path.read_bytes() for path in tier_directory.iterdir()}

    def test_damaged(self, tier_directory: Path) -> None:
        """Damage: every finding with its place, status 1."""
        segment = _damage(tier_directory)
        done = run("check", tier_directory)
        assert (1, "") == (done.returncode, done.stderr)
        assert segment in done.stdout
        assert "finding" in done.stdout.splitlines()[-1]

    def test_damaged_on_a_terminal(self, tier_directory: Path) -> None:
        """A terminal gets a table."""
        _damage(tier_directory)
        shown = run_on_a_terminal("check", tier_directory)
        assert "┃" in shown

    def test_open_directory(self, tmp_path: Path) -> None:
        """A directory in use is refused, its holder named, status 2."""
        tier = DiskTier(tmp_path, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES)
        done = run("check", tmp_path)
        tier.close()
        assert (2, "") == (done.returncode, done.stdout)
        assert f"pid {os.getpid()}" in done.stderr

    @pytest.mark.parametrize(
        ("kind", "reason"), [("missing", "does not exist"), ("file", "is not a directory"), ("empty", "no kvtier disk tier")]
    )
    def test_nothing_to_check(self, tmp_path: Path, kind: str, reason: str) -> None:
        """What is no directory of a disk tier is refused with a sentence that names it, status 2."""
        path = tmp_path / kind
        if kind == "file":
            path.write_text("")
        elif kind == "empty":
            path.mkdir()
        done = run("check", path)
        assert (2, "") == (done.returncode, done.stdout)
        assert str(path) in done.stderr
        assert reason in done.stderr
        assert 1 == len(done.stderr.splitlines())


class TestBench:
    """``kvtier bench``."""

    @pytest.mark.parametrize("name", sorted(cli.BENCHMARKS))
    def test_options_reach_the_benchmark(self, name: str) -> None:
        """``kvtier bench NAME --help`` is the benchmark's own help."""
        done = run("bench", name, "--help")
        assert 0 == done.returncode
        assert done.stdout.startswith(f"usage: kvtier bench {name} ")

    @pytest.mark.parametrize("name", sorted(cli.BENCHMARKS))
    def test_benchmarks_offer_what_the_command_line_needs(self, name: str) -> None:
        """A benchmark module has ``add_arguments`` and ``run``."""
        module = importlib.import_module(cli.BENCHMARKS[name][0])
        assert callable(module.add_arguments)
        assert callable(module.run)

    def test_help_lists_them(self) -> None:
        """``kvtier bench --help`` says what can be measured."""
        done = run("bench", "--help")
        assert 0 == done.returncode
        assert [] == [name for name, (_, about) in cli.BENCHMARKS.items() if f"{name:<10} {about}" not in done.stdout]


@pytest.mark.parametrize("arguments", [[], ["config"], ["bench"], ["bench", "unknown"], ["unknown"], ["check"]])
def test_wrong_usage(arguments: list[str]) -> None:
    """Wrong usage prints the usage on stderr, status 2."""
    done = run(*arguments)
    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith("usage: kvtier")


def test_reader_that_leaves(tmp_path: Path) -> None:
    """A reader that has seen enough (``| head``) is no error."""
    path = tmp_path / "kvtier.yaml"
    path.write_text("tiers: [{type: host, capacity: 1GiB}]\n")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "kvtier", "config", "check", str(path)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.parametrize("words", ["version", "config show-defaults", "config check kvtier.yaml"])
def test_output_that_cannot_be_written(words: str, tmp_path: Path) -> None:
    """A full disk behind standard output is status 2 and one line; a closed one is nothing to complain of."""
    (tmp_path / "kvtier.yaml").write_text("tiers: [{type: host, capacity: 1GiB}]\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    for output, expected in ((">/dev/full", (2, "standard output: No space left on device\n")), (">&-", (0, ""))):
        command = ["sh", "-c", f'"$0" -m kvtier {words} {output}', sys.executable]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert expected == (done.returncode, done.stderr)


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends a command without a traceback."""

    def interrupted(_options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_version", interrupted)
    assert 130 == cli.main(["version"])
    assert "" == capsys.readouterr().err


def test_serving_without_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``kvtier serve`` of a plain installation says what to install."""
    monkeypatch.setitem(sys.modules, "kvtier.serve.command", None)
    assert 2 == cli.main(["serve", "--config", "kvtier.yaml"])
    assert "kvtier[serve]" in capsys.readouterr().err


def _damage(directory: Path) -> str:
    """Overwrites the middle of the first segment file and returns its name."""
    segment = min(path for path in directory.iterdir() if path.stat().st_size == SEGMENT_BYTES)
    with segment.open("r+b") as file:
        file.seek(6000)
        file.write(b"damage" * 20)
    return segment.name
