"""Text form of a model for dumps and tests: one line a node, weights by shape and digest, nothing left to chance."""

from __future__ import annotations

import onnx_ir as ir

from kbitc.graph.edit import constant, digest


def model_text(model: ir.Model) -> str:
    """The whole model as text. Two models with equal text compute the same function.

    Small constants (at most 8 elements) are spelled out; larger ones appear as the first 12 digits of the SHA-256 of
    their bytes.
    """
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opset_imports.items()))
    lines = [f"# ir {model.ir_version}, opset {opsets}", *_graph_lines(model.graph, "")]
    for function in model.functions.values():
        names = ", ".join(value.name or "" for value in function.inputs)
        lines.append(f"function {function.domain}::{function.name}({names})")
        lines += [f"  {node_text(node)}" for node in function]
    return "\n".join(lines) + "\n"


def _graph_lines(graph: ir.Graph, indent: str) -> list[str]:
    lines = [f"{indent}input  {value_text(value)}" for value in graph.inputs]
    lines += [f"{indent}weight {_weight_text(value)}" for value in graph.initializers.values()]
    for node in graph:
        lines.append(f"{indent}{node_text(node)}")
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                lines.append(f"{indent}  {name}:")
                lines += _graph_lines(attribute.as_graph(), indent + "    ")
    lines += [f"{indent}output {value_text(value)}" for value in graph.outputs]
    return lines


def value_text(value: ir.Value) -> str:
    """`name: FLOAT[1,3,H,?]`."""
    if value.dtype is None:
        return f"{value.name}: ?"
    if value.shape is None:
        return f"{value.name}: {value.dtype.name}[...]"
    dims = ",".join(str(dim) if isinstance(dim, int) else (dim.value or "?") for dim in value.shape.dims)
    return f"{value.name}: {value.dtype.name}[{dims}]"


def node_text(node: ir.Node) -> str:
    """`y: FLOAT[2] = Add(a, b)`, attributes in name order, graphs left to the caller."""
    outputs = ", ".join(value_text(value) for value in node.outputs)
    inputs = ", ".join((value.name or "") if value is not None else "-" for value in node.inputs)
    parts = []
    for name in sorted(node.attributes):
        attribute = node.attributes[name]
        if attribute.is_ref():
            parts.append(f"{name}=@{attribute.ref_attr_name}")
        elif attribute.type == ir.AttributeType.TENSOR:
            parts.append(f"{name}={_array_text(attribute.as_tensor())}")
        elif attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            parts.append(f"{name}={attribute.value!r}")
    attributes = f" {{{', '.join(parts)}}}" if parts else ""
    domain = f"{node.domain}::" if node.domain else ""
    return f"{outputs} = {domain}{node.op_type}{attributes}({inputs})"


def _weight_text(value: ir.Value) -> str:
    tensor = value.const_value
    return f"{value_text(value)}{'' if tensor is None else ' = ' + _array_text(tensor)}"


def _array_text(tensor: ir.TensorProtocol) -> str:
    if tensor.size <= 8 and tensor.dtype != ir.DataType.STRING:
        return str(tensor.numpy().tolist())
    return f"{tensor.dtype.name}{list(tensor.shape.numpy())} #{digest(tensor).hex()[:12]}"


def operator_counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator type the model holds, subgraphs counted, sorted by name."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is known before the model runs."""
    return constant(value) is not None
