"""The products of gemv.py as a processor without AVX512 runs them, one thread.

    python examples/benchmarks/avx2.py [--rows 1 8 32 128 512] [--schemes int4:b32]

kbitc compiles for x86:avx2. OpenVINO is told to stay with AVX2 (ONEDNN_MAX_CPU_ISA), ggml is the one that KBITC_GGML
names: build it with -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON. onnxruntime has no
such switch: on a processor with AVX512 its figures are those with AVX512. Writes results/avx2.json.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import gemv
import harness

from kbitc.targets.probe import probe
from kbitc.targets.target import parse_target

TARGET = "x86:avx2"
SCHEMES = (*(f"int{k}:b32" for k in range(1, 9)), "nf4:b32", "int4:b32/i4", "int2:b32/i4")
MASKED = {"kbitc": TARGET, "OpenVINO": "ONEDNN_MAX_CPU_ISA=AVX2", "ggml": "built for AVX2", "onnxruntime": "not masked"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Products with AVX2 against peers with AVX2.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    chosen = parser.parse_args()
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    harness.pin(1)
    rows = [gemv.measure(chosen.schemes, gemv.FULL_SHAPE, 1, count, TARGET) for count in chosen.rows]
    found = probe(parse_target(TARGET), clock=time.thread_time)
    limits: dict[str, Any] = {} if found is None else found.as_json()
    print(harness.save("avx2", rows, threads=1, limits=limits, masked=MASKED))


if __name__ == "__main__":
    main()
