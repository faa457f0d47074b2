"""Reference runs of a model in onnxruntime: what every later stage is compared with. Only this file makes sessions.

Optimisations are off and `session.qdq_matmulnbits_accuracy_level` is 1, because onnxruntime otherwise replaces
DequantizeLinear + MatMul by a kernel that quantizes activations, and its answers are then no reference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from kbitc.errors import InternalError, ModelError

Array = npt.NDArray[Any]

#: Initializers of at least this many bytes are handed to onnxruntime beside the protobuf message, without a copy.
DETACH_BYTES = 1 << 16

_PLAIN = frozenset(
    (
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT16,
        ir.DataType.UINT16,
        ir.DataType.INT32,
        ir.DataType.UINT32,
        ir.DataType.INT64,
        ir.DataType.UINT64,
        ir.DataType.BOOL,
    )
)


class Session:
    """A model loaded once in onnxruntime and run many times.

    Args:
        model: the model; it is not changed.
        extra_outputs: names of intermediate values to return too (for calibration and for layer reports).
        threads: threads inside one operator; None means all cores this process may use.
        optimize: turn graph optimisations on: for speed comparisons only, never for a reference.
        lean: keep no copy of the weights and no memory between runs: for several sessions of one large model.

    Raises:
        ModelError: when onnxruntime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model,
        extra_outputs: Sequence[str] = (),
        *,
        threads: int | None = None,
        optimize: bool = False,
        lean: bool = False,
    ) -> None:
        import onnxruntime as ort

        proto, detached = light_proto(model)
        _add_outputs(proto, model, extra_outputs)
        options = session_options(threads=threads, optimize=optimize)
        if lean:
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        if detached:
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in detached.values()]
            options.add_external_initializers(list(detached), values)
            self._keep = (list(detached.values()), values)
        try:
            self._session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError("onnxruntime refuses the model", got=first_line(error)) from error
        self.inputs = [item.name for item in self._session.get_inputs()]
        self.outputs = [item.name for item in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Returns every output (and extra output) by name.

        Raises:
            ModelError: when onnxruntime fails while running.
        """
        known = {name: array for name, array in feeds.items() if name in self.inputs}
        try:
            arrays = self._session.run(None, known)
        except Exception as error:
            raise ModelError("the model fails when it is run", got=first_line(error)) from error
        return dict(zip(self.outputs, arrays, strict=True))


def evaluate(model: ir.Model, feeds: Mapping[str, Array], extra_outputs: Sequence[str] = ()) -> dict[str, Array]:
    """Load the model in onnxruntime and run it once on `feeds`; see `Session`."""
    return Session(model, extra_outputs).run(feeds)


def session_options(*, threads: int | None = None, optimize: bool = False) -> Any:
    """onnxruntime session options of a reference run."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def light_proto(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model as a protobuf message without its large initializers, and those initializers by name.

    In the message they are marked as external data, so that models of any size pass through a small message.
    The model is left as it was.
    """
    graph = model.graph
    taken: dict[str, ir.Value] = {}
    detached: dict[str, Array] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < DETACH_BYTES or tensor.dtype not in _PLAIN:
            continue
        if value.is_graph_output() or value.is_graph_input():
            continue
        detached[name] = np.ascontiguousarray(tensor.numpy())
        taken[name] = value
    try:
        for name in taken:
            graph.initializers.pop(name)
        proto = ir.to_proto(model)
    finally:
        for name in taken:
            graph.initializers[name] = taken[name]
    for name, array in detached.items():
        proto.graph.initializer.append(_external_stub(name, array))
    return proto, detached


def _external_stub(name: str, array: Array) -> onnx.TensorProto:
    stub = onnx.TensorProto(name=name, data_type=int(ir.DataType.from_numpy(array.dtype)), dims=array.shape)
    stub.data_location = onnx.TensorProto.EXTERNAL
    for key, text in (("location", "kbitc.detached"), ("offset", "0"), ("length", str(array.nbytes))):
        stub.external_data.add(key=key, value=text)
    return stub


def _add_outputs(proto: onnx.ModelProto, model: ir.Model, names: Sequence[str]) -> None:
    present = {item.name for item in proto.graph.output}
    made = {name for node in proto.graph.node for name in node.output} | {item.name for item in proto.graph.input}
    for name in names:
        if name in present:
            continue
        if name not in made:
            raise InternalError("asked for an intermediate value that the model does not hold", got=repr(name))
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
        present.add(name)


def first_line(error: BaseException, limit: int = 240) -> str:
    """The first line of another library's message, shortened: kbitc's own messages are one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def run_node(node: ir.Node, arrays: Sequence[Array | None], opset: int) -> list[Array]:
    """Run one node of the default domain on constant inputs in onnxruntime.

    Args:
        node: the node; it is not changed.
        arrays: its inputs in order, None for one that is left out.
        opset: the version of the default domain.

    Raises:
        ModelError: when onnxruntime cannot run it.
    """
    values = [
        None
        if array is None
        else ir.Value(
            name=f"x{index}", type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape)
        )
        for index, array in enumerate(arrays)
    ]
    copy = ir.Node(node.domain, node.op_type, values, node.attributes.values(), num_outputs=len(node.outputs))
    for index, value in enumerate(copy.outputs):
        value.name = f"y{index}" if node.outputs[index].name else ""
    outputs = [value for value in copy.outputs if value.name]
    inputs = [value for value in values if value is not None]
    graph = ir.Graph(inputs, outputs, nodes=[copy], opset_imports={"": opset}, name="one_node")
    feeds = {f"x{index}": array for index, array in enumerate(arrays) if array is not None}
    result = Session(ir.Model(graph, ir_version=10), threads=1).run(feeds)
    return [result[value.name or ""] for value in outputs]
