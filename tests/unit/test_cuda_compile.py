"""Every kernel compiles for every architecture, on a machine that has none of them, and nothing spills."""

from __future__ import annotations

import pytest

pytest.importorskip("cupy", reason="cupy is not installed: no CUDA kernel was compiled")
from cupy.cuda import nvrtc

from kvtier.copy.cuda_kernels import MODULES, KernelError, Resources, compile_module, resources_in, source_of
from kvtier.copy.cuda_params import BULK_CAPABILITY

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
MAX_REGISTERS = {"paged_copy": 64, "bulk_copy": 64, "place_rows": 40}
"""so that a block of the most threads that a kernel is launched with fits: 512, 512 and 256"""


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("name", MODULES)
def test_kernels_compile_and_nothing_spills(name: str, capability: int) -> None:
    """Machine code for each kernel, few registers, no local memory; what the device cannot do is refused by name."""
    module = MODULES[name]
    if capability < module.min_capability:
        with pytest.raises(KernelError, match=f"{name} does not compile for sm_{capability}"):
            compile_module(name, capability)
        return
    compiled = compile_module(name, capability)
    assert b"\x7fELF" == compiled.code[:4]
    assert set(module.kernels) == set(compiled.resources)
    for kernel, used in compiled.resources.items():
        assert (0, 0) == (used.stack_bytes, used.spill_bytes), kernel
        assert 0 < used.num_registers <= MAX_REGISTERS[name], kernel


def test_only_the_bulk_kernel_needs_a_new_device() -> None:
    """The other modules serve every architecture of the list."""
    assert {"bulk_copy"} == {name for name, module in MODULES.items() if module.min_capability > min(ARCHITECTURES)}
    assert min(ARCHITECTURES) < BULK_CAPABILITY == MODULES["bulk_copy"].min_capability


@pytest.mark.parametrize("name", MODULES)
def test_texts_include_nothing(name: str) -> None:
    """So they compile without a toolkit's headers."""
    assert "#include" not in source_of(name)


@pytest.mark.parametrize(("name", "accesses"), [("paged_copy", ["ld.v4.u32", "st.v4.u32"]), ("place_rows", ["ld.v4.u16", "st.v4.u16"])])
def test_accesses_are_wide(name: str, accesses: list[str]) -> None:
    """16 bytes a thread where a copy's alignment allows it, 8 in a rotation of 16-bit elements."""
    program = nvrtc.createProgram(source_of(name), f"{name}.cu", (), ())
    nvrtc.compileProgram(program, ("-std=c++17", "-arch=compute_80"))
    text = nvrtc.getPTX(program)
    assert [] == [access for access in accesses if access not in (text.decode() if isinstance(text, bytes) else text)]


def test_a_spill_is_seen() -> None:
    """The report of a kernel that needs more than it gets says so: the check above can fail."""
    body = "\n".join(f"float v{i} = in[threadIdx.x + {i} * 32];" for i in range(200))
    rest = " ".join(f"in[{i}] = v{199 - i};" for i in range(200))
    source = f'extern "C" __global__ void greedy(float* in) {{ {body} __syncthreads(); {rest} }}'
    program = nvrtc.createProgram(source, "greedy.cu", (), ())
    nvrtc.compileProgram(program, ("-arch=sm_80", "--ptxas-options=-v", "-maxrregcount=32"))
    found = resources_in(nvrtc.getProgramLog(program))
    assert {"greedy"} == set(found)
    assert found["greedy"].spill_bytes > 0


def test_report_of_an_assembler_is_read() -> None:
    """Each kernel gets its own figures."""
    log = """ptxas info    : Compiling entry function 'one' for 'sm_90'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 60 registers, used 0 barriers
ptxas info    : Compiling entry function 'two' for 'sm_90'
ptxas         .     8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers
"""
    assert {"one": Resources(60, 0, 0), "two": Resources(255, 8, 40)} == resources_in(log)
