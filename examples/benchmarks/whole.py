"""Whole networks, SmolLM2-135M and others with random weights (networks.py), against onnxruntime and OpenVINO.

    python examples/benchmarks/whole.py [--only resnet50 mobilenet_v2 bert_base decoder_step smollm2] [--rounds 20]
                                        [--save]

One thread, batch 1. All engines of a network take turns in one process, and processor time is measured. onnxruntime
runs the float model and what its own tools make of it: QDQ with static ranges for the convolutional networks, dynamic
int8 for BERT and SmolLM2, MatMulNBits (block 32, accuracy_level 4) for 4-bit weights. OpenVINO, where it is there,
runs the float model with its precision hint at f32 and its default, and the files of onnxruntime's tools. Writes
results/whole.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import networks
import numpy as np
import onnx
import onnxruntime

import kbitc

BASELINE = "onnxruntime fp32"
CALIBRATION = 4  # feeds
BLOCK = 32
STATIC = {"scheme": "int8:c", "activations": "static", "solver": "rtn", "equalize": "none"}
Feeds = dict[str, Any]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A network, what kbitc compiles it to, and the tools of onnxruntime that quantize it: name -> function."""

    title: str
    make: Callable[[], onnx.ModelProto]
    options: dict[str, dict[str, Any]]
    peers: dict[str, Callable[[Path, Path], None]]


