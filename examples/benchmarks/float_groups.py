"""Float operators that are no contraction, one thread, against onnxruntime: activations, softmax, norms, movement.

    python examples/benchmarks/float_groups.py [--target x86:avx2] [--only softmax] [--rounds 30] [--save]

Every row is a model of one operator, compiled as any other model is: emitted, scheduled and run by the Relax machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import operators

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One operator on x of a shape; further inputs are vectors of `weights` sizes. `dynamic`: no dimension is known."""

    name: str
    operator: str
    shape: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    weights: tuple[int, ...] = ()
    dynamic: bool = False


CASES = (
    Case("softmax 1536x128", "Softmax", (1536, 128)),
    Case("softmax 1536x128, dynamic", "Softmax", (1536, 128), dynamic=True),
    Case("layer norm 128x384", "LayerNormalization", (128, 384), weights=(384, 384)),
    Case("layer norm 128x384, dynamic rows", "LayerNormalization", (128, 384), weights=(384, 384), dynamic=True),
    Case("gelu 128x1536", "Gelu", (128, 1536)),
    Case("tanh 128x1536", "Tanh", (128, 1536)),
    Case("sigmoid 128x1536", "Sigmoid", (128, 1536)),
    Case("exp 128x1536", "Exp", (128, 1536)),
    Case("hard swish 1x64x56x56", "HardSwish", (1, 64, 56, 56)),
    Case("transpose heads 1x128x12x32", "Transpose", (1, 128, 12, 32), {"perm": [0, 2, 1, 3]}),
    Case("transpose last two 1x12x128x32", "Transpose", (1, 12, 128, 32), {"perm": [0, 1, 3, 2]}),
    Case("transpose to channels last 1x64x56x56", "Transpose", (1, 64, 56, 56), {"perm": [0, 2, 3, 1]}),
)


def make_model(case: Case) -> Any:
    """The ONNX model of a case."""
    from onnx import TensorProto, helper, numpy_helper

    dims: list[Any] = list(case.shape)
    if case.dynamic:
        dims = [f"d{axis}" for axis in range(len(dims))] if not case.weights else ["d0", *dims[1:]]
    names = [f"w{index}" for index in range(len(case.weights))]
    weights = [numpy_helper.from_array(random(index + 1, size), name)
               for index, (name, size) in enumerate(zip(names, case.weights, strict=True))]  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node(case.operator, ["x", *names], ["y"], **case.attributes)],
        "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(dims))],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def random(seed: int, *shape: int) -> FloatArray:
    """Normal numbers."""
    return np.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


def made(case: Case, target: Any) -> operators.Made:
    """The model of a case in both engines."""
    import onnx_ir as ir

    from kbitc.passes.canonicalize import canonicalize
    from kbitc.targets.lower.emitter import lower
    from kbitc.targets.rules.base import schedule

    model, x = make_model(case), random(0, *case.shape)
    lowered = lower(canonicalize(ir.from_proto(model)), target)
    module, _ = schedule(lowered.module, target, target.schedule_rules())
    ours = operators.in_kbitc(module, [x, *lowered.weights.values()], target)
    theirs = operators.in_onnxruntime(model, {"x": x})
    result = ours()
    first = result if hasattr(result, "numpy") else result[0]
    return operators.Made(ours, theirs, (first.numpy(), theirs()))


if __name__ == "__main__":
    operators.race("float_groups", str(__doc__), CASES, made, close=1e-4)
