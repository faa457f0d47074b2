"""The command line as a user meets it: a small model through every command, and every kind of mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import kbitc
from kbitc.cli import _guarded

BODY = """g (float[batch, 40] x) => (float[batch, 7] y) {
    h = MatMul(x, first)
    a = Add(h, bias)
    r = Relu(a)
    y = MatMul(r, second)
}"""


def _write_model(path: Path, *, first: np.ndarray | None = None) -> Path:
    random = np.random.default_rng(11)
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {BODY}')
    shapes = {"first": (40, 33), "bias": (33,), "second": (33, 7)}
    weights = {name: random.normal(size=shape) for name, shape in shapes.items()}
    if first is not None:
        weights["first"] = first
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    for index, node in enumerate(proto.graph.node):
        node.name = f"node{index}"
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    out = model.with_name("model.kbit")
    assert _guarded(["compile", str(model), "-o", str(out), "--target", "reference"]) == 0
    return out


@pytest.fixture(scope="module")
def feeds(model: Path) -> Path:
    path = model.with_name("feeds.npz")
    np.savez(path, x=np.random.default_rng(2).normal(size=(5, 40)).astype(np.float32))
    return path


def _call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = _guarded([str(item) for item in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    code, out, err = _call(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found: dict[str, object] = json.loads(out)
    return found


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = "('tvm', 'numpy', 'onnx', 'rich', 'onnxruntime')"
    script = f"import sys, kbitc.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("command", ["", "compile", "quantize", "run", "bench", "verify", "inspect", "targets"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = _call(capsys, *command.split(), "--help")
    assert code == 0 and "Usage: kbitc" in out


def test_compile_reports_as_json(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    found = _json(capsys, "compile", model, "-o", tmp_path / "a.kbit", "--target", "reference", "--bits", 3)
    assert found["scheme"] == "int3:b32" and found["quantized_weights"] == 2
    assert found["accuracy"]["module"]["y"]["sqnr_db"] > 5  # type: ignore[index]
    assert sorted(path.name for path in (tmp_path / "a.kbit").iterdir()) == [
        "manifest.json", "module.so", "report.json", "weights.safetensors",
    ]  # fmt: skip


def test_compiling_does_not_import_torch(model: Path, tmp_path: Path) -> None:
    """TVM would, wherever it is installed, which takes longer than a small model."""
    code = (
        f"import sys, kbitc; kbitc.compile({str(model)!r}, {str(tmp_path / 'a.kbit')!r}, target='reference')\n"
        "assert 'tvm' in sys.modules\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_compiling_twice_gives_the_same_bytes(model: Path, bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / bundle.name
    assert _guarded(["compile", str(model), "-o", str(again), "--target", "reference"]) == 0
    for path in sorted(bundle.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_run_writes_what_the_quantized_onnx_gives(
    capsys: pytest.CaptureFixture[str], model: Path, bundle: Path, feeds: Path, tmp_path: Path
) -> None:
    found = _json(capsys, "run", bundle, "--input", feeds, "--output", tmp_path / "outs.npz")
    assert found["outputs"][0]["shape"] == [5, 7]  # type: ignore[index]
    _json(capsys, "quantize", model, "-o", tmp_path / "q.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx")
    with np.load(feeds) as arrays, np.load(tmp_path / "outs.npz") as outputs:
        expected = session.run(None, dict(arrays))[0]
        # The same int8 codes and integer sums; float32 sums of at most 40 terms in another order.
        bound = 40 * np.finfo(np.float32).eps * np.abs(expected).max()
        np.testing.assert_allclose(outputs["y"], expected, rtol=0, atol=bound)


def test_verify_inspect_targets_and_bench_speak(
    capsys: pytest.CaptureFixture[str], model: Path, bundle: Path, feeds: Path
) -> None:
    verified = _json(capsys, "verify", bundle, "--model", model, "--input", feeds)
    assert verified["outputs"]["y"]["samples"] == 1  # type: ignore[index]
    assert _json(capsys, "inspect", bundle)["target"] == "reference"
    inspected = _json(capsys, "inspect", model)
    assert [item["tensor"] for item in inspected["weights"]] == ["first", "second"]  # type: ignore[attr-defined]
    assert "reference" in [item["target"] for item in _json(capsys, "targets")["targets"]]  # type: ignore[attr-defined]
    timed = _json(capsys, "bench", bundle, "--against", model, "--rounds", 2)
    assert [item["name"] for item in timed["engines"]] == ["bundle", "float build", "onnxruntime fp32"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["run", "verify", "inspect", "targets", "bench"])
def test_human_output_goes_to_standard_output(
    capsys: pytest.CaptureFixture[str], bundle: Path, feeds: Path, command: str
) -> None:
    arguments = {"run": ["--input", feeds], "bench": ["--input", feeds, "--rounds", 1]}.get(command, [])
    code, out, err = _call(capsys, command, *([] if command == "targets" else [bundle]), *arguments)
    assert (code, err) == (0, "") and len(out.splitlines()) >= 1


def test_weights_that_came_quantized_are_named(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    quantized, output = tmp_path / "q.onnx", tmp_path / "q.kbit"
    _call(capsys, "quantize", model, "-o", quantized, "--bits", 4, "--format", "qdq")
    code, out, err = _call(capsys, "compile", quantized, "-o", output, "--bits", 2, "--target", "reference")
    assert (code, err) == (0, "") and "quantized in the model already, and kept as they are: 2 int4:b32" in out
    code, out, err = _call(capsys, "compile", model, "-o", output, "--force", "--bits", 2, "--target", "reference")
    assert (code, err) == (0, "") and "already" not in out


def test_dump_dir_holds_what_each_stage_leaves(model: Path, tmp_path: Path) -> None:
    arguments = ["compile", model, "-o", tmp_path / "b.kbit", "--target", "reference", "--dump-dir", tmp_path / "dump"]
    assert _guarded([str(item) for item in arguments]) == 0
    found = {path.name for path in (tmp_path / "dump").iterdir()}
    assert {
        "00-options.json", "01-import.onnx.txt", "02-canonical.onnx.txt", "05-plan.json", "07-quantized.onnx.txt",
        "08-accuracy.json", "09-relax.py", "10-tir.py", "10-rules.txt",
    } <= found  # fmt: skip


MISTAKES = {
    "missing file": (3, ["compile", "{tmp}/none.onnx", "-o", "{out}"], "none.onnx"),
    "empty file": (3, ["compile", "{tmp}/empty.onnx", "-o", "{out}"], "empty"),
    "garbage": (3, ["compile", "{tmp}/garbage.onnx", "-o", "{out}"], "garbage.onnx"),
    "truncated": (3, ["compile", "{tmp}/cut.onnx", "-o", "{out}"], "cut.onnx"),
    "nan weight": (3, ["compile", "{tmp}/nan.onnx", "-o", "{out}"], "first"),
    "bits 0": (2, ["compile", "{model}", "-o", "{out}", "--bits", "0"], "1 to 8"),
    "bits 9": (2, ["compile", "{model}", "-o", "{out}", "--bits", "9"], "1 to 8"),
    "bits word": (2, ["compile", "{model}", "-o", "{out}", "--bits", "four"], "four"),
    "two schemes": (2, ["compile", "{model}", "-o", "{out}", "--bits", "4", "--scheme", "nf4"], "drop --bits"),
    "unknown scheme": (2, ["compile", "{model}", "-o", "{out}", "--scheme", "imt4:b32"], "did you mean"),
    "unknown target": (2, ["compile", "{model}", "-o", "{out}", "--target", "x68"], "x86"),
    "unknown activations": (2, ["compile", "{model}", "-o", "{out}", "--activations", "int4"], "dynamic or static"),
    "misspelled exclude": (2, ["compile", "{model}", "-o", "{out}", "--exclude", "node03"], "node0"),
    "unknown input in shape": (2, ["compile", "{model}", "-o", "{out}", "--shape", "z=1x40"], "z"),
    "bad shape": (2, ["compile", "{model}", "-o", "{out}", "--shape", "x=1xx40"], "--shape"),
    "wrong fixed dim": (2, ["compile", "{model}", "-o", "{out}", "--shape", "x=1x41"], "x"),
    "no output": (2, ["compile", "{model}"], "--output"),
    "unknown command": (2, ["compiel"], "compiel"),
    "missing calibration": (5, ["compile", "{model}", "-o", "{out}", "--calibration", "{tmp}/no.npz"], "no.npz"),
    "calibration name": (5, ["compile", "{model}", "-o", "{out}", "--calibration", "{tmp}/names.npz"], "'x'"),
    "calibration nan": (5, ["compile", "{model}", "-o", "{out}", "--calibration", "{tmp}/nan.npz"], "x"),
    "accuracy": (6, ["compile", "{model}", "-o", "{out}", "--target", "reference", "--min-sqnr", "99"], "99 dB"),
    "not a bundle": (8, ["run", "{tmp}", "--input", "{feeds}"], "manifest.json"),
    "wrong input file": (5, ["run", "{bundle}", "--input", "{tmp}/names.npz"], "'x'"),
}


@pytest.fixture(scope="module")
def places(model: Path, bundle: Path, feeds: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty.onnx").touch()
    (tmp / "garbage.onnx").write_bytes(os.urandom(3000))
    (tmp / "cut.onnx").write_bytes(model.read_bytes()[:-900])
    first = np.zeros((40, 33), np.float32)
    first[3, 4] = np.nan
    _write_model(tmp / "nan.onnx", first=first)
    np.savez(tmp / "names.npz", wrong=np.zeros((1, 40), np.float32))
    np.savez(tmp / "nan.npz", x=np.full((1, 40), np.nan, np.float32))
    return {"tmp": str(tmp), "model": str(model), "bundle": str(bundle), "feeds": str(feeds)}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_the_right_code_and_nothing_written(
    capsys: pytest.CaptureFixture[str], places: dict[str, str], tmp_path: Path, mistake: str
) -> None:
    expected, template, named = MISTAKES[mistake]
    code, out, err = _call(capsys, *(part.format(out=tmp_path / "out.kbit", **places) for part in template))
    assert code == expected, err
    assert out == "" and err.count("\n") == 1 and err.startswith("kbitc: error: ")
    assert named in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_needs_force(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.onnx"
    target.write_text("mine")
    code, _, err = _call(capsys, "quantize", model, "-o", target)
    assert code == 2 and "--force" in err and target.read_text() == "mine"
    assert _call(capsys, "quantize", model, "-o", target, "--force")[0] == 0
    onnx.checker.check_model(target, full_check=True)


def test_a_defect_leaves_a_reproducer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    from kbitc import driver

    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "make_plan", broken)
    code, _, err = _call(capsys, "quantize", model, "-o", tmp_path / "q.onnx")
    assert code == 1 and "boom" in err
    (saved,) = tmp_path.glob("kbitc-crash-*.json")
    assert saved.name in err
    data = json.loads(saved.read_text())
    assert data["command"][1] == "quantize" and str(model) in data["files"]
    assert any("boom" in line for line in data["traceback"])


@pytest.mark.parametrize("option", ["with_runtime", "debug_accumulators", "never_slower", "bit"])
def test_python_calls_refuse_options_they_have_not(model: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(TypeError, match=option):
        kbitc.quantize(model, tmp_path / "q.onnx", **{option: True})
    assert not (tmp_path / "q.onnx").exists()
