"""Machine code without a GPU or driver: what is in the library, and that nothing of it depends on chance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kbitc.errors import InternalError, ResourceError
from kbitc.targets.cuda import compile as cuda_compile
from kbitc.targets.cuda import inspection, toolchain
from kbitc.targets.target import parse_target

ROOT = Path(__file__).resolve().parents[3]
KERNEL = """
extern "C" __global__ void __launch_bounds__(128) twice(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float held[128];
  held[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = 2.0f * held[127 - threadIdx.x];
}
"""
needs_compiler = pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing()))

# Runs in a process of its own: loading a stub driver cannot be undone.
BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kbitc.targets.cuda import compile as cuda_compile
from kbitc.targets.target import parse_target
cuda_compile.load_runtime()
import tvm
from tests.targets.cuda import cases
from tests.targets.cuda.cases import Product
from kbitc.targets.cuda.kernels.product import make_product
from kbitc.targets.cuda.kernels.quantize import make_quantize
import numpy as np
functions = {}
for name, case in {"vector": Product("int4:b32", 1, 64, 256), "table": Product("nf4:b32", 1, 64, 256),
                   "matrix": Product("int4:b32", 64, 64, 256), "halves": Product("uint3:b16:zp", 64, 64, 256)}.items():
    weight = cases.make_weight(np.random.default_rng(0), case.n, 1, case.c, case.scheme)
    spec, quant = cases.specification(case, weight, accumulators=False)
    functions[name] = make_product(spec, name)
functions["quantize"] = make_quantize(quant, "quantize")
module = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in functions.items()})
made = cuda_compile.build_library(module, parse_target("cuda:" + sys.argv[2]), Path(sys.argv[3]))
for kernel in made.kernels:
    print(kernel.name, kernel.registers, kernel.shared_bytes, kernel.spill_bytes)
"""


def build(arch: str, output: Path) -> dict[str, tuple[int, int, int]]:
    """Build five kernels; registers, shared and spilled bytes by kernel."""
    command = [sys.executable, "-c", BUILD, str(ROOT), arch, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {line[0]: (int(line[1]), int(line[2]), int(line[3])) for line in lines}


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_library_holds_machine_code_of_the_architecture_and_no_source(arch: str, tmp_path: Path) -> None:
    library = tmp_path / "module.so"
    resources = build(arch, library)
    facts = inspection.inspect(library)
    assert not facts.has_source
    assert [cubin.arch for cubin in facts.cubins] == [arch]
    assert {f"{name}_kernel" for name in ("vector", "table", "matrix", "halves", "quantize")} == set(facts.kernels)
    assert all(kernel.code_bytes > 0 and kernel.shared_bytes < 48 * 1024 for kernel in facts.cubins[0].kernels)
    assert set(resources) == set(facts.kernels)
    assert all(spilled == 0 for _, _, spilled in resources.values())
    assert all(registers <= 255 for registers, _, _ in resources.values())


@needs_compiler
def test_integer_instructions_are_in_the_code(tmp_path: Path) -> None:
    if inspection.find_disassembler() is None:
        pytest.skip("nvdisasm is not here: pip install nvidia-cuda-nvdisasm")
    library = tmp_path / "module.so"
    build("sm_90", library)
    code = inspection.instructions(library)
    assert code["vector_kernel"]["IDP.4A.S8.S8"] > 0
    assert code["table_kernel"]["IDP.4A.S8.S8"] > 0 and code["table_kernel"]["PRMT"] > 0
    assert code["matrix_kernel"]["IMMA.16832.S8.S8"] > 0
    assert code["halves_kernel"]["IMMA.16816.S8.S8"] > 0
    # Weights come in 16-byte pieces, and the levels of a uniform format need no table.
    assert any(opcode.startswith("LDG.E.128") for opcode in code["vector_kernel"])
    assert code["vector_kernel"]["PRMT"] == 0


@needs_compiler
def test_same_kernels_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "module.so", tmp_path / "b" / "module.so"
    for library in (first, second):
        library.parent.mkdir()
        build("sm_90", library)
    images = []
    for library in (first, second):
        (cubin,) = inspection.inspect(library).cubins
        images.append(library.read_bytes()[cubin.offset : cubin.offset + cubin.size])
    assert images[0] == images[1]


@needs_compiler
def test_resources_are_those_of_the_kernel() -> None:
    cubin, (resources,) = toolchain.compile_source(KERNEL, "sm_90")
    assert cubin.startswith(b"\x7fELF")
    assert (resources.name, resources.shared_bytes, resources.spill_bytes) == ("twice", 512, 0)


@needs_compiler
def test_source_that_does_not_compile_names_the_error() -> None:
    with pytest.raises(InternalError, match="nothing_of_this_name"):
        toolchain.compile_source('extern "C" __global__ void f() { nothing_of_this_name(); }', "sm_90")


def test_missing_compiler_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_find_nvcc", lambda: None)
    monkeypatch.setattr(toolchain, "_find_nvrtc", lambda: None)
    toolchain.find_toolchain.cache_clear()
    try:
        with pytest.raises(ResourceError) as caught:
            toolchain.find_toolchain()
        assert "pip install" in str(caught.value) and "\n" not in str(caught.value)
        assert toolchain.missing() is not None
    finally:
        toolchain.find_toolchain.cache_clear()


def test_stub_driver_answers_no_device(tmp_path: Path) -> None:
    library = cuda_compile.build_stub(tmp_path)
    # In another process: this one may have the real driver or another stub.
    code = "import ctypes, sys; d = ctypes.CDLL(sys.argv[1]); print(d.cuInit(0), d.cuLaunchKernelEx(0, 0, 0, 0))"
    done = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(cuda_compile.NO_DEVICE)] * 2


def test_resource_text_of_ptxas_is_read() -> None:
    log = (
        "ptxas info    : Compiling entry function 'a_kernel' for 'sm_90'\n"
        "ptxas info    : Function properties for a_kernel\n"
        "    8 bytes stack frame, 16 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 6912 bytes smem, 400 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function 'b_kernel' for 'sm_90'\n"
        "ptxas info    : Used 10 registers\n"
    )
    first, second = toolchain.parse_resources(log)
    assert first == toolchain.KernelResources("a_kernel", 128, 6912, 8, 20)
    assert second == toolchain.KernelResources("b_kernel", 10, 0, 0, 0)


def test_file_without_machine_code_has_none(tmp_path: Path) -> None:
    library = tmp_path / "x.so"
    library.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(100) + b"__global__ void f()")
    facts = inspection.inspect(library)
    assert facts.cubins == () and facts.has_source


def test_opcodes_are_counted_by_kernel() -> None:
    listing = (
        '\t.section\t.text.a_kernel,"ax",@progbits\n'
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;\n"
        "        /*0010*/              @!P0 IDP.4A.S8.S8 R1, R2, R3, R4 ;\n"
        '\t.section\t.text.b_kernel,"ax",@progbits\n'
        "        /*0000*/                   EXIT ;\n"
    )
    counts = inspection.count_opcodes(listing)
    assert counts["a_kernel"] == {"LDC": 1, "IDP.4A.S8.S8": 1} and counts["b_kernel"] == {"EXIT": 1}


def test_target_builds_for_a_plain_x86_host() -> None:
    assert parse_target("cuda:sm_80").tvm["host"]["mcpu"] == "x86-64"
