"""Whole models on the emulated device: what a CUDA bundle would compute, against onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Feeds = Mapping[str, npt.NDArray[Any]]


def quantized_model(path: str, scheme: str | None, activations: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The canonical model of a file, quantized by round to nearest (None: left float)."""
    from kbitc import driver
    from kbitc.importer import load_model
    from kbitc.options import Method, from_arguments
    from kbitc.passes.canonicalize import canonicalize
    from kbitc.passes.rewrite.pipeline import rewrite
    from kbitc.passes.solve import solve_weights
    from kbitc.targets.target import parse_target

    model = canonicalize(load_model(path, shapes=dict(shapes)))
    if scheme is None:
        return model
    options = from_arguments(scheme=scheme, activations=activations)
    plan, kinds = driver.make_plan(model, options, parse_target("cuda:sm_90"))
    tensors = solve_weights(model, plan, kinds, Method("rtn")).tensors
    return rewrite(model, plan, tensors, kinds)


def run(model: Any, feeds: Feeds, debug: bool = False) -> tuple[dict[str, npt.NDArray[Any]], list[dict[str, Any]]]:
    """In the emulator's process: compile for cuda:sm_90 and run. Outputs by name, and the facts of the layers."""
    from kbitc.bundle.runtime import load_built
    from kbitc.targets.build import build
    from kbitc.targets.target import parse_target

    built = build(model, parse_target("cuda:sm_90"), debug_accumulators=debug)
    module = load_built(built.library, built.weights, built.inputs, built.outputs, device="cuda")
    return {name: np.asarray(value) for name, value in module(dict(feeds)).items()}, list(built.layers)


def reference(model: Any, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
    """The same model in onnxruntime."""
    from kbitc.graph.evaluate import evaluate

    return dict(evaluate(model, dict(feeds)))
