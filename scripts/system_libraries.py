"""System libraries that a package from the index needs and does not bring, for the tests: fetched into the checkout where they are missing.

Mooncake's engine is linked against ``libibverbs``, also where there is no InfiniBand. Where the machine has none and Debian's tools are
there, its packages are downloaded and unpacked below ``.cache``; nothing is installed and no right is needed. Elsewhere what needs them is
skipped by the tests, which say so.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from setup_progress import Progress

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "system-libraries"
LOG = ROOT / ".cache" / "logs" / "system-libraries.log"
PACKAGES = {"libibverbs.so.1": "libibverbs1", "libnl-3.so.200": "libnl-3-200", "libnl-route-3.so.200": "libnl-route-3-200"}
"""library -> Debian package"""
TIMEOUT_S = 120.0


def fetch_missing(progress: Progress) -> None:
    """Puts what is missing into the folder. Never fails: without them a part of the tests is skipped."""
    missing = sorted({package for library, package in PACKAGES.items() if not (loads(library) or (FOLDER / library).exists())})
    if not missing or not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return
    LOG.parent.mkdir(parents=True, exist_ok=True)
    work = FOLDER / "packages"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with progress.task(f"fetching {' '.join(missing)}", LOG), LOG.open("w") as log:
        if not _download(missing, work, log.fileno()):
            return
        for package in work.glob("*.deb"):
            _run(["dpkg-deb", "-x", str(package), str(work)], work, log.fileno())
    for library in PACKAGES:
        for found in work.rglob(library):
            shutil.copy(found, FOLDER / library)  # what a link leads to
    shutil.rmtree(work)


def loads(library: str) -> bool:
    """Whether the machine has it."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def with_libraries(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which the folder's libraries are found, behind the machine's own settings."""
    if not FOLDER.is_dir():
        return dict(environment)
    places = [*filter(None, environment.get("LD_LIBRARY_PATH", "").split(":")), str(FOLDER)]
    return {**environment, "LD_LIBRARY_PATH": ":".join(places)}


def _download(packages: Sequence[str], work: Path, log: int) -> bool:
    """With the machine's package lists; where it has none, with lists of our own."""
    if _run(["apt-get", "download", *packages], work, log):
        return True
    lists = work / "lists"
    (lists / "partial").mkdir(parents=True)
    own = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={work}", "-o", "Debug::NoLocking=1"]
    return _run(["apt-get", *own, "update"], work, log) and _run(["apt-get", *own, "download", *packages], work, log)


def _run(command: Sequence[str], work: Path, log: int) -> bool:
    try:
        done = subprocess.run(
            command, cwd=work, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(os.environ), timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
