"""The integer product of any number of rows: the matrix-vector kernel for few, the tensor-core kernel for more."""

from __future__ import annotations

from typing import Any

from kbitc.targets.cuda.kernels.arguments import Arguments, declared
from kbitc.targets.cuda.kernels.qgemm import emit_qgemm
from kbitc.targets.cuda.kernels.qgemv import MAX_ROWS, emit_qgemv
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.qgemm import QgemmSpec
from kbitc.targets.kernels.rows import MatmulRows


def make_product(spec: QgemmSpec, name: str) -> Any:
    """The PrimFunc; arguments as `arguments.declared` has them. A symbolic number of rows is decided at run time."""

    def body() -> None:
        with declared(spec) as args:
            _emit(spec, args)

    return v.kernel(name, body)


def _emit(spec: QgemmSpec, args: Arguments) -> None:
    rows = args.rows.count
    vector = isinstance(args.rows, MatmulRows)
    if isinstance(rows, int):
        few: Any = vector and rows <= MAX_ROWS
    else:
        few = rows <= v.i64(MAX_ROWS) if vector else False
    v.when(few, lambda: emit_qgemv(spec, args), lambda: emit_qgemm(spec, args))
