"""ONNX element types as tvm and numpy know them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import UnsupportedError

# Types that tensors in memory may have. int4 and uint4 exist only as constants, one element a byte.
TVM_TYPES: dict[ir.DataType, str] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.INT8: "int8",
    ir.DataType.INT16: "int16",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
    ir.DataType.UINT16: "uint16",
    ir.DataType.UINT32: "uint32",
    ir.DataType.UINT64: "uint64",
    ir.DataType.BOOL: "bool",
}
NARROW_TYPES: dict[ir.DataType, str] = {
    ir.DataType.INT4: "int4",
    ir.DataType.UINT4: "uint4",
    ir.DataType.INT2: "int2",
    ir.DataType.UINT2: "uint2",
}
# Smallest and largest value of every integer type.
INTEGER_RANGE: dict[str, tuple[int, int]] = {
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (2, 4, 8, 16, 32, 64)},
    **{f"uint{bits}": (0, 2**bits - 1) for bits in (2, 4, 8, 16, 32, 64)},
}


def is_float(dtype: str) -> bool:
    """Whether a type is a floating-point one."""
    return dtype.startswith(("float", "bfloat"))


def is_integer(dtype: str) -> bool:
    """Whether a type is a signed or unsigned integer (not bool)."""
    return dtype in INTEGER_RANGE


def storage(dtype: str) -> str:
    """The type that holds one element in memory: bytes for the types below 8 bits."""
    if dtype in ("int4", "int2"):
        return "int8"
    return "uint8" if dtype in ("uint4", "uint2") else dtype


def tvm_type(dtype: ir.DataType | None, where: str) -> str:
    """The tvm name of an ONNX element type that tensors in memory may have.

    Raises:
        UnsupportedError: for strings, complex numbers, 8-bit floats and types below 8 bits.
    """
    if dtype not in TVM_TYPES:
        name = dtype.name if dtype is not None else "unknown"
        raise UnsupportedError(
            "element type cannot be compiled", where=where, got=name, remedy="cast it to float32, int32 or int64"
        )
    return TVM_TYPES[dtype]


def from_tensor(tensor: Any, where: str) -> tuple[npt.NDArray[Any], str]:
    """The elements and the tvm type name of an ONNX tensor; types below 8 bits one element a byte."""
    if tensor.dtype in NARROW_TYPES:
        name = NARROW_TYPES[tensor.dtype]
        return np.asarray(tensor.numpy()).astype(storage(name)), name
    return np.asarray(tensor.numpy()), tvm_type(tensor.dtype, where)


def numpy_type(dtype: str) -> np.dtype[Any]:
    """The numpy type of a tvm type name."""
    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else storage(dtype))
    return found
