"""The ONNX standard's own test cases of single operators, compiled and compared with the outputs they come with."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from kbitc.errors import KbitcError
from kbitc.importer import load_model
from kbitc.passes.canonicalize import canonicalize
from tests.support.lowered import run_of

Array = npt.NDArray[Any]
# Cases of versions that kbitc does not read are tried as the nearest that it does read.
IR_VERSION, OLDEST_OPSET, OPSET = 11, 9, 23
# Inputs up to this many elements are made constants where a case gives axes, shapes and the like as inputs.
LARGEST_PARAMETER = 64
# With align_corners and scales onnxruntime, and so kbitc, divides by the rounded output size, the standard's
# reference implementation by the size before rounding.
AS_ONNXRUNTIME = {
    "test_resize_downsample_scales_linear_align_corners",
    "test_resize_downsample_scales_cubic_align_corners",
}


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "right", "refused" or "wrong", with the reason."""

    status: str
    detail: str = ""


@functools.cache
def cases() -> dict[str, Any]:
    """All node cases by name, without those that ONNX derives by expanding functions."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind="node")
    return {case.name: case for case in found if "_expanded" not in case.name and case.name not in AS_ONNXRUNTIME}


def _array(item: Any) -> Array:
    return numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else np.asarray(item)


def _current(model: onnx.ModelProto) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(min(entry.version, OPSET), OLDEST_OPSET)
    return proto


def _with_parameters(proto: onnx.ModelProto, feeds: list[Array]) -> tuple[onnx.ModelProto, list[Array]]:
    """Every small input but the first as an initializer."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    kept, arrays = [], []
    for place, (info, array) in enumerate(zip(proto.graph.input, feeds, strict=False)):
        limit = LARGEST_PARAMETER if array.dtype.kind in "iub" else 8
        if place > 0 and array.dtype.kind in "iubf" and array.size <= limit:
            result.graph.initializer.append(numpy_helper.from_array(array, info.name))
        else:
            kept.append(info)
            arrays.append(array)
    del result.graph.input[:]
    result.graph.input.extend(kept)
    return result, arrays


def try_case(name: str) -> Outcome:
    """Compile a case and compare; the tolerance is the case's own."""
    case = cases()[name]
    inputs, outputs = case.data_sets[0]
    try:
        feeds, wanted = [_array(item) for item in inputs], [_array(item) for item in outputs]
    except (TypeError, ValueError, AttributeError):
        return Outcome("refused", "its data are no tensors")
    proto = _current(case.model)
    outcome = _attempt(proto, feeds, wanted, case)
    if outcome.status == "refused":
        outcome = _attempt(*_with_parameters(proto, feeds), wanted, case)
    return outcome


def rounding(proto: onnx.ModelProto, feeds: list[Array]) -> float:
    """What float32 sums of all elements may lose, where sums cancel: a case's own tolerance is that of an FFT."""
    if all(node.op_type != "DFT" for node in proto.graph.node):
        return 0.0
    return float((feeds[0].size + 2) * 2.0**-24 * np.abs(feeds[0]).sum())


def _attempt(proto: onnx.ModelProto, feeds: list[Array], wanted: list[Array], case: Any) -> Outcome:
    try:
        runnable = run_of(canonicalize(load_model(proto)))
    except KbitcError as error:
        return Outcome("refused", str(error))
    names = [info.name for info in proto.graph.input]
    least = rounding(proto, feeds)
    results = runnable(dict(zip(names, feeds, strict=False)))
    for result, expected in zip(results, wanted, strict=True):
        if result.shape != expected.shape or result.dtype != expected.dtype:
            return Outcome("wrong", f"{result.dtype}{result.shape} for {expected.dtype}{expected.shape}")
        exact = expected.dtype.kind in "iub"
        left, right = (np.asarray(array, np.float64) for array in (result, expected))
        if not np.allclose(
            left, right, rtol=0 if exact else case.rtol, atol=0 if exact else case.atol + least, equal_nan=True
        ):
            return Outcome("wrong", f"differs by {np.nanmax(np.abs(left - right))}")
    return Outcome("right")
