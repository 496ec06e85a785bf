"""What differs between machines with GPUs and decides what kvtier does on them: for ``gpu_check.py``'s summary, in under a second.

Needs nothing but Python, so that there is an answer where something is missing: then it is None.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 10.0
DRIVER_FILES = ("/sys/module/nvidia/version", "/proc/driver/nvidia/version")
PACKAGES = {
    "torch": ("torch",),
    "cudnn": ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
}
"""what is asked for -> the packages that have it, by what they are called"""

VERSIONS = f"""
import json
from importlib import metadata

def version(names):
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass

found = {{what: version(names) for what, names in {PACKAGES!r}.items()}}
try:
    from cupy.cuda import nvrtc
    found["nvrtc"] = ".".join(map(str, nvrtc.getVersion()))
except (ImportError, RuntimeError):
    found["nvrtc"] = None
print(json.dumps(found))
"""


def facts(python: str) -> dict[str, object]:
    """All of them. ``python``: the one whose packages are asked about, without importing torch, which takes seconds."""
    return {
        "kernel": platform.release(),
        "/tmp": file_system("/tmp"),
        "/dev/shm": file_system("/dev/shm"),
        "available_bytes": available_bytes(),
        "driver": driver(),
        **versions(python),
    }


def gpus() -> list[str]:
    """A line of ``nvidia-smi`` for each."""
    return _output("nvidia-smi", "-L").splitlines()


def file_system(path: str, mounts: Path = Path("/proc/mounts")) -> dict[str, object] | None:
    """The type and size of the file system that a directory lies in."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
        at = [(place, kind) for _, place, kind, *_ in lines if path == place or path.startswith(place.rstrip("/") + "/")]
        usage = shutil.disk_usage(path)
    except (OSError, ValueError):
        return None
    kind = max(reversed(at), key=lambda each: len(each[0]))[1] if at else None  # of two in one place the later one counts
    return {"type": kind, "total_bytes": usage.total, "free_bytes": usage.free}


def available_bytes() -> int | None:
    """Memory that may be taken without swapping, as the kernel estimates it."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def driver(files: Sequence[str] = DRIVER_FILES) -> str | None:
    """The version of NVIDIA's driver: of the kernel's module where it is seen, else as ``nvidia-smi`` says."""
    for text in (*(_text(Path(file)) for file in files), _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")):
        if found := re.search(r"\b\d+\.\d+(\.\d+)?\b", text):
            return found[0]
    return None


def versions(python: str) -> dict[str, str | None]:
    """Of torch, cuDNN, CuPy and the NVRTC that CuPy uses."""
    missing: dict[str, str | None] = {**dict.fromkeys(PACKAGES), "nvrtc": None}
    try:
        return {**missing, **json.loads(_output(python, "-c", VERSIONS))}
    except ValueError:
        return missing


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    """What a command prints; nothing where there is no such command, it fails, or it takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
