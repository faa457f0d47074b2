"""Bundles of the real models, each compiled once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tasks

import kbitc
from kbitc.report import Report

Compile = Callable[..., "Compiled"]


@dataclass(frozen=True)
class Compiled:
    """A bundle and the report of its compilation."""

    bundle: Path
    report: Report


@pytest.fixture(scope="session")
def task(real_models: dict[str, Path]) -> Callable[[str], tasks.Task]:
    """`task("cls")`: the model with its samples and its measure, made once (real_models fetches what it needs)."""
    made: dict[str, tasks.Task] = {}

    def get(name: str) -> tasks.Task:
        if name not in made:
            made[name] = tasks.TASKS[name]()
            assert made[name].model == real_models[name]
        return made[name]

    return get


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory, task: Callable[[str], tasks.Task]) -> Compile:
    """`compiled("cls", 4, "host")`: compiled by the Python interface; debug=True keeps codes and accumulators."""
    folder = tmp_path_factory.mktemp("bundles")
    made: dict[tuple[str, int, str, bool], Compiled] = {}

    def get(name: str, bits: int, target: str = "host", debug: bool = False) -> Compiled:
        key = (name, bits, target, debug)
        if key not in made:
            bundle = folder / f"{name}-{bits}-{len(made)}.kbit"
            model, shapes = task(name).model, task(name).shapes
            report = kbitc.compile(model, bundle, bits=bits, target=target, shapes=shapes, debug_accumulators=debug)
            made[key] = Compiled(bundle, report)
        return made[key]

    return get


@pytest.fixture(scope="session")
def quantized_onnx(tmp_path_factory: pytest.TempPathFactory, task: Callable[[str], tasks.Task]) -> Callable[..., Path]:
    """`quantized_onnx("cls", 4, target)`: the quantized ONNX file of a model."""
    folder = tmp_path_factory.mktemp("onnx")
    made: dict[tuple[str, int, str], Path] = {}

    def get(name: str, bits: int, target: str = "host") -> Path:
        key = (name, bits, target)
        if key not in made:
            path = folder / f"{name}-{bits}-{len(made)}.onnx"
            kbitc.quantize(task(name).model, path, bits=bits, target=target, shapes=task(name).shapes)
            made[key] = path
        return made[key]

    return get
