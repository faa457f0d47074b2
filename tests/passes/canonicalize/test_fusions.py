"""Decomposed operators are recognised, and look-alikes are left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from kbitc.passes.base import GraphPass
from kbitc.passes.canonicalize.fuse_gelu import FuseGelu
from kbitc.passes.canonicalize.fuse_hard_swish import FuseHardSwish
from kbitc.passes.canonicalize.fuse_layer_norm import FuseLayerNorm
from kbitc.passes.canonicalize.fuse_moments import FuseMoments
from kbitc.passes.canonicalize.fuse_softmax import FuseSoftmax
from kbitc.passes.canonicalize.pow_to_mul import PowToMul
from tests.support.onnx_text import apply, model, noise, operators

F = np.float32
NUMBERS = {
    "half": F(0.5),
    "one": F(1),
    "two": F(2),
    "three": F(3),
    "six": F(6),
    "zero": F(0),
    "sixth": F(1 / 6),
    "root2": F(2**0.5),
    "iroot2": F(0.5**0.5),
    "rootpi": F((2 / np.pi) ** 0.5),
    "cubic": F(0.044715),
    "eps": F(1e-5),
    "last": np.array([-1], np.int64),
    "mid": np.array([1], np.int64),
    "gamma": noise(8),
    "beta": noise(8, seed=1),
    "other": noise(2, 4, 8, seed=2),
    "half_exp": F(0.5),
    "minus": F(-1),
    "square": np.int64(2),
    "minus_half": F(-0.5),
    "third": F(1 / 3),
    "eighth": F(1 / 8),
    "quarter": F(1 / 4),
    "column": noise(4, 1, seed=3),
}

NORMAL = """
    m = ReduceMean(x, last) \n d = Sub(x, m) \n s = Mul(d, d) \n v = ReduceMean(s, last)
    e = Add(v, eps) \n r = Sqrt(e)
"""
ERF = "a = Div(x, root2) \n b = Erf(a) \n c = Add(b, one)"
TANH = """
    c2 = Mul(x, x) \n c3 = Mul(c2, x)
    c4 = Mul(c3, cubic) \n c5 = Add(x, c4) \n c6 = Mul(c5, rootpi) \n t = Tanh(c6) \n c = Add(t, one)
"""
CUBE = "c2 = Mul(x, x) \n c3 = Mul(c2, x)"
CLIP = "a = Add(x, three) \n c = Clip(a, zero, six)"
EXP = "m = ReduceMax(x, last) \n d = Sub(x, m) \n e = Exp(d) \n s = ReduceSum(e, last)"

MOMENTS = """
    t = ReduceSum<keepdims = 0>(x, last) \n m = Mul(t, eighth) \n s = Mul(x, x)
    u = ReduceSum<keepdims = 0>(s, last) \n q = Mul(u, eighth) \n mm = Mul(m, m) \n v = Sub(q, mm)
    w = Max(zero, v) \n k = Unsqueeze(w, last) \n e = Add(k, eps) \n r = Sqrt(e) \n i = Reciprocal(r)
    n = Unsqueeze(m, last) \n d = Sub(x, n)
