"""What an ONNX value is while a graph is lowered: in memory, still an expression, known, or left for later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.targets.lower import dims
from kbitc.targets.lower.contraction import Dim, RelaxExpr

if TYPE_CHECKING:
    from kbitc.targets.lower.group import Group

Index = Any  # an int64 tvm expression or an int
Expr = Any  # a scalar tvm expression
Element = Callable[["Group", Sequence[Index]], Expr]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A value in memory.

    Attributes:
        var: the relax variable that holds it.
        shape: dimensions, ints or int64 expressions.
        dtype: tvm type name; the empty string when a node left this optional output out.
    """

    var: RelaxExpr
    shape: tuple[Dim, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Lazy:
    """A value that exists as a formula for its elements, and fuses into the kernel that reads it.

    Attributes:
        element: (group, indices) -> the element at these indices, as an expression that reads through the group.
        shape: dimensions.
        dtype: tvm type name.
        cost: operations that one element takes, counted roughly; a plain read is 1.
        pointwise: element i of the value reads its operands at i only (up to broadcasting), so that neighbouring
            elements read neighbouring memory.
    """

    element: Element
    shape: tuple[Dim, ...]
    dtype: str
    cost: int = 1
    pointwise: bool = True


@dataclass(frozen=True, eq=False)
class Constant:
    """A value known while compiling.

    Attributes:
        array: the elements; for a shape value an object array of ints, floats, bools and tvm expressions.
        dtype: tvm type name ("int4" and "uint4" arrays hold one element a byte).
        name: the tensor's name in the file, for the bundle's weights.
    """

    array: npt.NDArray[Any]
    dtype: str
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return tuple(int(dim) for dim in self.array.shape)

    @property
    def is_symbolic(self) -> bool:
        """Whether some elements are expressions over symbolic dimensions."""
        return self.array.dtype == np.dtype(object)


class Deferred:
    """A value that is computed when somebody asks for it, and then only once.

    Quantized operands are such values: a kernel reads codes and scales behind them and never asks.

    Attributes:
        constant: it depends on constants only.
    """

    def __init__(self, compute: Callable[[], Tensor | Lazy | Constant], constant: bool = False) -> None:
        self.constant = constant
        self._compute = compute
        self._value: Tensor | Lazy | Constant | None = None

    def value(self) -> Tensor | Lazy | Constant:
        """The value itself."""
        if self._value is None:
            self._value = self._compute()
        return self._value


Value = Tensor | Lazy | Constant


def without_ones(value: Lazy, shape: tuple[Dim, ...]) -> Lazy | None:
    """A lazy value under a shape that differs only in dimensions of size 1; None when it differs in others."""
    kept = [axis for axis, dim in enumerate(shape) if not (dims.is_static(dim) and dim == 1)]
    source = [axis for axis, dim in enumerate(value.shape) if not (dims.is_static(dim) and dim == 1)]
    if not dims.same_shape([shape[axis] for axis in kept], [value.shape[axis] for axis in source]):
        return None
    position = dict(zip(source, kept, strict=True))
    rank = len(value.shape)
    zero = tirx.IntImm("int64", 0)

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        return value.element(group, [indices[position[axis]] if axis in position else zero for axis in range(rank)])

    return Lazy(element, shape, value.dtype, value.cost, value.pointwise)
