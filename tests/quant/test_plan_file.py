"""Plan files as people write them: what is read, and the one line each mistake gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kbitc.errors import UsageError
from kbitc.quant.plan import PlanEntry, QuantPlan, parse_plan, read_plan
from kbitc.quant.scheme import QuantScheme


def _parse(*entries: Any, version: Any = 1) -> Any:
    return parse_plan({"version": version, "tensors": list(entries)}, "plan.json")


def test_an_entry_needs_only_tensor_and_scheme() -> None:
    asked = _parse(
        {"tensor": "a", "scheme": "uint3:b64"}, {"tensor": "b", "scheme": "float32"}, {"tensor": "c", "scheme": None}
    )
    assert [(item.tensor, None if item.scheme is None else str(item.scheme)) for item in asked] == [
        ("a", "uint3:b64:zp"), ("b", None), ("c", None),
    ]  # fmt: skip
    assert asked[0].activation is None and asked[0].shape is None


@pytest.mark.parametrize("text", ["int5:b64:f32", "uint4:b32:min"])
def test_a_written_plan_reads_back(tmp_path: Path, text: str) -> None:
    scheme = QuantScheme.parse(text)
    plan = QuantPlan((PlanEntry("w", ("n",), "MatMul", (8, 1, 64), scheme, "int8", "asked for"),))
    plan.write(tmp_path / "plan.json")
    (found,) = read_plan(tmp_path / "plan.json")
    assert (found.tensor, found.scheme, found.activation, found.shape) == ("w", scheme, "int8", (8, 1, 64))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"tensor": "w"}, "needs tensor and scheme"),
        ({"scheme": "int4:b32"}, "needs tensor and scheme"),
        ("w", "needs tensor and scheme"),
        ({"tensor": "w", "scheme": "imt4:b32"}, r"tensors\[0\], tensor 'w'.*imt.*did you mean int"),
        ({"tensor": "w", "scheme": "int9:b32"}, "1 to 8 bits"),
        ({"tensor": "w", "scheme": 4}, "a scheme is a text"),
        ({"tensor": "w", "scheme": "int4:b32", "activaton": "int8"}, "'activaton'.*did you mean activation"),
        ({"tensor": "w", "scheme": "int4:b32", "activation": "int4"}, "unknown activation in a plan"),
        ({"tensor": "w", "scheme": "int4:b32", "shape": [1, 2]}, r"\[N, T, C\]"),
    ],
)
def test_a_wrong_entry_is_one_line_that_names_it(entry: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        _parse(entry)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("version", [2, "1", None, True])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(UsageError, match="unknown version"):
        _parse(version=version)


def test_a_tensor_listed_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="twice.*'w'"):
        _parse({"tensor": "w", "scheme": "int4:b32"}, {"tensor": "w", "scheme": "int8:b32"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a plan"),
        ('{"version": 1, "tensors": {}}', "not a plan"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_plan(tmp_path / "plan.json")


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the plan"):
        read_plan(tmp_path / "none.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not JSON"):
        read_plan(tmp_path / "plan.json")


def test_the_text_of_a_plan_is_json_of_its_entries() -> None:
    assert json.loads(QuantPlan(()).text()) == {"version": 1, "tensors": []}
