"""What a graph must look like between stages. The table of operators the lowering knows needs no tvm.

`LOWERABLE` maps each operator of the default domain to a predicate: it takes the node and returns why the node cannot
be lowered, or None when it can. Operators of the domains `kbitc` and `kbitc.core` are our own.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from kbitc.errors import InternalError, UnsupportedError
from kbitc.graph.edit import all_nodes, constant, describe, rank

Predicate = Callable[[ir.Node], "str | None"]

OWN_DOMAINS = frozenset(("kbitc", "kbitc.core"))
_MAX_SHOWN = 40
_MAX_RANK = 8
_TYPES = frozenset(
    (
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.INT64,
        ir.DataType.INT32,
        ir.DataType.INT16,
        ir.DataType.INT8,
        ir.DataType.UINT64,
        ir.DataType.UINT32,
        ir.DataType.UINT16,
        ir.DataType.UINT8,
        ir.DataType.BOOL,
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT2,
        ir.DataType.UINT2,
    )
)


def _always(node: ir.Node) -> str | None:
    return None


def _constant_inputs(*indices: int) -> Predicate:
    """The named inputs must be constants."""

    def check(node: ir.Node) -> str | None:
        for index in indices:
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and constant(value) is None:
                return f"input {index} ({value.name}) must be a constant"
        return None

    return check


def _spatial(node: ir.Node) -> str | None:
    size = rank(node.inputs[0])
    return None if size in (3, 4) else f"only 1-D and 2-D windows can be lowered, the input has rank {size}"


def _max_pool(node: ir.Node) -> str | None:
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return "the indices of a pooling cannot be lowered"
    if node.attributes.get_int("storage_order", 0):
        return "storage_order 1 cannot be lowered"
    return _spatial(node)


def _conv_transpose(node: ir.Node) -> str | None:
    if "output_shape" in node.attributes:
        return "output_shape cannot be lowered, use pads and output_padding"
    return _spatial(node)


def _resize(node: ir.Node) -> str | None:
    mode = node.attributes.get_string("mode", "nearest")
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if mode not in ("nearest", "linear"):
        return f"mode {mode!r} cannot be lowered"
    if coordinates == "tf_crop_and_resize":
        return "tf_crop_and_resize cannot be lowered"
    if (
        node.attributes.get_int("antialias", 0)
        or node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        return "antialias and keep_aspect_ratio_policy cannot be lowered"
    return None


def _pad(node: ir.Node) -> str | None:
    mode = node.attributes.get_string("mode", "constant")
    return None if mode in ("constant", "reflect", "edge") else f"mode {mode!r} cannot be lowered"


def _layer_norm(node: ir.Node) -> str | None:
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "the mean and deviation outputs cannot be lowered"
    return None


def _dropout(node: ir.Node) -> str | None:
    return "only Dropout at inference, without its mask, can be lowered"


_PLAIN = """
Abs Acos Acosh Add And Asin Asinh Atan Atanh BatchNormalization BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
Cast CastLike Ceil Celu Clip Concat ConstantOfShape ConvInteger Cos Cosh DepthToSpace DequantizeLinear Div
DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu
GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Hardmax
Identity InstanceNormalization IsInf IsNaN LRN LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool
MatMul MatMulInteger Max Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not Or PRelu Pow QuantizeLinear Range
Reciprocal Relu Reshape Round ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
Softplus Softsign SpaceToDepth Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Transpose Trilu Where Xor
""".split()
_CONSTANT_AXES = [f"Reduce{kind}" for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()]

#: Operators of the default domain that can be lowered, and when.
LOWERABLE: dict[str, Predicate] = {
    **dict.fromkeys(_PLAIN, _always),
    **dict.fromkeys(_CONSTANT_AXES, _constant_inputs(1)),
    "ArgMax": _always,
    "ArgMin": _always,
    "AveragePool": _spatial,
    "Conv": _spatial,
    "ConvTranspose": _conv_transpose,
    "CumSum": _constant_inputs(1),
    "Dropout": _dropout,
    "LayerNormalization": _layer_norm,
    "MaxPool": _max_pool,
    "OneHot": _constant_inputs(1),
    "Pad": _pad,
    "RMSNormalization": _always,
    "Resize": _resize,
    "Scan": _always,
    "Split": _constant_inputs(1),
    "Squeeze": _constant_inputs(1),
    "Tile": _always,
    "TopK": _always,
    "Unsqueeze": _constant_inputs(1),
}

#: Operators that canonicalisation replaces in some forms, and what the others lack.
_FORMS = {
    "If": "its condition must be known, or its branches alike and safe; bind inputs with --shape or --constant",
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "the size of its state must be known: the shape of R"),
}


def why_not_lowerable(node: ir.Node) -> str | None:
    """Why the node cannot be lowered, or None when it can."""
    if node.domain in OWN_DOMAINS:
        return None
    if node.domain:
        return f"operators of domain {node.domain!r} are not known"
    predicate = LOWERABLE.get(node.op_type)
    if predicate is None:
        return _FORMS.get(node.op_type, "the operator is not known to the lowering")
    for value in (*node.inputs, *node.outputs):
        if value is None:
            continue
        if value.dtype is not None and value.dtype not in _TYPES:
            return f"type {value.dtype.name} of {value.name} cannot be lowered"
        if value.shape is not None and len(value.shape) > _MAX_RANK:
            return f"rank {len(value.shape)} of {value.name} is over {_MAX_RANK}"
    if any(value.name and value.shape is None for value in node.outputs):
        return "the rank of its result cannot be told; bind the input shapes with --shape"
    return predicate(node)


def refuse_unlowerable(model: ir.Model) -> None:
    """Refuse a canonical model with operators that cannot be lowered, before anything is quantized.

    Raises:
        UnsupportedError: lists all such nodes at once, by name, operator and reason.
    """
    found: dict[str, list[str]] = {}
    total = 0
    for node in all_nodes(model):
        reason = why_not_lowerable(node)
        if reason is not None:
            found.setdefault(reason, []).append(describe(node))
            total += 1
    if not total:
        return
    shown: list[str] = []
    for reason, nodes in found.items():
        room = max(_MAX_SHOWN - sum(text.count(" (") for text in shown), 1)
        more = f" and {len(nodes) - room} more" if len(nodes) > room else ""
        shown.append(f"{', '.join(nodes[:room])}{more}: {reason}")
    plural = "s" if total > 1 else ""
    raise UnsupportedError(f"{total} node{plural} cannot be lowered", got="; ".join(shown))


def after_import(model: ir.Model) -> list[str]:
    """What is wrong with a model that comes out of the importer: names, order, types."""
    problems: list[str] = []
    for graph in model.graphs():
        seen = {value.name for value in graph.inputs} | set(graph.initializers)
        for node in graph:
            for value in node.inputs:
                if value is not None and value.graph is graph and value.name not in seen:
                    problems.append(f"{describe(node)} comes before the producer of {value.name}")
            for value in node.outputs:
                if value.name and value.name in seen:
                    problems.append(f"{describe(node)}: the name {value.name} is taken")
                seen.add(value.name)
    problems += [f"input {value.name} has no type or rank" for value in model.graph.inputs if value.shape is None]
    return problems


def after_canonicalize(model: ir.Model) -> list[str]:
    """What is wrong with a canonical model, apart from operators that no target knows."""
    problems = after_import(model)
    if model.opset_imports.get("", 0) < 21:
        problems.append(f"opset {model.opset_imports.get('')} is under 21")
    problems += [f"function {'::'.join(key[:2])} is left" for key in model.functions if key[0] not in OWN_DOMAINS]
    names: set[str] = set()
    for node in all_nodes(model):
        if not node.name or node.name in names:
            problems.append(f"{describe(node)} has no name of its own")
        names.add(node.name or "")
        if not node.domain and node.op_type in ("Constant", "Gemm"):
            problems.append(f"{describe(node)} is left")
    return problems


def after_rewrite(model: ir.Model) -> list[str]:
    """What is wrong with a quantized model: as after canonicalisation, and each function call has its function."""
    problems = after_canonicalize(model)
    for node in all_nodes(model):
        if node.domain == "kbitc" and node.op_identifier() not in model.functions:
            problems.append(f"{describe(node)} calls a function that the model does not hold")
        elif not node.domain and node.op_type not in LOWERABLE:
            problems.append(f"{describe(node)} is not lowerable")
    return problems


def float_operators(model: ir.Model) -> list[ir.Node]:
    """The nodes of an integer graph that compute floats: all but what turns the graph's inputs into codes and integers
    into its outputs."""
    found = []
    for node in model.graph:
        if not any(value.dtype == ir.DataType.FLOAT for value in node.outputs):
            continue
        if node.op_type == "DequantizeLinear" and all(value.is_graph_output() for value in node.outputs):
            continue
        source = node.inputs[0] if node.inputs else None
        enters = node.op_type == "Cast" and source is not None and source.dtype != ir.DataType.FLOAT
        if enters and all(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses()):
            continue
        found.append(node)
    return found


def require(problems: list[str], stage: str) -> None:
    """Stop when a stage broke the graph.

    Raises:
        InternalError: with the first problems.
    """
    if problems:
        raise InternalError(f"the graph is broken after {stage}", got="; ".join(problems[:5]))
