"""Schedules: found by ratios within rounds, kept in a database, and without effect on any bit of a result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kbitc.errors import UsageError
from kbitc.quant.tensor import QTensor
from kbitc.targets import machine, tuning
from kbitc.targets.lower.contraction import Contraction, ConvAttributes
from kbitc.targets.target import host_runs, parse_target
from kbitc.targets.trial import (
    Trial,
    build_trials,
    made_up_levels,
    made_up_requantization,
    made_up_weight,
    results_of,
)
from kbitc.targets.tune import FIRST, FOUND, GAIN, USUAL, candidates, ratios, search, tune_layers, usual_schedule
from kbitc.targets.tuning import Entry, Schedule, Tuning, find_tuning, read_tuning, scheduled, shape_class

ENTRY = Entry("integer_product", "x86:avx2", "int4:b32, 1 rows, 48x1x64", Schedule(2, 1, 3), 1.25)
HOSTS = [parse_target(name) for name in ("x86:avx2", "x86:avx512vnni", "x86:avx512vbmi")]


def _matmul(rows: int, scheme: str | None, activation: str, n: int = 80, channels: int = 64) -> Contraction:
    weight = made_up_weight(scheme, (n, 1, channels))
    block = 32 if activation == "int8" else 0
    return Contraction("m", "matmul", weight, activation, (rows, channels), (rows, n), block)  # type: ignore[arg-type]


def _conv(scheme: str | None) -> Contraction:
    weight = made_up_weight(scheme, (40, 9, 16))
    geometry = ConvAttributes((3, 3), pads=(0, 0, 0, 0))
    return Contraction("c", "conv", weight, "float32", (1, 9, 9, 16), (1, 7, 7, 40), conv=geometry)


def _codes(rows: int, bits: int, groups: int = 0) -> Contraction:
    """A matmul of uint8 codes, or a convolution of groups with a border."""
    way = made_up_requantization(96)
    if not groups:
        weight = made_up_levels(bits, (96, 1, 70))
        return Contraction("i", "matmul", weight, "uint8", (rows, 70), (rows, 96), x_zero=7, requantize=way)
    geometry = ConvAttributes((3, 3), pads=(1, 1, 1, 1), group=groups)
    weight, size = made_up_levels(bits, (96, 9, 20)), (1, rows, rows)
    shapes = (*size, 20 * groups), (*size, 96)
    return Contraction("i", "conv", weight, "uint8", *shapes, conv=geometry, x_zero=7, requantize=way)


@pytest.mark.parametrize("target", HOSTS, ids=str)
@pytest.mark.parametrize(
    ("rule", "contraction"),
    [
        ("integer_product", _matmul(23, "int4:b32", "int8")),
        ("integer_product", _matmul(1, "int3:b32", "int8")),
        ("weight_only_product", _matmul(13, "int4:b32", "float32")),
        ("float_product", _matmul(23, None, "float32")),
        ("unpacked_conv", _conv("int4:c")),
        ("code_product", _codes(23, 8)),
        ("code_product", _codes(1, 4)),
        ("code_product", _codes(7, 8, groups=1)),
        ("code_product", _codes(7, 8, groups=2)),
    ],
    ids=["integer", "integer-row", "weight-only", "float", "unpacked", "codes", "codes-row", "codes-conv", "groups"],
)
def test_every_schedule_gives_the_same_bits(target: Any, rule: str, contraction: Contraction) -> None:
    reason = host_runs(target)
    if reason is not None:
        pytest.skip(reason)
    tried = [item for item in candidates(rule, target, contraction) if not item.unroll]
    assert tried and len(set(tried)) == len(tried)
    picked = tried[:: max(1, len(tried) // 2)]
    trials = [Trial(USUAL, contraction), *(Trial(f"s{i}", contraction, item) for i, item in enumerate(picked))]
    built = build_trials(trials, target)
    assert {layer["rule"] for layer in built.layers} == {rule}
    assert len({call["kernel"] for call in built.calls if call["result"]}) == len(trials), "some kernels are the same"
    results = results_of(built)
    for name, result in results.items():
        np.testing.assert_array_equal(result, results[USUAL], err_msg=name)


def test_candidates_fit_the_registers_and_leave_out_the_usual_schedule() -> None:
    target = parse_target("x86:avx512vnni")
    contraction = _matmul(128, None, "float32", n=256)
    tried = candidates("float_product", target, contraction)
    assert usual_schedule("float_product", target, contraction) not in tried
    assert all(item.rows * item.tiles + item.tiles + 1 <= 32 for item in tried)
    few = candidates("integer_product", target, _matmul(1, "int4:b32", "int8", n=256))
    assert {item.few_tiles for item in few} == {1, 2, 3, 5, 6, 7, 8}
    assert {(item.rows, item.tiles) for item in few} == {(4, 3)}


def test_ratios_are_those_within_a_round() -> None:
    seconds = {FIRST: [9.0, 9.0, 9.0], USUAL: [2.0, 20.0, 4.0], "s0": [1.0, 10.0, 4.0], "s1": [4.0, 5.0, 8.0]}
    assert ratios(seconds) == {"s0": 2.0, "s1": 0.5}


@pytest.mark.parametrize(("first", "again", "kept"), [(0.5, 0.5, True), (0.5, 1.0, False), (1.0, 0.5, False)])
def test_what_is_fastest_has_to_be_faster_again_in_both_orders(first: float, again: float, kept: bool) -> None:
    asked: list[Sequence[Trial]] = []

    def timer(trials: Sequence[Trial], target: Any) -> dict[str, list[float]]:
        asked.append(trials)
        own = (first, again, 0.25)[len(asked) - 1]
        return {trial.name: [own if trial.name in ("s3", FOUND) else 1.0] * 4 for trial in trials}

    target, contraction = parse_target("x86:avx512vnni"), _matmul(64, "int4:b32", "int8")
    entry, tried = search("integer_product", target, contraction, "some", timer)
    assert tried == len(asked[0]) - 2
    assert (entry is not None) is kept
    if entry is not None:
        found = asked[0][5].schedule
        assert entry == Entry("integer_product", target.name, "some", found, 1 / again, machine.processor())
    if first < 1:
        names = [[trial.name for trial in trials] for trials in asked[1:]]
        assert names == [[FIRST, USUAL, FOUND], [FIRST, FOUND, USUAL]]
        assert [trials[0].schedule for trials in asked[1:]] == [None, asked[0][5].schedule]


def test_equal_layers_are_searched_once_and_unknown_sizes_are_left_out() -> None:
    layer = {"name": "a", "kind": "matmul", "rule": "integer_product", "activation": "int8", "weight": "int4:b32",
             "weight_shape": [64, 1, 64], "x_shape": ["rows", 64], "out_shape": ["rows", 64], "conv": None}  # fmt: skip
    layers = [layer, {**layer, "name": "b"}, {**layer, "x_shape": ["rows*2", 64], "out_shape": ["rows*2", 64]},
              {**layer, "rule": "softmax"}]  # fmt: skip
    opened: list[bool] = []

    def timer(trials: Sequence[Trial], target: Any) -> dict[str, list[float]]:
        opened.extend(trial.open_rows for trial in trials)
        return {trial.name: [1.0] for trial in trials}

    (found,) = tune_layers(layers, parse_target("x86:avx2"), {"rows": 64}, timer=timer)
    assert (found["layers"], found["shape"], found["entry"]) == (["a", "b"], "int4:b32, any rows, 64x1x64", None)
    assert opened and all(opened)


def test_codes_are_searched_with_levels_of_their_width_and_not_where_blocks_have_factors() -> None:
    layer = {"name": "a", "kind": "matmul", "rule": "code_product", "activation": "uint8", "weight": "4-bit levels",
             "bits": 4, "weight_shape": [64, 1, 64], "x_shape": [64, 64], "out_shape": [64, 64], "conv": None,
             "result": "uint8"}  # fmt: skip
    seen: list[Trial] = []

    def timer(trials: Sequence[Trial], target: Any) -> dict[str, list[float]]:
        seen.extend(trials)
        return {trial.name: [0.5 if trial.schedule == Schedule(3, 2, 4) else 1.0] * 4 for trial in trials}

    blocks = {**layer, "name": "b", "weight": "4-bit levels in blocks of 32"}
    (found,) = tune_layers([layer, blocks], parse_target("x86:avx2"), {}, timer=timer)
    assert (found["layers"], found["shape"]) == (["a"], "4-bit levels, many rows, 64x1x64")
    assert found["entry"].schedule == Schedule(3, 2, 4)
    assert {trial.contraction.out_dtype for trial in seen} == {"uint8"}
    weight = made_up_levels(4, (64, 1, 64))
    made = Contraction("m", "matmul", weight, "uint8", (64, 64), (64, 64))
    assert scheduled(parse_target("x86:avx2").with_tuning(Tuning([found["entry"]])), "code_product", made).schedule


def test_groups_that_a_schedule_leaves_a_rest_of_keep_the_usual_tile() -> None:
    """The class does not name the groups: what was found for one number of them has to be right for all."""
    target = next((item for item in HOSTS if host_runs(item) is None), None)
    if target is None:
        pytest.skip("no x86")
    made = _codes(7, 8, groups=2)
    trials = [Trial(USUAL, made), Trial("s", made, Schedule(2, 2, 2))]
    results = results_of(build_trials(trials, target))
    np.testing.assert_array_equal(results["s"], results[USUAL])


def test_a_database_is_read_back_and_later_entries_replace_earlier(tmp_path: Path) -> None:
    later = replace(ENTRY, schedule=Schedule(8, 2, 4, 2))
    made = Tuning([ENTRY]).merged([later, replace(ENTRY, rule="float_product")])
    (tmp_path / "tuned.json").write_text(made.text())
    read = read_tuning(tmp_path / "tuned.json")
    assert read.text() == made.text() and len(read) == 2
    assert read.find(*ENTRY.key) == later.schedule
    assert read.find("integer_product", "x86:avx512vnni", ENTRY.shape) is None
    assert Tuning().facts() is None and made.facts() == read.facts()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"version": 2, "entries": []}', "not a database"),
        ('{"version": 1, "entries": [{"rule": "r"}]}', "needs rule"),
        ('{"version": 1, "entries": [{"rule": "r", "target": "t", "shape": "s", "schedule": {"rows": 1}}]}',
         "not a schedule"),
        ('{"version": 1, "entries": [{"rule": "r", "target": "t", "shape": "s",'
         ' "schedule": {"rows": 1, "tiles": 0, "few_tiles": 1}}]}', "at least one"),
    ],
)  # fmt: skip
def test_a_damaged_database_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_tuning(tmp_path / "tuned.json")


def test_the_cache_goes_over_what_ships_and_none_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, own = tmp_path / "shipped.json", tmp_path / "cache" / "kbitc" / "tuned.json"
    own.parent.mkdir(parents=True)
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "processor", lambda: "this")
    assert len(find_tuning(None)) == 0
    shipped.write_text(Tuning([ENTRY, replace(ENTRY, rule="float_product")]).text())
    own.write_text(Tuning([replace(ENTRY, schedule=Schedule(6, 1, 1))]).text())
    found = find_tuning(None)
    assert len(found) == 2 and found.find(*ENTRY.key) == Schedule(6, 1, 1)
    assert len(find_tuning(Path("none"))) == 0
    assert find_tuning(shipped).find(*ENTRY.key) == ENTRY.schedule
    with pytest.raises(UsageError, match="cannot read"):
        find_tuning(tmp_path / "missing.json")


def test_what_was_measured_on_another_processor_counts_only_where_its_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "processor", lambda: "AuthenticAMD 25 17")
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(tuning, "tuned_file", lambda: tmp_path / "own.json")
    here, other = replace(ENTRY, rule="a", machine="AuthenticAMD 25 17"), replace(ENTRY, machine="AuthenticAMD 25 33")
    for file in ("shipped.json", "own.json"):
        (tmp_path / file).write_text(Tuning([here, other]).text())
        assert find_tuning(None).entries() == (here,)
        assert len(find_tuning(tmp_path / file)) == 2
        (tmp_path / file).unlink()


def test_what_ships_is_of_products_that_exist_and_gives_the_same_bits() -> None:
    """Every entry is read back, was faster, and changes no bit of a smaller product of its scheme."""
    shipped = read_tuning(tuning.SHIPPED)
    assert len(shipped) > 0 and shipped.text() == tuning.SHIPPED.read_text(encoding="utf-8")
    for target_name in {entry.target for entry in shipped.entries()}:
        target = parse_target(target_name)
        entries = [entry for entry in shipped.entries() if entry.target == target_name]
        assert all(entry.speed >= GAIN and entry.machine for entry in entries)
        assert {entry.rule for entry in entries} <= {"integer_product", "code_product"}
        if host_runs(target) is not None:
            continue
        picked = {(entry.shape.split(",")[0], entry.schedule) for entry in entries}
        for rows in (1, 21):
            trials = []
            for i, (scheme, schedule) in enumerate(picked):
                bits = int(scheme[0]) if scheme.endswith("levels") else 0
                contraction = _codes(rows, bits) if bits else _matmul(rows, scheme, "int8")
                trials += [Trial(f"u{i}", contraction), Trial(f"s{i}", contraction, schedule)]
            results = results_of(build_trials(trials, target))
            for i in range(len(picked)):
                np.testing.assert_array_equal(results[f"u{i}"], results[f"s{i}"])


def test_a_compilation_takes_what_ships(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = next(item for item in read_tuning(tuning.SHIPPED).entries() if item.rule == "integer_product")
    monkeypatch.setattr(machine, "processor", lambda: entry.machine)
    monkeypatch.setattr(tuning, "tuned_file", lambda: tmp_path / "none.json")
    target = parse_target(entry.target).with_tuning(find_tuning(None))
    scheme, rows, shape = entry.shape.split(", ")
    n, taps, channels = map(int, shape.split("x"))
    count: Any = {"1 rows": 1, "few rows": 8, "many rows": 99, "any rows": "rows"}[rows]
    weight = made_up_weight(scheme, (n, taps, channels))
    made = Contraction("m", "matmul", weight, "int8", (count, channels), (count, n))
    assert scheduled(target, entry.rule, made).schedule == entry.schedule
    assert target.tuning_facts is not None and target.tuning_facts["schedules"] >= 1
    monkeypatch.setattr(machine, "processor", lambda: "another")
    assert scheduled(target.with_tuning(find_tuning(None)), entry.rule, made).schedule is None


def test_made_up_weights_have_coded_scales() -> None:
    weight = made_up_weight("int4:b32/i4", (5, 1, 64))
    assert isinstance(weight, QTensor) and weight.scale_steps is not None
    assert weight.integer_levels().shape == (5, 1, 64)


@pytest.mark.parametrize(
    ("rows", "expected"), [((1,), "1 rows"), ((1, 15), "few rows"), ((4, 4), "many rows"), (("batch", 4), "any rows")]
)
def test_classes_of_rows(rows: tuple[Any, ...], expected: str) -> None:
    assert shape_class("nf4:b64", rows, (48, 1, 64)) == f"nf4:b64, {expected}, 48x1x64"


def test_the_database_is_plain_json() -> None:
    data = json.loads(Tuning([replace(ENTRY, machine="AuthenticAMD 25 17")]).text())
    assert data["entries"][0]["machine"] == "AuthenticAMD 25 17"
    assert data["entries"][0]["schedule"] == {"rows": 2, "tiles": 1, "few_tiles": 3, "unroll": 0}
