"""Inputs made up when there are no data: right types and shapes, indices inside their tables, masks of ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import CalibrationError, ModelError
from kbitc.graph.edit import constant, static_shape
from kbitc.graph.evaluate import Session
from kbitc.importer.signature import Dim, parse_shape

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

#: Sizes tried for dims that the model leaves open, until it runs.
_OPEN_DIMS = (16, 32, 48, 64, 96, 128, 224, 320, 512, 1024)
#: The same for images: smaller ones shrink to nothing in a network's last pooling.
_OPEN_IMAGE_DIMS = (64, 96, 128, 224, 320, 512, 1024, 48, 32, 16)
_IMAGE_RANK = 4
#: A table of positions has at most so many rows; strides of what stands between an input and it.
_LARGEST_ADDED, _STRIDES = 8192, (1, 2, 4)
_PASS_ON = frozenset(
    "Cast Identity Reshape Unsqueeze Squeeze Expand Transpose Slice Concat Flatten Clip Tile Where Max Min "
    "Split".split()
)


def made_up_feeds(model: ir.Model, shapes: Sequence[str] = (), *, seed: int = 0) -> Feeds:
    """Feeds a model can run on, the same for the same model and seed.

    Floats are drawn from a normal distribution; indices into an embedding are below its number of rows; integers
    compared with a list of constants are below the largest; booleans and other integers are one, as masks are. Dims
    that are symbols: 1 for the first dim, and for the others the first of a few sizes with which the model runs.

    Args:
        model: the model.
        shapes: texts `NAME=1x3x224x224` for inputs with symbolic dims.
        seed: number of the sample.

    Raises:
        CalibrationError: the model does not run with any size that was tried.
    """
    bound = dict(map(parse_shape, shapes))
    fixed: dict[str, int] = {}
    for value in model.graph.inputs:
        for dim, wanted in zip(_dims(value), bound.get(value.name or "", ()), strict=False):
            if isinstance(dim, str) and isinstance(wanted, int):
                fixed[dim] = wanted
    fixed = {**_told_sizes(model), **fixed}
    open_symbols = _open_symbols(model, bound) - set(fixed)
    limits = index_bounds(model)
    if not open_symbols:
        return _feeds(model, bound, fixed, limits, seed)
    session = Session(model)
    problem = ""
    image = any(len(_dims(value)) >= _IMAGE_RANK for value in model.graph.inputs)
    for size in (*(_OPEN_IMAGE_DIMS if image else _OPEN_DIMS), *_added_sizes(model)):
        feeds = _feeds(model, bound, {**dict.fromkeys(sorted(open_symbols), size), **fixed}, limits, seed)
        try:
            session.run(feeds)
        except ModelError as error:
            problem = str(error.got)
        else:
            return feeds
    raise CalibrationError(
        "no sizes were found with which the model runs",
        where=", ".join(sorted(open_symbols)),
        got=problem[:160],
        remedy="fix the shapes with --shape or give --calibration data",
    )


def _dims(value: ir.Value) -> list[int | str]:
    dims = value.shape.dims if value.shape is not None else ()
    return [dim if isinstance(dim, int) else (dim.value or "?") for dim in dims]


def _open_symbols(model: ir.Model, bound: dict[str, tuple[Dim, ...]]) -> set[str]:
    """Symbols other than those of a first dim."""
    first = {dims[0] for value in model.graph.inputs if (dims := _dims(value))}
    return {
        dim for value in model.graph.inputs for dim in _dims(value)[1:] if isinstance(dim, str) and dim not in first
    }


def _told_sizes(model: ir.Model) -> dict[str, int]:
    """Sizes that weights tell of their inputs: channels of a Conv, columns of a MatMul."""
    told: dict[str, int] = {}
    for value in model.graph.inputs:
        dims = _dims(value)
        for node, index in value.uses():
            if index or node.op_type not in ("Conv", "MatMul") or node.domain:
                continue
            shape = static_shape(node.inputs[1])
            axis, weight_axis = (1, 1) if node.op_type == "Conv" else (-1, -2)
            if shape is None or len(shape) < 2 or len(dims) < 2 or not isinstance(dims[axis], str):
                continue
            told[str(dims[axis])] = shape[weight_axis] * node.attributes.get_int("group", 1)
    return told


def _added_sizes(model: ir.Model) -> list[int]:
    """Sizes of tables that are added to values, and these behind one or two strides of 2."""
    tables = [
        value.shape
        for value in model.graph.initializers.values()
        if value.shape is not None and any(node.op_type == "Add" for node, _ in value.uses())
    ]
    sizes = {dim for shape in tables for dim in shape[:-1] if isinstance(dim, int) and 1 < dim <= _LARGEST_ADDED}
    return [size * stride for size in sorted(sizes) for stride in _STRIDES]


def _feeds(
    model: ir.Model, bound: dict[str, tuple[Dim, ...]], sizes: dict[str, int], limits: dict[str, int], seed: int
) -> Feeds:
    feeds: Feeds = {}
    for position, value in enumerate(model.graph.inputs):
        name = value.name or ""
        shape = tuple(dim if isinstance(dim, int) else sizes.get(dim, 1) for dim in _dims(value))
        generator = np.random.default_rng([seed, position])
        kind = value.dtype if value.dtype is not None else ir.DataType.FLOAT
        feeds[name] = _numbers(generator, kind, shape, limits.get(name))
    return feeds


def _numbers(generator: np.random.Generator, kind: ir.DataType, shape: tuple[int, ...], limit: int | None) -> Array:
    dtype = kind.numpy()
    if kind.is_floating_point():
        return np.asarray(generator.standard_normal(shape), np.float32).astype(dtype)
    if limit is not None:
        return generator.integers(0, max(limit, 1), shape).astype(dtype)
    if kind == ir.DataType.UINT8:
        return generator.integers(0, 256, shape).astype(dtype)
    return np.ones(shape, dtype)


def index_bounds(model: ir.Model) -> dict[str, int]:
    """For integer inputs that are looked up or compared: the number all their values must be below.

    The walk follows an input through operators that only move elements, to Gather (rows of its table), OneHot (depth)
    and Equal (largest constant).
    """
    bounds: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.dtype is None or not value.dtype.is_integer():
            continue
        found = _bounds_below(value)
        if found:
            bounds[value.name or ""] = min(found)
    return bounds


def _bounds_below(start: ir.Value) -> list[int]:
    seen: set[ir.Value] = set()
    rest = [start]
    found: list[int] = []
    while rest:
        value = rest.pop()
        if value in seen:
            continue
        seen.add(value)
        for node, index in value.uses():
            if node.domain:
                continue
            if node.op_type in _PASS_ON:
                rest += node.outputs
            else:
                found += _bound_of_use(node, index)
    return found


def _bound_of_use(node: ir.Node, index: int) -> list[int]:
    if node.op_type == "Gather" and index == 1:
        table = node.inputs[0]
        shape = table.shape if table is not None else None
        size = shape[node.attributes.get_int("axis", 0)] if shape is not None else None
        return [size] if isinstance(size, int) else []
    if node.op_type == "OneHot" and index == 0:
        depth = constant(node.inputs[1])
        return [int(depth.reshape(-1)[0])] if depth is not None else []
    if node.op_type == "Equal":
        other = constant(node.inputs[1 - index])
        return [int(other.max()) + 1] if other is not None and other.size > 2 else []
    return []
