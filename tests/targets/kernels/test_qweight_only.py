"""Weight-only products, grouped convolutions and embeddings against numpy in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from tvm import tirx

from kbitc.targets.cpu.rules.quantized import PackedEmbedding, WeightOnlyGroupedConv, WeightOnlyProduct
from kbitc.targets.cpu.rules.unpacked import UnpackedConv
from kbitc.targets.lower.contraction import RELU, Contraction, ConvAttributes
from kbitc.targets.target import parse_target
from tests.support import kernels
from tests.support.kernels import Case
from tests.support.products import NEON, VNNI, need

RANDOM = np.random.default_rng(11)
BIAS = RANDOM.standard_normal(40).astype(np.float32)


def _product(name: str, scheme: str, size: tuple[int, int, int], **more: Any) -> Case:
    m, n, k = size
    weight = kernels.random_weight(scheme, (n, 1, k))
    x = RANDOM.standard_normal((m, k)).astype(np.float32)
    return Case(name, WeightOnlyProduct(), kernels.matmul(name, weight, (m,), "float32", **more), x)


def _convolution(
    name: str, scheme: str, shape: tuple[int, int, int], image: tuple[int, int, int], geometry: ConvAttributes
) -> Case:
    weight = kernels.random_weight(scheme, shape)
    contraction = kernels.convolution(name, weight, image, geometry, "float32")
    x = RANDOM.standard_normal(contraction.x_shape).astype(np.float32)
    grouped = geometry.group not in (1, shape[0])
    return Case(name, WeightOnlyGroupedConv() if grouped else UnpackedConv(), contraction, x)


def _embedding(name: str, scheme: str, rows: int, channels: int, dtype: Any = np.int64) -> Case:
    weight = kernels.random_weight(scheme, (rows, 1, channels))
    indices = RANDOM.integers(-rows, rows, (2, 5)).astype(dtype)
    contraction = Contraction(
        name,
        "embedding",
        weight,
        "float32",
        (2, 5),
        (2, 5, channels),
        index_dtype=np.dtype(dtype).name,  # type: ignore[arg-type]
    )
    return Case(name, PackedEmbedding(), contraction, indices)


SAME = ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1))
PRODUCTS = (
    _product("vector", "int4:b32", (1, 40, 100), bias=BIAS, post=RELU),
    _product("table", "nf4:b16", (7, 33, 71)),
    _product("zero", "uint3:b48:zp", (5, 17, 101)),
    *(_product(f"offset{k}", f"uint{k}:b32:min", (1 + k % 4, 17, 101)) for k in range(1, 9)),
    _product("offset_odd", "uint3:b48:min:f32", (5, 17, 101), bias=BIAS[:17]),
    _convolution("offset_conv", "uint4:b32:min", (24, 9, 40), (2, 7, 9), ConvAttributes((3, 3), (2, 1), (1, 1, 1, 1))),
    _convolution("offset_stem", "uint3:c:min", (24, 9, 3), (2, 7, 9), ConvAttributes((3, 3), (2, 2), (1, 1, 1, 1))),
    _convolution("offset_depth", "uint4:b32:min", (32, 9, 1), (2, 6, 7), ConvAttributes(**{**vars(SAME), "group": 32})),
    _convolution(
        "offset_group", "uint5:b32:min", (12, 4, 6), (1, 5, 6), ConvAttributes((2, 2), (1, 1), (0, 1, 1, 0), group=3)
    ),
    _product("channel", "int8:c", (6, 16, 33)),
    _product("bit", "int1:b32:f32", (2, 8, 8)),
    _convolution("conv", "int4:b32", (24, 9, 40), (2, 7, 9), ConvAttributes((3, 3), (2, 1), (1, 1, 1, 1))),
    _convolution("depthwise", "int4:b32", (32, 9, 1), (2, 6, 7), ConvAttributes(**{**vars(SAME), "group": 32})),
    _convolution("ragged", "nf3:c", (20, 25, 1), (1, 7, 6), ConvAttributes((5, 5), (2, 2), (2, 2, 2, 2), group=20)),
    _convolution("stem", "uint3:c", (24, 9, 3), (2, 7, 9), ConvAttributes((3, 3), (2, 2), (1, 1, 1, 1))),
    _convolution("wide", "int2:t", (17, 3, 50), (1, 1, 9), ConvAttributes((1, 3), (1, 1), (0, 1, 0, 1))),
    _convolution("grouped", "uint5:b32", (12, 4, 6), (1, 5, 6), ConvAttributes((2, 2), (1, 1), (0, 1, 1, 0), group=3)),
    _convolution("multiplier", "int6:b32", (18, 9, 1), (1, 4, 4), ConvAttributes((3, 3), dilations=(1, 1), group=6)),
)
EMBEDDINGS = (
    *(_embedding(f"int{k}", f"int{k}:b32", 19, 69) for k in range(1, 9)),
    _embedding("look_up", "nf4:b16", 33, 71, np.int32),
    _embedding("zero_row", "uint3:b48:zp", 17, 101),
    _embedding("row", "int8:c", 16, 33),
    *(_embedding(f"row_offset{k}", f"uint{k}:b16:min", 19, 69) for k in range(1, 9)),
    _embedding("row_offset_f32", "uint3:b48:min:f32", 17, 101),
    _embedding("row_offset_channel", "uint8:c:min", 16, 33),
)

_EVERY = {case.name: case for case in (*PRODUCTS, *EMBEDDINGS)}
NEON_PRODUCTS = tuple(_EVERY[name] for name in ("table", "conv", "ragged", "offset3", "offset_odd", "offset_group"))
NEON_EMBEDDINGS = tuple(_EVERY[name] for name in ("look_up", "zero_row", "row_offset_f32", "row_offset_channel"))


@cache
def results(target_name: str, which: str) -> dict[str, Any]:
    """Outputs of a group of cases on a target."""
    cases = {"products": PRODUCTS, "embeddings": EMBEDDINGS, "neon": (*NEON_PRODUCTS, *NEON_EMBEDDINGS)}[which]
    return kernels.compile_cases(cases, parse_target(target_name)).run()


def check_product(case: Case, out: np.ndarray[Any, Any]) -> None:
    """Within the rounding of a float32 sum of that many products, plus the weight's own rounding."""
    contraction = case.contraction
    geometry = contraction.conv or ConvAttributes((1, 1))
    x = case.x if contraction.conv else case.x[:, None, None]
    rows = kernels.gather_rows(x, geometry).astype(np.float64)
    weight = contraction.weight.dequantize().astype(np.float64)
    n, taps, channels = weight.shape
    rows = rows.reshape(rows.shape[0], taps, geometry.group, channels)
    grouped = weight.reshape(geometry.group, -1, taps, channels)
    wanted = np.einsum("mtgc,gntc->mgn", rows, grouped).reshape(-1, n)
    magnitude = np.einsum("mtgc,gntc->mgn", np.abs(rows), np.abs(grouped)).reshape(-1, n)
    if contraction.bias is not None:
        wanted, magnitude = wanted + contraction.bias, magnitude + np.abs(contraction.bias)
    if contraction.post is RELU:
        wanted = np.maximum(wanted, 0)
    bound = (taps * channels + 2) * 2.0**-23 * magnitude
    assert (np.abs(out.reshape(wanted.shape) - wanted) <= bound).all()


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
def test_product_is_numpys(case: Case) -> None:
    need(VNNI)
    check_product(case, results(VNNI, "products")[case.name])


