"""What a compiled library holds for the GPU: read from the file, without CUDA tools (except for `instructions`)."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kbitc.errors import BundleError, ResourceError
from kbitc.targets.cuda.toolchain import toolkit_roots

EM_CUDA = 190  # e_machine of a cubin
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")  # ELF64 after e_ident
_SECTION = struct.Struct("<IIQQQQIIQQ")
_ELF64 = b"\x7fELF\x02\x01\x01"
_TEXT, _SHARED = ".text.", ".nv.shared."
_NEW_ABI = 8  # from ABI version 8 (CUDA 13) the architecture stands one byte higher in e_flags
_SOURCE_MARKS = (b"__global__", b"__launch_bounds__", b"__device__")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class KernelCode:
    """One kernel in a cubin: bytes of instructions and of static shared memory (with what the driver reserves)."""

    name: str
    code_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Cubin:
    """One image of machine code: architecture such as "sm_90", its kernels, and where it lies in the file."""

    arch: str
    kernels: tuple[KernelCode, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class CudaFacts:
    """Machine code images of a library, and whether CUDA C++ text is in it too."""

    cubins: tuple[Cubin, ...]
    has_source: bool

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of all kernels in file order."""
        return tuple(kernel.name for cubin in self.cubins for kernel in cubin.kernels)


def inspect(library: Path) -> CudaFacts:
    """Find the cubins inside a library.

    Raises:
        BundleError: the file cannot be read.
    """
    try:
        data = library.read_bytes()
    except OSError as error:
        raise BundleError("cannot read the library", where=str(library), got=error) from None
    cubins = []
    start = data.find(_ELF64)
    while start >= 0:
        cubin = _cubin(data, start)
        if cubin is not None:
            cubins.append(cubin)
        start = data.find(_ELF64, start + 1)
    return CudaFacts(tuple(cubins), any(mark in data for mark in _SOURCE_MARKS))


def _cubin(data: bytes, start: int) -> Cubin | None:
    """The cubin that begins at `start`, None when another kind of ELF image does."""
    if start + 64 > len(data):
        return None
    fields = _HEADER.unpack_from(data, start)
    if fields[1] != EM_CUDA:
        return None
    program_offset, section_offset, flags = fields[4], fields[5], fields[6]
    program_size, programs, section_size, sections, names_index = fields[8:13]
    arch = (flags >> 8 if data[start + 8] >= _NEW_ABI else flags) & 0xFF
    table = [_SECTION.unpack_from(data, start + section_offset + i * section_size) for i in range(sections)]
    names_at = start + table[names_index][4]

    def name(section: tuple[int, ...]) -> str:
        at = names_at + section[0]
        return data[at : data.index(b"\0", at)].decode()

    sizes = {name(section): section[5] for section in table}
    kernels = tuple(
        KernelCode(key[len(_TEXT) :], size, sizes.get(_SHARED + key[len(_TEXT) :], 0))
        for key, size in sizes.items()
        if key.startswith(_TEXT)
    )
    end = max(program_offset + programs * program_size, section_offset + sections * section_size)
    return Cubin(f"sm_{arch}", kernels, start, end)


def find_disassembler() -> str | None:
    """Path of nvdisasm in PATH, a toolkit or the pip package nvidia-cuda-nvdisasm; None when there is none."""
    candidates = [str(root / "bin" / "nvdisasm") for root in toolkit_roots()]
    return next((path for name in ["nvdisasm", *candidates] if (path := shutil.which(name))), None)


def instructions(library: Path) -> dict[str, Counter[str]]:
    """Count the machine instructions (SASS opcodes such as "IDP.4A.S8.S8") of every kernel in a library.

    Raises:
        ResourceError: nvdisasm is missing or fails.
    """
    tool = find_disassembler()
    if tool is None:
        raise ResourceError("nvdisasm is not here", remedy="pip install nvidia-cuda-nvdisasm")
    data = library.read_bytes()
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="kbitc-sass-") as folder:
        for cubin in inspect(library).cubins:
            image = Path(folder, "image.cubin")
            image.write_bytes(data[cubin.offset : cubin.offset + cubin.size])
            done = subprocess.run([tool, "-c", str(image)], capture_output=True, text=True, timeout=600, check=False)
            if done.returncode:
                raise ResourceError("nvdisasm fails", where=str(library), got=done.stderr[-200:])
            counts |= count_opcodes(done.stdout)
    return counts


def count_opcodes(listing: str) -> dict[str, Counter[str]]:
    """Opcodes of every kernel in the text that ``nvdisasm -c`` writes."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.splitlines():
        if line.startswith(f"\t.section\t{_TEXT}") or line.startswith(f".section\t{_TEXT}"):
            kernel = line.split(_TEXT, 1)[1].split(",")[0].strip('" ')
            current = counts.setdefault(kernel, Counter())
        elif match := _OPCODE.search(line):
            current[match[1]] += 1
    return counts
