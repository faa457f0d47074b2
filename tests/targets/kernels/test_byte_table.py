"""Tables of bytes: every code, every length around a vector and a task."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from kbitc.targets.kernels.byte_table import TASK, make_byte_table
from kbitc.targets.target import parse_target

LENGTHS = (1, 15, 31, 32, 63, 64, 65, 256, TASK - 1, TASK + 33)


@pytest.mark.parametrize("name", ["x86:avx512vnni", "x86:avx512vbmi", "x86:avx2", "reference"])
def test_every_length(name: str) -> None:
    target = parse_target(name)
    length = tvm.tirx.Var("length", "int64")
    function = make_byte_table((length, 1), target, "table").with_attr("global_symbol", "table")
    library = tvm.compile(tvm.IRModule({"table": function}), target=tvm.target.Target(target.tvm))
    table = np.random.default_rng(1).permutation(256).astype(np.uint8)
    for count in LENGTHS:
        codes = np.resize(np.random.default_rng(0).permutation(256), (count, 1)).astype(np.uint8)
        out = tvm.runtime.tensor(np.zeros((count, 1), np.uint8))
        library["table"](tvm.runtime.tensor(codes), tvm.runtime.tensor(table), out)
        np.testing.assert_array_equal(out.numpy(), table[codes])


def test_the_table_is_in_registers() -> None:
    target = parse_target("x86:avx512vnni")
    function = make_byte_table((4096,), target, "table").with_attr("global_symbol", "table")
    library = tvm.compile(tvm.IRModule({"table": function}), target=tvm.target.Target(target.tvm))
    modules = [library.mod, *library.mod.imports]
    text = "\n".join(str(module.inspect_source("s")) for module in modules if module.kind == "llvm")
    assert text.count("vpshufb") >= 16
