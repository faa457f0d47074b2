"""Collecting statistics: the numbers of a run, in any grouping and order, cached without trusting the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from kbitc.errors import CalibrationError
from kbitc.graph.evaluate import DETACH_BYTES, evaluate
from kbitc.graph.text import operator_counts
from kbitc.importer.feeds import open_batches, sample_feeds
from kbitc.passes.calibrate import collect as stage
from kbitc.passes.calibrate.stream import only
from kbitc.passes.canonicalize import canonicalize
from tests.support.onnx_text import model, noise

NAMES = ("x", "h", "r", "y")


@pytest.fixture
def subject() -> ir.Model:
    """y = relu(x w) v with an open batch."""
    graph = "g (float[N, 8] x) => (float[N, 4] y) { h = MatMul(x, w) \n r = Relu(h) \n y = MatMul(r, v) }"
    return model(graph, {"w": noise(8, 16), "v": noise(16, 4)})


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": noise(5, 8, seed=seed) * (seed + 1)} for seed in range(6)]


def test_the_statistics_are_those_of_the_values(subject: ir.Model) -> None:
    stats = stage.collect(subject, NAMES, feeds())
    runs = [evaluate(subject, item, ["h", "r"]) | item for item in feeds()]
    for name in NAMES:
        every = np.concatenate([run[name].reshape(-1) for run in runs])
        found = stats.values[name]
        assert (found.low, found.high, found.count) == (float(every.min()), float(every.max()), every.size)
    assert stats.batches == 6


def test_order_and_grouping_do_not_matter(subject: ir.Model) -> None:
    reference = stage.collect(subject, NAMES, feeds()).to_bytes()
    assert stage.collect(subject, NAMES, feeds()[::-1]).to_bytes() == reference
    assert stage.collect(subject, NAMES, feeds(), budget=1).values.keys() == set(NAMES)
    assert stage.collect(subject, NAMES, feeds(), budget=1).to_bytes() == reference


def test_a_part_starts_where_the_one_before_ended() -> None:
    graph = """g (float[N, 8] x) => (float[N, 8] y) {
        h = MatMul(x, w)  a, b = Split<axis = 1, num_outputs = 2>(h)  r = Concat<axis = 1>(b, a)  y = Add(r, h) }"""
    subject = model(graph, {"w": noise(8, 8)})
    assert operator_counts(only(subject, ["r"], ["h"])) == {"Split": 1, "Concat": 1}
    assert operator_counts(only(subject, ["y"], ["h", "a", "b", "r"])) == {"Add": 1}
    assert operator_counts(only(subject, ["y"], ["a", "b"])) == {"MatMul": 1, "Concat": 1, "Add": 1}
    assert operator_counts(only(subject, ["r"], ["a"])) == {"MatMul": 1, "Split": 1, "Concat": 1}
    x = feeds()[0]["x"]
    known = {**evaluate(subject, {"x": x}, ["a"]), "x": x}
    np.testing.assert_array_equal(evaluate(only(subject, ["y"], ["a"]), known)["y"], known["y"])
    names = ["h", "a", "b", "r", "y"]
    whole, parts = (stage.collect(subject, names, feeds(), budget=size).to_bytes() for size in (1 << 20, 1))
    assert whole == parts


def test_a_part_in_front_of_a_loop_leaves_out_what_the_loop_reads() -> None:
    text = "g (float[n, 1, 8] x) => (float[n, 1, 1, 96] y) { h = Relu(x) y = LSTM<hidden_size = 96>(h, w, r) }"
    made = canonicalize(model(text, {"w": noise(1, 384, 8), "r": noise(1, 384, 96)}))
    assert any(value.const_value is not None and value.const_value.nbytes >= DETACH_BYTES
               for value in made.graph.initializers.values())  # fmt: skip
    part = only(made, ["h"])
    assert not part.graph.initializers
    given = noise(3, 1, 8)
    np.testing.assert_array_equal(evaluate(part, {"x": given})["h"], np.maximum(given, 0))
    assert evaluate(made, {"x": given})["y"].shape == (3, 1, 1, 96)


def test_groups_keep_to_the_budget(subject: ir.Model) -> None:
    groups = stage.in_groups(subject, ["h", "r", "y"], feeds()[0], 2 * 5 * 16 * 4)
    assert groups == [["h", "r"], ["y"]]
    assert stage.in_groups(subject, ["h", "r", "y"], feeds()[0], 1) == [["h"], ["r"], ["y"]]


def test_the_cache_serves_equal_data_and_survives_damage(
    subject: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = stage.cached(subject, NAMES, feeds())
    (path,) = stage.cache_folder().iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(stage, "collect", None)
        assert stage.cached(subject, NAMES, feeds()[::-1]).to_bytes() == first.to_bytes()
    path.write_bytes(path.read_bytes()[:100])
    assert stage.cached(subject, NAMES, feeds()).to_bytes() == first.to_bytes()
    changed = feeds()
    changed[0]["x"][0, 0] += 1
    keys = {stage.cache_key(subject, NAMES, data) for data in (feeds(), changed, feeds()[1:])}
    keys.add(stage.cache_key(subject, NAMES[1:], feeds()))
    subject.graph.initializers["w"].const_value = ir.tensor(noise(8, 16, seed=1), name="w")
    keys.add(stage.cache_key(subject, NAMES, feeds()))
    assert len(keys) == 5


def test_all_batches_of_a_file_are_streamed(subject: ir.Model, tmp_path: Path) -> None:
    data = noise(8 * 70, 8)
    np.save(tmp_path / "x.npy", data)
    batches = open_batches(subject, tmp_path / "x.npy")
    assert [len(list(batches)) for _ in range(2)] == [70, 70]
    assert len(sample_feeds(subject, tmp_path / "x.npy")[0]) == 64
    assert stage.collect(subject, ["x"], batches).values["x"].count == data.size


def test_a_bad_number_is_found_wherever_it_is(subject: ir.Model, tmp_path: Path) -> None:
    data = noise(8 * 70, 8)
    data[550, 3] = np.nan
    np.save(tmp_path / "x.npy", data)
    with pytest.raises(CalibrationError, match=r"nan at index \[550, 3\]"):
        stage.collect(subject, ["x"], open_batches(subject, tmp_path / "x.npy"))


def test_an_iterator_is_read_once_and_can_be_replayed(subject: ir.Model) -> None:
    batches = open_batches(subject, iter(feeds()))
    first, note = batches.first(2)
    assert len(first) == 2 and note == "2 feeds from the caller"
    for _ in range(2):
        for found, wanted in zip(batches, feeds(), strict=True):
            np.testing.assert_array_equal(found["x"], wanted["x"])
    with pytest.raises(CalibrationError, match="plain numbers"):
        list(open_batches(subject, iter([{"x": np.array([[object()] * 8])}])))
    with pytest.raises(CalibrationError, match="feeds 1"):
        list(open_batches(subject, iter([feeds()[0], "text"])))
