"""Calibration data: every way they can be wrong is named; made-up inputs respect what the model does with them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import kbitc
from kbitc.errors import CalibrationError
from kbitc.graph.evaluate import evaluate
from kbitc.importer.arrays import read_arrays
from kbitc.importer.feeds import made_up_feeds, model_inputs, open_batches, read_feeds, sample_feeds
from tests.support.onnx_text import model, noise, proto

GOOD = noise(6, 8)


@pytest.fixture
def subject() -> ir.Model:
    """y = relu(x), x [2, 8]."""
    return model("g (float[2, 8] x) => (float[] y) { y = Relu(x) }")


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_batches_have_the_size_the_model_wants(subject: ir.Model, tmp_path: Path) -> None:
    feeds, note = sample_feeds(subject, save(tmp_path / "d.npz", x=noise(7, 8)))
    assert [feed["x"].shape for feed in feeds] == [(2, 8)] * 3
    assert "1 left out" in note and "d.npz" in note
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds]), noise(7, 8)[:6])


def test_an_open_batch_and_further_inputs(tmp_path: Path) -> None:
    subject = model("g (float[N, 8] x, int64 k) => (float[] y) { f = Cast<to = 1>(k) \n y = Mul(x, f) }")
    feeds, note = sample_feeds(subject, save(tmp_path / "d.npz", x=noise(19, 8), k=np.array(3)))
    assert [feed["x"].shape[0] for feed in feeds] == [8, 8, 3]
    assert "left out" not in note
    assert all(feed["k"] == 3 for feed in feeds)


def test_npy_and_folders(subject: ir.Model, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", GOOD)
    save(tmp_path / "b.npz", x=GOOD[:2])
    assert len(sample_feeds(subject, tmp_path)[0]) == 4
    assert read_feeds(tmp_path / "b.npz", model_inputs(subject))["x"].shape == (2, 8)


def test_iterables(subject: ir.Model) -> None:
    feeds, note = sample_feeds(subject, ({"x": GOOD[i : i + 2]} for i in (0, 2)))
    assert len(feeds) == 2 and "caller" in note


def test_too_many_batches_are_thinned_evenly(subject: ir.Model) -> None:
    def feeds() -> Iterator[dict[str, np.ndarray]]:
        return ({"x": np.full((2, 8), number, np.float32)} for number in range(100))

    batches = open_batches(subject, feeds())
    for limit, most_bytes, step in ((30, 1 << 20, 4), (200, 64 * 30, 4), (200, 1 << 20, 1), (200, 1, 128)):
        kept = [int(item["x"][0, 0]) for item in batches.spread(limit, most_bytes)]
        assert kept == list(range(0, 100, step))
    assert open_batches(subject, batches) is batches


def test_an_iterator_serves_every_stage(tmp_path: Path) -> None:
    graph = "g (float[N, 8] x) => (float[] y) { y = MatMul(x, w) }"
    subject = proto(graph, {"w": noise(8, 4)})
    samples = [{"x": noise(4, 8, seed=seed)} for seed in range(3)]
    written = []
    for number, data in enumerate((samples, iter(samples))):
        out = tmp_path / f"{number}.onnx"
        kbitc.quantize(subject, out, scheme="int8:c", activations="static", calibration=data)
        written.append(out.read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "array",
    [GOOD.astype(np.float64), GOOD.astype(np.float16), np.asfortranarray(GOOD), GOOD.astype(">f4")],
)
def test_harmless_conversions(subject: ir.Model, tmp_path: Path, array: np.ndarray) -> None:
    feeds, _ = sample_feeds(subject, save(tmp_path / "d.npz", x=array))
    assert feeds[0]["x"].dtype == np.float32 and feeds[0]["x"].flags.c_contiguous
    np.testing.assert_array_equal(feeds[0]["x"], array[:2].astype(np.float32))


def bad(index: tuple[int, int], number: float) -> np.ndarray:
    array = GOOD.copy()
    array[index] = number
    return array


WRONG: dict[str, tuple[dict[str, np.ndarray], tuple[str, ...]]] = {
    "name": ({"data": GOOD}, ("'x'", "'data'")),
    "extra": ({"x": GOOD, "z": GOOD}, ("'z'", "no input")),
    "images": ({"x": np.zeros((2, 8), np.uint8)}, ("'x'", "uint8", "float32")),
    "whole": ({"x": np.zeros((2, 8), np.int64)}, ("'x'", "int64")),
    "bool": ({"x": np.zeros((2, 8), bool)}, ("'x'", "bool")),
    "shape": ({"x": noise(2, 7)}, ("'x'", "7", "8")),
    "rank": ({"x": noise(2, 8, 1)}, ("'x'", "rank")),
    "empty": ({"x": np.zeros((0, 8), np.float32)}, ("'x'", "no samples")),
    "one": ({"x": noise(1, 8)}, ("'x'", "batch")),
    "nan": ({"x": bad((3, 5), np.nan)}, ("'x'", "[3, 5]", "nan")),
    "inf": ({"x": bad((0, 7), -np.inf)}, ("'x'", "[0, 7]", "-inf")),
    "overflow": ({"x": np.full((2, 8), 1e300)}, ("'x'", "inf")),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arrays_are_named(subject: ir.Model, tmp_path: Path, name: str) -> None:
    arrays, words = WRONG[name]
    path = save(tmp_path / "d.npz", **arrays)
    with pytest.raises(CalibrationError) as caught:
        sample_feeds(subject, path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message, message
    assert caught.value.exit_code == 5


def test_different_numbers_of_samples(tmp_path: Path) -> None:
    subject = model("g (float[N, 2] x, float[N, 2] z) => (float[] y) { y = Add(x, z) }")
    with pytest.raises(CalibrationError, match="x 3, z 4"):
        sample_feeds(subject, save(tmp_path / "d.npz", x=noise(3, 2), z=noise(4, 2)))


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(500))


def header_bomb(path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 8), }"
    header += b" " * (117 - len(header)) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64))


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 8), }"
        header += b" " * (117 - len(header)) + b"\n"
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(1 << 20))


def truncated(path: Path) -> None:
    np.savez(path, x=GOOD)
    whole = path.with_suffix(".npz").read_bytes() if not path.exists() else path.read_bytes()
    path.write_bytes(whole[:-40])


def corrupted(path: Path) -> None:
    np.savez(path, x=GOOD)
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)


def corrupted_deflate(path: Path) -> None:
    np.savez_compressed(path, x=np.zeros((64, 8), np.float32))
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)


def pickled(path: Path) -> None:
    np.savez(path, x=np.array([{"a": 1}], dtype=object))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def absent(path: Path) -> None:
    pass


def empty_archive(path: Path) -> None:
    zipfile.ZipFile(path, "w").close()


@pytest.mark.parametrize(
    "make",
    [
        garbage,
        header_bomb,
        zip_bomb,
        truncated,
        corrupted,
        corrupted_deflate,
        pickled,
        empty,
        fifo,
        absent,
        empty_archive,
    ],
)
def test_broken_files(subject: ir.Model, tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "d.npz"
    make(path)
    with pytest.raises(CalibrationError) as caught:
        sample_feeds(subject, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_empty_folder(subject: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no .npz"):
        sample_feeds(subject, tmp_path)


def test_the_empty_cache_of_a_first_step_is_a_sample() -> None:
    subject = model("g (float[B, 2] x, float[B, P, 2] past) => (float[] y) { y = Add(x, past) }")
    feeds = {"x": noise(1, 2), "past": np.zeros((1, 0, 2), np.float32)}
    found, _ = sample_feeds(subject, [feeds])
    assert found[0]["past"].shape == (1, 0, 2)


def test_no_samples_and_no_mappings(subject: ir.Model) -> None:
    with pytest.raises(CalibrationError, match="no samples"):
        sample_feeds(subject, iter(()))
    with pytest.raises(CalibrationError, match="feeds 0"):
        sample_feeds(subject, [GOOD])


def test_indices_beyond_an_embedding(tmp_path: Path) -> None:
    subject = model("g (int64[2, 3] ids) => (float[] y) { y = Gather(t, ids) }", {"t": noise(10, 4)})
    with pytest.raises(CalibrationError, match="below 10"):
        sample_feeds(subject, save(tmp_path / "d.npz", ids=np.full((2, 3), 10)))
    with pytest.raises(CalibrationError, match="does not fit"):
        small = model("g (int32[2, 3] ids) => (float[] y) { y = Gather(t, ids) }", {"t": noise(10, 4)})
        sample_feeds(small, save(tmp_path / "e.npz", ids=np.full((2, 3), 2**40)))


def test_reading_keeps_every_bit(tmp_path: Path) -> None:
    for name in ("f2", "f4", "f8", "i1", "u1", "i4", "i8", "?"):
        array = np.random.default_rng(1).integers(0, 2, (3, 5)).astype(name)
        np.save(tmp_path / "a.npy", array)
        np.savez_compressed(tmp_path / "a.npz", a=array, b=array.T)
        np.testing.assert_array_equal(read_arrays(tmp_path / "a.npy")[""], array)
        np.testing.assert_array_equal(read_arrays(tmp_path / "a.npz")["b"], array.T)


def test_made_up_inputs_respect_their_use() -> None:
    graph = """g (int64[N, S] ids, int64[N, S] mask, int32[N, S] bytes, bool[N, S] flag, uint8[N, S] image)
    => (float[] y, float[] z, bool[] q, float[] i) {
        u = Unsqueeze(ids, one) \n e = Gather(table, u) \n m = Cast<to = 1>(mask) \n y = ReduceSum(e) \n z = Neg(m)
        b = Unsqueeze(bytes, one) \n q1 = Equal(b, choices) \n q = Identity(q1)
        f = Not(flag) \n i = Cast<to = 1>(image)
    }"""
    weights = {"table": noise(7, 4), "one": np.array([2]), "choices": np.arange(5, dtype=np.int32)}
    subject = model(graph, weights)
    drawn = [made_up_feeds(subject, seed=seed) for seed in range(20)]
    ids = np.concatenate([feed["ids"].reshape(-1) for feed in drawn])
    assert ids.min() == 0 and ids.max() == 6
    assert max(int(feed["bytes"].max()) for feed in drawn) == 4
    assert all((feed["mask"] == 1).all() and feed["flag"].all() for feed in drawn)
    assert max(int(feed["image"].max()) for feed in drawn) > 200
    np.testing.assert_array_equal(made_up_feeds(subject, seed=3)["ids"], drawn[3]["ids"])
    evaluate(subject, drawn[0])


def test_open_dims_get_a_size_with_which_the_model_runs() -> None:
    """Two valid convolutions of 5 need 9 pixels at least; the dims are tied by a product of 32 pixels a side."""
    graph = "g (float[N, 1, H, W] x) => (float[] y) { c = Conv(x, w) \n f = Flatten(c) \n y = MatMul(f, m) }"
    subject = model(graph, {"w": noise(1, 1, 1, 1), "m": noise(32 * 32, 2)})
    assert made_up_feeds(subject)["x"].shape == (1, 1, 32, 32)
    assert made_up_feeds(subject, ["x=2x1x32x32"])["x"].shape == (2, 1, 32, 32)
    with pytest.raises(CalibrationError, match="--shape"):
        made_up_feeds(model(graph, {"w": noise(1, 1, 1, 1), "m": noise(33, 2)}))


def test_made_up_sizes_are_those_that_weights_and_tables_want() -> None:
    """Channels of a convolution, and as many frames as positions behind a stride of 2."""
    graph = """g (float[b, channels, frames] x, float[b, width] v) => (float[b, t, 4] y, float[b, 2] z) {
        c = Conv<strides = [2], pads = [1, 1]>(x, w)
        rows = Transpose<perm = [0, 2, 1]>(c)
        y = Add(rows, positions)
        z = MatMul(v, m)
    }"""
    subject = model(graph, {"w": noise(4, 80, 3), "positions": noise(75, 4), "m": noise(33, 2)})
    feeds = made_up_feeds(subject)
    assert feeds["x"].shape == (1, 80, 150)
    assert feeds["v"].shape == (1, 33)
