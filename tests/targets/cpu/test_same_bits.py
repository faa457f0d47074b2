"""x86 and NEON compute the same bits: functions, sums and movement in their stated operations and order."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from kbitc.bundle.manifest import ValueInfo
from kbitc.passes.canonicalize import canonicalize
from kbitc.targets.build import build
from tests.support.groups import HERE
from tests.support.qemu import need_runner, run_on

ROWS, COLUMNS = 2000, 93


def model() -> Any:
    """One output for every kind of group."""
    nodes = [
        helper.make_node("Softmax", ["x"], ["softmax"]),
        helper.make_node("LayerNormalization", ["x", "scale"], ["norm"], epsilon=1e-5),
        helper.make_node("Gelu", ["x"], ["gelu"]),
        helper.make_node("Tanh", ["x"], ["tanh"]),
        helper.make_node("Softplus", ["x"], ["softplus"]),
        helper.make_node("Sigmoid", ["x"], ["sigmoid"]),
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0]),
        helper.make_node("ReduceSum", ["x", "last"], ["sums"], keepdims=0),
        helper.make_node("ReduceSum", ["x", "first"], ["columns"], keepdims=0),
    ]
    names = [node.output[0] for node in nodes]
    weights = {
        "scale": np.linspace(-2, 2, COLUMNS).astype(np.float32),
        "last": np.array([1], np.int64),
        "first": np.array([0], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "same_bits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (ROWS, COLUMNS))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return canonicalize(ir.from_proto(made))


def outputs(target: Any) -> dict[str, Any]:
    built = build(model(), target)
    described = [[ValueInfo(v.name, v.dtype, tuple(v.shape)) for v in part] for part in (built.inputs, built.outputs)]
    x = np.random.default_rng(8).normal(size=(ROWS, COLUMNS)).astype(np.float32) * 4
    cpu = "cortex-a76" if target.kind == "arm-neon" else "max"
    return dict(run_on(target, built.library, built.weights, *described, {"x": x}, cpu=cpu).outputs)


@pytest.mark.slow
def test_neon_and_x86_agree_bit_for_bit() -> None:
    neon = outputs(need_runner("arm-neon:dotprod"))
    for target in HERE:
        here = outputs(need_runner(target.name))
        assert here.keys() == neon.keys()
        assert [name for name in here if not np.array_equal(here[name], neon[name])] == []
