"""Ranges chosen by what they do to the outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from kbitc import driver, options
from kbitc.importer.feeds import open_batches
from kbitc.options import Method
from kbitc.passes.allocate import measured
from kbitc.passes.allocate.activations import plan_activations
from kbitc.passes.allocate.measured import alive_behind, least_noise, windows
from kbitc.passes.calibrate.moments import fixed_sample
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.solve import solve_weights
from kbitc.quant.static import codes_for
from kbitc.targets.target import parse_target
from tests.support.onnx_text import model

Array = npt.NDArray[Any]
GRAPH = "agraph (float[64, 4] x) => (float[64, 2] y) { h = Relu(x)  y = MatMul(h, w) }"
NARROW, WIDE = codes_for(0.0, 4.0, 8), codes_for(0.0, 100.0, 8)


def outlier(read: float) -> tuple[dict[str, Array], dict[str, Array]]:
    """Weights and samples: channel 3 is 100 in one row, and read with this weight."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 4, (64, 4)).astype(np.float32)
    x[5, 3] = 100
    w = rng.normal(size=(4, 2)).astype(np.float32)
    w[3] = read
    return {"w": w}, {"x": x}


@pytest.mark.parametrize(("read", "best"), [(0.0, 0), (1.0, 1)])
def test_an_outlier_is_clipped_only_where_the_outputs_do_not_need_it(read: float, best: int) -> None:
    weights, feeds = outlier(read)
    found = least_noise(model(GRAPH, weights), {"h": [NARROW, WIDE]}, [feeds])
    assert found == {"h": best}
    assert least_noise(model(GRAPH, weights), {"h": [WIDE, NARROW]}, [feeds]) == {"h": 1 - best}


def test_outputs_and_values_with_one_range_keep_it() -> None:
    weights, feeds = outlier(1.0)
    offers = {"y": [NARROW, WIDE], "h": [NARROW], "missing": [NARROW, WIDE]}
    assert least_noise(model(GRAPH, weights), offers, [feeds]) == dict.fromkeys(offers, 0)


DEPTH = 12


def deep() -> tuple[ir.Model, dict[str, Array]]:
    """Layers of one size one behind the other, around which their inputs are added; and a sample."""
    rng = np.random.default_rng(0)
    steps = [f"h{i} = Relu(x{i})  p{i} = MatMul(h{i}, w{i})  x{i + 1} = Add(p{i}, x{i})" for i in range(DEPTH)]
    text = f"agraph (float[64, 8] x0) => (float[64, 8] y) {{ {'  '.join(steps)}  y = Neg(x{DEPTH}) }}"
    weights = {f"w{i}": rng.normal(0, 0.2, (8, 8)).astype(np.float32) for i in range(DEPTH)}
    made = model(text, weights)
    for node in made.graph:
        node.name = f"make {node.outputs[0].name}"
    return made, {"x0": rng.uniform(0, 4, (64, 8)).astype(np.float32)}


def ran(made: ir.Model, limit: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, int], list[str]]:
    """Nodes run while the ranges of every h are measured, what was chosen, and what progress heard."""
    nodes, heard = 0, []
    plain = measured.Session

    class Counting(plain):  # type: ignore[misc, valid-type]
        def __init__(self, part: ir.Model) -> None:
            super().__init__(part)
            self.size = len(part.graph)

        def run(self, feeds: Any) -> Any:
            nonlocal nodes
            nodes += self.size
            return super().run(feeds)

    monkeypatch.setattr(measured, "Session", Counting)
    offers = {f"h{i}": [codes_for(0.0, 0.01, 8), codes_for(0.0, 100.0, 8)] for i in range(DEPTH)}
    found = least_noise(made, offers, [deep()[1]], heard.append, limit=limit)
    return nodes, found, heard


