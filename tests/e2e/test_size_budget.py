"""`--size-budget` with everything real: random budgets, compiled, and every file of the bundle counted on the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import kbitc
from kbitc.errors import UsageError
from kbitc.targets import build as stage
from kbitc.targets.build import Built
from kbitc.targets.target import Target
from tests.support import planned

MLP = """g (float[batch, 256] x) => (float[batch, 24] y) {
    h = MatMul(x, first)
    r = Relu(h)
    k = MatMul(r, second)
    y = MatMul(k, third)
}"""


def _mlp() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {MLP}')
    random = np.random.default_rng(5)
    for name, shape in {"first": (256, 256), "second": (256, 320), "third": (320, 24)}.items():
        array = random.standard_t(5, size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def _disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _try(model: str | Path | onnx.ModelProto, folder: Path, budgets: list[int]) -> tuple[int, int]:
    """How many budgets were kept and how many refused; none is exceeded."""
    kept = refused = 0
    for index, budget in enumerate(budgets):
        out = folder / f"{index}.kbit"
        try:
            kbitc.compile(model, out, size_budget=budget)
        except UsageError as error:
            refused += 1
            assert "below the smallest result" in str(error) and not list(folder.iterdir())
            continue
        kept += 1
        assert _disk(out) <= budget, budget
        for file in sorted(out.rglob("*"), reverse=True):
            file.unlink()
        out.rmdir()
    return kept, refused


def _range(model: str | Path | onnx.ModelProto, folder: Path) -> tuple[int, int]:
    sizes = []
    for bits in (2, 8):
        out = folder / f"limit{bits}.kbit"
        kbitc.compile(model, out, bits=bits)
        sizes.append(_disk(out))
    return sizes[0], sizes[1]


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is built once: the same one gives the same bytes, and different budgets often end in the same plan."""
    made: dict[bytes, Built] = {}
    build = stage.build

    def once(model: ir.Model, target: Target, **options: Any) -> Built:
        key = hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True)).digest()
        if key not in made:
            made[key] = build(model, target, **options)
        return made[key]

    monkeypatch.setattr(stage, "build", once)


@pytest.mark.slow
@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize(("name", "count"), [("mlp", 100), ("mixed", 80), ("magika", 20)])
def test_no_random_budget_is_exceeded(name: str, count: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: str | Path | onnx.ModelProto
    if name == "magika":
        model = request.getfixturevalue("real_models")["magika"]
    else:
        model = _mlp() if name == "mlp" else ir.to_proto(planned.model())
    (tmp_path / "range").mkdir()
    (tmp_path / "work").mkdir()
    low, high = _range(model, tmp_path / "range")
    random = np.random.default_rng(count)
    budgets = [int(value) for value in random.integers(int(0.9 * low), int(1.1 * high), count)]
    kept, _ = _try(model, tmp_path / "work", budgets)
    assert kept >= count // 2
