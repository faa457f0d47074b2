"""The order of the stages. The only file that knows it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

from kbitc import catalog
from kbitc.errors import UnsupportedError
from kbitc.options import DEFAULT_FORM, CompileOptions, Method
from kbitc.quant.plan import UINT8, QuantPlan, read_plan
from kbitc.quant.tensor import QTensor
from kbitc.report import Report, WeightReport, provenance, with_packed_sizes
from kbitc.trace import Trace

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from kbitc.bundle.writer import Staging
    from kbitc.importer.batches import Batches
    from kbitc.kernel_times import KernelTimes
    from kbitc.never_slower import Compared
    from kbitc.passes.carried import Carried
    from kbitc.passes.verify.accuracy import References
    from kbitc.passes.verify.score import Score
    from kbitc.planner import Planner
    from kbitc.targets.build import Built
    from kbitc.targets.target import Target

    Source: TypeAlias = str | PathLike[str] | onnx.ModelProto

FORMS = "kbitc.passes.interchange"


@dataclass(frozen=True)
class Prepared:
    """What is the same for every plan: the canonical float model and the samples."""

    original: ir.Model
    feeds: list[dict[str, Any]]
    data: str
    calibration: Batches | None
    provenance: dict[str, Any]
    carried: Carried | None = None

    @property
    def floats(self) -> ir.Model:
        """The model that is quantized: without the rounding that an already quantized model does itself."""
        return self.original if self.carried is None else self.carried.model

    def solved_on(self) -> list[dict[str, Any]]:
        """The batches that weights are solved on; none without calibration data."""
        from kbitc.importer.feeds import SOLVED_BATCHES, SOLVED_BYTES

        return [] if self.calibration is None else self.calibration.spread(SOLVED_BATCHES, SOLVED_BYTES)


@dataclass(frozen=True)
class Quantized:
    """What stages 6 and 7 give: the quantized model and the reference outputs."""

    model: ir.Model
    plan: QuantPlan
    tensors: dict[str, QTensor]
    weights: tuple[WeightReport, ...]
    references: References


def quantize_model(
    source: Source, output: str | PathLike[str], options: CompileOptions, calibration: Any = None,
    trace: Trace | None = None,
) -> Report:  # fmt: skip
    """Stages 0 to 8 and the ONNX file, or another form of it.

    Raises:
        KbitcError: with the reason in one line; nothing is written then.
    """
    from kbitc.importer.files import fresh_output, size_of
    from kbitc.passes.interchange._export import Export
    from kbitc.passes.verify import accuracy
    from kbitc.targets.target import parse_target

    trace = trace or Trace(options.dump_dir)
    target = parse_target(options.target)
    path = fresh_output(output, options.force)
    form: Any = catalog.find(FORMS, options.form, "format")
    prepared = prepare(source, options, target, calibration, trace)
    planner, kinds = make_planner(prepared, options, [target], trace, bundle=False)
    while True:
        made = quantize_prepared(prepared, planner.plan, kinds, options, trace)
        exported = Export(prepared.original, made.model, made.plan, made.tensors, kinds)
        report = Report(str(path), None, options.scheme_text, made.weights, {}, (), {}, trace.seconds)
        with trace.stage("write"):
            size = size_of(partial(form.write, exported), path) if options.budget.size is not None else 0
        if planner.accepts(size, report.bits_per_weight):
            break
    measured = accuracy.measure(made.references, None)
    accuracy.check_floor(measured, options.min_sqnr)
    trace.dump("08-accuracy.json", lambda: json.dumps(measured.as_json(), indent=1) + "\n")
    with trace.stage("write"):
        size = form.write(exported, path)
    made.plan.write(options.write_plan)
    return replace(report, accuracy=measured.as_json(), bytes={options.form: size}, planning=planner.summary())


def compile_model(
    source: Source, output: str | PathLike[str], options: CompileOptions, calibration: Any = None,
    trace: Trace | None = None,
) -> Report:  # fmt: skip
    """All stages: the bundle. What is verified is what lies in the bundle.

    Raises:
        KbitcError: with the reason in one line; nothing is written then.
    """
    from kbitc.bundle.writer import check_output, stage
    from kbitc.targets.target import parse_targets
    from kbitc.targets.tuning import find_tuning

    trace = trace or Trace(options.dump_dir)
    tuning = find_tuning(options.speed.tuned)
    targets = [target.with_tuning(tuning) for target in parse_targets(options.target)]
    check_output(output, force=options.force)
    prepared = prepare(source, options, targets[0], calibration, trace)
    compared = compare_layers(prepared, options, targets, trace) if options.speed.never_slower else ()
    planner, kinds = make_planner(prepared, options, targets, trace, bundle=True, compared=compared)
    while True:
        with stage(output, force=options.force) as staging:
            made = quantize_prepared(prepared, planner.plan, kinds, options, trace)
            report = compile_plan(
                staging, str(output), made, planner, prepared.provenance, options, targets, trace, compared
            )
        if report is not None:
            made.plan.write(options.write_plan)
            return report


def compile_plan(
    staging: Staging, output: str, made: Quantized, planner: Planner, origin: dict[str, Any],
    options: CompileOptions, targets: Sequence[Target], trace: Trace, compared: Compared = (),
) -> Report | None:  # fmt: skip
    """Stages 8 to 12 of one plan. None when the planner does not accept the size of the result: it is not published."""
    from kbitc.passes.verify import accuracy
    from kbitc.targets.build import build_all
    from kbitc.targets.costs import sizes_of, with_predictions
    from kbitc.targets.target import bundle_name, fastest

    with trace.stage("lower and build"):
        every = build_all(made.model, targets, debug_accumulators=options.debug_accumulators, dump=trace.dump)
        staging.write_variants(every)
        if options.keep_onnx:
            keep_onnx(staging, made.model)
    built = every[-1]
    with trace.stage("verify"):
        # The last one is what the report shows: the best that runs here.
        for module in staged_modules(staging, built) or (None,):
            measured = accuracy.measure(made.references, module)
            accuracy.check_lowering(measured)
    trace.dump("08-accuracy.json", lambda: json.dumps(measured.as_json(), indent=1) + "\n")
    layers = with_predictions(built.layers, fastest(targets).name, sizes_of(built.inputs, made.references.feeds[0]))
    report = Report(
        output, bundle_name(targets), options.scheme_text, with_packed_sizes(made.weights, built.weights),
        measured.as_json(), layers, staging.sizes, trace.seconds, planner.summary(), built.calls,
        [item.as_json() for item in compared],
    )  # fmt: skip

    def accepts(size: int) -> bool:
        if not planner.accepts(size, report.bits_per_weight):
            return False
        accuracy.check_floor(measured, options.min_sqnr)
        return True

    with trace.stage("write"):
        published = finish_bundle(staging, built, report, made.plan, origin, options, accepts)
    return report if published else None


def prepare(source: Source, options: CompileOptions, target: Target, calibration: Any, trace: Trace) -> Prepared:
    """Stages 1 to 3."""
    from kbitc.graph import legality
    from kbitc.graph.text import model_text
    from kbitc.importer import load_model
    from kbitc.importer.feeds import open_batches, sample_feeds
    from kbitc.importer.signature import parse_constant, parse_shape
    from kbitc.passes.canonicalize import canonicalize
    from kbitc.passes.split.pipeline import split_products
    from kbitc.static import find_carried

    trace.dump("00-options.json", options.text)
    with trace.stage("import"):
        imported = load_model(
            source,
            shapes=dict(map(parse_shape, options.shapes)),
            constants=dict(map(parse_constant, options.constants)),
        )
        legality.require(legality.after_import(imported), "import")
        trace.dump("01-import.onnx.txt", lambda: model_text(imported))
    with trace.stage("canonicalise"):
        original = canonicalize(imported)
        legality.require(legality.after_canonicalize(original), "canonicalisation")
        original = split_products(original, options.scheme, centre=options.centre, proxy=options.proxy)
        trace.dump("02-canonical.onnx.txt", lambda: model_text(original))
    with trace.stage("check target"):
        check_target(original, target)
    with trace.stage("samples"):
        batches = None if calibration is None else open_batches(original, calibration)
        feeds, data = sample_feeds(original, batches)
    carried = find_carried(original, options, target)
    return Prepared(original, feeds, data, batches, provenance(source, options.text()), carried)


def quantize_prepared(
    prepared: Prepared, plan: QuantPlan, kinds: dict[str, str], options: CompileOptions, trace: Trace
) -> Quantized:
    """Stages 6 and 7."""
    from kbitc.graph import legality
    from kbitc.graph.text import model_text
    from kbitc.passes.rewrite.pipeline import rewrite
    from kbitc.passes.solve import account, solve_weights
    from kbitc.passes.verify.accuracy import HELD_BYTES, reference_runs
    from kbitc.static import plan_static

    with trace.stage("quantize"):
        # Inputs of what a quantized model keeps float are not those of its float model.
        feeds = prepared.solved_on() if prepared.carried is None else []
        carried = {} if prepared.carried is None else prepared.carried.tensors
        method = options.method(bool(feeds))
        solved = solve_weights(prepared.floats, plan, kinds, method, feeds, trace.on_stage, carried=carried)
        weights = account(solved, plan, kinds)
    if options.activation == UINT8 or prepared.carried is not None:
        with trace.stage("plan activations"):
            samples = replace(prepared, original=solved.model)
            plan, weights = plan_static(samples, plan, solved.tensors, weights, options, trace.on_stage)
    trace.dump("05-plan.json", plan.text)
    with trace.stage("rewrite"):
        quantized = rewrite(solved.model, plan, solved.tensors, kinds)
        legality.require(legality.after_rewrite(quantized), "the rewrite")
        trace.dump("07-quantized.onnx.txt", lambda: model_text(quantized))
    with trace.stage("reference runs"):
        held = HELD_BYTES if options.budget.max_drop is None else math.inf  # a score needs every label's sample
        references = reference_runs(prepared.original, quantized, prepared.feeds, prepared.data, held)
    return Quantized(quantized, plan, solved.tensors, weights, references)


def check_target(model: ir.Model, target: Target) -> None:
    """Refuse operators that cannot be lowered, before anything is quantized."""
    from kbitc.bundle.engine import torch_hidden, tvm_ffi
    from kbitc.graph.legality import refuse_unlowerable

    tvm_ffi()  # before tvm, which needs it
    with torch_hidden():  # tvm would import it where it is installed, for seconds
        from kbitc.targets.build import check_lowerable

    refuse_unlowerable(model)
    check_lowerable(model, target)


def compare_layers(prepared: Prepared, options: CompileOptions, targets: Sequence[Target], trace: Trace) -> Compared:
    """What `--never-slower` asks: every weight that the other options quantize against float, on the best variant."""
    from kbitc.never_slower import compare
    from kbitc.targets.target import fastest

    target = fastest(targets)
    plan, kinds = make_plan(prepared.original, options, target)
    with trace.stage("compare with float"):
        made = quantize_prepared(prepared, plan, kinds, options.quickly_solved(), Trace())
        return compare(prepared.original, made.model, made.plan, target, prepared.feeds[0], options.plan)


def make_plan(
    model: ir.Model, options: CompileOptions, target: Target, levels: Mapping[str, QTensor] | None = None
) -> tuple[QuantPlan, dict[str, str]]:
    """Stage 5 without a budget; also the view (matmul, conv, embedding) of every planned tensor."""
    from kbitc.passes.allocate.blocks import with_blocks
    from kbitc.passes.allocate.exclude import excluded_by
    from kbitc.passes.allocate.given import apply_requests
    from kbitc.passes.allocate.survey import survey
    from kbitc.passes.allocate.uniform import accepted_by, allocate, keep_float
    from kbitc.passes.carried import with_levels
    from kbitc.passes.split import kept_float, widen_kept

    form = catalog.find(FORMS, options.form, "format")
    candidates = survey(model)
    kinds = {candidate.tensor: candidate.kind for candidate in candidates}
    excluded = excluded_by(candidates, options.exclude) | kept_float(candidates)
    accepts = accepted_by(target, partial(form.declines, options.widen))
    if options.scheme is None:
        plan = keep_float(candidates)
    else:
        plan = widen_kept(allocate(model, candidates, options.scheme, options.activation, excluded, accepts))
        plan = with_blocks(model, candidates, plan, accepts) if options.blocks else plan
    if levels:
        plan = with_levels(model, plan, candidates, levels, excluded, accepts)
    if options.plan is not None:
        requests = read_plan(options.plan)
        plan = apply_requests(model, candidates, plan, requests, options.activation, excluded, accepts)
    if options.form != DEFAULT_FORM and options.scheme is not None and not plan.quantized():
        reason = next((entry.reason for entry in plan.entries), "the model has no weights")
        raise UnsupportedError("nothing would be quantized", where=f"--format {options.form}", got=reason)
    return plan, kinds


def make_planner(
    prepared: Prepared, options: CompileOptions, targets: Sequence[Target], trace: Trace, *, bundle: bool,
    compared: Compared = (),
) -> tuple[Planner, dict[str, str]]:  # fmt: skip
    """Stage 5; also the view of every planned tensor. Weights that were slower than float when compared stay float."""
    from kbitc.budget_planner import budget_planner
    from kbitc.kernel_times import kernel_times
    from kbitc.passes.allocate.uniform import accepted_by
    from kbitc.passes.rewrite.pipeline import rewrite
    from kbitc.passes.solve import solve_weights
    from kbitc.passes.verify.score import make_judge
    from kbitc.planner import MEASURED_WITH, Settled, estimate_others
    from kbitc.targets.target import fastest

    model, target = prepared.floats, targets[0]
    levels = None if prepared.carried is None else prepared.carried.tensors
    with trace.stage("plan"):
        base, kinds = make_plan(model, options, target, levels)
        base = base.kept_float({item.entry.tensor: item.reason for item in compared if item.slower})
        if not options.budget.limits_plan or options.scheme is None:
            return Settled(base), kinds

        def quantized(plan: QuantPlan) -> ir.Model:
            return rewrite(model, plan, solve_weights(model, plan, kinds, Method(MEASURED_WITH)).tensors, kinds)

        form = catalog.find(FORMS, options.form, "format")
        accepts = accepted_by(target, partial(form.declines, options.widen))
        others = partial(estimate_others, quantized, target) if bundle else None
        score = make_judge(options.budget.metric, options.budget.labels)

        def judge(plan: QuantPlan) -> Score:
            references = quantize_prepared(prepared, plan, kinds, options, trace).references
            return score(references.original, references.quantized)

        def times() -> KernelTimes:
            return kernel_times(quantized(base), fastest(targets), prepared.feeds[0])

        return budget_planner(model, base, prepared.feeds, options, accepts, others, judge, times), kinds


def keep_onnx(staging: Staging, model: ir.Model) -> None:
    """Put the quantized ONNX into the bundle, with its weights beside it when they do not fit one file."""
    from kbitc.bundle.manifest import QUANTIZED
    from kbitc.importer.files import write_model

    with TemporaryDirectory(prefix="kbitc-") as folder:
        write_model(model, Path(folder) / QUANTIZED)
        for file in sorted(Path(folder).iterdir()):
            staging.add_file(file.name, file)


def staged_modules(staging: Staging, built: Built) -> list[Callable[..., Any]]:
    """The variants as they lie in the unfinished bundle and as far as they run here, each a function of feeds."""
    from kbitc.bundle.runtime import load_parts
    from kbitc.targets.target import host_runs, parse_target

    return [
        load_parts(
            staging.folder / variant.library, staging.weights, staging.parameters_of(variant),
            built.inputs, built.outputs, device=built.target.device,
        )
        for variant in reversed(staging.variants)
        if host_runs(parse_target(variant.target)) is None
    ]  # fmt: skip


def finish_bundle(
    staging: Staging, built: Built, report: Report, plan: QuantPlan, origin: dict[str, Any],
    options: CompileOptions, accepts: Callable[[int], bool],
) -> bool:  # fmt: skip
    """Report, runtime files and manifest; then, when the size of all is accepted, the one rename."""
    from kbitc import __version__
    from kbitc.targets.runner.deploy import with_runtime

    staging.write_json("report.json", report.as_json(timings=False))
    for name, content in (with_runtime(built.target) if options.with_runtime else {}).items():
        staging.add_file(name, content, executable="/" not in name)
    manifest = staging.commit(
        built.inputs, built.outputs, kbitc_version=__version__, plan=plan.as_json(), accuracy=report.accuracy,
        provenance={**origin, "tuning": built.target.tuning_facts}, accepts=accepts,
    )  # fmt: skip
    return manifest is not None
