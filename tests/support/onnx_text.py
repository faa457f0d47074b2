"""Small ONNX models from text, and comparisons of what they compute in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir

from kbitc.graph.evaluate import evaluate
from kbitc.graph.shapes import infer_shapes
from kbitc.graph.text import operator_counts
from kbitc.importer import load_model
from kbitc.importer.feeds import made_up_feeds
from kbitc.passes.base import GraphPass

Array = npt.NDArray[Any]
# Unit roundoff of float32.
ROUNDOFF = 2.0**-24


def proto(graph: str, weights: Mapping[str, Array] | None = None, *, opset: int = 21, functions: str = "",
          domains: str = "") -> onnx.ModelProto:  # fmt: skip
    """A message from the text of a graph; `weights` become initializers."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>'
    message = onnx.parser.parse_model(f"{header}\n{graph}\n{functions}")
    for name, array in (weights or {}).items():
        message.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return message


def model(graph: str, weights: Mapping[str, Array] | None = None, **options: Any) -> ir.Model:
    """An imported model from text."""
    return load_model(proto(graph, weights, **options))


def noise(*shape: int, seed: int = 0) -> Array:
    """Reproducible float32 numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def assert_same(before: Mapping[str, Array], after: Mapping[str, Array], terms: int = 0) -> None:
    """Equal outputs: exactly, or up to the rounding of sums of `terms` float32 products in another order."""
    assert list(before) == list(after)
    for name, wanted in before.items():
        found = after[name]
        assert found.shape == wanted.shape and found.dtype == wanted.dtype, name
        if not terms or not wanted.size:
            np.testing.assert_array_equal(found, wanted)
            continue
        bound = 4 * terms * ROUNDOFF * max(1.0, float(np.abs(wanted).max()))
        assert float(np.abs(found.astype(np.float64) - wanted).max()) <= bound, name


def apply(graph_pass: GraphPass, subject: ir.Model, terms: int = 0) -> bool:
    """Run a pass; it must keep the numbers and the signature, and have nothing to do the second time."""
    signature = [(value.name, value.dtype) for value in (*subject.graph.inputs, *subject.graph.outputs)]
    feeds = made_up_feeds(subject)
    before = evaluate(subject, feeds)
    modified = graph_pass(subject).modified
    assert [(value.name, value.dtype) for value in (*subject.graph.inputs, *subject.graph.outputs)] == signature
    assert_same(before, evaluate(subject, feeds), terms)
    infer_shapes(subject)
    assert not graph_pass(subject).modified, "the second run still finds something to do"
    return modified


def operators(subject: ir.Model) -> dict[str, int]:
    """Operator counts of a model."""
    return operator_counts(subject)
