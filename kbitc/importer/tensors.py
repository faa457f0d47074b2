"""Checks and decodes the tensors of a model message: sizes that add up, types we compile, no NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from kbitc.errors import ModelError, UnsupportedError
from kbitc.importer.external import ExternalFiles

Array = npt.NDArray[Any]

MAX_RANK = 64
#: No tensor of a model we compile has more elements than this (16 Ti elements would be a bomb, not a weight).
MAX_ELEMENTS = 1 << 36
#: Tensors of at least this many bytes leave the message, so that checks and shape inference work on a small one.
DETACH_BYTES = 1024

_REFUSED_TYPES: dict[int, str] = {
    int(onnx.TensorProto.COMPLEX64): "complex64",
    int(onnx.TensorProto.COMPLEX128): "complex128",
    int(onnx.TensorProto.STRING): "string",
}
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


@dataclass
class DetachedTensor:
    """A tensor whose bytes were taken out of the message. `token` marks its place there."""

    token: str
    name: str
    dtype: ir.DataType
    dims: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    def tensor(self) -> ir.TensorProtocol:
        """The tensor as an `onnx_ir` tensor on the same bytes."""
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(self.data, self.dtype, shape=ir.Shape(self.dims), name=self.name)
        array = self.data.view(self.dtype.numpy()).reshape(self.dims)
        return ir.Tensor(array, dtype=self.dtype, name=self.name)


def check_type(elem_type: int, where: str) -> ir.DataType:
    """The data type of a tensor or value.

    Raises:
        UnsupportedError: complex and string tensors.
        ModelError: a number that is no ONNX type.
    """
    if elem_type in _REFUSED_TYPES:
        raise UnsupportedError(
            "tensors of this type cannot be compiled",
            where=where,
            got=_REFUSED_TYPES[elem_type],
            remedy="cast it in the model",
        )
    try:
        dtype = ir.DataType(elem_type)
    except ValueError as error:
        raise ModelError("unknown tensor type", where=where, got=elem_type) from error
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError("the tensor has no type", where=where)
    return dtype


def check_dims(dims: tuple[int, ...], where: str) -> int:
    """The number of elements.

    Raises:
        ModelError: negative dims, a rank over 64, or more elements than any real weight has.
    """
    if len(dims) > MAX_RANK:
        raise ModelError("the tensor's rank is absurd", where=where, got=f"rank {len(dims)}")
    if any(dim < 0 for dim in dims):
        raise ModelError("a tensor dim is negative", where=where, got=list(dims))
    count = prod(dims)
    if count > MAX_ELEMENTS:
        raise ModelError("the tensor is too large", where=where, got=f"dims {list(dims)}")
    return count


def take_tensors(proto: onnx.ModelProto, files: ExternalFiles) -> dict[str, DetachedTensor]:
    """Check every tensor of the model and take the large initializers of the main graph out of the message.

    Args:
        proto: changed in place: taken tensors become external ones whose location is a token. External tensors in
            other places (subgraphs, attributes) become ordinary ones.
        files: where external data are looked up.

    Returns:
        The taken tensors by token.
    """
    taken: dict[str, DetachedTensor] = {}
    weights = len(proto.graph.initializer)
    for count, (where, tensor) in enumerate(iter_tensors(proto)):
        found = _check(tensor, where, files, f"kbitc:{count}")
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if count >= weights:
            if external:
                _make_inline(tensor, found)
        elif external or found.data.size >= DETACH_BYTES:
            _detach(tensor, found)
            taken[found.token] = found
    return taken


def _make_inline(tensor: onnx.TensorProto, found: DetachedTensor) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = found.data.tobytes()


def _detach(tensor: onnx.TensorProto, found: DetachedTensor) -> None:
    for field in ("raw_data", "external_data", *_TYPED_FIELDS):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=found.token)


def _check(tensor: onnx.TensorProto, where: str, files: ExternalFiles, token: str) -> DetachedTensor:
    label = f"tensor {tensor.name}" if tensor.name else where
    dtype = check_type(tensor.data_type, label)
    dims = tuple(tensor.dims) if len(tensor.dims) <= MAX_RANK else (1,) * len(tensor.dims)
    count = check_dims(dims, label)
    nbytes = (count * dtype.bitwidth + 7) // 8
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if tensor.HasField("segment"):
        raise ModelError("the tensor is stored in segments, which ONNX never defined", where=label)
    if external:
        data = files.read(tensor, nbytes)
    elif tensor.HasField("raw_data"):
        _refuse_two_fields(tensor, label)
        if len(tensor.raw_data) != nbytes:
            raise ModelError(
                "the tensor's data do not match its dims",
                where=label,
                got=f"{len(tensor.raw_data)} bytes for dims {list(dims)} of {dtype.name}, which need {nbytes}",
            )
        data = np.frombuffer(tensor.raw_data, np.uint8)
    else:
        data = _typed_data(tensor, dtype, count, label)
    found = DetachedTensor(token, tensor.name, dtype, dims, data)
    refuse_nan(found, label)
    return found


def _refuse_two_fields(tensor: onnx.TensorProto, label: str) -> None:
    both = [field for field in _TYPED_FIELDS if len(getattr(tensor, field))]
    if both:
        raise ModelError("the tensor holds its data twice", where=label, got=f"raw_data and {both[0]}")


def _typed_data(tensor: onnx.TensorProto, dtype: ir.DataType, count: int, label: str) -> npt.NDArray[np.uint8]:
    filled = [field for field in _TYPED_FIELDS if len(getattr(tensor, field))]
    stored = sum(len(getattr(tensor, field)) for field in filled)
    packed = (count * dtype.bitwidth + 7) // 8 if dtype.bitwidth < 8 else count
    if stored != packed or len(filled) > 1:
        raise ModelError(
            "the tensor's data do not match its dims",
            where=label,
            got=f"{stored} stored values for dims {list(tensor.dims)}",
        )
    if count == 0:
        return np.zeros(0, np.uint8)
    try:
        array = ir.TensorProtoTensor(tensor).tobytes()
    except Exception as error:
        raise ModelError(
            "the tensor's data are in the wrong field for its type", where=label, got=dtype.name
        ) from error
    return np.frombuffer(array, np.uint8)


def refuse_nan(found: DetachedTensor, label: str) -> None:
    """Refuse a float tensor that holds a NaN.

    Infinities are judged later, where it is known what the tensor is used for: masks hold them on purpose.

    Raises:
        ModelError: names the tensor and the first index.
    """
    if not found.dtype.is_floating_point() or found.dtype.bitwidth < 8:
        return
    values = found.data.view(found.dtype.numpy())
    step = 1 << 20
    for start in range(0, values.size, step):
        part = values[start : start + step]
        if np.isfinite(part).all():
            continue
        bad = np.isnan(part)
        if bad.any():
            flat = start + int(np.argmax(bad))
            index = [int(item) for item in np.unravel_index(flat, found.dims)] if found.dims else []
            raise ModelError(
                "a weight is NaN", where=label, got=f"NaN at index {index}", remedy="repair the training run"
            )


def iter_tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every tensor of the model with a description of its place: initializers, attributes, subgraphs, functions."""
    for tensor in proto.graph.initializer:
        yield f"tensor {tensor.name}", tensor
    yield from _graph_tensors(proto.graph, skip_initializers=True)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(
    graph: onnx.GraphProto, *, skip_initializers: bool = False
) -> Iterator[tuple[str, onnx.TensorProto]]:
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise UnsupportedError(
            "sparse initializers cannot be compiled", where=f"tensor {name}", remedy="store it dense"
        )
    for tensor in () if skip_initializers else graph.initializer:
        yield f"tensor {tensor.name}", tensor
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    label = node.name or (node.output[0] if node.output else "unnamed")
    for attribute in node.attribute:
        where = f"attribute {attribute.name} of node {label} ({node.op_type})"
        if attribute.HasField("t"):
            if not attribute.t.name and node.output:
                attribute.t.name = node.output[0]
            yield where, attribute.t
        for tensor in attribute.tensors:
            yield where, tensor
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise UnsupportedError("sparse tensors cannot be compiled", where=where, remedy="store it dense")
