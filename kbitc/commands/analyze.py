"""`kbitc analyze`: where the accuracy of a quantized model goes, as data and as one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitc import catalog, driver
from kbitc.errors import UsageError
from kbitc.graph.evaluate import Session
from kbitc.graph.functions import add_functions
from kbitc.importer.files import fresh_output
from kbitc.options import CompileOptions, Method, default_scheme
from kbitc.passes.allocate.allocation import by_noise
from kbitc.passes.allocate.allocators import second_order, sensitivity
from kbitc.passes.allocate.choices import FLOAT_BITS, Choice, Problem, make_problem
from kbitc.passes.allocate.survey import survey
from kbitc.passes.allocate.uniform import accepted_by
from kbitc.passes.analyze.layers import LayerAnalysis, analyze_layers, noise_db
from kbitc.passes.analyze.matching import DEPARTS_DB, Match, first_departure, match
from kbitc.passes.rewrite.pipeline import activation_blocks, rewrite
from kbitc.passes.rewrite.quantize_activations import quantize_activations
from kbitc.passes.solve import Solved, solve_weights
from kbitc.planner import MEASURED_WITH, SOLVERS
from kbitc.quant.metrics import OutputAccuracy, compare
from kbitc.quant.moments import InputMoments
from kbitc.quant.plan import FLOAT, QuantPlan
from kbitc.quant.tensor import QTensor
from kbitc.targets.target import Target, parse_target
from kbitc.trace import Trace

if TYPE_CHECKING:
    import onnx_ir as ir

ANALYSIS_VERSION = 1
DATA_SUFFIX = ".json"
Accuracies = Mapping[str, OutputAccuracy]


def analyze_model(
    model: Path, calibration: Path | None, options: CompileOptions, trace: Trace, *, estimate: bool = False
) -> dict[str, Any]:
    """Measure everything; plain data for json.dumps.

    Args:
        model: ONNX file.
        calibration: samples, or None: inputs are made up then.
        options: scheme, activations, target, shapes, plan and solver of the analysed model; without a solver its
            weights are rounded to nearest.
        trace: announces the stages.
        estimate: sensitivities to second order instead of measured ones.

    Raises:
        KbitcError: as `kbitc quantize`, or the model has no weight that can be quantized.
    """
    target = parse_target(options.target)
    options = replace(options, scheme=options.scheme or default_scheme())
    prepared = driver.prepare(model, options, target, calibration, trace)
    method = options.method(prepared.calibration is not None) if options.solver else Method(MEASURED_WITH)
    bench = _Bench(prepared, method)
    with trace.stage("plan"):
        plan, kinds = driver.make_plan(prepared.original, options, target)
        problem = _problem(prepared, plan, options, target)
    if not problem.layers:
        reasons = sorted({entry.reason for entry in plan.entries}) or ["the model has none"]
        raise UsageError("no weight of the model can be quantized", where=str(model), got="; ".join(reasons[:3]))
    with trace.stage("sensitivity of each layer"):
        noise = second_order.estimate(problem) if estimate else sensitivity.measure(problem)
    with trace.stage("layers alone and left out"):
        solved = bench.solve(plan)
        layers, all_weights = analyze_layers(problem, solved.tensors, noise)
    with trace.stage("values along the graph"):
        quantized = rewrite(solved.model, plan, solved.tensors, kinds)
        matches, activations = match(prepared.original, quantized, plan, prepared.feeds)
    with trace.stage("plans of other widths"):
        asked = bench.run(plan)
        widths = _widths(problem, bench)
        suggested = _suggested(problem, noise, plan, bench)
        rounded = bench.run(plan, weights=False)
    return {
        "version": ANALYSIS_VERSION,
        "model": {
            **_model(model, problem, prepared.provenance), "scheme": options.scheme_text, "target": target.name,
            "solver": method.solver,
        },
        "data": prepared.data,
        "made_up": calibration is None,
        "accuracy": _accuracy(asked),
        "noise": {
            "weights_db": noise_db(all_weights), "activations_db": _worst(rounded), "together_db": _worst(asked),
        },
        "widths": widths,
        "suggested": suggested,
        "layers": [_layer(item, activations) for item in layers],
        "left_float": [entry.as_json() for entry in plan.entries if entry.scheme is None],
        "matching": {
            "departs_db": DEPARTS_DB, "first": _departure(matches), "values": [vars(item) for item in matches],
        },
    }  # fmt: skip


def check_outputs(output: Path, plan: Path | None, force: bool) -> None:
    """Refuse outputs that cannot be written, before anything is measured.

    Raises:
        UsageError: a file exists, or its folder does not.
    """
    for path in (output, output.with_suffix(DATA_SUFFIX), plan):
        if path is not None:
            fresh_output(path, force)
    if output.suffix == DATA_SUFFIX:
        raise UsageError("the page is HTML; its data go beside it", got=str(output), remedy="give -o report.html")


def write_analysis(data: Mapping[str, Any], output: Path, plan: Path | None) -> None:
    """Write the page, the JSON beside it, and the suggested plan where it is asked for."""
    from kbitc.page.render import render

    output.write_text(render(data), encoding="utf-8")
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    output.with_suffix(DATA_SUFFIX).write_text(text, encoding="utf-8")
    if plan is not None:
        plan.write_text(json.dumps(data["suggested"]["plan"], indent=1) + "\n", encoding="utf-8")


class _Bench:
    """Solves plans, runs them in onnxruntime and compares them with the float model, which runs once."""

    def __init__(self, prepared: driver.Prepared, method: Method) -> None:
        self._prepared, self._method = prepared, method
        self._inputs: dict[str, InputMoments] = {}
        self._solving = [] if method.solver == MEASURED_WITH else prepared.solved_on()
        self._kinds = {candidate.tensor: candidate.kind for candidate in survey(prepared.original)}
        self._float: list[dict[str, Any]] | None = None

    def solve(self, plan: QuantPlan) -> Solved:
        """The weights of a plan, and the model with its corrected biases."""
        model = self._prepared.original
        return solve_weights(model, plan, self._kinds, self._method, self._solving, memo=self._inputs)

    def run(self, plan: QuantPlan, *, weights: bool = True) -> Accuracies:
        """Accuracy of a plan; without weights only its activations are rounded."""
        model, feeds = self._prepared.original, self._prepared.feeds
        solved = self.solve(plan)
        if self._float is None:
            session = Session(model)
            self._float = [session.run(feed) for feed in feeds]
        if weights:
            session = Session(rewrite(solved.model, plan, solved.tensors, self._kinds))
        else:
            session = Session(_rounded(model, plan, solved.tensors))
        return compare(self._float, [session.run(feed) for feed in feeds])


def _rounded(model: ir.Model, plan: QuantPlan, tensors: Mapping[str, QTensor]) -> ir.Model:
    """The float model with the activations of the plan rounded at run time."""
    copy = model.clone()
    needed = quantize_activations(copy, activation_blocks(plan, dict(tensors)))
    add_functions(copy, needed, copy.graph.opset_imports[""])
    return copy


def _problem(prepared: driver.Prepared, plan: QuantPlan, options: CompileOptions, target: Target) -> Problem:
    solver = catalog.find(SOLVERS, MEASURED_WITH, "solver")
    return make_problem(
        prepared.original, survey(prepared.original), plan, (), options.scheme or default_scheme(),
        options.activation, accepted_by(target), prepared.feeds, solver.solve,
    )  # fmt: skip


def _widths(problem: Problem, bench: _Bench) -> list[dict[str, Any]]:
    """One row a width: every layer at it."""
    rows = []
    for width in sorted({_bits(choice) for layer in problem.layers for choice in layer.choices}):
        chosen = [_nearest([_bits(choice) for choice in layer.choices], width) for layer in problem.layers]
        rows.append({"bits": width, **_row(problem, chosen, bench.run(problem.plan(chosen)))})
    return rows


def _nearest(widths: Sequence[int], wanted: int) -> int:
    return min(range(len(widths)), key=lambda index: abs(widths[index] - wanted))


def _suggested(problem: Problem, noise: Sequence[Sequence[float]], plan: QuantPlan, bench: _Bench) -> dict[str, Any]:
    """The mixed plan of the size of the analysed one, or that one where mixing wins nothing."""
    asked = {entry.tensor: entry for entry in plan.entries}
    current = [
        [choice.entry.scheme for choice in layer.choices].index(asked[layer.candidate.tensor].scheme)
        for layer in problem.layers
    ]
    sizes = [[choice.bits for choice in layer.choices] for layer in problem.layers]
    limit = sum(row[index] for row, index in zip(sizes, current, strict=True))
    found = by_noise(problem, noise)(sizes, limit)
    mixed = current if found is None else list(found.chosen)
    rows = [(_row(problem, chosen, bench.run(problem.plan(chosen))), chosen) for chosen in (current, mixed)]
    row, chosen = max(rows, key=lambda item: float(item[0]["sqnr_db"]))
    predicted = None if found is None or chosen is current else found.sqnr_db
    return {**row, "predicted_db": predicted, "plan": problem.plan(chosen).as_json()}


def _row(problem: Problem, chosen: Sequence[int], accuracy: Accuracies) -> dict[str, Any]:
    bits = sum(layer.choices[index].bits for layer, index in zip(problem.layers, chosen, strict=True))
    bits += problem.fixed_bits
    agreement = [item.top1_agreement for item in accuracy.values() if item.top1_agreement is not None]
    return {
        "bits_per_weight": bits / problem.weights,
        "bytes": -(-bits // 8),
        "sqnr_db": _worst(accuracy),
        "top1_agreement": min(agreement, default=None),
    }


def _bits(choice: Choice) -> int:
    return 0 if choice.entry.scheme is None else choice.entry.scheme.bits


def _worst(accuracy: Accuracies) -> float:
    return min((item.sqnr_db for item in accuracy.values()), default=0.0)


def _accuracy(accuracy: Accuracies) -> dict[str, Any]:
    return {name: item.as_json() for name, item in accuracy.items()}


def _model(path: Path, problem: Problem, provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": path.name,
        "sha256": provenance["model_sha256"],
        "weights": problem.weights,
        "float_bytes": problem.weights * FLOAT_BITS // 8,
        "layers": len(problem.layers),
    }


def _departure(matches: Sequence[Match]) -> dict[str, Any] | None:
    found = first_departure(matches)
    return None if found is None else vars(found)


def _layer(item: LayerAnalysis, activations: Mapping[str, Any]) -> dict[str, Any]:
    seen = activations.get(item.entry.tensor)
    return {
        **item.entry.as_json(),
        "weights": item.weights,
        "bits_per_weight": item.bits_per_weight,
        "alone_db": {str(bits): value for bits, value in item.alone_db.items()},
        "noise": item.noise,
        "exclusion_db": item.exclusion_db,
        "weight_db": item.weight_db,
        "theory_db": item.theory_db,
        "peak_to_rms": item.peak_to_rms,
        "histogram": {**item.histogram.as_json(), "levels": list(item.levels)},
        "activation_histogram": None if seen is None else seen.as_json(),
        "activation_is_float": item.entry.activation == FLOAT,
    }
