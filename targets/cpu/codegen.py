"""Machine code of a scheduled module for CPUs: kernels in parts that are compiled side by side, then linked.

LLVM takes most of the time of a compilation and works on one module in one thread. TVM lets go of Python's lock
meanwhile and every part has an LLVM context of its own. How kernels are divided depends on the module alone, so the
library is the same on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbitc.targets.link import linker
from kbitc.targets.target import Target

# More would balance better, but each part costs a few functions that every module has.
PARTS = 8
# Fewer kernels than this in a part are not worth its cost.
LEAST_KERNELS = 4


@dataclass(frozen=True)
class MachineCode:
    """A compiled module before it is linked.

    Attributes:
        target: what it was compiled for.
        executable: TVM's executable of the functions around the kernels.
        parts: runtime modules of the kernels.
    """

    target: Target
    executable: Any
    parts: tuple[Any, ...]

    def assembly(self) -> str:
        """Assembly text of the kernels."""
        return "\n".join(str(part.inspect_source("s")) for part in self.parts)

    def link(self, folder: Path) -> bytes:
        """The bytes of the shared library; temporary files go to the folder.

        Raises:
            ResourceError: no linker for the target.
        """

        def write(numbered: tuple[int, Any]) -> str:
            path = folder / f"kernels{numbered[0]}.o"
            numbered[1].write_to_file(str(path), "o")
            return str(path)

        objects = _side_by_side(write, list(enumerate(self.parts)))
        library = folder / "module.so"
        self.executable.export_library(str(library), fcompile=linker(self.target), addons=objects)
        return library.read_bytes()


def compile_kernels(module: Any, target: Target, relax_pipeline: Any, disabled: Sequence[str] = ()) -> MachineCode:
    """Compile a scheduled relax module for a CPU.

    Args:
        module: tvm IRModule with main and its kernels.
        target: what to compile for.
        relax_pipeline: passes that come first.
        disabled: names of TVM's passes that are left out.
    """
    import tvm
    from tvm import relax

    known = tvm.target.Target(target.tvm)

    def build(part: dict[Any, Any]) -> Any:
        # Target and pass context belong to a thread.
        with known, tvm.transform.PassContext(disabled_pass=list(disabled)):
            return tvm.tirx.build(tvm.IRModule(part), target=known)

    with known, tvm.transform.PassContext(disabled_pass=list(disabled)):
        planned = relax_pipeline(module)
    builder = relax.ExecBuilder()
    left = tvm.get_global_func("relax.VMCodeGen")(builder, planned)
    kernels = [(name, func) for name, func in left.functions_items() if isinstance(func, tvm.tirx.PrimFunc)]
    parts = _side_by_side(build, divided(sorted(kernels, key=lambda item: item[0].name_hint)))
    linked = tvm.get_global_func("relax.VMLink")(builder, known, None, [], {})
    return MachineCode(target, relax.VMExecutable(linked), tuple(parts))


def divided(kernels: Sequence[tuple[Any, Any]]) -> list[dict[Any, Any]]:
    """Kernels in turn to at most PARTS parts: neighbours by name are alike, so that parts are about equal."""
    count = max(1, min(PARTS, len(kernels) // LEAST_KERNELS))
    return [dict(kernels[i::count]) for i in range(count)]


def _side_by_side(function: Any, items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(max(1, min(len(items), os.cpu_count() or 1))) as pool:
        return list(pool.map(function, items))