class _Feeder:
    """The calibration feeds, as onnxruntime's quantizer wants them."""

    def __init__(self, feeds: list[Feeds]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next feeds, None behind the last."""
        return next(self._feeds, None)


def calibration(model: onnx.ModelProto) -> list[Feeds]:
    """Feeds that are not timed."""
    return [networks.feeds(model, seed) for seed in range(1, CALIBRATION + 1)]


def quantize_static(source: Path, made: Path) -> None:
    """uint8 activations, int8 weights by channel, QDQ."""
    from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process
    from onnxruntime.quantization import quantize_static as quantize

    folded = made.with_suffix(".folded.onnx")
    quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
    feeder: Any = _Feeder(calibration(onnx.load(source)))
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize(str(folded), str(made), feeder, quant_format=QuantFormat.QDQ, per_channel=True, **kinds)


def quantize_dynamic(source: Path, made: Path) -> None:
    """int8 weights by channel, activations by tensor at run time."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    quantize(str(source), str(made), per_channel=True, weight_type=QuantType.QInt8)


def quantize_nbits(source: Path, made: Path) -> None:
    """MatMulNBits with 4 bits and int8 arithmetic."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(made))


def smollm2() -> onnx.ModelProto:
    """SmolLM2-135M on 256 tokens, as examples/accuracy scores it."""
    examples = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(examples), str(examples / "accuracy")]
    from build_smollm import CONTEXT, NAME
    from tasks import made_by

    folder = harness.models().fetch("smollm2-135m")
    model = onnx.load(made_by("accuracy/build_smollm.py", folder / NAME.format(CONTEXT)))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return model


CASES = {
    "resnet50": Case("ResNet-50", networks.resnet50, {"kbitc W8A8 static": STATIC}, {"int8 QDQ": quantize_static}),
    "mobilenet_v2": Case(
        "MobileNetV2", networks.mobilenet_v2, {"kbitc W8A8 static": STATIC}, {"int8 QDQ": quantize_static}
    ),
    "bert_base": Case(
        "BERT-base, 128 tokens",
        networks.bert_base,
        {
            "kbitc W8A8 dynamic": {"scheme": "int8:c"},
            "kbitc W8A8 static": STATIC,
            "kbitc W4A8 dynamic": {"scheme": f"int4:b{BLOCK}"},
        },
        {"int8 dynamic": quantize_dynamic, "MatMulNBits 4 bits": quantize_nbits},
    ),
    "decoder_step": Case(
        "decoder step 12 x 768, 256 tokens past",
        networks.decoder_step,
        {"kbitc W4A8 dynamic": {"scheme": f"int4:b{BLOCK}"}},
        {"MatMulNBits 4 bits": quantize_nbits},
    ),
    "smollm2": Case(
        "SmolLM2-135M, 256 tokens",
        smollm2,
        {"kbitc W8A8 dynamic": {"scheme": "int8:c"}, "kbitc W4A8 dynamic": {"scheme": f"int4:b{BLOCK}"}},
        {"int8 dynamic": quantize_dynamic, "MatMulNBits 4 bits": quantize_nbits},
    ),
}


def in_onnxruntime(path: Path, feeds: Feeds) -> Call:
    """A call with one thread; inputs and outputs stay where they are."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def in_openvino(path: Path, feeds: Feeds, hints: dict[str, Any]) -> Call:
    """A call with one thread."""
    import openvino  # type: ignore[import-not-found]

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", **hints}
    request = core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()
    for name, array in feeds.items():
        request.set_tensor(name, openvino.Tensor(np.ascontiguousarray(array), shared_memory=True))
    return lambda: request.infer(share_outputs=True)


def openvinos(files: dict[str, Path], feeds: Feeds) -> dict[str, Call]:
    """OpenVINO on the float model and on the files of onnxruntime's tools, those that it can read."""
    if importlib.util.find_spec("openvino") is None:
        return {}
    found = {
        "OpenVINO f32": in_openvino(files["fp32"], feeds, {"INFERENCE_PRECISION_HINT": "f32"}),
        "OpenVINO default": in_openvino(files["fp32"], feeds, {}),
    }
    for name, path in files.items():
        if name != "fp32":
            try:
                found[f"OpenVINO {name}"] = in_openvino(path, feeds, {})
            except RuntimeError as error:
                logging.warning("OpenVINO does not run %s: %s", name, str(error).splitlines()[0])
    return found


def measure(case: Case, rounds: int, folder: Path) -> dict[str, Any]:
    """One row of results: every engine takes turns."""
    model = case.make()
    feeds = networks.feeds(model)
    files = {"fp32": folder / "fp32.onnx"}
    onnx.save(model, files["fp32"])
    calls = {BASELINE: in_onnxruntime(files["fp32"], feeds)}
    for name, tool in case.peers.items():
        files[name] = folder / f"{name.replace(' ', '-')}.onnx"
        tool(files["fp32"], files[name])
        calls[f"onnxruntime {name}"] = in_onnxruntime(files[name], feeds)
    compiled = {}
    for name, options in case.options.items():
        given = calibration(model) if options.get("activations") == "static" else None
        start = time.perf_counter()
        report = kbitc.compile(model, folder / f"{name.replace(' ', '-')}.kbit", calibration=given, **options)
        compiled[name] = round(time.perf_counter() - start, 1)
        calls[name] = in_kbitc(Path(report.output), feeds)
    calls |= openvinos(files, feeds)
    timing = harness.interleave(calls, rounds, clock=clock(calls))
    harness.print_table(case.title, timing, BASELINE)
    row: dict[str, Any] = timing.as_json(case.title, BASELINE, compile_seconds=compiled)
    return row


def in_kbitc(bundle: Path, feeds: Feeds) -> Call:
    """A call of a bundle with one thread."""
    module = kbitc.load(bundle, threads=1)
    arguments = module.device_arguments([feeds[info.name] for info in module.inputs])
    return lambda: module.run_raw(arguments)


def clock(calls: dict[str, Call]) -> Callable[[], float]:
    """Processor time: of the calling thread, or of the process where OpenVINO works in a thread of its own."""
    return time.process_time if any(name.startswith("OpenVINO") for name in calls) else time.thread_time


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Whole networks against onnxruntime and OpenVINO.")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="write results/whole.json")
    given = parser.parse_args()
    harness.pin()
    rows = []
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(CASES[name], given.rounds, Path(folder)))
    if given.save:
        print(harness.save("whole", [*kept([row["case"] for row in rows]), *rows], threads=1))


def kept(measured: list[str]) -> list[dict[str, Any]]:
    """Rows of the results file of networks that were not measured now."""
    path = harness.RESULTS / "whole.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return [row for row in known if row["case"] not in measured]


if __name__ == "__main__":
    main()
