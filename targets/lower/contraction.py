"""What a matrix product, convolution or embedding is to the kernel rules, and what a kernel rule is.

The emitter describes each contraction of the graph by one `Contraction` and offers it to the target's rules in
order; the first rule whose `match` returns None emits it. The last rule of every list is the reference rule,
which takes everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kbitc.quant.tensor import QTensor
    from kbitc.targets.target import Target

FloatWeight = npt.NDArray[np.float32]
# A dimension is a Python int or an int64 tvm expression; tvm ships no type stubs.
Dim = Any
RelaxExpr = Any
PrimFunc = Any


@dataclass(frozen=True)
class ConvAttributes:
    """Geometry of a two-dimensional convolution; a one-dimensional one has height 1.

    Attributes:
        kernel: (height, width) of the window in taps; the weight has T = height * width taps, row-major.
        strides, dilations: (height, width), in pixels.
        pads: (top, left, bottom, right), in pixels of real zero.
        group: the input and output channels are split into this many independent groups.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    group: int = 1


@dataclass(frozen=True)
class PostFunction:
    """min(max(y, low), high) applied after the bias; None leaves that side open. relu is low = 0.

    With both sides given low is not above high. NaN stays NaN.
    """

    low: float | None = None
    high: float | None = None


RELU = PostFunction(low=0.0)


@dataclass(frozen=True, eq=False)
class Contraction:
    """One product of activations with a weight, or of two activations.

    Tensors by kind (inputs are given to `Rule.emit` in this order, all float32 unless said):
        matmul: x [..., C] by weight [N, 1, C] -> [..., N].
        conv: x [B, H, W, C * group] by weight [N, T, C] -> [B, OH, OW, N]; channels last.
        embedding: indices int32 or int64 [...] into weight [N, 1, C] -> [..., C]; negative ones count from N.
        batch_matmul: a [..., M, C] by b [..., C, N] -> [..., M, N]; weight is None; leading dims broadcast.

    Attributes:
        name: name of the graph node, unique; weights and debug outputs are named after it.
        kind: see above.
        weight: QTensor or float32 array seen as [N, T, C]; None for batch_matmul.
        activation: "int8" quantizes the activation at run time (kbitc::DynamicQuantize), "float32" does not.
        x_shape: shape of the first input, ints or int64 tvm expressions.
        out_shape: shape of the result.
        activation_block: channels per activation scale when activation is "int8"; 0 is the whole of C.
        conv: geometry when kind is "conv".
        bias: float32 [N], added after the sum; None for none.
        post: clamp after the bias; None for none.
        index_dtype: dtype of the indices when kind is "embedding".
        b_shape: shape of the second input when kind is "batch_matmul".
        transpose_b: the second input of batch_matmul is [..., N, C].
        accumulators_out: also hand the int32 accumulators [*out_shape[:-1], T * CB, N] and the int8 codes (as they
            lie in memory) to `EmitContext.debug_output` as "<name>.accumulators" and "<name>.codes".
    """

    name: str
    kind: Literal["matmul", "conv", "embedding", "batch_matmul"]
    weight: QTensor | FloatWeight | None
    activation: Literal["float32", "int8"]
    x_shape: tuple[Dim, ...]
    out_shape: tuple[Dim, ...]
    activation_block: int = 0
    conv: ConvAttributes | None = None
    bias: FloatWeight | None = None
    post: PostFunction | None = None
    index_dtype: Literal["int32", "int64"] = "int64"
    b_shape: tuple[Dim, ...] | None = None
    transpose_b: bool = False
    accumulators_out: bool = False


class EmitContext(Protocol):
    """What the emitter lends a rule."""

    memo: dict[object, Any]
    """Shared results, such as the quantized codes of an activation that several contractions read."""

    @property
    def target(self) -> Target:
        """What is compiled for."""

    def weight(self, name: str, array: npt.NDArray[Any]) -> RelaxExpr:
        """Register a parameter of main; the bundle stores the array under this name."""

    def call(
        self,
        prim_func: PrimFunc,
        name_hint: str,
        inputs: Sequence[RelaxExpr],
        outputs: Sequence[tuple[tuple[Dim, ...], str]],
    ) -> Any:
        """call_tir: one variable for one output (shape, dtype), a list of variables for several."""

    def debug_output(self, name: str, value: RelaxExpr) -> None:
        """Make a value an extra output of main under this name."""


class Rule(Protocol):
    """One way to emit a contraction on one target."""

    name: str

    def match(self, contraction: Contraction, target: Target) -> str | None:
        """None when the rule takes the contraction, otherwise the reason why it declines."""

    def emit(self, ctx: EmitContext, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> RelaxExpr:
        """Emit it into ctx and return the result of shape `contraction.out_shape`."""
