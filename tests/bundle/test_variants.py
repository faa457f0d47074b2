"""Bundles with several libraries: which one is loaded, and that every one is checked."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kbitc.bundle import reader
from kbitc.bundle.reader import open_bundle
from kbitc.bundle.runtime import load
from kbitc.errors import BundleError
from kbitc.targets import machine
from kbitc.targets.runner.build import runner_folder
from kbitc.targets.target import host_runs, parse_target
from tests.support import tamper, tiny
from tests.support.qemu import need_runner

NARROW, WIDE = "x86:avx2", "x86:avx512vnni"
FEATURES = frozenset(parse_target(NARROW).cpu_features)


@pytest.fixture(scope="module")
def variants() -> list[tiny.Tiny]:
    """The tiny model for AVX2 and, told apart by its signs, for AVX-512."""
    if reason := host_runs(parse_target(NARROW)):
        pytest.skip(reason)
    narrow, wide = tiny.compile_tiny(NARROW), tiny.compile_tiny(WIDE, negated=True)
    return [narrow, replace(wide, weights=narrow.weights)]


@pytest.fixture
def bundle(variants: list[tiny.Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(reader.VARIANT, raising=False)
    return tiny.write(variants, tmp_path / "tiny.kbit")


def pretend(monkeypatch: pytest.MonkeyPatch, features: frozenset[str]) -> None:
    monkeypatch.setattr(machine, "cpu_features", lambda: features)


def need_wide() -> None:
    if reason := host_runs(parse_target(WIDE)):
        pytest.skip(reason)


def ran(bundle: Path, **options: str) -> str:
    """The variant that runs, by what it says and by what it computes."""
    model = load(bundle, **options)
    feeds = tiny.feeds()
    negated = not np.array_equal(model(feeds)["y"], tiny.expected(feeds["x"])["y"])
    assert model.target_name == (WIDE if negated else NARROW)
    return model.target_name


def test_a_bundle_lists_its_variants_best_first(bundle: Path, variants: list[tiny.Tiny]) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.target.name == "x86"
    assert [item.target for item in manifest.variants] == [WIDE, NARROW]
    assert [item.name for item in manifest.variants] == ["avx512vnni", "avx2"]
    assert set(manifest.variants[1].cpu_features) == FEATURES < set(manifest.variants[0].cpu_features)
    for item, made in zip(manifest.variants, reversed(variants), strict=True):
        assert (bundle / item.library).read_bytes() == made.library
        assert item.arguments == (0, 1)
    assert sorted(path.name for path in bundle.iterdir()) == [
        "manifest.json", "module-avx2.so", "module-avx512vnni.so", "report.json", "weights.safetensors",
    ]  # fmt: skip


def test_the_best_variant_of_the_machine_runs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_wide()
    assert ran(bundle) == WIDE
    pretend(monkeypatch, FEATURES)
    assert ran(bundle) == NARROW


def test_a_machine_without_avx2_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, FEATURES - {"avx2"})
    with pytest.raises(BundleError, match="another machine .*x86:avx2 needs the processor features avx2,") as caught:
        load(bundle)
    assert caught.value.exit_code == 8


def test_a_variant_can_be_forced(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(bundle, variant="avx2") == ran(bundle, variant=NARROW) == NARROW
    monkeypatch.setenv(reader.VARIANT, "avx2")
    assert ran(bundle) == NARROW
    need_wide()
    assert ran(bundle, variant="avx512vnni") == WIDE


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_forced_variant_is_never_replaced(bundle: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    pretend(monkeypatch, FEATURES)

    def attempt(name: str) -> None:
        monkeypatch.setenv(reader.VARIANT, name if by == "environment" else "avx2")
        load(bundle, variant=name if by == "argument" else None)

    with pytest.raises(BundleError, match="cannot run the variant .*avx512_vnni"):
        attempt("avx512vnni")
    with pytest.raises(BundleError, match="no such variant .*got avx1024.*it has avx512vnni, avx2"):
        attempt("avx1024")


@pytest.mark.parametrize("harm", [tamper.flip, tamper.cut])
@pytest.mark.parametrize("name", ["module-avx2.so", "module-avx512vnni.so"])
def test_every_library_is_checked_whichever_runs(bundle: Path, name: str, harm) -> None:  # type: ignore[no-untyped-def]
    harm(name, 0.5)(bundle)
    with pytest.raises(BundleError, match=name):
        load(bundle, variant="avx2")
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"missing .*{name}"):
        load(bundle, variant="avx2")


def test_weights_that_differ_are_stored_for_each(variants: list[tiny.Tiny], tmp_path: Path) -> None:
    narrow, wide = variants
    other = replace(wide, weights=wide.weights | {"b": wide.weights["b"] + np.float16(1)})
    out = tiny.write([narrow, other], tmp_path / "a.kbit")
    manifest = open_bundle(out).manifest
    assert [item.tensor for item in manifest.parameters] == ["w", "b", "b@avx512vnni"]
    assert [item.arguments for item in manifest.variants] == [(0, 2), (0, 1)]
    feeds = tiny.feeds()
    expected = tiny.expected(feeds["x"])["y"]
    np.testing.assert_array_equal(load(out, variant="avx2")(feeds)["y"], expected)
    need_wide()
    np.testing.assert_array_equal(load(out, variant="avx512vnni")(feeds)["y"], -expected - 1)


def test_an_equal_library_is_stored_once(variants: list[tiny.Tiny], tmp_path: Path) -> None:
    narrow = variants[0]
    out = tiny.write([narrow, replace(narrow, target=parse_target(WIDE))], tmp_path / "a.kbit")
    assert {item.library for item in open_bundle(out).manifest.variants} == {"module-avx2.so"}
    assert not (out / "module-avx512vnni.so").exists()


class TestRunner:
    """The same choices by kbitc-run; a feature that no processor has stands for one that this machine lacks."""

    @pytest.fixture
    def feeds(self, tmp_path: Path) -> Path:
        need_runner(NARROW)
        np.savez(tmp_path / "x.npz", **tiny.feeds())
        return tmp_path / "x.npz"

    def run(self, bundle: Path, feeds: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        program = runner_folder("x86_64") / "kbitc-run"
        output = feeds.with_name("y.npz")
        output.unlink(missing_ok=True)
        command = [program, bundle, "--input", feeds, "--output", output, "--json", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=variables)

    def ran(self, bundle: Path, feeds: Path, *options: str, **variables: str) -> str:
        done = self.run(bundle, feeds, *options, **variables)
        assert done.returncode == 0, done.stderr
        with np.load(feeds) as given, np.load(feeds.with_name("y.npz")) as outputs:
            negated = not np.array_equal(outputs["y"], tiny.expected(given["x"])["y"])
        name: str = json.loads(done.stdout)["target"]
        assert name == (WIDE if negated else NARROW)
        return name

    def test_the_best_variant_runs(self, bundle: Path, feeds: Path) -> None:
        need_wide()
        assert self.ran(bundle, feeds) == WIDE
        tamper.variant(cpu_features=["quantum"])(bundle)
        assert self.ran(bundle, feeds) == NARROW

    def test_a_variant_can_be_forced(self, bundle: Path, feeds: Path) -> None:
        assert self.ran(bundle, feeds, "--variant", "avx2") == NARROW
        assert self.ran(bundle, feeds, KBITC_VARIANT=NARROW) == NARROW
        need_wide()
        assert self.ran(bundle, feeds, "--variant", "avx512vnni", KBITC_VARIANT="avx2") == WIDE

    def test_what_it_lacks_is_refused(self, bundle: Path, feeds: Path) -> None:
        tamper.variant(cpu_features=["quantum"])(bundle)
        done = self.run(bundle, feeds, "--variant", "avx512vnni")
        assert done.returncode == 8 and "x86:avx512vnni needs the processor feature quantum" in done.stderr
        done = self.run(bundle, feeds, KBITC_VARIANT="avx1024")
        assert done.returncode == 8 and "it has avx512vnni, avx2" in done.stderr
        tamper.forge(lambda raw: [item.update(cpu_features=["quantum"]) for item in raw["variants"]] and None)(bundle)
        done = self.run(bundle, feeds)
        assert done.returncode == 8 and "another machine" in done.stderr and "x86:avx2 needs" in done.stderr

    @pytest.mark.parametrize("name", ["module-avx2.so", "module-avx512vnni.so"])
    def test_every_library_is_checked(self, bundle: Path, feeds: Path, name: str) -> None:
        tamper.flip(name, 0.5)(bundle)
        done = self.run(bundle, feeds, "--variant", "avx2")
        assert done.returncode == 8 and name in done.stderr
