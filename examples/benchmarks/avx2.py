"""The products of gemv.py as a processor without AVX512 runs them, one thread.

    python examples/benchmarks/avx2.py [--rows 1 8 32 128] [--schemes int4:b32]

kbitc compiles for x86:avx2. OpenVINO is told to stay with AVX2 (ONEDNN_MAX_CPU_ISA). ggml is the one that KBITC_GGML
names: build it with -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON. onnxruntime is masked
when this runs as `masked.py` says; else its figures are those of the whole processor. Writes results/avx2.json.
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
MANY_ROWS_SCHEMES = ("int4:b32", "nf4:b32", "int8:c", "int4:b32/i4")
MASKED = {"kbitc": TARGET, "OpenVINO": "ONEDNN_MAX_CPU_ISA=AVX2", "ggml": "built for AVX2"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Products with AVX2 against peers with AVX2.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--schemes", nargs="+")
    chosen = parser.parse_args()
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    harness.pin(1)
    rows = []
    for count in chosen.rows:
        schemes = chosen.schemes or list(gemv.SCHEMES if count == 1 else MANY_ROWS_SCHEMES)
        rows.append(gemv.measure(schemes, gemv.FULL_SHAPE, 1, count, TARGET))
    found = probe(parse_target(TARGET), clock=time.thread_time)
    limits: dict[str, Any] = {} if found is None else found.as_json()
    seen = "masked" if "cpuid.so" in os.environ.get("LD_PRELOAD", "") else "not masked"
    print(harness.save("avx2", rows, threads=1, limits=limits, masked={**MASKED, "onnxruntime": seen}))


if __name__ == "__main__":
    main()
