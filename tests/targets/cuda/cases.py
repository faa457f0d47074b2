"""What the tests run in the emulator's process: kernels against exact numpy arithmetic. Each function returns the
failures it found, as texts; an empty list is a pass. Every kernel runs twice, with threads and blocks in both orders.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
EPSILON = 2.0**-23  # spacing of float32 at 1


@dataclass(frozen=True)
class Product:
    """One integer product: x [m, c] by a weight [n, taps, c]; a convolution when `image` is given.

    values: "random", "zero", "extreme" (largest codes and activations of one sign), "outlier".
    image: (batch, height, width, kernel, stride, pad, dilation) of an ungrouped convolution.
    """

    scheme: str
    m: int
    n: int
    c: int
    values: str = "random"
    symbolic: bool = False
    image: tuple[int, int, int, int, int, int, int] | None = None

    @property
    def row_scales(self) -> bool:
        """Integer block scales meet activations with one scale a row."""
        return "/i4" in self.scheme


def make_weight(rng: np.random.Generator, n: int, taps: int, c: int, scheme: str, values: str = "random") -> Any:
    """A QTensor of random codes, scales and zero points or offsets; "learned4:b32" has a table of its own."""
    from kbitc.quant.format import Format
    from kbitc.quant.scheme import QuantScheme
    from kbitc.quant.tensor import QTensor, scale_shape

    parsed = QuantScheme.parse(scheme.replace("learned", "int"))
    data_type = parsed.data_type()
    if scheme.startswith("learned"):
        levels = np.sort(rng.integers(-128, 128, 2**parsed.bits))
        data_type = Format("learned", parsed.bits, tuple(int(level) for level in levels), uniform=False)
    top = 2**data_type.bits
    codes = rng.integers(0, top, (n, taps, c)).astype(np.uint8)
    if values == "extreme":
        codes = np.where(np.arange(n)[:, None, None] % 2 == 0, 0, top - 1).astype(np.uint8) * np.ones_like(codes)
    shape = scale_shape((n, taps, c), parsed)
    scales = (rng.random(shape) * 0.1 + 0.01).astype(np.float16).astype(np.float32)
    steps = None
    if "/i4" in scheme:
        factors = rng.integers(1, parsed.largest_scale_code + 1, shape)
        steps = (2.0 ** rng.integers(-8, -5, n)).astype(np.float32)
        scales = (factors * steps[:, None, None]).astype(np.float32)
    zeros = None
    if parsed.zero_point:
        zeros = rng.integers(0, top, shape).astype(np.uint8)
        if values == "extreme":
            zeros[:] = top - 1
    offsets = None
    if parsed.offset:
        offsets = (rng.random(shape) - 0.5).astype(np.float16).astype(np.float32)
    return QTensor(codes, scales, zeros, data_type, parsed, steps, offsets)


def make_rows(rng: np.random.Generator, rows: int, c: int, values: str) -> Array:
    """Activations float32 [rows, c]."""
    x = rng.standard_normal((rows, c)).astype(np.float32)
    if values == "zero":
        x[:] = 0
    elif values == "extreme":
        x[:] = np.where(np.arange(rows)[:, None] % 2 == 0, 3.5, -3.5)
    elif values == "outlier":
        x[:, c // 2] = 1e20
    return x


def quantize(x: Array, block: int, sum_block: int) -> tuple[Array, Array, Array]:
    """kbitc::DynamicQuantize of rows: codes int64 [rows, c], scales f32 [rows, CB], sums int64 [rows, CS]."""
    starts, sum_starts = (np.arange(0, x.shape[1], step) for step in (block, sum_block))
    amax = np.maximum(np.maximum.reduceat(np.abs(x), starts, axis=1), np.float32(1e-30))
    inverse = np.float32(127) / amax
    spread = np.repeat(inverse, block, axis=1)[:, : x.shape[1]]
    codes = np.clip(np.rint(x * spread), -127, 127).astype(np.int64)
    return codes, (amax / np.float32(127)).astype(np.float32), np.add.reduceat(codes, sum_starts, axis=1)


def _pad_columns(a: Array, width: int) -> Array:
    return np.pad(a, ((0, 0), (0, width - a.shape[1])))


def specification(case: Product, weight: Any, *, accumulators: bool = True) -> tuple[Any, Any]:
    """(QgemmSpec, QuantizeSpec) of a case."""
    from tvm import tirx

    from kbitc.targets.kernels.dynamic_quantize import QuantizeSpec
    from kbitc.targets.kernels.packed import weight_fields
    from kbitc.targets.kernels.qgemm import QgemmSpec
    from kbitc.targets.kernels.rows import ConvRows, MatmulRows
    from kbitc.targets.lower.contraction import RELU, ConvAttributes

    sums = min(weight.block, case.c)
    block = case.c if case.row_scales else sums
    rows: Any = MatmulRows((tirx.Var("m", "int64") if case.symbolic else case.m,))
    quant = QuantizeSpec(rows.lead, case.c, block, sum_block=sums)
    if case.image is not None:
        batch, h, w, k, stride, pad, dilation = case.image
        geometry = ConvAttributes((k, k), (stride, stride), (pad, pad, pad, pad), (dilation, dilation))
        oh, ow = ((size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size in (h, w))
        sizes: list[Any] = [batch, h, w, h + 2 * pad, w + 2 * pad, oh, ow]
        if case.symbolic:
            sizes = [tirx.Var(name, "int64") for name in ("b", "h", "w", "ph", "pw", "oh", "ow")]
        rows = ConvRows(sizes[0], sizes[3], sizes[4], sizes[5], sizes[6], geometry)
        quant = QuantizeSpec(tuple(sizes[:3]), case.c, block, geometry.pads, (sizes[3], sizes[4]), sums)
    spec = QgemmSpec(
        **weight_fields(weight), rows=rows, row_scales=case.row_scales, bias=True,
        post=RELU if case.m % 2 else None, accumulators=accumulators,
    )  # fmt: skip
    return spec, quant


def packed_arguments(weight: Any, scale_dtype: str) -> list[Array]:
    """Codes, scales, and zero points or offsets as they lie in memory."""
    from kbitc.quant.packing import pack_codes, pack_per_channel
    from kbitc.targets.kernels.isa import stored_zero_points

    n = weight.shape[0]
    given = [pack_codes(weight.codes, weight.bits), pack_per_channel(weight.scales, n).astype(scale_dtype)]
    if weight.zero_points is not None:
        given.append(pack_per_channel(stored_zero_points(weight.zero_points, weight.format), n))
    if weight.offsets is not None:
        given.append(pack_per_channel(weight.offsets, n).astype(scale_dtype))
    return [np.asarray(array) for array in given]


def check_products(cases: list[Product], kernel: str) -> list[str]:
    """Run the activation quantization and the product of every case; kernel is "gemv", "gemm" or "any"."""
    from kbitc.targets.cuda.kernels.product import make_product
    from kbitc.targets.cuda.kernels.qgemm import make_qgemm
    from kbitc.targets.cuda.kernels.qgemv import make_qgemv
    from kbitc.targets.cuda.kernels.quantize import make_quantize

    make = {"gemv": make_qgemv, "gemm": make_qgemm, "any": make_product}[kernel]
    rng = np.random.default_rng(7)
    functions, prepared = {}, []
    for i, case in enumerate(cases):
        taps = case.image[3] ** 2 if case.image else 1
        weight = make_weight(rng, case.n, taps, case.c, case.scheme, case.values)
        spec, quant = specification(case, weight)
        functions[f"q{i}"], functions[f"p{i}"] = make_quantize(quant, f"q{i}"), make(spec, f"p{i}")
        prepared.append((case, weight, spec, quant))
    failures = []
    for order in ("forward", "backward"):
        os.environ["KBITC_EMULATOR_ORDER"] = order
        launcher = _Launcher(functions)
        for i, (case, weight, spec, quant) in enumerate(prepared):
            failures += [f"{order} {case}: {what}" for what in _check(launcher, i, case, weight, spec, quant)]
    return failures


class _Launcher:
    """Compiled functions; `__call__` gives the arguments back as they are after the call."""

    _built: dict[int, Any] = {}

    def __init__(self, functions: dict[str, Any]) -> None:
        from kbitc.targets.target import parse_target

        self.target = parse_target("cuda:sm_90").tvm
        key = id(functions)
        if key not in self._built:
            import tvm

            target = tvm.target.Target(self.target)
            named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
            with target:
                self._built.clear()
                self._built[key] = tvm.compile(tvm.IRModule(named), target=target)
        self.module = self._built[key]

    def __call__(self, name: str, *arrays: Array) -> list[Array]:
        import tvm

        tensors = [tvm.runtime.tensor(np.array(array, order="C"), device=tvm.cuda(0)) for array in arrays]
        self.module[name](*tensors)
        return [tensor.numpy() for tensor in tensors]


def _check(launcher: _Launcher, i: int, case: Product, weight: Any, spec: Any, quant: Any) -> list[str]:
    rng = np.random.default_rng(i)
    width = spec.padded_channels
    if case.image is None:
        x = make_rows(rng, case.m, case.c, case.values)
        lead: tuple[int, ...] = (case.m,)
        source = np.arange(case.m)[:, None]
        padded = x
        inside = np.ones(case.m, bool)
        out_lead = lead
    else:
        batch, h, w, k, stride, pad, dilation = case.image
        x = make_rows(rng, batch * h * w, case.c, case.values).reshape(batch, h, w, case.c)
        lead = (batch, h + 2 * pad, w + 2 * pad)
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))).reshape(-1, case.c)
        inside = np.pad(np.ones((batch, h, w), bool), ((0, 0), (pad, pad), (pad, pad))).reshape(-1)
        oh, ow = ((size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size in (h, w))
        numbers = np.arange(len(padded)).reshape(lead)
        taps = [(ky * dilation, kx * dilation) for ky in range(k) for kx in range(k)]
        down, across = stride * oh, stride * ow
        picked = [numbers[:, y : y + down : stride, z : z + across : stride].reshape(-1) for y, z in taps]
        source = np.stack(picked, axis=1)
        out_lead = (batch, oh, ow)
    codes, scales, sums = quantize(padded, quant.block, quant.sum_channels)
    scales = np.where(inside[:, None], scales, 0).astype(np.float32)
    got = launcher(
        f"q{i}", x, np.zeros((*lead, width), np.int8), np.zeros((*lead, quant.blocks), np.float32),
        np.zeros((*lead, quant.sums), np.int32),
    )  # fmt: skip
    failures = []
    wanted = (_pad_columns(codes, width), scales, sums)
    for what, mine, right in zip(("codes", "scales", "sums"), got[1:], wanted, strict=True):
        if not np.array_equal(mine.reshape(right.shape), right):
            failures.append(f"{what} differ in {np.sum(mine.reshape(right.shape) != right)} places")
    return failures + _check_product(launcher, i, case, weight, spec, (codes, scales, source, out_lead, got))


def _check_product(launcher: _Launcher, i: int, case: Product, weight: Any, spec: Any, made: Any) -> list[str]:
    codes, scales, source, out_lead, got = made
    rng = np.random.default_rng(100 + i)
    n, taps, c = weight.shape
    block, blocks, m = spec.block, spec.blocks, len(source)
    bias = np.zeros(spec.output_tiles * 16, np.float32)
    bias[:n] = rng.standard_normal(n)
    rubbish = np.full((*out_lead, taps * blocks, n), 12345, np.int32)
    result = launcher(
        f"p{i}", *got[1:], *packed_arguments(weight, spec.scale_dtype), bias,
        np.full((*out_lead, n), np.nan, np.float32), rubbish,
    )  # fmt: skip
    levels = weight.levels().astype(np.int64)
    exact = np.zeros((m, taps * blocks, n), np.int64)
    terms, moved = (np.zeros((m, taps * blocks, n)) for _ in range(2))
    weight_scales = np.broadcast_to(weight.scales, (n, taps, blocks)).astype(np.float64)
    for t in range(taps):
        for b in range(blocks):
            part = slice(b * block, min(c, (b + 1) * block))
            exact[:, t * blocks + b] = codes[source[:, t], part] @ levels[:, t, part].T
            factor = (
                scales[source[:, t], 0 if case.row_scales else b].astype(np.float64)[:, None] * weight_scales[:, t, b]
            )
            terms[:, t * blocks + b] = exact[:, t * blocks + b] * factor
            if weight.offsets is not None:
                offsets = np.broadcast_to(weight.offsets, (n, taps, blocks)).astype(np.float64)[:, t, b]
                summed = codes[source[:, t], part].sum(axis=1) * scales[source[:, t], b].astype(np.float64)
                moved[:, t * blocks + b] = summed[:, None] * offsets
    failures = []
    if not np.array_equal(result[-1].reshape(exact.shape), exact):
        failures.append(f"{np.sum(result[-1].reshape(exact.shape) != exact)} accumulators differ")
    right = (terms + moved).sum(axis=1) + bias[:n]
    # Two roundings a term and one an addition, whatever the order of the sum; two terms a block with offsets.
    count = taps * blocks * (1 if weight.offsets is None else 2)
    bound = (count + 4) * EPSILON * ((np.abs(terms) + np.abs(moved)).sum(axis=1) + np.abs(bias[:n]))
    if spec.post is not None:
        right = np.maximum(right, 0)
    error = np.abs(result[-2].reshape(m, n).astype(np.float64) - right)
    if not (error <= bound).all():
        failures.append(f"result is off by {np.nanmax(error)}, nan {np.isnan(error).sum()}")
    return failures