def test_a_limit_bounds_the_work_and_not_the_number_of_values_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = deep()
    whole, best, _ = ran(made, 1 << 60, monkeypatch)
    nodes, found, heard = ran(made, 0, monkeypatch)
    # Whole: 2 ranges through 3 DEPTH + 1 nodes less those in front. A window a node: a node or two behind the value.
    assert whole > DEPTH * 3 * DEPTH > 2 * 2 * len(made.graph) >= nodes
    assert found == best == {f"h{i}": 1 for i in range(DEPTH)}
    assert len(heard) == DEPTH and heard[-1].endswith(f"{DEPTH} of {DEPTH}")


def test_windows_are_as_few_as_the_limit_allows() -> None:
    made, feeds = deep()
    offers = {f"h{i}": 2 for i in range(DEPTH)}
    counts = [len(windows(made, offers, [feeds], limit)) for limit in (1 << 60, 1 << 23, 0)]
    assert counts[0] == 1 < counts[1] < counts[2] == len(made.graph)
    for limit in (1 << 60, 1 << 23, 0):
        cut = windows(made, offers, [feeds], limit)
        assert [name for window in cut for name in window.names] == [node.outputs[0].name for node in made.graph]
        assert cut[-1].ends == ("y",)


def test_what_is_no_node_s_result_is_no_end() -> None:
    weights, feeds = outlier(1.0)
    graph = model(GRAPH, weights)
    graph.graph.outputs.extend([graph.graph.inputs[0], graph.graph.initializers["w"]])
    assert least_noise(graph, {"h": [NARROW, WIDE]}, [feeds]) == {"h": 1}


def test_a_graph_without_nodes_has_nothing_to_measure() -> None:
    assert least_noise(model("agraph (float[2] x) => (float[2] x) { }"), {}, [{"x": np.zeros(2, np.float32)}]) == {}


def test_what_is_alive_behind_each_value() -> None:
    graph = model("agraph (float[2] x) => (float[2] y) { a = Relu(x)  b = Abs(a)  c = Neg(b)  y = Add(a, c) }")
    assert alive_behind(graph) == {"a": ["a"], "b": ["a", "b"], "c": ["a", "c"], "y": ["y"]}


def test_rounded_is_what_the_codes_give() -> None:
    codes = codes_for(-1.0, 3.0, 4)
    numbers = np.array([-9, -1.01, 0, 0.13, 0.14, 2.9, 9], np.float32)
    wanted = [codes.scale * (codes.code_of(float(number)) - codes.zero) for number in numbers]
    np.testing.assert_allclose(codes.rounded(numbers), wanted, rtol=2.0**-23)


def test_the_sample_is_the_same_in_any_order() -> None:
    feeds = [{"x": np.full((2, 2), number, np.float32)} for number in range(5)]
    ahead, back = fixed_sample(feeds, 2), fixed_sample(feeds[::-1], 2)
    assert [feed["x"].tolist() for feed in ahead] == [feed["x"].tolist() for feed in back] and len(ahead) == 2


def test_the_plan_takes_the_measured_range(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ends = {}
    feeds = [{"x": np.random.default_rng(seed).uniform(0, 4, (8192, 4)).astype(np.float32)} for seed in range(3)]
    for feed in feeds:
        feed["x"][5, 3] = 10000  # one number of 32768: outside of the percentile
    for observer in ("percentile", "measured"):
        # Two products: the first reads the graph's input, the second the value with the outlier.
        graph = canonicalize(
            model(
                "agraph (float[8192, 4] x) => (float[8192, 2] y) { v = MatMul(x, u)  h = Relu(v)  y = MatMul(h, w) }",
                {"u": np.eye(4, dtype=np.float32), "w": np.full((4, 2), 1.0, np.float32)},
            )
        )
        wishes = options.from_arguments(bits=8, activations="static", observer=observer)
        plan, kinds = driver.make_plan(graph, wishes, parse_target("reference"))
        tensors = solve_weights(graph, plan, kinds, Method("rtn")).tensors
        made = plan_activations(graph, plan, tensors, open_batches(graph, feeds), observer=observer, bits=8)
        assert made.static is not None
        codes = made.static.codes("h")
        ends[observer] = codes.scale * (codes.high - codes.zero)
    assert ends["percentile"] < 9999 < 10001 <= ends["measured"] * (1 + 2**-8)
