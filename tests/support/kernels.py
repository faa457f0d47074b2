"""Builds contractions through their kernel rules into a module, runs it, and says what it must compute."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from kbitc.bundle.manifest import ValueInfo
from kbitc.quant.format import Format
from kbitc.quant.scheme import QuantScheme, ScaleCode
from kbitc.quant.tensor import QTensor, blocks_of, scale_shape
from kbitc.targets import machine
from kbitc.targets.link import export_library
from kbitc.targets.lower.contraction import Contraction, ConvAttributes
from kbitc.targets.runner.execute import run_library
from kbitc.targets.target import Target

Array = npt.NDArray[Any]


@dataclass
class BenchContext:
    """An `EmitContext` for one contraction."""

    target: Target
    builder: relax.BlockBuilder
    memo: dict[object, Any] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    parameters: list[Any] = field(default_factory=list)
    debug: dict[str, Any] = field(default_factory=dict)

    def weight(self, name: str, array: Array) -> Any:
        self.arrays[name] = array
        self.parameters.append(relax.Var(f"w{len(self.arrays)}", relax.TensorType(array.shape, str(array.dtype))))
        return self.parameters[-1]

    def call(self, prim_func: Any, name_hint: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        function = self.builder.add_func(prim_func.without_attr("global_symbol"), name_hint)
        types = [relax.TensorType(tuple(shape), dtype) for shape, dtype in outputs]
        made = self.builder.emit(relax.op.call_tir(function, list(inputs), types if len(types) > 1 else types[0]))
        if len(types) == 1:
            return made
        return [self.builder.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]

    def debug_output(self, name: str, value: Any) -> None:
        self.debug[name] = value


@dataclass(frozen=True, eq=False)
class Case:
    """A contraction with its rule and one input; `name` is unique among the cases of a module."""

    name: str
    rule: Any
    contraction: Contraction
    x: Array


def emit_cases(cases: Sequence[Case], target: Target) -> tuple[Any, dict[str, Array], list[str]]:
    """One relax module for all cases: (module, weights in order, names of the outputs).

    Outputs are named "<case>" and "<case>.accumulators", "<case>.codes" where asked for. Every rule must take its case.
    """
    builder = relax.BlockBuilder()
    ctx = BenchContext(target, builder)
    inputs, outputs = [], {}
    for case in cases:
        reason = case.rule.match(case.contraction, target)
        if reason is not None:
            raise ValueError(f"{case.name}: {reason}")
        kind = relax.TensorType(tuple(case.contraction.x_shape), str(case.x.dtype))
        inputs.append(relax.Var("x_" + case.name, kind))
    with builder.function("main"):
        with builder.dataflow():
            for case, x in zip(cases, inputs, strict=True):
                outputs[case.name] = case.rule.emit(ctx, case.contraction, [x])
            outputs |= ctx.debug
            result = builder.emit_output(relax.Tuple(list(outputs.values())))
        builder.emit_func_output(result, params=[*inputs, *ctx.parameters])
    return builder.get(), ctx.arrays, list(outputs)


@dataclass
class Compiled:
    """Built cases: `executable`, the weights in order, the names of the outputs."""

    target: Target
    executable: Any
    cases: Sequence[Case]
    weights: dict[str, Array]
    names: list[str]

    def run(self, inputs: Sequence[Array] | None = None) -> dict[str, Array]:
        """Outputs by name, on this machine or under qemu; other inputs than the cases' own may be given."""
        inputs = [case.x for case in self.cases] if inputs is None else inputs
        if self.target.machine == machine.architecture():
            vm = relax.VirtualMachine(self.executable, tvm.cpu())
            arguments = [tvm.runtime.tensor(a) for a in (*inputs, *self.weights.values())]
            return {name: value.numpy() for name, value in zip(self.names, vm["main"](*arguments), strict=True)}
        return self._run_emulated(inputs)

    def _run_emulated(self, inputs: Sequence[Array]) -> dict[str, Array]:
        feeds = {f"x{i}": x for i, x in enumerate(inputs)}
        described = [ValueInfo(name, str(x.dtype), x.shape) for name, x in feeds.items()]
        results = []
        for name in self.names:
            case = next(c for c in self.cases if name == c.name or name.startswith(c.name + "."))
            results.append(_output(name, case))
        library = export_library(self.executable, self.target)
        outcome = run_library(
            self.target, library, self.weights, described, results, feeds, cpu=QEMU_CPUS[self.target.name]
        )
        return outcome.outputs

    def assembly(self) -> str:
        """The text of the machine code."""
        return "\n".join(m.inspect_source("asm") for m in _modules(self.executable.mod) if m.kind == "llvm")