"""
MOMENTS_OF_ROWS = MOMENTS.replace("last", "mid").replace("eighth", "quarter")

FUSED: dict[str, tuple[GraphPass, str, dict[str, int]]] = {
    "layer norm": (
        FuseLayerNorm(),
        f"{NORMAL} \n n = Div(d, r) \n g = Mul(n, gamma) \n y = Add(g, beta)",
        {"LayerNormalization": 1},
    ),
    "layer norm reciprocal": (
        FuseLayerNorm(),
        f"{NORMAL} \n i = Reciprocal(r) \n n = Mul(i, d) \n g = Mul(gamma, n) \n y = Add(beta, g)",
        {"LayerNormalization": 1},
    ),
    "layer norm alone": (FuseLayerNorm(), f"{NORMAL} \n y = Div(d, r)", {"LayerNormalization": 1}),
    "layer norm pow": (
        FuseLayerNorm(),
        NORMAL.replace("Mul(d, d)", "Pow(d, two)") + " \n n = Div(d, r) \n y = Mul(n, gamma)",
        {"LayerNormalization": 1},
    ),
    "moments": (
        FuseMoments(),
        f"{MOMENTS} \n g = Mul(i, gamma) \n f = Mul(d, g) \n y = Add(f, beta)",
        {"LayerNormalization": 1},
    ),
    "moments of rows": (
        FuseMoments(),
        f"{MOMENTS_OF_ROWS} \n g = Mul(i, column) \n f = Mul(g, d) \n y = Add(f, column)",
        {"LayerNormalization": 1, "Transpose": 2},
    ),
    "moments alone": (
        FuseMoments(),
        f"{MOMENTS.replace('w = Max(zero, v)', '').replace('(w,', '(v,')} \n y = Mul(d, i)",
        {"LayerNormalization": 1},
    ),
    "gelu x(1+e)/2": (FuseGelu(), f"{ERF} \n f = Mul(x, c) \n y = Mul(f, half)", {"Gelu": 1}),
    "gelu (x/2)(1+e)": (FuseGelu(), f"{ERF} \n f = Mul(half, x) \n y = Mul(f, c)", {"Gelu": 1}),
    "gelu x((1+e)/2)": (FuseGelu(), f"{ERF} \n f = Mul(c, half) \n y = Mul(x, f)", {"Gelu": 1}),
    "gelu mul": (
        FuseGelu(),
        ERF.replace("Div(x, root2)", "Mul(iroot2, x)") + " \n f = Mul(x, c) \n y = Div(f, two)",
        {"Gelu": 1},
    ),
    "gelu tanh": (FuseGelu(), f"{TANH} \n f = Mul(c, half) \n y = Mul(x, f)", {"Gelu": 1}),
    "gelu tanh pow": (
        FuseGelu(),
        TANH.replace(CUBE, "c3 = Pow(x, three)") + " \n f = Mul(x, half) \n y = Mul(f, c)",
        {"Gelu": 1},
    ),
    "hard swish paddle": (FuseHardSwish(), f"{CLIP} \n f = Mul(x, c) \n y = Div(f, six)", {"HardSwish": 1}),
    "hard swish torch": (FuseHardSwish(), f"{CLIP} \n f = Div(c, six) \n y = Mul(x, f)", {"HardSwish": 1}),
    "hard swish mul": (FuseHardSwish(), f"{CLIP} \n f = Mul(c, x) \n y = Mul(f, sixth)", {"HardSwish": 1}),
    "hard swish of hard sigmoid": (
        FuseHardSwish(),
        "h = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) \n y = Mul(h, x)",
        {"HardSwish": 1},
    ),
    "hard sigmoid": (FuseHardSwish(), f"{CLIP} \n y = Div(c, six)", {"HardSigmoid": 1}),
    "softmax with dropped axes": (
        FuseSoftmax(),
        "m0 = ReduceMax<keepdims = 0>(x, last) \n m = Unsqueeze(m0, last) \n d = Sub(x, m) \n e = Exp(d)"
        " \n s0 = ReduceSum<keepdims = 0>(e, last) \n s = Unsqueeze(s0, last) \n y = Div(e, s)",
        {"Softmax": 1},
    ),
    "softmax": (FuseSoftmax(), f"{EXP} \n y = Div(e, s)", {"Softmax": 1}),
    "pow 2": (PowToMul(), "y = Pow(x, two)", {"Mul": 1}),
    "pow integer 2": (PowToMul(), "y = Pow(x, square)", {"Mul": 1}),
    "pow 3": (PowToMul(), "y = Pow(x, three)", {"Mul": 2}),
    "pow 1/2": (PowToMul(), "a = Abs(x) \n y = Pow(a, half)", {"Abs": 1, "Sqrt": 1}),
    "pow -1": (PowToMul(), "a = Exp(x) \n y = Pow(a, minus)", {"Exp": 1, "Reciprocal": 1}),
    "pow -1/2": (PowToMul(), "a = Exp(x) \n y = Pow(a, minus_half)", {"Exp": 1, "Reciprocal": 1, "Sqrt": 1}),
}

KEPT: dict[str, tuple[GraphPass, str]] = {
    "mean over another axis": (
        FuseLayerNorm(),
        NORMAL.replace("ReduceMean(x, last)", "ReduceMean(x, mid)") + " \n y = Div(d, r)",
    ),
    "both over a middle axis": (FuseLayerNorm(), NORMAL.replace("last", "mid") + " \n y = Div(d, r)"),
    "variance of something else": (
        FuseLayerNorm(),
        NORMAL.replace("Mul(d, d)", "Mul(other, other)") + " \n y = Div(d, r)",
    ),
    "divides something else": (FuseLayerNorm(), f"{NORMAL} \n y = Div(x, r)"),
    "a mean square of something else": (
        FuseMoments(),
        MOMENTS.replace("Mul(x, x)", "Mul(other, other)") + " \n y = Mul(d, i)",
    ),
    "a mean of another count": (
        FuseMoments(),
        MOMENTS.replace("Mul(u, eighth)", "Mul(u, quarter)") + " \n y = Mul(d, i)",
    ),
    "erf of another scale": (FuseGelu(), ERF.replace("root2", "two") + " \n f = Mul(x, c) \n y = Mul(f, half)"),
    "erf plus two": (FuseGelu(), ERF.replace("one", "two") + " \n f = Mul(x, c) \n y = Mul(f, half)"),
    "erf times another value": (FuseGelu(), f"{ERF} \n f = Mul(other, c) \n y = Mul(f, half)"),
    "erf without the half": (FuseGelu(), f"{ERF} \n y = Mul(x, c)"),
    "tanh of another cubic": (FuseGelu(), TANH.replace("cubic", "half") + " \n f = Mul(c, half) \n y = Mul(x, f)"),
    "clip to 3": (FuseHardSwish(), "a = Add(x, three) \n c = Clip(a, zero, three) \n f = Mul(x, c) \n y = Div(f, six)"),
    "shift of 2": (FuseHardSwish(), "a = Add(x, two) \n c = Clip(a, zero, six) \n f = Mul(x, c) \n y = Div(f, six)"),
    "hard sigmoid of another slope": (FuseHardSwish(), "h = HardSigmoid<alpha = 0.2, beta = 0.5>(x) \n y = Mul(h, x)"),
    "hard sigmoid times another value": (
        FuseHardSwish(),
        "h = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) \n y = Mul(h, other)",
    ),
    "sums over different axes": (
        FuseSoftmax(),
        EXP.replace("ReduceSum(e, last)", "ReduceSum(e, mid)") + " \n y = Div(e, s)",
    ),
    "sum of something else": (
        FuseSoftmax(),
        EXP.replace("ReduceSum(e, last)", "ReduceSum(x, last)") + " \n y = Div(e, s)",
    ),
    "pow 1/3": (PowToMul(), "a = Abs(x) \n y = Pow(a, third)"),
    "pow by a vector": (PowToMul(), "a = Abs(x) \n y = Pow(a, gamma)"),
}


def build(nodes: str, outputs: str = "float[] y") -> ir.Model:
    used = {
        name: array
        for name, array in NUMBERS.items()
        if f" {name})" in nodes or f"({name}," in nodes or f" {name}," in nodes
    }
    return model(f"g (float[2, 4, 8] x) => ({outputs}) {{ {nodes} }}", used)


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    graph_pass, nodes, wanted = FUSED[name]
    subject = build(nodes)
    assert apply(graph_pass, subject, terms=64)
    assert operators(subject) == wanted


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    graph_pass, nodes = KEPT[name]
    assert not apply(graph_pass, build(nodes))


@pytest.mark.parametrize(
    ("graph_pass", "nodes", "middle"),
    [
        (FuseGelu(), f"{ERF} \n f = Mul(x, c) \n y = Mul(f, half)", "c"),
        (FuseHardSwish(), f"{CLIP} \n f = Mul(x, c) \n y = Div(f, six)", "f"),
        (FuseSoftmax(), f"{EXP} \n y = Div(e, s)", "e"),
    ],
)
def test_a_middle_that_is_an_output_keeps_the_graph(graph_pass: GraphPass, nodes: str, middle: str) -> None:
    subject = build(nodes, f"float[] y, float[] {middle}")
    assert not apply(graph_pass, subject)
