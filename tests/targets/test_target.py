from __future__ import annotations

import numpy as np
import pytest

from kbitc.errors import UsageError
from kbitc.quant.scheme import QuantScheme
from kbitc.targets import machine
from kbitc.targets import target as targets
from kbitc.targets.cuda import toolchain
from kbitc.targets.target import Target, all_targets, host_runs, machine_runs, parse_target

WIDE = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "popcnt"})
VNNI = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"})
AMX = WIDE | VNNI | {"avx512vbmi", "amx_tile", "amx_int8"}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Make this machine look like another one."""

    def apply(architecture: str, features: frozenset[str], gpu: tuple[int, int] | str = "no GPU") -> None:
        monkeypatch.setattr(machine, "architecture", lambda: architecture)
        monkeypatch.setattr(machine, "cpu_features", lambda: features)
        monkeypatch.setattr(machine, "cuda_capability", lambda: gpu)
        monkeypatch.setattr(machine, "may_use_tiles", lambda: True)

    return apply


@pytest.mark.parametrize("target", all_targets(), ids=str)
def test_name_reads_back_as_the_same_target(target: Target) -> None:
    assert parse_target(target.name) == target
    assert hash(parse_target(target.name)) == hash(target)


@pytest.mark.parametrize("target", all_targets(), ids=str)
def test_tvm_accepts_every_target(target: Target) -> None:
    import tvm

    made = tvm.target.Target(target.tvm)
    assert made.kind.name == target.tvm["kind"]
    assert "native" not in str(made)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("x86", "x86:avx2"),
        ("x86:avx2,avx512vnni", "x86:avx512vnni"),
        ("x86:avx512vbmi,avx512vnni", "x86:avx512vbmi"),
        ("x86:amx", "x86:amx"),
        ("arm-neon", "arm-neon:dotprod"),
        ("arm-neon:i8mm", "arm-neon:dotprod,i8mm"),
        (" arm-neon:dotprod, i8mm ", "arm-neon:dotprod,i8mm"),
        ("cuda:sm_90", "cuda:sm_90"),
        ("reference", "reference"),
    ],
)
def test_other_spellings(text: str, name: str) -> None:
    assert parse_target(text).name == name


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("x68", "did you mean x86?"),
        ("cuda:sm90", "did you mean cuda:sm_90?"),
        ("arm-neno", "did you mean arm-neon?"),
        ("x86:avx512", "x86:avx512vnni"),
        ("reference:fast", "write reference alone"),
        ("host:avx2", "did you mean host?"),
        ("x86:", "known: x86:avx2, x86:avxvnni, x86:avx512vnni, x86:avx512vbmi, x86:amx"),
        ("", "known: host"),
    ],
)
def test_unknown_targets_name_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert hint in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "features", "name"),
    [
        ("x86_64", AMX, "x86:amx"),
        ("x86_64", AMX - {"amx_int8"}, "x86:avx512vbmi"),
        ("x86_64", WIDE | VNNI | {"avx512vbmi"}, "x86:avx512vbmi"),
        ("x86_64", WIDE | VNNI, "x86:avx512vnni"),
        ("x86_64", WIDE | VNNI - {"avx512_vnni"}, "x86:avx2"),
        ("x86_64", WIDE | {"avx_vnni"}, "x86:avxvnni"),
        ("x86_64", WIDE | VNNI | {"avx_vnni"}, "x86:avx512vnni"),
        ("x86_64", frozenset({"sse2"}), "reference"),
        ("aarch64", frozenset("asimd asimddp asimdhp asimdrdm atomics crc32 fphp".split()), "arm-neon:dotprod"),
        (
            "aarch64",
            frozenset("asimd asimddp asimdhp asimdrdm atomics crc32 fphp i8mm".split()),
            "arm-neon:dotprod,i8mm",
        ),
        ("aarch64", frozenset({"asimd"}), "reference"),
    ],
)
def test_host_is_the_best_target_this_machine_runs(pretend, architecture, features, name) -> None:
    pretend(architecture, features)
    assert parse_target("host").name == name
    assert host_runs(parse_target("host")) is None


def test_another_machine_is_refused_naming_both_sides(pretend) -> None:
    pretend("x86_64", WIDE)
    assert host_runs(parse_target("arm-neon")) == "arm-neon:dotprod is for aarch64, this machine is x86_64"
    reason = host_runs(parse_target("x86:avx512vnni"))
    assert reason is not None
    assert "avx512_vnni" in reason
    assert "fma" not in reason
    pretend("x86_64", WIDE | VNNI)
    assert "avx512vbmi" in str(host_runs(parse_target("x86:avx512vbmi")))


def test_tiles_need_a_permission_that_is_asked_for_only_where_there_are_any(pretend, monkeypatch) -> None:
    asked = []

    def ask() -> bool:
        asked.append(1)
        return False

    pretend("x86_64", WIDE | VNNI)
    monkeypatch.setattr(machine, "may_use_tiles", ask)
    assert "amx_int8, amx_tile, avx512vbmi" in str(host_runs(parse_target("x86:amx")))
    assert host_runs(parse_target("x86:avx512vnni")) is None and not asked
    pretend("x86_64", AMX)
    monkeypatch.setattr(machine, "may_use_tiles", ask)
    assert "does not permit" in str(host_runs(parse_target("x86:amx")))
    assert parse_target("host").name == "x86:avx512vbmi" and asked


@pytest.mark.parametrize(
    ("gpu", "runs"),
    [((8, 0), True), ((8, 9), True), ((9, 0), False), ((7, 5), False), ("the driver is missing", False)],
)
def test_machine_code_runs_on_gpus_of_its_major_version(pretend, gpu, runs) -> None:
    pretend("x86_64", frozenset(), gpu)
    reason = machine_runs("cuda:sm_80", "x86_64", (), "cuda", "sm_80")
    assert (reason is None) == runs
    assert runs or "sm_80" in reason


@pytest.mark.parametrize(("gpu", "name"), [((8, 9), "cuda:sm_80"), ((9, 0), "cuda:sm_90"), ("none", "cuda:sm_80")])
def test_plain_cuda_is_the_gpu_at_hand(pretend, gpu, name) -> None:
    pretend("x86_64", frozenset(), gpu)
    assert parse_target("cuda").name == name


@pytest.mark.parametrize(
    ("inactive", "lost"),
    [
        ((0, 2, 28), {"avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni"}),
        ((1, 1, 16), {"avx512f", "avx512_vnni"}),
        ((1, 3, 24), {"amx_tile", "amx_int8"}),
    ],
)
def test_features_whose_registers_are_not_saved_cannot_be_used(inactive: tuple[int, int, int], lost: set[str]) -> None:
    features = frozenset("sse2 bmi2 popcnt avx avx2 fma f16c avx512f avx512_vnni amx_tile amx_int8".split())
    number, register, bit = inactive

    def leaf(asked: int) -> tuple[int, ...]:
        bits = [0xFFFFFFFF] * 4
        if asked == number:
            bits[register] ^= 1 << bit
        return tuple(bits)

    assert machine.usable(features, leaf) == features - lost
    assert machine.usable(features, lambda asked: None) == features


def test_plain_x86_is_every_variant() -> None:
    """The first runs wherever another does: a bundle is chosen by going from the last to the first."""
    every = targets.parse_targets("x86")
    names = [item.name.removeprefix("x86:") for item in every]
    assert names == ["avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx"]
    for narrow, wide in zip(every[2:], every[3:], strict=False):
        assert set(narrow.cpu_features) < set(wide.cpu_features)
    assert all(set(every[0].cpu_features) < set(other.cpu_features) for other in every[1:])
    assert targets.bundle_name(every) == "x86"


@pytest.mark.parametrize("text", ["host", "x86:avx2", "arm-neon", "cuda", "reference"])
def test_other_targets_are_one(text: str) -> None:
    assert targets.parse_targets(text) == (parse_target(text),)
    assert targets.bundle_name(targets.parse_targets(text)) == parse_target(text).name


def test_cpuinfo_features_are_those_of_every_processor() -> None:
    x86 = "processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n"
    assert machine.parse_cpuinfo(x86) == {"fpu", "avx2"}
    assert machine.parse_cpuinfo("Features\t: fp asimd asimddp\nCPU part\t: 0xd0b\n") == {"fp", "asimd", "asimddp"}
    assert machine.parse_cpuinfo("bogus") == frozenset()


@pytest.mark.parametrize("target", all_targets(), ids=str)
@pytest.mark.parametrize(
    "text",
    ["nf4:b64", *(form.format(k) for k in range(1, 9) for form in ("int{}:b32", "uint{}:b16", "int{}:c", "int{}:t"))],
)
def test_every_width_is_accepted(target: Target, text: str) -> None:
    scheme = QuantScheme.parse(text)
    for activation in ("float32", "int8", "float", "dynamic"):
        assert target.accepts("MatMul", activation, scheme) is None
    assert target.accepts("Gather", "float32", scheme) is None


def test_refusals_have_reasons() -> None:
    target, scheme = parse_target("x86"), QuantScheme.parse("int4:b32")
    assert "Softmax" in str(target.accepts("Softmax", "float32", scheme))
    assert "Gather" in str(target.accepts("Gather", "int8", scheme))
    assert target.accepts("Softmax", "float32", None) is None
    with pytest.raises(UsageError, match="dynamic"):
        target.accepts("MatMul", "dynamc", scheme)


@pytest.mark.parametrize("text", ["int8:c", "uint8:c", "int4:t", "uint1:c", "nf4:c"])
def test_overflow_bound_is_exact(text: str) -> None:
    """The bound is where 127 * largest level difference * terms first exceeds 2^31 - 1."""
    target, scheme = parse_target("arm-neon"), QuantScheme.parse(text)
    grid = np.asarray(scheme.data_type().grid, np.int64)
    largest = int(grid.max() - grid.min()) if scheme.zero_point else int(np.abs(grid).max())
    most = (2**31 - 1) // (127 * largest)
    assert target.accepts("MatMul", "int8", scheme, reduction=most) is None
    assert "overflow" in str(target.accepts("MatMul", "int8", scheme, reduction=most + 1))
    assert target.accepts("MatMul", "float32", scheme, reduction=most + 1) is None


def test_blocks_bound_the_sum() -> None:
    scheme = QuantScheme.parse("uint8:b1024")
    assert parse_target("cuda").accepts("MatMul", "int8", scheme, reduction=10**9) is None


@pytest.mark.parametrize("target", all_targets(), ids=str)
def test_requirements_say_how_to_get_what_is_missing(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "tool", lambda *names: None)
    monkeypatch.setattr(machine, "has_module", lambda name: False)
    monkeypatch.setattr(toolchain, "missing", lambda: "no compiler")
    monkeypatch.setattr(toolchain, "find_runtime", lambda: None)
    needed = targets.requirements(target)
    compiling = [item for item in needed if item.purpose == "compile"]
    assert compiling
    assert not any(item.present for item in compiling)
    assert all("install" in item.install for item in compiling)


def test_parsing_targets_does_not_import_tvm() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from kbitc.targets.target import all_targets, requirements\n"
        "[requirements(t) for t in all_targets()]\n"
        "sys.exit(any(m in sys.modules for m in ('tvm', 'tvm_ffi', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_processor_is_vendor_family_and_model() -> None:
    x86 = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: EPYC\n\nmodel\t: 1\n"
    assert machine.parse_processor(x86) == "AuthenticAMD 25 17"
    arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n\n"
    assert machine.parse_processor(arm) == "0x41 0x3 0xd0c"
    assert machine.parse_processor("vendor_id\t: GenuineIntel\n") == "" == machine.parse_processor("bogus")
