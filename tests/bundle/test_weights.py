from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file

from kbitc.bundle.manifest import Parameter
from kbitc.bundle.runtime import map_file
from kbitc.bundle.weights import DTYPE_NAMES, map_weights, padded_size, write_weights
from kbitc.errors import BundleError, InternalError


def write(folder: Path, weights: dict[str, Any]) -> tuple[Path, tuple[Parameter, ...]]:
    path = folder / "w.safetensors"
    parameters, entry = write_weights(path, weights)
    assert entry.size == path.stat().st_size
    return path, parameters


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (8, 8), (5, 3, 2)])
def test_every_dtype_and_shape_comes_back_equal_and_aligned(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    path, parameters = write(tmp_path, {"first": np.ones(3, np.int8), "a": array})
    data = map_file(path)
    views = map_weights(data, parameters, "w")
    assert views["a"].dtype == array.dtype
    np.testing.assert_array_equal(views["a"], array)
    assert views["a"].ctypes.data % 64 == 0 or array.size == 0
    assert np.shares_memory(views["a"], data) or array.size == 0


@given(
    st.lists(arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)), max_size=5)
)
def test_safetensors_itself_reads_the_file(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    weights = {f"w{i}": value for i, value in enumerate(values)}
    path, _ = write(tmp_path_factory.mktemp("w"), weights)
    loaded = load_file(path)
    assert set(loaded) == set(weights)
    for name, value in weights.items():
        stored = loaded[name].reshape(-1)
        assert stored.tobytes()[: value.nbytes] == value.tobytes()
        assert not any(stored.tobytes()[value.nbytes :])
        assert stored.nbytes == padded_size(value.nbytes)


def test_what_fits_keeps_its_shape(tmp_path: Path) -> None:
    path, _ = write(tmp_path, {"fits": np.ones((4, 4), np.float32), "not": np.ones((3, 5), np.float32)})
    assert {name: array.shape for name, array in load_file(path).items()} == {"fits": (4, 4), "not": (16,)}


def test_arrays_in_other_orders_are_stored_row_by_row(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.int32).reshape(3, 4, 5)
    weights = {"turned": array.transpose(2, 0, 1), "strided": array[:, ::2], "big": array.astype(">i4")}
    path, parameters = write(tmp_path, weights)
    views = map_weights(map_file(path), parameters, "w")
    for name, value in weights.items():
        np.testing.assert_array_equal(views[name], value)


def test_mapped_weights_can_be_written_without_changing_the_file(tmp_path: Path) -> None:
    path, parameters = write(tmp_path, {"a": np.zeros(16, np.float32)})
    before = path.read_bytes()
    map_weights(map_file(path), parameters, "w")["a"][:] = 1
    assert path.read_bytes() == before


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="complex64"):
        write(tmp_path, {"a": np.ones(2, np.complex64)})


GOOD = {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}
PARAMETER = (Parameter("a", "float32", (16,), "a"),)


def file_of(header: object, data: int = 64, pad: int = 64) -> np.ndarray[Any, Any]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % pad)
    return np.frombuffer(struct.pack("<Q", len(text)) + text + bytes(data), np.uint8).copy()


def test_a_good_file_is_read() -> None:
    assert map_weights(file_of(GOOD), PARAMETER, "w")["a"].shape == (16,)


@pytest.mark.parametrize(
    "data",
    [
        np.zeros(0, np.uint8),
        np.zeros(7, np.uint8),
        np.full(64, 255, np.uint8),
        file_of(GOOD, data=63),
        file_of(GOOD, pad=1),
        file_of(b"{"),
        file_of([]),
        file_of(b"[" * 100_000),
        file_of({"b": GOOD["a"]}),
        file_of({"a": {"dtype": "F32", "shape": [16]}}),
        file_of({"a": GOOD["a"] | {"data_offsets": [0]}}),
        file_of({"a": GOOD["a"] | {"data_offsets": [0, 64, 128]}}),
        file_of({"a": GOOD["a"] | {"data_offsets": [-64, 0]}}),
        file_of({"a": GOOD["a"] | {"data_offsets": [64, 128]}}),
        file_of({"a": GOOD["a"] | {"data_offsets": [0, 2**70]}}),
        file_of({"a": GOOD["a"] | {"data_offsets": [32, 64]}}),
        file_of({"a": GOOD["a"] | {"dtype": "I32"}}),
        file_of({"a": GOOD["a"] | {"data_offsets": [0, 0]}}),
    ],
)
def test_broken_files_are_refused(data: Any) -> None:
    with pytest.raises(BundleError):
        map_weights(data, PARAMETER, "w")
