from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import kbitc
from kbitc.bundle import runtime
from kbitc.bundle.engine import torch_hidden
from kbitc.bundle.feeds import aligned, check_feeds
from kbitc.bundle.manifest import ValueInfo
from kbitc.bundle.runtime import load, load_built, load_parts
from kbitc.bundle.writer import stage
from kbitc.errors import BundleError, CalibrationError, UsageError
from tests.support import tamper, tiny


def assert_equal(outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(outputs) == list(expected)
    for name, array in expected.items():
        assert outputs[name].dtype == array.dtype
        np.testing.assert_array_equal(outputs[name], array)


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_outputs_are_those_of_the_model(bundle: Path, compiled: tiny.Tiny, rows: int) -> None:
    model = load(bundle)
    feeds = tiny.feeds(rows)
    assert_equal(model(feeds), compiled.expected(feeds["x"]))
    assert model.inputs == tiny.INPUTS
    assert model.outputs == tiny.OUTPUTS
    assert model.target_name == "reference"


def test_a_staged_or_built_module_runs_before_the_bundle_is_written(compiled: tiny.Tiny, tmp_path: Path) -> None:
    feeds = tiny.feeds()
    with stage(tmp_path / "a.kbit") as staging:
        staging.write_variants([compiled])
        library = staging.folder / staging.variants[0].library
        model = load_parts(library, staging.weights, staging.parameters, tiny.INPUTS, tiny.OUTPUTS)
        assert_equal(model(feeds), compiled.expected(feeds["x"]))
    built = load_built(compiled.library, compiled.weights, tiny.INPUTS, tiny.OUTPUTS)
    assert_equal(built(feeds), compiled.expected(feeds["x"]))
    assert_equal(model(feeds), compiled.expected(feeds["x"]))  # its files are gone, its maps are not


def test_loading_imports_neither_tvm_nor_torch(bundle: Path) -> None:
    code = (
        "import sys, numpy; from kbitc.bundle.runtime import load\n"
        f"model = load({str(bundle)!r}); model({{'x': numpy.ones((2, 8), 'float32')}})\n"
        "assert 'tvm_ffi' in sys.modules\n"
        "sys.exit(' '.join({'tvm', 'torch', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_hiding_torch_ends_and_does_not_reach_other_threads() -> None:
    seen: list[bool] = []

    def other() -> None:
        try:
            sys.meta_path[0].find_spec("torch")  # type: ignore[union-attr]
            seen.append(True)
        except ModuleNotFoundError:
            seen.append(False)

    before = list(sys.meta_path)
    with torch_hidden():
        with pytest.raises(ModuleNotFoundError):
            sys.meta_path[0].find_spec("torch")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [True]
    assert sys.meta_path == before


def test_weights_are_mapped_not_copied(bundle: Path) -> None:
    model = load(bundle)
    maps = Path("/proc/self/maps").read_text()
    line = next(line for line in maps.splitlines() if str(bundle / "weights.safetensors") in line)
    low, high = (int(part, 16) for part in line.split()[0].split("-"))
    assert all(low <= array.ctypes.data < high for array in model._weights)


def test_threads_do_not_pin_the_caller(bundle: Path) -> None:
    before = os.sched_getaffinity(0)
    model = load(bundle, threads=2)
    model(tiny.feeds())
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("threads", [1, 2, 1000])
def test_thread_counts_give_equal_outputs(bundle: Path, compiled: tiny.Tiny, threads: int) -> None:
    feeds = tiny.feeds(33)
    assert_equal(load(bundle, threads=threads)(feeds), compiled.expected(feeds["x"]))


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_is_a_usage_error(bundle: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        load(bundle, threads=threads)


def test_many_threads_may_call_one_model(bundle: Path, compiled: tiny.Tiny) -> None:
    model = load(bundle)
    wrong: list[int] = []

    def work(rows: int) -> None:
        for _ in range(50):
            feeds = tiny.feeds(rows)
            if not np.array_equal(model(feeds)["y"], compiled.expected(feeds["x"])["y"]):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 3, 8, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_outputs_stay_when_the_model_runs_again_or_goes(bundle: Path, compiled: tiny.Tiny) -> None:
    model = load(bundle)
    feeds = tiny.feeds()
    kept = model(feeds)
    model(tiny.feeds(7))
    del model
    gc.collect()
    assert_equal(kept, compiled.expected(feeds["x"]))
    kept["y"][:] = 0  # writeable, and nobody else's


def test_a_replaced_bundle_gives_the_new_module(compiled: tiny.Tiny, tmp_path: Path) -> None:
    """dlopen answers by name: while the first model lives, the same path must still give the new library."""
    out = compiled.write(tmp_path / "a.kbit")
    first = load(out)
    other = tiny.compile_tiny("reference", negated=True)
    other.write(out, force=True)
    second = load(out)
    feeds = tiny.feeds()
    assert_equal(second(feeds), other.expected(feeds["x"]))
    assert_equal(first(feeds), compiled.expected(feeds["x"]))
    assert not np.array_equal(first(feeds)["y"], second(feeds)["y"])


def test_two_models_on_one_bundle_are_independent(bundle: Path, compiled: tiny.Tiny) -> None:
    first, second = load(bundle), load(bundle)
    feeds = tiny.feeds()
    del first
    gc.collect()
    assert_equal(second(feeds), compiled.expected(feeds["x"]))


def test_misaligned_and_strided_feeds_are_right(bundle: Path, compiled: tiny.Tiny) -> None:
    x = tiny.feeds(6)["x"]
    room = np.zeros(x.nbytes + 4, np.uint8)
    odd = room[4:].view(np.float32).reshape(x.shape)
    odd[:] = x
    readonly = x.copy()
    readonly.flags.writeable = False
    model = load(bundle)
    for given in (odd, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], readonly):
        assert_equal(model({"x": given}), compiled.expected(x))


def test_an_output_that_is_the_input_stays_when_the_model_runs_again(tmp_path: Path) -> None:
    """Misaligned inputs are copied to one place in every run; what a caller holds must not lie there."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[m, 2] y) {
        s = Constant <value_ints: ints = [-1, 2]> ()
        y = Reshape(x, s)
    }"""
    kbitc.compile(onnx.parser.parse_model(text), tmp_path / "a.kbit", target="reference")
    model = load(tmp_path / "a.kbit")
    odd = np.zeros(36, np.uint8)[4:].view(np.float32).reshape(2, 4)
    first = model({"x": odd})["y"]
    odd += 1
    second = model({"x": odd})["y"]
    assert (first.tolist(), second.tolist()) == ([[0, 0]] * 4, [[1, 1]] * 4)


@pytest.mark.parametrize("offset", [0, 1, 4, 63])
def test_aligned_copies_only_when_it_must(offset: int) -> None:
    room = np.zeros(1024, np.uint8)
    start = -room.ctypes.data % 64 + offset
    array = room[start : start + 64]
    result = aligned(array)
    assert result.ctypes.data % 64 == 0
    assert np.shares_memory(result, room) == (offset == 0)


def test_empty_arrays_get_the_strides_that_compiled_code_checks() -> None:
    """The empty cache of a decoder's first step; numpy gives it strides of zero."""
    empty = aligned(np.empty((2, 4, 0, 8), np.float32))
    assert (empty.shape, empty.dtype, empty.strides) == ((2, 4, 0, 8), np.float32, (0, 0, 32, 4))


def test_raw_runs_give_the_same(bundle: Path, compiled: tiny.Tiny) -> None:
    model = load(bundle)
    feeds = tiny.feeds()
    results = model.run_raw(model.device_arguments(check_feeds(model.inputs, feeds)))
    np.testing.assert_array_equal(np.from_dlpack(results[0]), compiled.expected(feeds["x"])["y"])


INPUTS = (
    ValueInfo("ids", "int64", ("batch", "sequence")),
    ValueInfo("mask", "int64", ("batch", "sequence")),
    ValueInfo("image", "float32", (1, 3, "height", 8)),
)


def good() -> dict[str, np.ndarray]:
    ids = np.zeros((2, 5), np.int64)
    return {"ids": ids, "mask": ids, "image": np.zeros((1, 3, 4, 8), np.float32)}


def test_good_feeds_come_back_in_order() -> None:
    feeds = good()
    arrays = check_feeds(INPUTS, dict(reversed(feeds.items())))
    assert [array is feeds[info.name] for array, info in zip(arrays, INPUTS, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imaeg": np.zeros(1)}, "no such input .*'imaeg'.*did you mean image"),
        ({"ids": None}, "missing .*ids.*int64\\[batch, sequence\\]"),
        ({"ids": np.zeros((2, 5), np.int32)}, "wrong dtype .*ids.*int32.*astype\\('int64'\\)"),
        ({"ids": np.zeros(5, np.int64)}, "1 dims instead of 2 .*ids"),
        ({"image": np.zeros((1, 3, 4, 9), np.float32)}, "wrong shape .*image.*\\[1, 3, 4, 9\\]"),
        ({"mask": np.zeros((2, 6), np.int64)}, "wrong shape .*mask.*dim sequence is 5 in ids"),
        ({"image": [[1.0]]}, "wrong dtype .*image.*float64"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    feeds = {name: value for name, value in (good() | change).items() if value is not None}
    with pytest.raises(CalibrationError, match=message) as caught:
        check_feeds(INPUTS, feeds)
    assert caught.value.exit_code == 5


def test_a_library_that_is_no_module_is_refused(bundle: Path, tmp_path: Path) -> None:
    from kbitc.targets.link import link_shared

    link_shared(tmp_path / "other.so", [], runtime.machine.architecture())
    data = (tmp_path / "other.so").read_bytes()
    (bundle / "module.so").write_bytes(data)
    import hashlib

    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    tamper.forge(lambda raw: raw["files"].update({"module.so": entry}))(bundle)
    with pytest.raises(BundleError, match="library"):
        load(bundle)


@pytest.mark.slow
def test_a_large_bundle_loads_at_once(compiled: tiny.Tiny, tmp_path: Path) -> None:
    """90 MB of weights: under 0.2 s of processor time apart from hashing, because they are mapped."""
    rng = np.random.default_rng(0)
    weights = compiled.weights | {f"extra{i}": rng.integers(0, 256, 900_000, np.uint8) for i in range(100)}
    with stage(tmp_path / "big.kbit") as staging:
        staging.write_variants([replace(compiled, weights=weights)])
        staging.variants = (replace(staging.variants[0], arguments=(0, 1)),)
        staging.commit(tiny.INPUTS, tiny.OUTPUTS, kbitc_version="0")
    code = (
        "import time; from kbitc.bundle.runtime import load; start = time.process_time()\n"
        f"load({str(tmp_path / 'big.kbit')!r}, verify=False); print(time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.2


@pytest.mark.parametrize("own", [None, "7"])
def test_workers_without_work_sleep_soon_unless_the_user_says_otherwise(own: str | None) -> None:
    """Each of TVM's 300,000 looks for work gives the core away: where others want it, exit() waited for minutes."""
    text = (
        "import os; from kbitc.bundle.engine import tvm_ffi; tvm_ffi(); print(os.environ['TVM_THREAD_POOL_SPIN_COUNT'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TVM_THREAD_POOL_SPIN_COUNT"}
    environment |= {} if own is None else {"TVM_THREAD_POOL_SPIN_COUNT": own}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{own or 2000}\n"
