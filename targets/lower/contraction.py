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
    from kbitc.quant.levels import LevelTensor
    from kbitc.quant.tensor import QTensor
    from kbitc.targets.target import Target

FloatWeight = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
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
class Requantization:
    """int32 accumulators -> uint8 codes; the one rounding rule of integer graphs (kbitc::Requantize):

        clip(((int64(acc) * multiplier + 2^(shift - 1)) >> shift) + zero, low, high)        >> floors

    Attributes:
        multiplier: int32 [1] or [N], 0 or in [2^30, 2^31).
        shift: int32 [1] or [N], 1..62.
        zero: zero point of the codes.
        low, high: range of the codes, inside 0..255.
    """

    multiplier: IntArray
    shift: IntArray
    zero: int
    low: int
    high: int


@dataclass(frozen=True)
class Place:
    """Where a tensor [*lead, rows, channels] lies.

    Attributes:
        shape: dimensions in memory, the channels last.
        axes: for each axis of [*lead, rows] its place in `shape`; None repeats the same numbers along it.
    """

    shape: tuple[Dim, ...]
    axes: tuple[int | None, ...]


@dataclass(frozen=True)
class AttentionCodes:
    """What is fixed of an attention of codes, beside the requantization of the result.

    Attributes:
        q_zero, k_zero, v_zero: zero points.
        step: a score of one step of the sums of products, float32.
        share_scale, share_zero: of the codes of the softmax.
    """

    q_zero: int
    k_zero: int
    v_zero: int
    step: float
    share_scale: float
    share_zero: int


@dataclass(frozen=True)
class Attention:
    """softmax(scores) v with scores = q k^T * scale + mask, or q k^T / scale + mask.

    Attributes:
        lead: leading dimensions of the result, seen as [*lead, M, D].
        rows, keys, channels, columns: M, N, C and D of q [*lead, M, C], k [*lead, N, C] and v [*lead, N, D].
        q, k, v, out: where they lie.
        mask: [*lead, M, N], where it lies; None for none.
        scale: see above; 1 for none.
        divide: the scores are divided by it.
        codes: q, k and v are codes, and so is softmax(scores):
            scores = float32(sum of (q - q_zero) (k - k_zero)) * step, then scale and mask,
            acc = sum of (QuantizeLinear(softmax(scores), share_scale, share_zero) - share_zero) (v - v_zero).
            None: all is float32.
    """

    lead: tuple[Dim, ...]
    rows: Dim
    keys: Dim
    channels: int
    columns: int
    q: Place
    k: Place
    v: Place
    out: Place
    mask: Place | None = None
    scale: float = 1.0
    divide: bool = False
    codes: AttentionCodes | None = None


@dataclass(frozen=True, eq=False)
class Contraction:
    """One product of activations with a weight, or of two activations.

    Tensors by kind (inputs are given to `Rule.emit` in this order, all float32 unless said):
        matmul: x [..., C] by weight [N, 1, C] -> [..., N].
        conv: x [B, H, W, C * group] by weight [N, T, C] -> [B, OH, OW, N]; channels last.
        embedding: indices int32 or int64 [...] into weight [N, 1, C] -> [..., C]; negative ones count from N.
        batch_matmul: a [..., M, C] by b [..., C, N] -> [..., M, N]; weight is None; leading dims broadcast.
        attention: q, k, v and the mask if there is one, all as `attention` says (the mask is
            float32); weight is None.

    With activation "uint8" everything is integer: uint8 inputs, LevelTensor weights (uint8 b for batch_matmul), and

        acc[m, n] = bias[n] + sum over (t, c) of (x[row(m, t), c] - x_zero) * w[n, t, c]        int32, cannot overflow

    where a pad counts as x_zero. The result is acc (int32), or its requantization (uint8). Rules give exactly this.

    Attributes:
        name: name of the graph node, unique; weights and debug outputs are named after it.
        kind: see above.
        weight: QTensor, LevelTensor or float32 array seen as [N, T, C]; None for products of activations.
        activation: "int8" quantizes the activation at run time (kbitc::DynamicQuantize), "float32" does not;
            "uint8" are codes of a static graph.
        x_shape: shape of the first input, ints or int64 tvm expressions.
        out_shape: shape of the result.
        activation_block: channels per activation scale when activation is "int8"; 0 is the whole of C.
        conv: geometry when kind is "conv".
        bias: float32 [N], added after the sum; int32 [N] when activation is "uint8"; None for none.
        post: clamp after the bias; None for none.
        index_dtype: dtype of the indices when kind is "embedding".
        b_shape: shape of the second input when kind is "batch_matmul".
        transpose_b: the second input of batch_matmul is [..., N, C].
        accumulators_out: also hand the int32 accumulators [*out_shape[:-1], T * CB, N] and the int8 codes (as they
            lie in memory) to `EmitContext.debug_output` as "<name>.accumulators" and "<name>.codes"; when activation
            is "uint8", only acc [*out_shape], and only where it is requantized.
        x_zero: zero point of the first input when activation is "uint8".
        b_zero: zero point of the second input of such a batch_matmul.
        requantize: makes the result uint8; only when activation is "uint8". None leaves it int32 there.
        attention: what is computed when kind is "attention".
    """

    name: str
    kind: Literal["matmul", "conv", "embedding", "batch_matmul", "attention"]
    weight: QTensor | LevelTensor | FloatWeight | None
    activation: Literal["float32", "int8", "uint8"]
    x_shape: tuple[Dim, ...]
    out_shape: tuple[Dim, ...]
    activation_block: int = 0
    conv: ConvAttributes | None = None
    bias: FloatWeight | IntArray | None = None
    post: PostFunction | None = None
    index_dtype: Literal["int32", "int64"] = "int64"
    b_shape: tuple[Dim, ...] | None = None
    transpose_b: bool = False
    accumulators_out: bool = False
    x_zero: int = 0
    b_zero: int = 0
    requantize: Requantization | None = None
    attention: Attention | None = None

    @property
    def out_dtype(self) -> str:
        """Type of the result."""
        if self.activation != "uint8":
            return "float32"
        return "int32" if self.requantize is None else "uint8"


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