# The oldest processor of each variant, so that an instruction beyond it is caught.
QEMU_CPUS = {"arm-neon:dotprod": "cortex-a76", "arm-neon:dotprod,i8mm": "max"}


def _output(name: str, case: Case) -> ValueInfo:
    """What kbitc-run needs to know of an output; unknown dimensions are symbolic."""
    out = case.contraction.out_shape
    if name == case.name:
        return ValueInfo(name, case.contraction.out_dtype, tuple(int(d) for d in out))
    if name.endswith(".accumulators") and case.contraction.activation == "uint8":
        return ValueInfo(name, "int32", tuple(int(d) for d in out))
    if name.endswith(".accumulators"):
        return ValueInfo(name, "int32", (*(int(d) for d in out[:-1]), "blocks" + case.name, int(out[-1])))
    return ValueInfo(name, "int8", tuple(f"{case.name}{i}" for i in range(len(out))))


def _modules(module: Any) -> list[Any]:
    return [module, *(inner for other in module.imports for inner in _modules(other))]


def compile_cases(cases: Sequence[Case], target: Target) -> Compiled:
    """Emit and build all cases as one module."""
    module, weights, names = emit_cases(cases, target)
    return Compiled(target, relax.build(module, tvm.target.Target(target.tvm)), cases, weights, names)


def hot_blocks(assembly: str, instruction: str) -> list[str]:
    """The basic blocks of the assembly that use an instruction more than once."""
    blocks = re.split(r"\n(?=\.?[A-Za-z_][\w.$]*:)", assembly)
    return [block for block in blocks if len(re.findall(rf"\b{instruction}\b", block)) > 1]


def random_weight(scheme: str, shape: tuple[int, int, int], seed: int = 0) -> QTensor:
    """A weight [N, T, C] of random codes, scales in [0.5, 1.5), and zero points or offsets in [-4, 4).

    Integer block scales are any from 1 to the largest, of steps that are powers of two, with the largest in each row.
    """
    parsed = QuantScheme.parse(scheme)
    data_type = parsed.data_type()
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**data_type.bits, shape).astype(np.uint8)
    scales = (random.random(scale_shape(shape, parsed)) + 0.5).astype(np.float16).astype(np.float32)
    zeros = random.integers(0, 2**data_type.bits, scales.shape).astype(np.uint8) if parsed.zero_point else None
    offsets = None
    if parsed.offset:
        offsets = (random.random(scales.shape) * 8 - 4).astype(np.float16).astype(np.float32)
    if parsed.scale_code is not ScaleCode.INTEGER:
        return QTensor(codes, scales, zeros, data_type, parsed, offsets=offsets)
    factors = random.integers(1, parsed.largest_scale_code + 1, scales.shape)
    factors[:, :, 0] = parsed.largest_scale_code
    steps = (2.0 ** random.integers(-6, -3, shape[0])).astype(np.float32)
    scales = (factors * steps[:, None, None]).astype(np.float32)
    return QTensor(codes, scales, zeros, data_type, parsed, steps)


def activation_block(weight: QTensor) -> int:
    """Channels of one activation scale as `Contraction` has it: 0, the whole row, beside integer block scales."""
    return 0 if weight.scheme.scale_code is ScaleCode.INTEGER else weight.scheme.block


