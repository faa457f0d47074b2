"""Arrays through kbitc-run: a model that gives every input back shows what its .npz reader and writer do."""

from __future__ import annotations

import io
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kbitc.bundle.manifest import ValueInfo
from kbitc.bundle.writer import Compiled, write_bundle
from kbitc.targets import machine
from kbitc.targets.link import export_library
from kbitc.targets.runner.build import runner_folder
from kbitc.targets.target import parse_target
from tests.support.qemu import need_runner

DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
DTYPES += ("float16", "float32", "float64")
RANKS = (0, 1, 3)
VALUES = tuple(
    ValueInfo(f"{dtype}/{rank}", dtype, tuple(f"{dtype}{rank}{axis}" for axis in range(rank)))
    for dtype in DTYPES
    for rank in RANKS
)


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose outputs are copies of its inputs."""
    import tvm
    from tvm import relax, te, tirx

    need_runner("reference")
    builder = relax.BlockBuilder()
    inputs = []
    for value in VALUES:
        dims = [tirx.Var(str(dim), "int64") for dim in value.shape]
        inputs.append(relax.Var("v" + value.name.replace("/", ""), relax.TensorType(dims, value.dtype)))
    with builder.function("main", inputs):
        with builder.dataflow():
            copies = [
                builder.emit_te(
                    lambda x: te.compute(x.shape, lambda *i: x(*i), name="copy"), value, primfunc_name_hint="copy"
                )
                for value in inputs
            ]
            result = builder.emit_output(relax.Tuple(copies))
        builder.emit_func_output(result)
    target = parse_target("reference")
    library = export_library(relax.build(builder.get(), tvm.target.Target(target.tvm)), target)
    out = tmp_path_factory.mktemp("echo") / "echo.kbit"
    outputs = [ValueInfo(f"out/{value.name}", value.dtype, value.shape) for value in VALUES]
    write_bundle(out, [Compiled(target, library, {})], VALUES, outputs, kbitc_version="0", report={})
    return out


def random_feeds(side: int) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(side)
    feeds = {}
    for value in VALUES:
        shape = tuple(side + axis for axis in range(len(value.shape)))
        raw = rng.integers(0, 256, (*shape, np.dtype(value.dtype).itemsize), np.uint8)
        raw = raw & 1 if value.dtype == "bool" else raw
        feeds[value.name] = raw.view(value.dtype).reshape(shape)  # every bit pattern, NaN included
    return feeds


def run(bundle: Path, source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    program = runner_folder(machine.architecture()) / "kbitc-run"
    command = [program, bundle, "--input", source, "--output", out]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("side", [1, 2, 7, 40])
@pytest.mark.parametrize("form", ["stored", "deflated", "fortran"])
def test_every_dtype_comes_back_bit_for_bit(echo: Path, tmp_path: Path, side: int, form: str) -> None:
    feeds = random_feeds(side)
    given = {name: np.array(array, order="F") for name, array in feeds.items()} if form == "fortran" else feeds
    (np.savez_compressed if form == "deflated" else np.savez)(tmp_path / "x.npz", **given)
    done = run(echo, tmp_path / "x.npz", tmp_path / "y.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "y.npz") as outputs:
        assert outputs.files == [f"out/{value.name}" for value in VALUES]
        for value in VALUES:
            found = outputs[f"out/{value.name}"]
            assert (found.dtype, found.shape) == (feeds[value.name].dtype, feeds[value.name].shape)
            assert found.tobytes() == feeds[value.name].tobytes()
    assert zipfile.ZipFile(tmp_path / "y.npz").testzip() is None


@pytest.mark.parametrize("level", range(1, 10))
def test_every_kind_of_deflate_block(echo: Path, tmp_path: Path, level: int) -> None:
    """Noise gives stored blocks, runs give long matches, text gives dynamic codes, short members fixed ones."""
    feeds = random_feeds(3)
    rng = np.random.default_rng(level)
    feeds["uint8/1"] = rng.integers(0, 256, 70_000, np.uint8)
    feeds["int8/1"] = np.zeros(100_000, np.int8)
    feeds["int32/3"] = rng.integers(0, 9, (30, 40, 50)).astype(np.int32)
    feeds["float64/3"] = np.tile(rng.random((1, 2, 3)), (40, 40, 3))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=level) as archive:
        for name, array in feeds.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(name + ".npy", buffer.getvalue())
    done = run(echo, tmp_path / "x.npz", tmp_path / "y.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "y.npz") as outputs:
        for name, array in feeds.items():
            assert outputs["out/" + name].tobytes() == array.tobytes()


def test_equal_outputs_give_equal_files(echo: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **random_feeds(2))
    for name in ("y", "z"):
        assert run(echo, tmp_path / "x.npz", tmp_path / f"{name}.npz").returncode == 0
    assert (tmp_path / "y.npz").read_bytes() == (tmp_path / "z.npz").read_bytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_broken_files_are_refused_without_a_crash(echo: Path, tmp_path: Path, compressed: bool) -> None:
    """Truncated and flipped .npz files: refused (5), or read right where the damage touches nothing that counts."""
    feeds = random_feeds(2)
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **feeds)
    data = buffer.getvalue()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(24):
        broken = bytearray(data)
        if trial % 3 == 0:
            broken = broken[: rng.integers(0, len(data))]
        else:
            broken[rng.integers(0, len(data))] ^= 1 << rng.integers(0, 8)
        (tmp_path / "x.npz").write_bytes(broken)
        done = run(echo, tmp_path / "x.npz", tmp_path / "y.npz")
        assert done.returncode in (0, 5), (trial, done.returncode, done.stderr)
        refused += done.returncode == 5
        if done.returncode == 0:
            with np.load(tmp_path / "y.npz") as outputs:
                assert all(outputs["out/" + name].tobytes() == array.tobytes() for name, array in feeds.items())
    assert refused >= 8  # every truncation at least


def npy(header: str) -> bytes:
    """A .npy file with this header and four bytes of data."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        b"PK\x05\x06" + bytes(18),
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff{",
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9,), }"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }"),
        npy("{'descr': '>f4', 'fortran_order': False, 'shape': (), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (x,), }"),
        npy("{'descr': '<f4', 'fortran_order': False, }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 9999999999), }"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999,), }"),
    ],
)
def test_what_is_no_array_file_is_refused(echo: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    done = run(echo, tmp_path / "x.npz", tmp_path / "y.npz")
    assert done.returncode == 5, done.stderr
    assert not (tmp_path / "y.npz").exists()


def test_a_message_about_any_bytes_is_one_line_of_text(echo: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("nnnnnnnn.npy", b"no array")
    data = (tmp_path / "x.npz").read_bytes().replace(b"nnnnnnnn", b"\xff\x1b\n\xc3\xb6\xed\0")
    (tmp_path / "x.npz").write_bytes(data)
    done = run(echo, tmp_path / "x.npz", tmp_path / "y.npz")
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert done.stderr.rstrip("\n").isprintable()
