"""Float against quantized values all along the graph: where they start to depart, and what each activation is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import ops
from kbitc.graph.evaluate import Session
from kbitc.passes.analyze.layers import Histogram, count
from kbitc.quant.metrics import sqnr_db
from kbitc.quant.plan import INT8, QuantPlan

Array = npt.NDArray[Any]
# A value with less than this is another value: its error has a tenth of its amplitude.
DEPARTS_DB = 20.0
MAX_BATCHES = 4
#: Operators besides those with weights whose results are compared.
LANDMARKS = ("LayerNormalization", "Softmax", "Add", "Concat", "LSTM", "GRU", "GlobalAveragePool")
INT8_LEVELS = 127


@dataclass(frozen=True)
class Match:
    """One value of the graph in both models.

    Attributes:
        value: its name.
        node: the node that makes it.
        op_type: its operator type.
        sqnr_db: of the quantized model's value against the float model's.
        cosine: of the two, flattened.
    """

    value: str
    node: str
    op_type: str
    sqnr_db: float
    cosine: float


@dataclass
class _Sums:
    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0


def watched(model: ir.Model) -> list[ir.Node]:
    """Nodes with weights, landmarks between them, and those that make the outputs; in graph order."""
    outputs = set(model.graph.outputs)
    found = []
    for node in model.graph:
        weighted = node.domain == "" and node.op_type in ops.WEIGHT_USES and ops.weight_source(node)[0] is not None
        landmark = node.domain == "" and node.op_type in LANDMARKS
        floats = node.outputs[0].dtype == ir.DataType.FLOAT
        if floats and (weighted or landmark or node.outputs[0] in outputs):
            found.append(node)
    return found


def match(
    original: ir.Model, quantized: ir.Model, plan: QuantPlan, feeds: Sequence[Mapping[str, Array]]
) -> tuple[list[Match], dict[str, Histogram]]:
    """Compare values along the graph.

    Args:
        original: canonical float model.
        quantized: what the rewrite made of it: values keep their names.
        plan: what was carried out.
        feeds: samples; at most `MAX_BATCHES` are used, one at a time.

    Returns:
        The values in graph order, and a histogram of the activation that each weight meets: in steps of its int8
        grid where it is quantized at run time, else in its own unit.
    """
    nodes = watched(original)
    kept = {value.name for node in quantized.graph for value in node.outputs}
    nodes = [node for node in nodes if node.outputs[0].name in kept]
    names = [node.outputs[0].name or "" for node in nodes]
    read = _activations(original, plan)
    sources = sorted({name for name, _, _ in read.values()} - {value.name for value in original.graph.inputs})
    floats = Session(original, [*names, *sources])
    rounded = Session(quantized, names)
    sums = {name: _Sums() for name in names}
    histograms: dict[str, Histogram] = {}
    for feed in feeds[:MAX_BATCHES]:
        expected, found = {**feed, **floats.run(feed)}, rounded.run(feed)
        for name in names:
            _add(sums[name], expected[name], found[name])
        for tensor, (name, axis, block) in read.items():
            if tensor not in histograms:
                histograms[tensor] = activation_histogram(np.asarray(expected[name], np.float32), axis, block)
    return [_finish(node, sums[node.outputs[0].name or ""]) for node in nodes], histograms


def first_departure(matches: Sequence[Match], limit_db: float = DEPARTS_DB) -> Match | None:
    """The first value below the limit."""
    return next((item for item in matches if item.sqnr_db < limit_db), None)


def _activations(model: ir.Model, plan: QuantPlan) -> dict[str, tuple[str, int, int]]:
    """Weight -> (value that its first user multiplies it with, axis, int8 block or 0)."""
    nodes = {node.name: node for node in model.graph}
    found = {}
    for entry in plan.quantized():
        for name in entry.nodes:
            node = nodes.get(name)
            if node is None:  # inside a loop
                continue
            use = ops.WEIGHT_USES[node.op_type]
            source = None if use.activation_input is None else node.inputs[use.activation_input]
            if source is None or source.name is None or source.const_value is not None or entry.scheme is None:
                continue
            block = (entry.scheme.block or entry.shape[2]) if entry.activation == INT8 else 0
            found[entry.tensor] = (source.name, -1 if use.kind == "matmul" else 1, block)
            break
    return found


def activation_histogram(array: npt.NDArray[np.float32], axis: int, block: int) -> Histogram:
    """An activation in units of its int8 step, block by block along an axis; in its own unit where block is 0."""
    if block == 0 or array.ndim == 0:
        finite = array[np.isfinite(array)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        return count(array, low, high)
    moved = np.moveaxis(array, axis, -1)
    width = moved.shape[-1]
    padded = np.zeros((*moved.shape[:-1], -(-width // block) * block), np.float32)
    padded[..., :width] = moved
    split = padded.reshape(*moved.shape[:-1], -1, block)
    step = np.abs(split).max(axis=-1, keepdims=True) / np.float32(INT8_LEVELS)
    ratio = (split / np.where(step > 0, step, np.float32(1))).reshape(padded.shape)[..., :width]
    return count(ratio, -INT8_LEVELS - 1, INT8_LEVELS + 1)


def _add(total: _Sums, expected: Array, found: Array) -> None:
    if expected.shape != found.shape:
        return
    known = np.isfinite(expected) & np.isfinite(found)
    x, y = (np.where(known, array, 0).astype(np.float64) for array in (expected, found))
    total.signal += float((x * x).sum())
    total.other += float((y * y).sum())
    total.product += float((x * y).sum())
    total.noise += float(((x - y) ** 2).sum())


def _finish(node: ir.Node, total: _Sums) -> Match:
    norm = float(np.sqrt(total.signal) * np.sqrt(total.other))
    cosine = total.product / norm if norm else float(total.signal == total.other)
    return Match(node.outputs[0].name or "", node.name or "", node.op_type, sqnr_db(total.signal, total.noise), cosine)
