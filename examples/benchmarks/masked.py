"""A copy of onnxruntime that sees no AVX512, AVX-VNNI and AMX, for comparisons with AVX2 on a processor that has them.

    python examples/benchmarks/masked.py FOLDER
    LD_PRELOAD=FOLDER/cpuid.so PYTHONPATH=FOLDER:$PYTHONPATH python examples/benchmarks/avx2.py

onnxruntime asks the processor by the instruction `cpuid` and has no switch. In the copy every such instruction is one
that does not exist (ud2, of the same two bytes); the library preloaded answers in its place, less the features to hide.
For x86-64 Linux; needs objdump and a C compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import struct
import subprocess
from pathlib import Path

CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"
LOAD_SEGMENT = 1
# Leaf 7: (subleaf, register) -> bits of AVX512*, AMX*, AVX-VNNI (Intel SDM, volume 2A, CPUID).
HANDLER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>

static const unsigned long places[] = {@PLACES@};

static void answer(int number, siginfo_t *info, void *context) {
  greg_t *all = ((ucontext_t *)context)->uc_mcontext.gregs;
  Dl_info where;
  int known = 0;
  if (dladdr((void *)all[REG_RIP], &where) && strstr(where.dli_fname, "onnxruntime_pybind11_state"))
    for (unsigned i = 0; i < sizeof places / sizeof *places; i++)
      known |= (unsigned long)all[REG_RIP] - (unsigned long)where.dli_fbase == places[i];
  if (!known) {
    signal(number, SIG_DFL);
    return;
  }
  unsigned leaf = all[REG_RAX], sub = all[REG_RCX], a, b, c, d;
  __cpuid_count(leaf, sub, a, b, c, d);
  if (leaf == 7 && sub == 0) {
    b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
    c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
    d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
  }
  if (leaf == 7 && sub == 1) {
    a &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23);
    d &= ~(1u << 4 | 1u << 5 | 1u << 10);
  }
  all[REG_RAX] = a, all[REG_RBX] = b, all[REG_RCX] = c, all[REG_RDX] = d;
  all[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO};
  sigaction(SIGILL, &action, 0);
}
"""


def segments(library: bytes) -> list[tuple[int, int, int]]:
    """(address, place in the file, bytes) of what is loaded of an ELF file of 64 bits."""
    start, size, count = (*struct.unpack_from("<Q", library, 32), *struct.unpack_from("<HH", library, 54))
    headers = [struct.unpack_from("<IIQQQQ", library, start + i * size) for i in range(count)]
    return [(header[3], header[2], header[5]) for header in headers if header[0] == LOAD_SEGMENT]


def masked(library: bytes, places: list[int]) -> bytes:
    """The library with another instruction at these addresses, all of which must hold `cpuid`."""
    made = bytearray(library)
    for place in places:
        at = next(place - a + offset for a, offset, size in segments(library) if a <= place < a + size)
        if made[at : at + 2] != CPUID:
            raise ValueError(f"no cpuid at {place:#x}")
        made[at : at + 2] = UD2
    return bytes(made)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A copy of onnxruntime that sees no AVX512.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise SystemExit("onnxruntime is not installed")
    copy = folder / "onnxruntime"
    shutil.copytree(Path(found.origin).parent, copy)
    library = next((copy / "capi").glob("onnxruntime_pybind11_state*.so"))
    listing = subprocess.run(["objdump", "-d", str(library)], check=True, capture_output=True, text=True).stdout
    places = [int(text, 16) for text in re.findall(r"^\s*([0-9a-f]+):.*\tcpuid", listing, re.MULTILINE)]
    library.write_bytes(masked(library.read_bytes(), places))
    source = folder / "cpuid.c"
    source.write_text(HANDLER.replace("@PLACES@", ", ".join(f"{place:#x}ul" for place in places)), encoding="utf-8")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(folder / "cpuid.so"), str(source), "-ldl"], check=True)
    print(f"LD_PRELOAD={folder / 'cpuid.so'} PYTHONPATH={folder}", len(places), "places")


if __name__ == "__main__":
    main()
