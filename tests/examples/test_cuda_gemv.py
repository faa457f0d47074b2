from __future__ import annotations

from pathlib import Path

import cuda_gemv
import onnx
import pytest


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cuda_gemv.machine, "cuda_capability", lambda: "the driver is not installed")
    assert cuda_gemv.main(["--rows", "1"]) == 7
    assert capsys.readouterr().err == "nothing to time here: the driver is not installed\n"


@pytest.mark.parametrize("argv", [["--n", "0"], ["--schemes", "int9:b32"], ["--rows"]])
def test_bad_arguments_end_with_two(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cuda_gemv.arguments(argv)
    assert caught.value.code == 2


def test_model_has_one_product_a_copy(tmp_path: Path) -> None:
    cuda_gemv.make_model(16, 8, 2, 3, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul"] * 3


def test_medians_are_over_interleaved_rounds() -> None:
    calls: list[str] = []
    values = iter(range(100))

    def runner(name: str) -> float:
        calls.append(name)
        return float(next(values))

    found = cuda_gemv.measure({"a": lambda: runner("a"), "b": lambda: runner("b")}, 3)
    assert calls == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3
    assert found == {"a": 8.0, "b": 9.0}
