"""`--target x86`: one bundle, several libraries, the same numbers from each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kbitc
from kbitc.bundle.manifest import Manifest
from kbitc.bundle.reader import VARIANT, open_bundle
from kbitc.cli import _guarded
from kbitc.errors import BundleError
from kbitc.targets.target import host_runs, parse_target, parse_targets
from tests.support import amx
from tests.support.onnx_text import noise, proto

NAMES = tuple(target.variant for target in parse_targets("x86"))
GRAPH = """g (float[n, 6, 40] x) => (float[n, 6, 7] y) {
    h = MatMul(x, a) r = Relu(h) t = Transpose<perm = [0, 2, 1]>(r) s = MatMul(r, t) p = Softmax(s) q = MatMul(p, r)
    y = MatMul(q, b)
}"""
CONV = """g (float[2, 3, 12, 10] x) => (float[2, 40, 12, 10] y) {
    c = Conv<pads = [1, 1, 1, 1]>(x, a) r = Relu(c) y = Conv<pads = [1, 1, 1, 1], group = 40>(r, b)
}"""


def compiled(folder: Path, graph: str, weights: dict[str, Any], **options: Any) -> Path:
    kbitc.compile(proto(graph, weights), folder / "m.kbit", target="x86", debug_accumulators=True, **options)
    return folder / "m.kbit"


@pytest.fixture(scope="module", params=["int4", "nf4", "static"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := host_runs(parse_targets("x86")[0]):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("variants")
    if request.param == "static":
        feeds = [{"x": noise(2, 3, 12, 10, seed=seed)} for seed in range(2)]
        weights = {"a": noise(40, 3, 3, 3), "b": noise(40, 1, 3, 3)}
        return compiled(folder, CONV, weights, bits=8, activations="static", calibration=feeds)
    weights = {"a": noise(40, 33), "b": noise(33, 7)}
    return compiled(folder, GRAPH, weights, scheme=f"{request.param}:b16")


def manifest_of(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


def feeds_of(bundle: Path) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else 3 for dim in manifest_of(bundle).inputs[0].shape]
    return {"x": noise(*shape, seed=9)}


def test_variants_and_thread_counts_give_equal_integers_and_floats(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host_runs(parse_target("x86:avx512vbmi")) is None:
        amx.pretend(monkeypatch)
    runnable = [target for target in parse_targets("x86") if host_runs(target) is None]
    feeds = feeds_of(bundle)
    wanted = kbitc.load(bundle, threads=1, variant=runnable[0].variant)(feeds)
    assert any(array.dtype == np.int32 for array in wanted.values())
    for target in runnable:
        for threads in (1, 2):
            model = kbitc.load(bundle, threads=threads, variant=target.variant)
            assert model.target_name == target.name
            found = model(feeds)
            assert list(found) == list(wanted)
            for name, array in wanted.items():
                np.testing.assert_array_equal(found[name], array, err_msg=f"{name} of {target} on {threads} threads")


def test_weights_are_stored_once_unless_they_differ(bundle: Path) -> None:
    """Only integer graphs have weights by the width of registers: depthwise taps and their biases."""
    manifest = manifest_of(bundle)
    assert [item.name for item in manifest.variants] == list(reversed(NAMES))
    stored = [item.tensor for item in manifest.parameters]
    assert len(stored) == len(set(stored))
    static = manifest.provenance["options"]["activation"] == "uint8"
    differ = {name.partition("@")[0].rpartition(".")[2] for name in stored if "@" in name}
    assert differ == ({"levels", "bias"} if static else set())


def test_variants_with_the_same_kernels_share_a_library(bundle: Path) -> None:
    """VBMI looks levels up in another way; where they follow from the codes it has the kernels of VNNI.

    AMX multiplies many rows in another way; the static model has none whose channels tiles take.
    """
    manifest = manifest_of(bundle)
    tiles, vbmi, vnni, narrow, avx2 = manifest.variants
    assert len({item.library for item in (vnni, narrow, avx2)}) == 3
    options = manifest.provenance["options"]
    assert (vbmi.library == vnni.library) == (not options["scheme"].startswith("nf4"))
    assert (tiles.library == vbmi.library) == (options["activation"] == "uint8")


def test_commands_say_which_variant_ran(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIANT, raising=False)
    np.savez(tmp_path / "x.npz", **feeds_of(bundle))
    runs = [str(bundle), "--input", str(tmp_path / "x.npz")]
    for command in (["run", *runs], ["bench", *runs, "--rounds", "1"], ["verify", str(bundle)]):
        assert _guarded([*command, "--variant", "avx2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["target"] == "x86:avx2"
        assert _guarded([*command, "--variant", "sse9"]) == BundleError.exit_code
        assert "it has amx, avx512vbmi, avx512vnni, avxvnni, avx2" in capsys.readouterr().err
        assert _guarded([*command, "--variant", "avx2"]) == 0
        assert "x86:avx2" in capsys.readouterr().out
    assert _guarded(["inspect", str(bundle), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["variants"]
    assert [item["target"] for item in shown] == [f"x86:{name}" for name in reversed(NAMES)]
    assert shown[-1]["runs"] is None
