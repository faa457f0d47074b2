"""A small model with every kind of weight, and its allocation problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from kbitc.passes.allocate.choices import Problem, make_problem
from kbitc.passes.allocate.survey import survey
from kbitc.passes.allocate.uniform import accepted_by, allocate
from kbitc.passes.solvers import rtn
from kbitc.quant.scheme import QuantScheme
from kbitc.targets.target import parse_target

BODY = """g (float[1, 3, 8, 8] x, int64[b] i) => (float[1, 20, 6, 6] y, float[b, 24] z) {
    c = Conv(x, stem)
    d = Conv<group = 20, pads = [1, 1, 1, 1]>(c, deep)
    y = Conv(d, point)
    e = Gather(table, i)
    h = MatMul(e, first)
    r = Relu(h)
    z = MatMul(r, second)
}"""
SHAPES = {
    "stem": (20, 3, 3, 3), "deep": (20, 1, 3, 3), "point": (20, 20, 1, 1), "table": (30, 40), "first": (40, 33),
    "second": (33, 24),
}  # fmt: skip


def model() -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {BODY}')
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        array = random.standard_t(4, size=shape) * (10 if name == "second" else 1)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    made = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for index, node in enumerate(made.graph):
        node.name = f"{node.op_type.lower()}{index}"
    return made


def feeds() -> list[dict[str, Any]]:
    random = np.random.default_rng(1)
    return [
        {"x": random.normal(size=(1, 3, 8, 8)).astype(np.float32), "i": random.integers(0, 30, 12)} for _ in range(2)
    ]


def problem(
    scheme: str = "int4:b32", activation: str = "int8", target: str = "x86:avx2", pinned: tuple[str, ...] = ()
) -> Problem:
    made, wanted = model(), QuantScheme.parse(scheme)
    candidates, accepts = survey(made), accepted_by(parse_target(target))
    base = allocate(made, candidates, wanted, activation, {}, accepts)
    return make_problem(made, candidates, base, pinned, wanted, activation, accepts, feeds(), rtn.solve)