def learned_weight(bits: int, shape: tuple[int, int, int], seed: int = 0) -> QTensor:
    """A weight with blocks of 32 and any ascending int8 levels, some of them equal, as k-means finds them."""
    base = random_weight(f"int{bits}:b32", shape, seed)
    levels = np.sort(np.random.default_rng(seed).integers(-128, 128, 2**bits))
    levels[0], levels[1], levels[-1] = -128, -128 if bits > 1 else 127, 127
    made = Format("learned", bits, tuple(int(level) for level in levels), uniform=False)
    return replace(base, format=made)


def matmul(name: str, weight: QTensor, lead: tuple[Any, ...], activation: str = "int8", **more: Any) -> Contraction:
    """x [*lead, C] by the weight."""
    n, _, c = weight.shape
    return Contraction(
        name,
        "matmul",
        weight,
        activation,
        (*lead, c),
        (*lead, n),
        activation_block=activation_block(weight),
        **more,  # type: ignore[arg-type]
    )


def convolution(
    name: str,
    weight: QTensor,
    image: tuple[Any, Any, Any],
    geometry: ConvAttributes,
    activation: str = "int8",
    **more: Any,
) -> Contraction:
    """x [B, H, W, C * group] by the weight."""
    n, _, c = weight.shape
    batch, height, width = image
    top, left, bottom, right = geometry.pads
    out = [
        (size + before + after - step * (kernel - 1) - 1) // stride + 1
        for size, before, after, kernel, step, stride in zip(
            (height, width), (top, left), (bottom, right), geometry.kernel, geometry.dilations, geometry.strides,
            strict=True,
        )
    ]  # fmt: skip
    return Contraction(
        name, "conv", weight, activation, (batch, height, width, c * geometry.group),  # type: ignore[arg-type]
        (batch, *out, n), activation_block=activation_block(weight), conv=geometry, **more,
    )  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """Codes [M, T, CB, block], exact accumulators int64 [M, T * CB, N], out f32 [M, N]."""

    codes: Array
    accumulators: Array
    out: Array


