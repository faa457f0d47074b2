"""What bounds a product of one row in the first cache: cycles that mixes of instructions take for 128 codes of 4 bits.

    python examples/benchmarks/ports.py

Each mix does what a kernel does to 64 bytes of codes (both nibbles, two dot products), for six tiles in turn, on data
of the first-level cache, and leaves out scales. A cycle is a third of what each multiplication of a chain takes.
Needs a C compiler, AVX512-VNNI and VBMI. Writes results/ports.json.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import harness

TILES, STEPS = 6, 4
MASK, TABLE, FREE = "%%zmm31", "%%zmm30", "%%zmm29"
LOW_NIBBLES = (f"vpandq {MASK},{{a}},{{a}}", f"vpandq {MASK},{{b}},{{b}}")
LOOK_UPS = (f"vpermb {TABLE},{{a}},{{a}}", f"vpermb {TABLE},{{b}},{{b}}")
SHUFFLES = (*LOW_NIBBLES, f"vpshufb {{a}},{TABLE},{{a}}", f"vpshufb {{b}},{TABLE},{{b}}")
DOTS = ("vpdpbusd {low}(%1)%{{1to16%}},{a},{sum}", "vpdpbusd {high}(%1)%{{1to16%}},{b},{sum}")
SHIFT, MOVE, ANY = "vpsrlw $4,{a},{b}", "vmovdqa64 {a},{b}", f"vpaddb {FREE},{{a}},{{b}}"
MIXES = {
    "int4: shift, 2 vpandq, 2 vpdpbusd": (SHIFT, *LOW_NIBBLES, *DOTS),
    "nf4: shift, 2 vpermb, 2 vpdpbusd": (SHIFT, *LOOK_UPS, *DOTS),
    "nf4, an operation of any port for the shift": (ANY, *LOOK_UPS, *DOTS),
    "nf4 without the shift": (MOVE, *LOOK_UPS, *DOTS),
    "nf4 shifted by vpmultishiftqb": (f"vpmultishiftqb {{a}},{FREE},{{b}}", *LOOK_UPS, *DOTS),
    "nf4 shifted by vprolq": ("vprolq $4,{a},{b}", *LOOK_UPS, *DOTS),
    "nf4 by vpshufb": (SHIFT, *SHUFFLES, *DOTS),
    "2 vpdpbusd alone": (MOVE, *DOTS),
}
MAIN = """
#include <stdio.h>
#include <time.h>
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
static char codes[65536] __attribute__((aligned(64))), x[4096] __attribute__((aligned(64)));
int main(void) {
  double cycle = 1e9, best, start;
  for (int r = 0; r < 9; r++) {
    long n = 1000000, sum = 0; start = now();
    __asm__ volatile("1: .rept 64; imul $3,%1,%1; .endr; dec %0; jnz 1b" : "+r"(n), "+r"(sum));
    start = (now() - start) / (64 * 3e6); if (start < cycle) cycle = start;
  }
  printf("%.6g\\n", cycle);
"""


def loop(name: str, mix: tuple[str, ...]) -> str:
    """C that times a mix and prints its name and seconds."""
    lines = []
    for step in range(STEPS):
        for tile in range(TILES):
            names = {"sum": f"%%zmm{tile}", "a": f"%%zmm{8 + 2 * tile}", "b": f"%%zmm{9 + 2 * tile}"}
            places = {"low": 8 * step, "high": 8 * step + 4}
            lines.append(f"vmovdqu64 {64 * (tile + TILES * step)}(%0),{names['a']}")
            lines += [line.format(**names, **places) for line in mix]
    registers = ",".join(f'"zmm{i}"' for i in range(32))
    text = "; ".join(lines)
    return f"""  best = 1e9;
  for (int r = 0; r < 15; r++) {{
    start = now();
    for (long i = 0; i < 20000; i++) __asm__ volatile("{text}" :: "r"(codes), "r"(x) : {registers});
    start = (now() - start) / 20000; if (start < best) best = start;
  }}
  printf("{name}|%.6g\\n", best / {TILES * STEPS});
"""


def measure() -> tuple[float, dict[str, float]]:
    """Seconds of a cycle, and of each mix."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("no C compiler: apt-get install gcc")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "ports.c", Path(folder) / "ports"
        source.write_text(MAIN + "".join(loop(*item) for item in MIXES.items()) + "  return 0;\n}\n", encoding="ascii")
        flags = ["-O2", "-mavx512f", "-mavx512bw", "-mavx512vnni", "-mavx512vbmi"]
        subprocess.run([compiler, *flags, "-o", str(program), str(source)], check=True)
        done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    cycle, *lines = done.stdout.splitlines()
    return float(cycle), {name: float(seconds) for name, _, seconds in (line.partition("|") for line in lines)}


def main() -> None:
    """Measure, print and save."""
    harness.pin(1)
    cycle, found = measure()
    for name, seconds in found.items():
        print(f"{seconds / cycle:6.2f} cycles  {name}")
    against = next(iter(found))
    row: dict[str, Any] = {
        "case": "128 codes of 4 bits in the first cache, without scales",
        "against": against,
        "milliseconds": {name: float(f"{1e3 * seconds:.4g}") for name, seconds in found.items()},
        "speed": {name: round(found[against] / seconds, 3) for name, seconds in found.items()},
        "cycles": {name: round(seconds / cycle, 2) for name, seconds in found.items()},
    }
    print(harness.save("ports", [row], threads=1))


if __name__ == "__main__":
    main()
