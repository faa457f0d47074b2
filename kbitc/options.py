"""Stage 0: what the user asked for, as types. Text stops here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from kbitc import catalog
from kbitc.budget import Budget, make_budget
from kbitc.errors import UsageError
from kbitc.quant.plan import FLOAT, INT8, UINT8
from kbitc.quant.scheme import Granularity, QuantScheme

DEFAULT_BITS = 4
DEFAULT_BLOCK = 32
DEFAULT_FORM = "onnx"
ACTIVATIONS = {"float": FLOAT, "dynamic": INT8, "static": UINT8}
#: Where nothing is said, a model that carries ranges of its activations is computed with these.
DEFAULT_ACTIVATIONS = "dynamic"
ACT_BITS = range(4, 9)
#: The observer that loses least on the examples: whether numbers far outside the rest count, only the outputs tell.
DEFAULT_OBSERVER = "measured"
SOLVERS = "kbitc.passes.solvers"
EQUALIZERS = "kbitc.passes.equalize"
CALIBRATED_SOLVER, DATA_FREE_SOLVER = "gptq", "rtn"
CALIBRATED_EQUALIZERS = ("bias_correction",)
#: Before those, where codes of activations have one scale a tensor.
STATIC_EQUALIZERS = ("norm_outliers",)
#: Weights of fewer bits are solved layer by layer: on 8 bits there is nothing to make up for.
SEQUENTIAL_BELOW = 8
#: The solver of this name is half of a method; the other half is the equalizer of this name.
AWQ = "awq"
#: Options of `kbitc compile` that `kbitc quantize` has not.
BUNDLE_ONLY = ("debug_accumulators", "with_runtime", "keep_onnx", "never_slower", "tuned")


@dataclass(frozen=True)
class Method:
    """How weights are solved.

    Attributes:
        solver: file name below passes/solvers.
        equalizers: file names below passes/equalize, in the order in which they are applied.
        sequential: watch the inputs of a layer in the model whose earlier layers are quantized already.
    """

    solver: str
    equalizers: tuple[str, ...] = ()
    sequential: bool = False


@dataclass(frozen=True)
class Speed:
    """What is done for speed.

    Attributes:
        never_slower: weights whose layers are slower than float stay float.
        tuned: file of schedules that `kbitc tune` has found; None takes the one of the cache folder, if any.
    """

    never_slower: bool = False
    tuned: Path | None = None


@dataclass(frozen=True)
class CompileOptions:
    """Everything that `kbitc compile` and `kbitc quantize` decide by.

    Attributes:
        scheme: what every weight becomes; None compiles the float model.
        activation: "int8" (quantized at run time), "uint8" (planned from calibration) or "float32".
        act_bits: bits of a planned activation, 4 to 8.
        observer: what gives the ranges of planned activations.
        integer_only: refuse a graph in which a float operator is left.
        target: text form of the target.
        shapes: symbolic dimensions bound by the user, as NAME=1x3x224x224 texts.
        constants: inputs made constants by the user, as NAME=16000 texts.
        exclude: patterns of weights that stay float.
        centre: weights of matrix products are quantized without the means of their blocks.
        proxy: percent of the inputs of matrix products that are kept at 8 bits; None for none.
        min_sqnr: least signal-to-quantization-noise ratio in dB that is accepted.
        dump_dir: folder that receives what each stage leaves.
        force: replace an existing output.
        debug_accumulators: also output int8 codes and int32 accumulators of every integer contraction.
        with_runtime: put the native runner and the runtime libraries into the bundle.
        keep_onnx: put the quantized ONNX into the bundle.
        plan: file whose entries come before every other option.
        write_plan: file that receives the plan that was carried out.
        budget: what the plan has to keep.
        form: what `kbitc quantize` writes, a file of `kbitc.passes.interchange`.
        widen: codes may be written in the next wider type of the form; their values stay.
        solver: how weights are rounded; None chooses by whether there are calibration data.
        equalize: what is done to the float graph for it; None chooses likewise.
        sequential: calibrate each layer on the output of quantized ones; None chooses.
        blocks: weights get integer block scales in place of one scale a channel where that is worth it.
        speed: what is done for speed, apart from what every compilation does.
        own_ranges: a model that rounds activations itself is computed on these codes.
    """

    scheme: QuantScheme | None
    activation: str = INT8
    act_bits: int = 8
    observer: str = DEFAULT_OBSERVER
    integer_only: bool = False
    target: str = "host"
    shapes: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    centre: bool = False
    proxy: float | None = None
    min_sqnr: float | None = None
    dump_dir: Path | None = None
    force: bool = False
    debug_accumulators: bool = False
    with_runtime: bool = False
    keep_onnx: bool = False
    plan: Path | None = None
    write_plan: Path | None = None
    budget: Budget = field(default_factory=Budget)
    form: str = DEFAULT_FORM
    widen: bool = False
    solver: str | None = None
    equalize: tuple[str, ...] | None = None
    sequential: bool | None = None
    blocks: bool = False
    speed: Speed = field(default_factory=Speed)
    own_ranges: bool = False

    def method(self, calibrated: bool) -> Method:
        """How weights are solved, with or without calibration data."""
        solver = self.solver or (CALIBRATED_SOLVER if calibrated else DATA_FREE_SOLVER)
        equalizers = self.equalize
        if equalizers is None:
            equalizers = CALIBRATED_EQUALIZERS if calibrated else ()
            equalizers = (*STATIC_EQUALIZERS, *equalizers) if calibrated and self.activation == UINT8 else equalizers
        if solver == AWQ and AWQ not in equalizers:
            equalizers = (AWQ, *equalizers)
        sequential = self.sequential
        if sequential is None:
            narrow = self.scheme is not None and self.scheme.bits < SEQUENTIAL_BELOW
            sequential = calibrated and narrow and solver == CALIBRATED_SOLVER
        return Method(solver, equalizers, sequential)

    def quickly_solved(self) -> CompileOptions:
        """The options with the quickest method, for weights whose values do not count."""
        return replace(self, solver=DATA_FREE_SOLVER, equalize=(), sequential=False)

    @property
    def scheme_text(self) -> str:
        """Text form of the scheme, float32 when there is none."""
        return FLOAT if self.scheme is None else str(self.scheme)

    def text(self) -> str:
        """The options as JSON."""
        data = asdict(self)
        data["scheme"] = None if self.scheme is None else str(self.scheme)
        return json.dumps(data, indent=1, default=str) + "\n"


def from_arguments(
    *,
    bits: int | None = None,
    scheme: str | None = None,
    block: int | None = None,
    activations: str | None = None,
    act_bits: int | None = None,
    observer: str | None = None,
    integer_only: bool = False,
    target: str = "host",
    shapes: Sequence[str] = (),
    constants: Sequence[str] = (),
    exclude: Sequence[str] = (),
    centre: bool = False,
    proxy: float | None = None,
    min_sqnr: float | None = None,
    dump_dir: str | PathLike[str] | None = None,
    force: bool = False,
    debug_accumulators: bool = False,
    with_runtime: bool = False,
    keep_onnx: bool = False,
    plan: str | PathLike[str] | None = None,
    write_plan: str | PathLike[str] | None = None,
    form: str = DEFAULT_FORM,
    widen: bool = False,
    solver: str | None = None,
    equalize: str | None = None,
    sequential: bool | None = None,
    **limits: Any,
) -> CompileOptions:
    """Options from the plain values of the command line or the Python call.

    The fields of `Speed` are taken out of `limits`, the others go to `make_budget`.

    Raises:
        UsageError: when a value is out of range or two of them contradict.
    """
    speed, budget = make_speed(limits, scheme, integer_only), make_budget(**limits)
    check_choice(budget, bits, scheme)
    activation = UINT8 if integer_only else parse_activations(activations or DEFAULT_ACTIVATIONS)
    check_activation(activation, act_bits, observer, centre, proxy, scheme)
    return CompileOptions(
        scheme=make_scheme(bits, scheme, block, per_channel=activation == UINT8),
        activation=activation, act_bits=8 if act_bits is None else act_bits, observer=observer or DEFAULT_OBSERVER,
        integer_only=integer_only, target=target,
        shapes=tuple(shapes), constants=tuple(constants), exclude=tuple(exclude),
        centre=centre, proxy=proxy, min_sqnr=min_sqnr,
        dump_dir=None if dump_dir is None else Path(dump_dir), force=force,
        debug_accumulators=debug_accumulators, with_runtime=with_runtime, keep_onnx=keep_onnx,
        plan=None if plan is None else Path(plan), write_plan=None if write_plan is None else Path(write_plan),
        budget=budget, form=form.replace("-", "_"), widen=widen,
        solver=None if solver is None else known(SOLVERS, solver, "solver"), equalize=parse_equalizers(equalize),
        sequential=sequential, blocks=activation == UINT8 and scheme is None and block is None, speed=speed,
        own_ranges=activations is None or activation == UINT8,
    )  # fmt: skip


def check_choice(budget: Budget, bits: int | None, scheme: str | None) -> None:
    """Refuse options that leave a budget nothing to choose.

    Raises:
        UsageError: the bits are fixed, or no weight is quantized.
    """
    if not budget.limits_plan:
        return
    if bits is not None:
        raise UsageError("--bits fixes what a budget chooses", got=bits, remedy="drop --bits, or the budget")
    if scheme == FLOAT:
        raise UsageError("--scheme float32 leaves a budget nothing to choose", remedy="drop one of them")


def make_speed(given: dict[str, Any], scheme: str | None, integer_only: bool) -> Speed:
    """What is done for speed; its fields are taken out of `given`.

    Raises:
        UsageError: --never-slower, but no weight is quantized or none may stay float.
    """
    chosen = {item.name: given.pop(item.name) for item in fields(Speed) if item.name in given}
    if chosen.get("never_slower") and (scheme == FLOAT or integer_only):
        other = "--integer-only" if integer_only else "--scheme float32"
        raise UsageError(f"--never-slower has nothing to choose with {other}", remedy="drop one of them")
    if chosen.get("tuned") is not None:
        chosen["tuned"] = Path(chosen["tuned"])
    return Speed(**chosen)


def check_activation(
    activation: str, act_bits: int | None, observer: str | None, centre: bool, proxy: float | None, scheme: str | None
) -> None:
    """Refuse options that say nothing with this type of activations.

    Raises:
        UsageError: as `check_static` and `check_splits` do.
    """
    check_static(activation, act_bits, observer)
    check_splits(centre, proxy, activation, scheme)


def check_splits(centre: bool, proxy: float | None, activation: str, scheme: str | None) -> None:
    """Refuse splits of products that make no sense.

    Raises:
        UsageError: --centre or --proxy with float weights or static activations, or a share that is none.
    """
    if not centre and proxy is None:
        return
    if activation == UINT8 or scheme == FLOAT:
        remedy = "use --activations dynamic or float" if activation == UINT8 else "give a --scheme with fewer bits"
        raise UsageError("--centre and --proxy split products with quantized weights", remedy=remedy)
    if proxy is not None and not 0 < proxy < 100:
        raise UsageError("--proxy is a share of inputs in percent, between 0 and 100", got=proxy)


def check_static(activation: str, act_bits: int | None, observer: str | None) -> None:
    """Refuse --act-bits and --observer where they say nothing, and bits out of range.

    Raises:
        UsageError: as it says.
    """
    if activation != UINT8 and (act_bits is not None or observer is not None):
        raise UsageError("--act-bits and --observer plan activations", remedy="add --activations static")
    if act_bits is not None and act_bits not in ACT_BITS:
        raise UsageError("--act-bits is a whole number from 4 to 8", got=act_bits)


def known(package: str, name: str, kind: str) -> str:
    """The name, when the package has a file of it.

    Raises:
        UsageError: when it has none; names the nearest.
    """
    there = catalog.names(package)
    if name not in there:
        raise UsageError(f"unknown {kind}", got=repr(name), remedy=catalog.nearest(name, there))
    return name


def parse_equalizers(text: str | None) -> tuple[str, ...] | None:
    """The equalizers of --equalize A,B; none for "none".

    Raises:
        UsageError: an unknown one.
    """
    if text is None or text == "none":
        return None if text is None else ()
    return tuple(known(EQUALIZERS, name.strip(), "equalizer") for name in text.split(","))


def default_scheme() -> QuantScheme:
    """What `kbitc compile` makes of every weight when nothing is said."""
    return QuantScheme("int", DEFAULT_BITS, Granularity.BLOCK, DEFAULT_BLOCK)


def make_scheme(
    bits: int | None, scheme: str | None, block: int | None, *, per_channel: bool = False
) -> QuantScheme | None:
    """The weight scheme that --bits, --scheme and --block describe together; None for `--scheme float32`.

    Integer sums over all of K need one scale a channel, or integer block scales: with `per_channel` the default is one
    scale a channel, and `CompileOptions.blocks` says that the plan may take blocks.

    Raises:
        UsageError: bits outside 1..8, both --bits and --scheme, or a block size that is not one.
    """
    if scheme is not None:
        if bits is not None or block is not None:
            raise UsageError("--scheme already says bits and block", got=scheme, remedy="drop --bits and --block")
        return None if scheme == FLOAT else QuantScheme.parse(scheme)
    wanted = DEFAULT_BITS if bits is None else bits
    if not 1 <= wanted <= 8:
        raise UsageError("--bits is a whole number from 1 to 8", got=wanted)
    if per_channel and block is None:
        return QuantScheme("int", wanted, Granularity.CHANNEL)
    return QuantScheme("int", wanted, Granularity.BLOCK, DEFAULT_BLOCK if block is None else block)


def parse_activations(text: str) -> str:
    """The activation type of --activations.

    Raises:
        UsageError: when it is none of float, dynamic and static.
    """
    if text not in ACTIVATIONS:
        raise UsageError("unknown --activations", got=repr(text), remedy="use float, dynamic or static")
    return ACTIVATIONS[text]
