"""Float operators that are no contraction, one thread, against onnxruntime: activations, softmax, norms, movement.

    python examples/benchmarks/float_groups.py [--target x86:avx2] [--only softmax] [--rounds 30] [--save]

Every row is a model of one operator, compiled as any other model is: emitted, scheduled and run by the Relax machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import harness
import numpy as np
import numpy.typing as npt

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


def compiled(model: Any, x: FloatArray, target: Any) -> Callable[[], Any]:
    """A call of the module that kbitc makes of a model."""
    import onnx_ir as ir
    import tvm
    from tvm import relax

    from kbitc.passes.canonicalize import canonicalize
    from kbitc.targets.build import relax_pipeline
    from kbitc.targets.lower.emitter import lower
    from kbitc.targets.rules.base import schedule

    lowered = lower(canonicalize(ir.from_proto(model)), target)
    module, _ = schedule(lowered.module, target, target.schedule_rules())
    with tvm.target.Target(target.tvm):
        built = relax.build(module, tvm.target.Target(target.tvm), relax_pipeline=relax_pipeline())
    main = relax.VirtualMachine(built, tvm.cpu())["main"]
    arguments = [tvm.runtime.tensor(array) for array in (x, *lowered.weights.values())]
    return lambda: main(*arguments)


def session(model: Any, x: FloatArray) -> Callable[[], Any]:
    """A call of onnxruntime with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda: made.run(None, {"x": x})[0]


def main() -> None:
    """Run the cases, print a table each, and save the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="host")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--save", action="store_true", help="write results/float_groups.json")
    given = parser.parse_args()
    harness.pin()
    from kbitc.targets.target import parse_target

    target = parse_target(given.target)
    rows = []
    for case in CASES:
        if given.only not in case.name:
            continue
        model, x = make_model(case), random(0, *case.shape)
        ours, theirs = compiled(model, x, target), session(model, x)
        result = ours()
        first = result[0] if not hasattr(result, "numpy") else result
        np.testing.assert_allclose(first.numpy(), theirs(), rtol=1e-4, atol=1e-5)
        timing = harness.interleave({"kbitc": ours, "onnxruntime": theirs}, given.rounds)
        harness.print_table(case.name, timing, against="onnxruntime")
        rows.append(timing.as_json(case.name, against="onnxruntime", target=target.name))
    if given.save:
        harness.save("float_groups", rows, threads=1)


if __name__ == "__main__":
    main()
