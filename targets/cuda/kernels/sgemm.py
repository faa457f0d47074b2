"""Float32 matrix product and convolution: tiles in shared memory, 4 by 4 results a thread, float32 sums in order of K.

    out[m, n] = sum over taps t, channels c of x[row(m, t), c] * w[t, c, n]      then bias and clamp

The right operand is a dense weight [T, C, N], a packed k-bit weight that is unpacked on its way to shared memory, or
a second activation [..., C, N] or [..., N, C] (batched product).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from kbitc.quant.packing import GROUP, LANES, STEPS, UNIT
from kbitc.targets.cuda.kernels import threads as t
from kbitc.targets.cuda.kernels.dequantize import Packed, declare_packed, view_words
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.packed import WeightSpec
from kbitc.targets.kernels.tasks import clamp
from kbitc.targets.lower.contraction import ConvAttributes, PostFunction

Expr = Any
Buffer = Any
Dim = Any
THREADS = 256
TILE_N = 64
STEP_K = 16
PER_THREAD = 4
SKEW = 4  # keeps rows of the transposed tile on other banks
FEW_ROWS = 16


@dataclass(frozen=True)
class SgemmSpec:
    """What a kernel computes.

    Attributes:
        x_shape: [*lead, M, C] (matrix, batched product) or [B, H, W, C] (convolution).
        out_shape: [*lead, M, N] or [B, OH, OW, N].
        conv: geometry of an ungrouped convolution.
        taps: T.
        weight: the packed weight, None for a dense right operand.
        b_shape: shape of the second activation of a batched product, None for a weight.
        transpose_b: the second activation is [..., N, C].
        bias: a float32 [N] is added.
        post: clamp after the bias.
    """

    x_shape: tuple[Dim, ...]
    out_shape: tuple[Dim, ...]
    conv: ConvAttributes | None = None
    taps: int = 1
    weight: WeightSpec | None = None
    b_shape: tuple[Dim, ...] | None = None
    transpose_b: bool = False
    bias: bool = False
    post: PostFunction | None = None


def make_sgemm(spec: SgemmSpec, name: str) -> Any:
    """The PrimFunc: x, then w f32 [T, C, N] | packed codes, scales, zero points | b, then bias [N] (if any), out."""

    def body() -> None:
        dims = v.DimVars()
        x_shape, out_shape = tuple(dims(d) for d in spec.x_shape), tuple(dims(d) for d in spec.out_shape)
        b_shape = tuple(dims(d) for d in spec.b_shape) if spec.b_shape is not None else None
        x = v.argument("x", x_shape, "float32")
        right: Buffer | Packed
        if spec.weight is not None:
            right = declare_packed(spec.weight)
        else:
            right = v.argument("w", b_shape or (spec.taps, x_shape[-1], out_shape[-1]), "float32")
        bias_length = out_shape[-1] if spec.weight is None else spec.weight.output_tiles * LANES
        bias = v.argument("bias", (bias_length,), "float32") if spec.bias else None
        out = v.argument("out", out_shape, "float32")
        with v.root():
            _Launch(spec, x_shape, out_shape, b_shape, x, right, bias, out).emit()

    return v.kernel(name, body)


class _Launch:
    """The grid, and views of the buffers as matrices."""

    def __init__(
        self,
        spec: SgemmSpec,
        x_shape: tuple[Dim, ...],
        out_shape: tuple[Dim, ...],
        b_shape: tuple[Dim, ...] | None,
        x: Buffer,
        right: Buffer | Packed,
        bias: Buffer | None,
        out: Buffer,
    ) -> None:
        self.spec, self.x_shape, self.out_shape, self.b_shape = spec, x_shape, out_shape, b_shape
        self.bias = bias
        self.channels, self.n = x_shape[-1], out_shape[-1]
        self.batched = b_shape is not None
        # A product by a weight has one matrix of all rows; a batched one a matrix for each leading index.
        self.rows = out_shape[-2] if self.batched else v.product(out_shape[:-1])
        self.batches = v.product(out_shape[:-2]) if self.batched else 1
        self.x = t.view(x, (v.product(x_shape[:-1]), self.channels), "float32")
        self.out = t.view(out, (v.product(out_shape[:-1]), self.n), "float32")
        if isinstance(right, Packed):
            view_words(right)
            self.packed: Packed | None = right
        else:
            self.packed = None
            shape = (spec.taps * self.channels, self.n)
            if b_shape is not None:
                shape = (v.product(b_shape[:-1]), b_shape[-1])
            self.w = t.view(right, shape, "float32")

    def emit(self) -> None:
        """One launch; batches lie along z, or along x where there may be more than z takes."""
        few = isinstance(self.rows, int) and self.rows <= FEW_ROWS
        tile_m = FEW_ROWS if few else TILE_N
        down, across = t.divide_round_up(self.rows, tile_m), t.divide_round_up(self.n, TILE_N)
        with t.launch((down * self.batches, across), THREADS) as ((first, column), thread):
            batch, row = (v.bind(first // down), v.bind(first % down)) if self.batched else (v.i64(0), first)
            _Block(self, tile_m, batch, v.bind(row * tile_m), v.bind(column * TILE_N), thread).emit()


class _Block:
    """Emits what a thread block does for one tile of the result."""

    def __init__(self, launch: _Launch, tile_m: int, batch: Expr, row: Expr, column: Expr, thread: Expr) -> None:
        self.launch, self.spec, self.tile_m = launch, launch.spec, tile_m
        self.batch, self.row, self.column, self.thread = batch, row, column, thread
        self.per_row = tile_m * PER_THREAD // TILE_N  # rows of a thread: 4, or 1 in the flat tile
        self.left = t.shared((STEP_K * (tile_m + SKEW),), "float32")
        self.right = t.shared((STEP_K * TILE_N,), "float32")
        self.sums = t.local(self.per_row * PER_THREAD, "float32")
        self.k, self.line = v.bind(thread % STEP_K), v.bind(thread // STEP_K)
        self.loads = [self._left_row(i) for i in range(tile_m // (THREADS // STEP_K))]

    def emit(self) -> None:
        """Zero, walk K, store."""
        for i in range(self.per_row * PER_THREAD):
            v.store(self.sums, [i], tirx.const(0.0, "float32"), 1)
        steps = t.divide_round_up(self.launch.channels, STEP_K)

        def one(tap: Expr) -> None:
            reads = [read(tap) for read in self.loads]
            v.loop(steps, lambda step: self._step(tap, v.bind(step * STEP_K), reads))

        v.loop(self.spec.taps, one)
        self._finish()

    def _left_row(self, i: int) -> Callable[[Expr], tuple[Expr, Expr]]:
        """For the i-th row that this thread loads: tap -> (row of x, whether it is real)."""
        launch, conv = self.launch, self.spec.conv
        m = v.bind(self.row + i * (THREADS // STEP_K) + self.line)
        real = m < v.i64(launch.rows)
        if launch.batched:
            source = v.bind(_broadcast(self.batch, launch.out_shape[:-2], launch.x_shape[:-2]) * launch.x_shape[-2] + m)
            return lambda tap: (source, real)
        if conv is None:
            return lambda tap: (m, real)
        height, width = launch.x_shape[1], launch.x_shape[2]
        line = v.bind(m // launch.out_shape[2])
        x = v.bind(m % launch.out_shape[2] * conv.strides[1] - conv.pads[1])
        y = v.bind(line % launch.out_shape[1] * conv.strides[0] - conv.pads[0])
        image = v.bind(line // launch.out_shape[1])

        def at(tap: Expr) -> tuple[Expr, Expr]:
            iy = v.bind(y + tap // conv.kernel[1] * conv.dilations[0])
            ix = v.bind(x + tap % conv.kernel[1] * conv.dilations[1])
            inside = tirx.all(real, iy >= v.i64(0), iy < v.i64(height), ix >= v.i64(0), ix < v.i64(width))
            return v.bind((image * height + iy) * width + ix), v.bind(inside)

        return at

    def _step(self, tap: Expr, c: Expr, reads: list[tuple[Expr, Expr]]) -> None:
        """16 of K: both tiles to shared memory, then the products."""
        channel = v.bind(c + self.k)
        zero = tirx.const(0.0, "float32")
        for i, (source, real) in enumerate(reads):
            exists = tirx.all(real, channel < v.i64(self.launch.channels))
            value = t.read_if(exists, self.launch.x[source, channel], zero)
            line = i * (THREADS // STEP_K) + self.line
            v.store(self.left, [self.k * (self.tile_m + SKEW) + line], value, 1)
        if self.launch.packed is not None:
            self._unpack(self.launch.packed, tap, c)
        else:
            self._copy(tap, c)
        t.barrier()
        v.loop(STEP_K, self._multiply)
        t.barrier()

    def _copy(self, tap: Expr, c: Expr) -> None:
        """A 16 by 64 tile of a dense right operand; neighbouring threads read neighbouring elements."""
        launch = self.launch
        for i in range(PER_THREAD):
            if self.spec.transpose_b:
                k, n = self.k, v.bind(i * (THREADS // STEP_K) + self.line)
            else:
                k, n = v.bind(self.thread // TILE_N + i * (THREADS // TILE_N)), v.bind(self.thread % TILE_N)
            channel, column = v.bind(c + k), v.bind(self.column + n)
            exists = tirx.all(channel < v.i64(launch.channels), column < v.i64(launch.n))
            value = t.read_if(exists, self._dense(tap, channel, column), tirx.const(0.0, "float32"))
            v.store(self.right, [k * TILE_N + n], value, 1)

    def _dense(self, tap: Expr, channel: Expr, column: Expr) -> Expr:
        launch = self.launch
        if launch.b_shape is None:
            return launch.w[tap * launch.channels + channel, column]
        matrix = _broadcast(self.batch, launch.out_shape[:-2], launch.b_shape[:-2]) * launch.b_shape[-2]
        return launch.w[matrix + column, channel] if self.spec.transpose_b else launch.w[matrix + channel, column]

    def _unpack(self, packed: Packed, tap: Expr, c: Expr) -> None:
        """Each thread unpacks one step (four of K) of one channel n: 4 steps by 64 channels. Padding codes of C meet
        zeros on the left; tiles past N are read as the last one and not stored."""
        n, quarter = v.bind(self.thread % TILE_N), v.bind(self.thread // TILE_N)
        tile = v.bind(t.at_most((self.column + n) // LANES, packed.spec.output_tiles - 1))
        step = v.bind(c % UNIT // GROUP + quarter)
        values = packed.four(tile, tap, v.bind(c // UNIT), v.bind(step % STEPS), v.bind(n % LANES))
        for j, value in enumerate(values):
            v.store(self.right, [(quarter * GROUP + j) * TILE_N + n], value, 1)

    def _multiply(self, k: Expr) -> None:
        """One of K: an outer product in registers."""
        down, across = self.thread // STEP_K, self.thread % STEP_K
        a = [v.bind(self.left[k * (self.tile_m + SKEW) + down * self.per_row + i]) for i in range(self.per_row)]
        b = [v.bind(self.right[k * TILE_N + across * PER_THREAD + j]) for j in range(PER_THREAD)]
        for i in range(self.per_row):
            for j in range(PER_THREAD):
                at = i * PER_THREAD + j
                fused = tirx.call_pure_extern("float32", "__fmaf_rn", a[i], b[j], self.sums[at])
                v.store(self.sums, [at], fused, 1)

    def _finish(self) -> None:
        launch = self.launch
        down, across = self.thread // STEP_K, self.thread % STEP_K
        for i in range(self.per_row):
            m = v.bind(self.row + down * self.per_row + i)
            place = v.bind(self.batch * launch.rows + m) if launch.batched else m
            for j in range(PER_THREAD):
                n = v.bind(self.column + across * PER_THREAD + j)

                def store(i: int = i, j: int = j, place: Expr = place, n: Expr = n) -> None:
                    value = self.sums[i * PER_THREAD + j]
                    if launch.bias is not None:
                        value = value + launch.bias[n]
                    v.store(launch.out, [place, n], clamp(v.bind(value), self.spec.post, 1), 1)

                v.when(tirx.all(m < v.i64(launch.rows), n < v.i64(launch.n)), store)


def _broadcast(index: Expr, shape: tuple[Dim, ...], own: tuple[Dim, ...]) -> Expr:
    """Number of the matrix in an operand with leading dimensions `own`, for matrix `index` of the result's `shape`."""
    if not own:
        return v.i64(0)
    parts, rest = [], index
    for dim in reversed(shape):
        parts.append(rest % dim)
        rest = rest // dim
    result: Expr = v.i64(0)
    for dim, part in zip(own, list(reversed(parts))[len(shape) - len(own) :], strict=True):
        result = result * dim + (v.i64(0) if isinstance(dim, int) and dim == 1 else part)
    return result
