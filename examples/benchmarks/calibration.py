"""Peak memory of calibrating a model shaped like BERT-base on 1,000 sequences of 128 tokens.

    python examples/benchmarks/calibration.py                      12 layers of 768, percentile observer
    python examples/benchmarks/calibration.py --layers 2 --samples 64
    python examples/benchmarks/calibration.py --samples 16 --observer measured --values 3

With `measured` the first values take most: all of the model lies behind them.
The weights are random: memory does not depend on them. The peak is that of the whole process, the model (about 440 MB)
and onnxruntime's copy of it included.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import harness
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

THREADS = 1  # the calibration takes one, for equal bits
HEADS, VOCABULARY, LENGTH, BATCH = 12, 30522, 128, 8
BERT_LAYER = """
    q0{i} = MatMul(x{i}, wq{i})  q1{i} = Add(q0{i}, bq{i})  k0{i} = MatMul(x{i}, wk{i})  k1{i} = Add(k0{i}, bk{i})
    v0{i} = MatMul(x{i}, wv{i})  v1{i} = Add(v0{i}, bv{i})
    q2{i} = Reshape(q1{i}, split)  q3{i} = Transpose<perm = [0, 2, 1, 3]>(q2{i})
    k2{i} = Reshape(k1{i}, split)  k3{i} = Transpose<perm = [0, 2, 3, 1]>(k2{i})
    v2{i} = Reshape(v1{i}, split)  v3{i} = Transpose<perm = [0, 2, 1, 3]>(v2{i})
    s0{i} = MatMul(q3{i}, k3{i})  s1{i} = Div(s0{i}, root)  p{i} = Softmax(s1{i})  c0{i} = MatMul(p{i}, v3{i})
    c1{i} = Transpose<perm = [0, 2, 1, 3]>(c0{i})  c2{i} = Reshape(c1{i}, join)
    o0{i} = MatMul(c2{i}, wo{i})  o1{i} = Add(o0{i}, bo{i})  r0{i} = Add(o1{i}, x{i})
    n{i} = LayerNormalization(r0{i}, gain, bias)
    u0{i} = MatMul(n{i}, wu{i})  u1{i} = Add(u0{i}, bu{i})  g{i} = Gelu(u1{i})
    d0{i} = MatMul(g{i}, wd{i})  d1{i} = Add(d0{i}, bd{i})  r1{i} = Add(d1{i}, n{i})
    x{next} = LayerNormalization(r1{i}, gain, bias)"""


def bert_shaped(layers: int, width: int) -> onnx.ModelProto:
    """An encoder with random weights: i64 ids [N, S] -> f32 [N, S, width]."""
    body = "".join(BERT_LAYER.format(i=i, next=i + 1) for i in range(layers))
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (int64[N, S] ids) => (float[N, S, {width}] x{layers}) {{'
    model = onnx.parser.parse_model(f"{text} x0 = Gather(table, ids) {body} }}")
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.standard_normal((VOCABULARY, width), np.float32),
        "gain": np.ones(width, np.float32), "bias": np.zeros(width, np.float32),
        "root": np.array(np.sqrt(width / HEADS), np.float32),
        "split": np.array([0, 0, HEADS, width // HEADS]), "join": np.array([0, 0, width]),
    }  # fmt: skip
    for i in range(layers):
        for name, (rows, columns) in {
            "q": (1, 1),
            "k": (1, 1),
            "v": (1, 1),
            "o": (1, 1),
            "u": (1, 4),
            "d": (4, 1),
        }.items():
            shape = (rows * width, columns * width)
            arrays[f"w{name}{i}"] = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))
            arrays[f"b{name}{i}"] = rng.standard_normal(shape[1], np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def main() -> None:
    """Calibrate, print one line of JSON, and save it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--observer", default="percentile")
    parser.add_argument("--values", type=int, help="how many values are measured, for --observer measured")
    parser.add_argument("--save", action="store_true", help="write results/calibration.json")
    options = parser.parse_args()
    from kbitc import catalog
    from kbitc.importer import load_model
    from kbitc.passes.allocate.measured import BATCHES, least_noise
    from kbitc.passes.allocate.static import observable
    from kbitc.passes.calibrate.collect import collect
    from kbitc.passes.canonicalize import canonicalize
    from kbitc.quant.static import codes_for

    model = canonicalize(load_model(bert_shaped(options.layers, options.width)))
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (options.samples, LENGTH))
    feeds = [{"ids": ids[start : start + BATCH]} for start in range(0, len(ids), BATCH)]
    start, processor = time.perf_counter(), time.process_time()
    stats = collect(model, observable(model), feeds)
    observer = catalog.find("kbitc.passes.observers", options.observer, "observer")
    ranges = {name: observer.observe(item, 256) for name, item in stats.values.items()}
    if hasattr(observer, "candidates"):
        offers = {
            name: [codes_for(*ends, 8) for ends in observer.candidates(stats.values[name], 256)] for name in ranges
        }
        choices = [name for name, every in offers.items() if len(every) > 1][: options.values]
        collected = time.perf_counter()
        least_noise(model, {name: offers[name] for name in choices}, feeds[:BATCHES])
        print(f"{len(choices)} values with a choice measured in {time.perf_counter() - collected:.0f} s")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    name = f"{options.observer}, {len(ranges)} values"
    row = {
        "case": f"calibration of {options.layers} layers of {options.width}, {options.samples} sequences of {LENGTH}",
        "milliseconds": {name: 1000 * seconds}, "speed": {name: 1.0}, "against": name,
        "float_value": f"peak {peak:.2f} GiB", "peak_gib": peak, "seconds": seconds,
        "processor_seconds": time.process_time() - processor,
    }  # fmt: skip
    print(json.dumps(row))
    if options.save:
        harness.save("calibration", [row], THREADS)


if __name__ == "__main__":
    main()