@pytest.mark.parametrize("case", EMBEDDINGS, ids=lambda case: case.name)
def test_embedding_is_the_dequantized_row(case: Case) -> None:
    need(VNNI)
    wanted = case.contraction.weight.dequantize()[case.x, 0]
    np.testing.assert_array_equal(results(VNNI, "embeddings")[case.name], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("case", NEON_PRODUCTS, ids=lambda case: case.name)
def test_product_is_numpys_on_neon(case: Case) -> None:
    need(NEON)
    check_product(case, results(NEON, "neon")[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", NEON_EMBEDDINGS, ids=lambda case: case.name)
def test_embedding_is_the_dequantized_row_on_neon(case: Case) -> None:
    need(NEON)
    wanted = case.contraction.weight.dequantize()[case.x, 0]
    np.testing.assert_array_equal(results(NEON, "neon")[case.name], wanted)


@pytest.mark.parametrize("rows", [1, 3, 6, 8])
def test_symbolic_rows(rows: int) -> None:
    need(VNNI)
    x = RANDOM.standard_normal((rows, 45)).astype(np.float32)
    weight = kernels.random_weight("int4:b32", (20, 1, 45))
    out = _symbolic().run([x])["symbolic"]
    check_product(Case("symbolic", None, kernels.matmul("symbolic", weight, (rows,), "float32"), x), out)


@cache
def _symbolic() -> kernels.Compiled:
    weight = kernels.random_weight("int4:b32", (20, 1, 45))
    contraction = kernels.matmul("symbolic", weight, (tirx.Var("rows", "int64"),), "float32")
    case = Case("symbolic", WeightOnlyProduct(), contraction, np.zeros((1, 45), np.float32))
    return kernels.compile_cases([case], parse_target(VNNI))


def test_many_weights_a_channel_are_declined() -> None:
    weight = kernels.random_weight("int4:b32", (8, 9, 32))
    grouped = kernels.convolution("g", weight, (1, 5, 5), ConvAttributes((3, 3), group=2), "float32")
    assert "more weights" in str(WeightOnlyGroupedConv().match(grouped, parse_target(VNNI)))


def test_int8_activations_are_declined() -> None:
    weight = kernels.random_weight("int4:b32", (8, 1, 32))
    assert "int8" in str(WeightOnlyProduct().match(kernels.matmul("m", weight, (1,)), parse_target(VNNI)))
