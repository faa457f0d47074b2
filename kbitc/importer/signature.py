"""The model's inputs and outputs: plain dense tensors of known rank, with dims bound by `--shape` or named."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir

from kbitc.errors import ModelError, UnsupportedError, UsageError
from kbitc.importer.tensors import check_type

#: A bound dim: a number, a symbol's name, or None for "as in the model".
Dim = int | str | None
Shapes = Mapping[str, Sequence[Dim]]

#: Types that numpy and onnxruntime exchange.
_FEEDABLE = frozenset(ir.DataType.from_numpy(np.dtype(kind)) for kind in "efdbhilqBHILQ?")
_MAX_DIM = (1 << 31) - 1
_MAX_RANK = 8
_MAX_CONSTANT = 1024  # elements
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def parse_shape(text: str) -> tuple[str, tuple[Dim, ...]]:
    """`NAME=1x3x224x224` as name and dims. A dim may be `?` (as in the model) or a symbol; commas serve as x too.

    A name may hold `=` itself: the last one divides. `NAME=` alone is a scalar.

    Raises:
        UsageError: text of another form, or a dim of 0 or less.
    """
    name, equals, dims_text = text.rpartition("=")
    if not equals or not name:
        raise UsageError("--shape needs NAME=DIMS", got=repr(text), remedy="for example --shape x=1x3x224x224")
    if not dims_text:
        return name, ()
    separator = "," if "," in dims_text else "x"
    dims: list[Dim] = []
    for part in dims_text.split(separator):
        part = part.strip()
        if part == "?":
            dims.append(None)
        elif part.isascii() and part.isdigit() and 0 < int(part) <= _MAX_DIM:
            dims.append(int(part))
        elif _SYMBOL.fullmatch(part):
            dims.append(part)
        else:
            raise UsageError(
                "--shape: a dim must be a number over 0, a symbol or ?", got=repr(part), remedy=f"in {text!r}"
            )
    return name, tuple(dims)


def parse_constant(text: str) -> tuple[str, float]:
    """`NAME=16000` as name and number. A name may hold `=` itself: the last one divides.

    Raises:
        UsageError: text of another form.
    """
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise UsageError("--constant needs NAME=NUMBER", got=repr(text), remedy="for example --constant sr=16000")
    return name, value


def bind_constants(graph: onnx.GraphProto, constants: Mapping[str, float]) -> None:
    """Make inputs constants that hold one number everywhere. They leave the signature.

    Args:
        graph: changed in place.
        constants: number by input name.

    Raises:
        UsageError: a name that is no input, an input whose shape is open or large, or a number that its type lacks.
    """
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {item.name: item for item in graph.input if item.name not in weights}
    _check_known(constants, list(inputs), "--constant")
    for name, number in constants.items():
        tensor = inputs[name].type.tensor_type
        where = f"input {name}"
        sizes = [dim.dim_value for dim in tensor.shape.dim]
        if not tensor.HasField("shape") or any(size <= 0 for size in sizes) or math.prod(sizes) > _MAX_CONSTANT:
            raise UsageError("--constant is for inputs of a small known shape", where=where, got=sizes)
        dtype = np.dtype(check_type(tensor.elem_type, where).numpy())
        with np.errstate(invalid="ignore", over="ignore"):
            array = np.full(sizes, number).astype(dtype)
        if not np.all(array == number) and dtype.kind != "f":
            raise UsageError(
                "--constant: the input's type lacks this number", where=where, got=f"{number:g} as {dtype}"
            )
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        graph.input.remove(inputs[name])


def check_signature(graph: onnx.GraphProto, shapes: Shapes) -> None:
    """Check the types of inputs and outputs.

    Raises:
        UnsupportedError: sequences, optionals, maps, sparse tensors, complex and string tensors.
        ModelError: no type, or a rank that is neither in the model nor in `shapes`.
    """
    weights = {tensor.name for tensor in graph.initializer}
    for item in graph.input:
        if item.name not in weights:
            _check_value(item, f"input {item.name}", shapes)
    for item in graph.output:
        kind = item.type.WhichOneof("value")
        if kind is not None and kind != "tensor_type":
            raise UnsupportedError(f"outputs of type {_kind(kind)} cannot be compiled", where=f"output {item.name}")
        dtype = ir.DataType(item.type.tensor_type.elem_type)
        if dtype not in _FEEDABLE and dtype != ir.DataType.UNDEFINED:
            raise UnsupportedError(
                "outputs of this type cannot be handed out",
                where=f"output {item.name}",
                got=dtype.name,
                remedy="cast it to float32 in the model",
            )


def _kind(field: str) -> str:
    return field.removesuffix("_type").replace("_", " ")


def _check_value(item: onnx.ValueInfoProto, where: str, shapes: Shapes) -> None:
    kind = item.type.WhichOneof("value")
    if kind is None:
        raise ModelError("a graph input has no type", where=where, remedy="export the model again")
    if kind != "tensor_type":
        raise UnsupportedError(f"inputs of type {_kind(kind)} cannot be compiled", where=where)
    tensor = item.type.tensor_type
    dtype = check_type(tensor.elem_type, where)
    if dtype not in _FEEDABLE:
        raise UnsupportedError(
            "inputs of this type cannot be fed",
            where=where,
            got=dtype.name,
            remedy="take float32 and cast it in the model",
        )
    if not tensor.HasField("shape"):
        if item.name not in shapes or any(dim is None for dim in shapes[item.name]):
            raise ModelError(
                "the rank of a graph input is not known", where=where, remedy=f"pass --shape {item.name}=..."
            )
        return
    if len(tensor.shape.dim) > _MAX_RANK:
        raise UnsupportedError(
            f"tensors of rank over {_MAX_RANK} cannot be compiled", where=where, got=f"rank {len(tensor.shape.dim)}"
        )


def forget_negative_dims(graph: onnx.GraphProto) -> None:
    """Some exporters write -1 for a dim that is open: make it one without a value, as ONNX has it."""
    for item in (*graph.input, *graph.output, *graph.value_info):
        for dim in item.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 0:
                dim.Clear()


def give_ranks(graph: onnx.GraphProto, shapes: Shapes) -> None:
    """Inputs of unknown rank get the dims that `shapes` states for them."""
    for item in graph.input:
        tensor = item.type.tensor_type
        if item.name in shapes and not tensor.HasField("shape"):
            for wanted in shapes[item.name]:
                _set_dim(tensor.shape.dim.add(), wanted if wanted is not None else "?")
            tensor.shape.SetInParent()


def bind_shapes(graph: onnx.GraphProto, shapes: Shapes) -> None:
    """Give inputs the dims that `shapes` states, name anonymous dims, and forget every inferred shape.

    A symbol that one input binds is bound wherever it occurs. Anonymous dims (`?`, empty, negative) get a name of their
    own, `NAME_dim_0`. The dims of outputs and inner values are cleared: they are inferred again.

    Raises:
        UsageError: a name that is no input (names the nearest), a wrong rank, or a dim that contradicts the model.
    """
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [item for item in graph.input if item.name not in weights]
    _check_known(shapes, [item.name for item in inputs])
    symbols: dict[str, Dim] = {}
    for item in inputs:
        if item.name in shapes:
            _bind_input(item, shapes[item.name], symbols)
    taken = {dim.dim_param for item in inputs for dim in item.type.tensor_type.shape.dim}
    for item in inputs:
        _name_dims(item, symbols, taken)
    del graph.value_info[:]
    for item in graph.output:
        for dim in item.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value") or dim.dim_value < 0:
                dim.Clear()


def _check_known(given: Iterable[str], names: list[str], option: str = "--shape") -> None:
    for name in given:
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"inputs: {', '.join(names[:20])}"
            raise UsageError(f"{option} names an input that the model does not have", got=repr(name), remedy=hint)


def _bind_input(item: onnx.ValueInfoProto, dims: Sequence[Dim], symbols: dict[str, Dim]) -> None:
    shape = item.type.tensor_type.shape
    if len(shape.dim) != len(dims):
        raise UsageError(
            "--shape has another rank than the model's input",
            where=f"input {item.name}",
            got=f"{len(dims)} dims, the model has {len(shape.dim)}",
        )
    for position, (dim, wanted) in enumerate(zip(shape.dim, dims, strict=True)):
        if wanted is None:
            continue
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            if dim.dim_value != wanted:
                raise UsageError(
                    "--shape contradicts a fixed dim of the model",
                    where=f"input {item.name}, dim {position}",
                    got=f"{wanted}, the model says {dim.dim_value}",
                )
            continue
        name = dim.dim_param
        if _is_symbol(name) and symbols.setdefault(name, wanted) != wanted:
            raise UsageError(
                "--shape gives one symbolic dim two values",
                where=f"input {item.name}, dim {position}",
                got=f"{name} = {symbols[name]} and {wanted}",
            )
        _set_dim(dim, wanted)


def _is_symbol(name: str) -> bool:
    return name not in ("", "?", "None", "-1")


def _set_dim(dim: onnx.TensorShapeProto.Dimension, wanted: int | str) -> None:
    if isinstance(wanted, int):
        dim.dim_value = wanted
    else:
        dim.dim_param = wanted


def _name_dims(item: onnx.ValueInfoProto, symbols: dict[str, Dim], taken: set[str]) -> None:
    for position, dim in enumerate(item.type.tensor_type.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            continue
        bound = symbols.get(dim.dim_param) if dim.HasField("dim_param") else None
        if bound is not None:
            _set_dim(dim, bound)
        elif dim.HasField("dim_value") or not _is_symbol(dim.dim_param):
            dim.dim_param = _new_symbol(f"{item.name}_dim_{position}", taken)
        elif not _SYMBOL.fullmatch(dim.dim_param):
            old = dim.dim_param
            dim.dim_param = _new_symbol(old, taken)
            symbols[old] = dim.dim_param


def _new_symbol(base: str, taken: set[str]) -> str:
    """A symbol that shape expressions can hold: letters, digits, dots and underscores, not used yet."""
    name = re.sub(r"[^A-Za-z0-9_.]", "_", base)[:80]
    if not name or not (name[0].isalpha() or name[0] == "_"):
        name = f"dim_{name}"
    while name in taken:
        name += "_"
    taken.add(name)
    return name
