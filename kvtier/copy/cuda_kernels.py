"""The CUDA kernels: which texts make one, for which devices, and how they are compiled (NVRTC, through CuPy).

A module is compiled for the very device, at start, in about 0.2 s; nothing is compiled inside an engine's step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cupy.cuda import nvrtc

from kvtier.copy.cuda_params import BULK_CAPABILITY

_INSTALLED = Path(__file__).resolve().parent / "cuda_sources"
SOURCES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[2] / "csrc" / "cuda"
"""where the texts lie: inside an installed package, or in the checkout"""


@dataclass(frozen=True, slots=True)
class KernelModule:
    """Kernels that are compiled together."""

    files: tuple[str, ...]
    kernels: tuple[str, ...]
    min_capability: int = 0
    """10 * major + minor"""


MODULES: Mapping[str, KernelModule] = {
    "paged_copy": KernelModule(("paged_index.h", "paged_copy.cu"), ("paged_copy",)),
    "bulk_copy": KernelModule(("paged_index.h", "bulk_primitives.h", "bulk_copy.cu"), ("bulk_copy",), BULK_CAPABILITY),
    "place_rows": KernelModule(
        ("row_index.h", "half_primitives.h", "float_formats.h", "place_rows.cu"),
        tuple(f"place_{pairs}_{storage}" for pairs in ("neox", "interleaved") for storage in ("bf16", "fp16", "fp32")),
    ),
}
"""name -> module"""

MODULE_OF_KERNEL: Mapping[str, str] = {kernel: name for name, module in MODULES.items() for kernel in module.kernels}


class KernelError(RuntimeError):
    """A kernel does not compile. The message has the compiler's log."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What the compiler says that one kernel uses."""

    num_registers: int
    stack_bytes: int
    spill_bytes: int
    """stored and loaded"""


@dataclass(frozen=True, slots=True)
class CompiledModule:
    """Machine code of one module for one architecture, and the report of each of its kernels."""

    code: bytes
    resources: Mapping[str, Resources]


def source_of(name: str) -> str:
    """The text of a module: its files, one after the other."""
    texts = [(SOURCES / file).read_text(encoding="utf-8") for file in MODULES[name].files]
    return "".join(("#define KVTIER_DEVICE __device__ __forceinline__\n", *texts))


def compile_module(name: str, capability: int) -> CompiledModule:
    """Compiles a module for one device. Needs neither a GPU nor a driver.

    Args:
        capability: 10 * major + minor, as in ``sm_90``

    Raises:
        KernelError: it does not compile, or not for this device.
    """
    program = nvrtc.createProgram(source_of(name), f"{name}.cu", (), ())
    options = ("-std=c++17", f"-arch=sm_{capability}", "--fmad=false", "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, options)
        return CompiledModule(nvrtc.getCUBIN(program), resources_in(nvrtc.getProgramLog(program)))
    except nvrtc.NVRTCError as error:
        raise KernelError(f"kernel module {name} does not compile for sm_{capability}: {nvrtc.getProgramLog(program) or error}") from error
    finally:
        nvrtc.destroyProgram(program)


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SIZES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def resources_in(log: str) -> dict[str, Resources]:
    """Kernel -> what the assembler's report says of it."""
    found: dict[str, Resources] = {}
    parts = _ENTRY.split(log)
    for kernel, text in zip(parts[1::2], parts[2::2], strict=True):
        sizes, registers = _SIZES.search(text), _REGISTERS.search(text)
        if sizes is not None and registers is not None:
            stack, stores, loads = map(int, sizes.groups())
            found[kernel] = Resources(int(registers[1]), stack, stores + loads)
    return found