def quantized_blocks(x: Array, weight: QTensor) -> tuple[Array, Array]:
    """Codes [M, CB, block] in the blocks of the weight and scales [M, CB], all of a row alike beside integer ones."""
    rows, channels = x.shape
    block = min(weight.block, channels)
    if activation_block(weight) or weight.scheme.block == 0:
        codes, scales, _ = quantized_rows(x, block)
        return codes, scales
    whole, scales, _ = quantized_rows(x, channels)
    blocks = -(-channels // block)
    codes = np.zeros((rows, blocks * block), np.int8)
    codes[:, :channels] = whole[:, 0]
    return codes.reshape(rows, blocks, block), np.repeat(scales, blocks, axis=1)


def quantized_rows(x: Array, block: int) -> tuple[Array, Array, Array]:
    """kbitc::DynamicQuantize in numpy: x f32 [M, C] -> codes int8 [M, CB, block], scales f32 and sums [M, CB]."""
    rows, channels = x.shape
    blocks = -(-channels // block)
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :channels] = x
    padded = padded.reshape(rows, blocks, block)
    amax = np.maximum(np.abs(padded).max(axis=2), np.float32(1e-30))
    inverse = np.float32(127) / amax
    codes = np.clip(np.rint(padded * inverse[..., None]), -127, 127).astype(np.int8)
    return codes, amax / np.float32(127), codes.astype(np.int32).sum(axis=2)


def levels_by_block(weight: QTensor, block: int) -> Array:
    """grid[code] - grid[zero point], int64 [N, T, CB, block], zero in the padding."""
    n, taps, channels = weight.shape
    blocks = -(-channels // block)
    padded = np.zeros((n, taps, blocks * block), np.int64)
    padded[:, :, :channels] = weight.levels()
    return padded.reshape(n, taps, blocks, block)


def by_block(array: Array, weight: QTensor) -> Array:
    """Scales or offsets spread to f32 [N, T, CB]."""
    n, taps, channels = weight.shape
    return np.broadcast_to(array, (n, taps, blocks_of(channels, weight.scheme))).astype(np.float32)


def expected(x: Array, weight: QTensor, bias: Array | None = None) -> Expected:
    """What the integer product of gathered rows x f32 [M, T, C] must be, with floats in the kernel's order."""
    rows, taps, channels = x.shape
    block = min(weight.block, channels)
    codes, scales = quantized_blocks(x.reshape(rows * taps, channels), weight)
    codes, scales = codes.reshape(rows, taps, -1, block), scales.reshape(rows, taps, -1)
    exact = np.einsum("mtbc,ntbc->mtbn", codes.astype(np.int64), levels_by_block(weight, block))
    out = np.zeros((rows, weight.shape[0]), np.float32)
    by = by_block(weight.scales, weight)
    offsets = None if weight.offsets is None else by_block(weight.offsets, weight)
    summed = codes.sum(axis=3, dtype=np.int32).astype(np.float32) * scales
    if weight.scheme.scale_code is ScaleCode.INTEGER and weight.scale_steps is not None:
        totals = np.einsum("mtbn,ntb->mtn", exact, weight.scale_codes().astype(np.int64))
        for t in range(taps):
            out = out + totals[:, t].astype(np.float32) * (scales[:, t, :1] * weight.scale_steps)
        scales = scales[:, :, :0]
    for t in range(taps):
        for b in range(scales.shape[2]):
            out = out + exact[:, t, b].astype(np.float32) * (scales[:, t, b, None] * by[:, t, b])
            if offsets is not None:
                out = out + summed[:, t, b, None] * offsets[:, t, b]
    if bias is not None:
        out = out + bias
    return Expected(codes, exact.reshape(rows, -1, weight.shape[0]), out)


def gather_rows(x: Array, geometry: ConvAttributes) -> Array:
    """The pixels under every tap: x [B, H, W, C] -> [B * OH * OW, T, C], zero outside the image."""
    top, left, bottom, right = geometry.pads
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    (kh, kw), (sy, sx), (dy, dx) = geometry.kernel, geometry.strides, geometry.dilations
    out_h = (padded.shape[1] - dy * (kh - 1) - 1) // sy + 1
    out_w = (padded.shape[2] - dx * (kw - 1) - 1) // sx + 1
    taps = [
        padded[:, i * dy : i * dy + (out_h - 1) * sy + 1 : sy, j * dx : j * dx + (out_w - 1) * sx + 1 : sx]
        for i in range(kh)
        for j in range(kw)
    ]
    return np.stack(taps, axis=3).reshape(-1, kh * kw, x.shape[3])


def float_bound(x: Array, weight: QTensor) -> Array:
    """Bound of the float32 rounding of a sum of blocks, f32 [M, N]: terms * 2^-23 * the sum of magnitudes.

    Each term carries two roundings (the product of scales, the product) and each addition one; a fused
    multiply-add only removes roundings, so that any contraction stays inside. With offsets a block has two terms.
    """
    rows, taps, channels = x.shape
    block = min(weight.block, channels)
    codes, scales = quantized_blocks(x.reshape(rows * taps, channels), weight)
    codes, scales = codes.reshape(rows, taps, -1, block), scales.reshape(rows, taps, -1)
    exact = np.abs(np.einsum("mtbc,ntbc->mtbn", codes.astype(np.int64), levels_by_block(weight, block)))
    magnitude = np.einsum("mtbn,mtb,ntb->mn", exact, scales.astype(np.float64), by_block(weight.scales, weight))
    terms = taps * scales.shape[2] + 3
    if weight.offsets is not None:
        summed = np.abs(codes.sum(axis=3, dtype=np.int64) * scales.astype(np.float64))
        magnitude += np.einsum("mtb,ntb->mn", summed, np.abs(by_block(weight.offsets, weight)))
        terms += taps * scales.shape[2]
    return terms * 2.0**-23 * magnitude
