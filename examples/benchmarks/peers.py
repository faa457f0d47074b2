"""Other engines on the products of gemv.py: onnxruntime's own kernels, and OpenVINO and ggml where they are there.

OpenVINO is a package (`pip install openvino`). ggml comes with `pip install llama-cpp-python`, which builds it for the
machine, or as a folder with libggml-base.so and libggml-cpu.so that KBITC_GGML names. Neither is needed.

Every function gives calls by name: without arguments, one thread, input and output stay where they are.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Call = Callable[[], Any]
BLOCK = 32
# ggml's numbers of its types.
GGML_TYPES = {"q4_0": 2, "q8_0": 8, "q2_K": 10, "q3_K": 11, "q4_K": 12}
GGML_F32 = 0
HEADER_BYTES = 1 << 20  # of tensors and a graph, without their numbers
BUFFER_FIELD = 8  # bytes before `buffer` in ggml_tensor


def openvinos(weights: list[Floats], x: Floats) -> dict[str, Call]:
    """Weights in float, int8 a channel and int4 in blocks of 32; computing in float32 and as OpenVINO likes."""
    if importlib.util.find_spec("openvino") is None:
        return {}
    found = {}
    for bits in (32, 8, 4):
        for hint in ("f32", ""):
            name = f"OpenVINO {'fp32' if bits == 32 else f'int{bits}'}, {f'hint {hint}' if hint else 'default'}"
            try:
                found[name] = _in_openvino(weights, x, bits, hint)
            except RuntimeError as error:  # Masked, it may ask itself for instructions that it may not use.
                logging.warning("%s does not run: %s", name, str(error).strip().splitlines()[-1])
    return found


def _in_openvino(weights: list[Floats], x: Floats, bits: int, hint: str) -> Call:
    import openvino
    from openvino import opset13 as ops

    given = value = ops.parameter(x.shape, np.float32)
    kept: list[Any] = []  # OpenVINO does not copy packed codes.
    for weight in weights:
        value = ops.matmul(value, _constant(weight.T, bits, kept), False, True)
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if hint:
        settings["INFERENCE_PRECISION_HINT"] = hint
    model = openvino.Model([value], [given], "product")
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    return lambda: request.infer(share_outputs=True)


def _constant(weight: Floats, bits: int, kept: list[Any]) -> Any:
    """A weight [N, K] as NNCF compresses it: codes, less their zero point, times scales. `kept` holds its memory."""
    import openvino
    from openvino import opset13 as ops

    if bits == 32:
        return ops.constant(np.ascontiguousarray(weight))
    blocks = weight.reshape(weight.shape[0], -1, BLOCK if bits == 4 else weight.shape[1])
    scales = (np.abs(blocks).max(axis=2, keepdims=True) / (2 ** (bits - 1) - 1)).astype(np.float16)
    codes = np.clip(np.rint(blocks / scales), 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    if bits == 8:
        held = ops.constant(codes.astype(np.int8))
        product = ops.multiply(ops.convert(held, np.float16), ops.constant(np.ascontiguousarray(scales), np.float16))
    else:
        unsigned = (codes + 8).astype(np.uint8).reshape(-1)
        packed = np.ascontiguousarray(unsigned[0::2] | (unsigned[1::2] << 4))
        origin = np.array([8], np.uint8)
        kept += [packed, origin]
        held = ops.constant(openvino.Tensor(packed, codes.shape, openvino.Type.u4))
        eight = ops.constant(openvino.Tensor(origin, [1, 1, 1], openvino.Type.u4))
        moved = ops.subtract(ops.convert(held, np.float16), ops.convert(eight, np.float16))
        product = ops.multiply(moved, ops.constant(np.ascontiguousarray(scales), np.float16))
    whole = ops.reshape(product, ops.constant(np.array(weight.shape, np.int64)), False)
    return ops.convert(whole, np.float32)


def ggmls(weights: list[Floats], x: Floats) -> dict[str, Call]:
    """Every type as it is, and as ggml packs it for the processor where it does."""
    folder = _ggml_folder()
    if folder is None:
        return {}
    engine = _Ggml(folder)
    found = {}
    for name, kind in GGML_TYPES.items():
        found[f"ggml {name}"] = engine.call(weights, x, kind, None)
        for way, buffer_type in engine.packings(weights[0], x, kind):
            found[f"ggml {name} {way}"] = engine.call(weights, x, kind, buffer_type)
    return found


def _ggml_folder() -> Path | None:
    named = os.environ.get("KBITC_GGML")
    if named:
        return Path(named)
    package = importlib.util.find_spec("llama_cpp")
    return None if package is None or package.origin is None else Path(package.origin).parent / "lib"


class _Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Ggml:
    """The functions of ggml that a matrix product takes."""

    def __init__(self, folder: Path) -> None:
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self.backend = self._pointer(self._cpu, "ggml_backend_cpu_init")
        self._cpu.ggml_backend_cpu_set_n_threads(ctypes.c_void_p(self.backend), 1)
        registry = self._pointer(self._cpu, "ggml_backend_cpu_reg")
        self._device = self._pointer(self._base, "ggml_backend_reg_dev_get", registry, ctypes.c_size_t(0))
        name = ctypes.c_char_p(b"ggml_backend_dev_get_extra_bufts")
        self._extra = self._pointer(self._base, "ggml_backend_reg_get_proc_address", registry, name)

    @staticmethod
    def _pointer(library: Any, name: str, *given: Any) -> int:
        function = getattr(library, name)
        function.restype = ctypes.c_void_p
        return int(function(*(ctypes.c_void_p(a) if isinstance(a, int) else a for a in given)) or 0)

    def _context(self) -> int:
        self._base.ggml_init.argtypes = [_Parameters]
        self._base.ggml_init.restype = ctypes.c_void_p
        return int(self._base.ggml_init(_Parameters(HEADER_BYTES, None, True)))

    def _tensor(self, context: int, kind: int, inner: int, outer: int) -> int:
        sizes = ctypes.c_int64(inner), ctypes.c_int64(outer)
        return self._pointer(self._base, "ggml_new_tensor_2d", context, ctypes.c_int(kind), *sizes)

    def packings(self, weight: Floats, x: Floats, kind: int) -> Iterator[tuple[str, int]]:
        """(name, buffer type) of the ways in which ggml packs such a weight for its own kernels."""
        if not self._extra:
            return
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(self._extra)(self._device)
        for buffer_type in listed:
            if not buffer_type:
                return
            context = self._context()
            held = self._tensor(context, kind, *weight.shape)
            product = self._pointer(
                self._base, "ggml_mul_mat", context, held, self._tensor(context, GGML_F32, x.shape[1], x.shape[0])
            )
            empty = self._pointer(self._base, "ggml_backend_buft_alloc_buffer", buffer_type, ctypes.c_size_t(0))
            ctypes.c_void_p.from_address(held + BUFFER_FIELD).value = empty
            self._base.ggml_backend_dev_supports_op.restype = ctypes.c_bool
            if self._base.ggml_backend_dev_supports_op(ctypes.c_void_p(self._device), ctypes.c_void_p(product)):
                self._base.ggml_backend_buft_name.restype = ctypes.c_char_p
                yield self._base.ggml_backend_buft_name(ctypes.c_void_p(buffer_type)).decode(), buffer_type

    def call(self, weights: list[Floats], x: Floats, kind: int, buffer_type: int | None) -> Call:
        """One product after another; weights [K, N]."""
        context, other = self._context(), self._context()
        held = [self._tensor(context, kind, *weight.shape) for weight in weights]
        if buffer_type is None:
            self._pointer(self._base, "ggml_backend_alloc_ctx_tensors", context, self.backend)
        else:
            self._pointer(self._base, "ggml_backend_alloc_ctx_tensors_from_buft", context, buffer_type)
        for tensor, weight in zip(held, weights, strict=True):
            self._fill(tensor, self._quantized(weight, kind))
        given = value = self._tensor(other, GGML_F32, x.shape[1], x.shape[0])
        for tensor in held:
            value = self._pointer(self._base, "ggml_mul_mat", other, tensor, value)
        graph = self._pointer(self._base, "ggml_new_graph", other)
        self._base.ggml_build_forward_expand(ctypes.c_void_p(graph), ctypes.c_void_p(value))
        self._pointer(self._base, "ggml_backend_alloc_ctx_tensors", other, self.backend)
        self._fill(given, x)
        compute, backend, made = self._base.ggml_backend_graph_compute, self.backend, graph
        compute.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        return lambda: compute(backend, made)

    def _fill(self, tensor: int, array: npt.NDArray[Any]) -> None:
        sizes = ctypes.c_size_t(0), ctypes.c_size_t(array.nbytes)
        data = array.ctypes.data_as(ctypes.c_void_p)
        self._base.ggml_backend_tensor_set(ctypes.c_void_p(tensor), data, *sizes)

    def _quantized(self, weight: Floats, kind: int) -> npt.NDArray[np.uint8]:
        inputs, outputs = weight.shape
        rows = np.ascontiguousarray(weight.T)
        self._base.ggml_row_size.restype = ctypes.c_size_t
        size = self._base.ggml_row_size(ctypes.c_int(kind), ctypes.c_int64(inputs))
        made = np.empty((outputs, size), np.uint8)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (rows, made))
        sizes = ctypes.c_int64(0), ctypes.c_int64(outputs), ctypes.c_int64(inputs)
        self._base.ggml_quantize_chunk(ctypes.c_int(kind), *pointers, *sizes, None)
        return made
