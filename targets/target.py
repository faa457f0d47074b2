"""Targets: what a module is compiled for. The text form of `--target` becomes a `Target` here.

A target family is a folder (`targets/x86`, `targets/neon`, `targets/cuda`, `targets/reference`) whose `target.py`
declares its variants and what building for it needs; its `rules` module, imported only when something is lowered,
holds the kernel rules.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from kbitc import catalog
from kbitc.errors import InternalError, UsageError
from kbitc.quant.scheme import Granularity, QuantScheme
from kbitc.targets import machine
from kbitc.targets.tuning import Schedule, Tuning

FOLDERS = {"x86": "x86", "arm-neon": "neon", "cuda": "cuda", "reference": "reference"}
SYNTAX = "host|x86[:avx2|avxvnni|avx512vnni|avx512vbmi|amx]|arm-neon[:dotprod,i8mm]|cuda[:sm_80|sm_90]|reference"
WEIGHT_OPERATORS = ("MatMul", "Gemm", "Conv", "Gather")
ACTIVATIONS = {"float": "float32", "float32": "float32", "dynamic": "int8", "int8": "int8", "uint8": "uint8"}
BLOCK_STEP = 16
INT32_LIMIT = 2**31 - 1
ACTIVATION_LEVEL = 127  # kbitc::DynamicQuantize clips to -127..127


@dataclass(frozen=True)
class Requirement:
    """One thing that compiling for a target, or running on it, needs.

    Attributes:
        what: name of the tool, library or device.
        present: whether this machine has it.
        install: one command or sentence that gets it.
        purpose: "compile" or "run".
    """

    what: str
    present: bool
    install: str
    purpose: str = "compile"


@dataclass(frozen=True)
class Target:
    """One machine that kbitc compiles for.

    Attributes:
        name: exact text form, such as ``x86:avx512vnni``; `parse_target` reads it back.
        kind: family, "x86", "arm-neon", "cuda" or "reference".
        features: variant names of the text form, such as ("dotprod", "i8mm").
        machine: processor architecture of the host side, "x86_64" or "aarch64".
        triple: triple of the host side, such as "x86_64-linux-gnu".
        device: where kernels run, "cpu" or "cuda".
        cpu_features: processor features (names of /proc/cpuinfo) that the code uses.
        tvm_fields: fields of the TVM target as pairs; `tvm` is the dict.
        vector_bytes: bytes of one vector register (of a warp-wide 32-bit value for cuda).
        lanes: 32-bit lanes of one vector register.
        dot: the integer dot instruction that kernels use, or "" when there is none.
        registers: vector registers that a kernel may use.
        arch: GPU architecture such as "sm_90", or "".
        tuning: schedules that were found by measuring; None for none.
        schedule: the one for the kernel that is being made; None for the usual one.
    """

    name: str
    kind: str
    features: tuple[str, ...]
    machine: str
    triple: str
    device: str
    cpu_features: tuple[str, ...]
    tvm_fields: tuple[tuple[str, Any], ...]
    vector_bytes: int
    lanes: int
    dot: str
    registers: int
    arch: str = ""
    tuning: Tuning | None = field(default=None, compare=False, repr=False)
    schedule: Schedule | None = field(default=None, compare=False, repr=False)

    def with_tuning(self, tuning: Tuning | None) -> Target:
        """The same machine with other schedules."""
        return replace(self, tuning=tuning)

    def with_schedule(self, schedule: Schedule | None) -> Target:
        """The same machine with the schedule of one kernel."""
        return replace(self, schedule=schedule)

    @property
    def tuning_facts(self) -> dict[str, Any] | None:
        """What a bundle records of the schedules: how many there were, and the hash of all."""
        return None if self.tuning is None else self.tuning.facts()

    @property
    def variant(self) -> str:
        """What tells it from others of its family, such as ``avx2``: the text form behind the colon."""
        return self.name.partition(":")[2] or self.name

    @property
    def tvm(self) -> dict[str, Any]:
        """The dict for `tvm.target.Target`; for cuda it holds the host part under "host"."""
        fields = dict(self.tvm_fields)
        if "mattr" in fields:
            fields["mattr"] = list(fields["mattr"])
        if "host" in fields:
            fields["host"] = dict(fields["host"])
        return fields

    def has(self, feature: str) -> bool:
        """Whether the text form names this feature, such as ``i8mm``."""
        return feature in self.features

    def accepts(
        self, operator: str, activation: str, scheme: QuantScheme | None, *, reduction: int | None = None
    ) -> str | None:
        """Why this target cannot run an operator with such a weight; None when it can.

        Args:
            operator: ONNX operator type that holds the weight.
            activation: "float32" (or "float"), "int8" (or "dynamic"), "uint8" (planned codes).
            scheme: scheme of the weight; None for a float weight.
            reduction: products that are summed in one integer accumulator, when known.

        Raises:
            UsageError: when `activation` is not one of the names.
        """
        if activation not in ACTIVATIONS:
            raise UsageError(
                "unknown activation type", got=repr(activation), remedy=catalog.nearest(activation, list(ACTIVATIONS))
            )
        if scheme is None:
            return None
        if operator not in WEIGHT_OPERATORS:
            return f"{operator} has no kernel for quantized weights (only {', '.join(WEIGHT_OPERATORS)} have)"
        if scheme.granularity is Granularity.BLOCK and scheme.block % BLOCK_STEP:
            return f"a block of {scheme.block} is not a multiple of {BLOCK_STEP}"
        if ACTIVATIONS[activation] != "float32" and operator == "Gather":
            return "Gather has no activations that could be int8; its rows are dequantized to float"
        if ACTIVATIONS[activation] == "int8" and reduction is not None:
            return _overflow(scheme, reduction)
        return None

    def contraction_rules(self) -> list[Any]:
        """Kernel rules for contractions in priority order (`RULES` of the family's rules module). Imports tvm."""
        return list(self._rules().RULES)

    def fuses_attention(self) -> bool:
        """Whether some kernel rule takes attention as a whole."""
        return any(getattr(rule, "attention", False) for rule in self.contraction_rules())

    def schedule_rules(self) -> list[Callable[..., Any]]:
        """Schedule rules in priority order (`SCHEDULE_RULES` of the family's rules module). Imports tvm."""
        return list(self._rules().SCHEDULE_RULES)

    def _rules(self) -> ModuleType:
        return importlib.import_module(f"kbitc.targets.{FOLDERS[self.kind]}.rules")

    def __str__(self) -> str:
        return self.name


def _overflow(scheme: QuantScheme, reduction: int) -> str | None:
    """Why an int32 accumulator could overflow: |sum| <= terms * 127 * (largest level difference)."""
    levels = scheme.data_type().grid
    low, high = int(min(levels)), int(max(levels))
    largest = high - low if scheme.zero_point or scheme.offset else max(abs(low), abs(high))
    terms = min(reduction, scheme.block) if scheme.granularity is Granularity.BLOCK else reduction
    if terms * ACTIVATION_LEVEL * largest <= INT32_LIMIT:
        return None
    most = INT32_LIMIT // (ACTIVATION_LEVEL * largest)
    return f"a sum of {terms} products can overflow int32 (at most {most}); use block scales or float activations"


def family(kind: str) -> ModuleType:
    """The declaration module `targets/<folder>/target.py` of a family."""
    if kind not in FOLDERS:
        raise InternalError("no such target family", got=kind)
    return importlib.import_module(f"kbitc.targets.{FOLDERS[kind]}.target")


def parse_target(text: str) -> Target:
    """The target of a text form such as ``host``, ``x86:avx2``, ``arm-neon:dotprod,i8mm`` or ``cuda:sm_90``.

    A family without a variant means its first one (see `parse_targets`); plain ``cuda`` means the GPU of this machine
    when it has one.

    Raises:
        UsageError: when the text names no target; says the nearest.
    """
    kind, colon, variant = text.strip().partition(":")
    if kind == "host" and not colon:
        return host_target()
    if kind not in FOLDERS:
        known = ["host", *FOLDERS]
        raise UsageError("unknown target", got=repr(text), remedy=f"{catalog.nearest(kind, known)} ({SYNTAX})")
    module = family(kind)
    features = tuple(part.strip() for part in variant.split(",")) if colon else module.bundled_features()[0]
    for feature in features:
        if feature not in module.VARIANTS:
            remedy = catalog.nearest(feature, [f"{kind}:{name}" for name in module.VARIANTS])
            if not module.VARIANTS:
                remedy = f"write {kind} alone"
            raise UsageError(f"unknown variant of target {kind}", got=repr(text), remedy=remedy)
    target: Target = module.declare(features)
    return target


def parse_targets(text: str) -> tuple[Target, ...]:
    """The targets of a text form, of which a bundle holds a library each: all variants for plain ``x86``, else one.

    The first one runs wherever another of them does.

    Raises:
        UsageError: as `parse_target`.
    """
    kind = text.strip()
    if kind not in FOLDERS:
        return (parse_target(text),)
    module = family(kind)
    return tuple(module.declare(features) for features in module.bundled_features())


def bundle_name(targets: Sequence[Target]) -> str:
    """The text form that `parse_targets` reads back."""
    return targets[0].name if len(targets) == 1 else targets[0].kind


def host_target() -> Target:
    """The best CPU target that this machine runs; ``reference`` where no family does."""
    for target in (*reversed(parse_targets("x86")), *map(parse_target, ("arm-neon:dotprod,i8mm", "arm-neon:dotprod"))):
        if host_runs(target) is None:
            return target
    return parse_target("reference")


def all_targets() -> list[Target]:
    """Every target that kbitc has, in the order of `FOLDERS`."""
    names = ("arm-neon:dotprod", "arm-neon:dotprod,i8mm", "cuda:sm_80", "cuda:sm_90", "reference")
    return [*parse_targets("x86"), *map(parse_target, names)]


def required_cpu_features(target: Target) -> tuple[str, ...]:
    """Processor features, with the names of /proc/cpuinfo, without which the compiled code must not be loaded."""
    return target.cpu_features


def host_runs(target: Target) -> str | None:
    """Why this machine cannot run code for the target, naming both sides; None when it can."""
    return machine_runs(target.name, target.machine, target.cpu_features, target.device, target.arch)


def fastest(targets: Sequence[Target]) -> Target:
    """The last variant that runs here, else the last: later ones are faster."""
    return next((item for item in reversed(targets) if host_runs(item) is None), targets[-1])


def machine_runs(name: str, architecture: str, features: tuple[str, ...], device: str, arch: str = "") -> str | None:
    """As `host_runs`, from the plain facts that a bundle's manifest holds.

    Args:
        name: the target's text form, for the message.
        architecture: "x86_64" or "aarch64".
        features: needed processor features, names of /proc/cpuinfo.
        device: "cpu" or "cuda".
        arch: GPU architecture such as "sm_90"; "" for CPU targets.
    """
    here = machine.architecture()
    if here != architecture:
        return f"{name} is for {architecture}, this machine is {here}"
    missing = sorted(set(features) - machine.cpu_features())
    if missing:
        return f"{name} needs the processor features {', '.join(missing)}, which this {here} processor lacks"
    if any(feature.startswith("amx") for feature in features) and not machine.may_use_tiles():
        return f"{name} needs AMX tiles, which the operating system does not permit this process to use"
    return _gpu_runs(name, arch) if device == "cuda" else None


def _gpu_runs(name: str, arch: str) -> str | None:
    """Machine code for sm_XY runs on GPUs of the same major version and an equal or higher minor one."""
    found = machine.cuda_capability()
    if isinstance(found, str):
        return f"{name} needs an NVIDIA GPU of {arch}, but {found}"
    major, minor = divmod(int(arch.removeprefix("sm_")), 10)
    if found[0] != major or found[1] < minor:
        return f"{name} is for GPUs of {arch}, this machine has sm_{found[0]}{found[1]}"
    return None


def requirements(target: Target) -> list[Requirement]:
    """What compiling for a target and running it needs, whether it is here, and how to get it."""
    needed: list[Requirement] = family(target.kind).requirements(target)
    reason = host_runs(target)
    how = "copy the bundle to such a machine (see --with-runtime)" if reason else ""
    what = f"a machine for {target.name}" if reason is None else reason
    return [*needed, Requirement(what, reason is None, how, purpose="run")]
