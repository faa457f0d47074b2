"""mma.sync m16n8k32 and m16n8k16 on signed bytes: a warp adds a 16x8 product into int32 registers (PTX ISA, "mma").

Lane 4 * group + member holds: of A (16 rows, k columns) the rows group and group + 8, of B (k rows, 8 columns) the
column group, each as one word for every 16 of k, bytes 4 * member .. 4 * member + 3; of C (16 rows, 8 columns) the
rows group (elements 0, 1) and group + 8 (2, 3), columns 2 * member and 2 * member + 1.
Which of the k columns a word stands for is free as long as A and B agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call

OPCODE = "IMMA"
ROWS = 16
COLUMNS = 8

# The guard lets another meaning of the two functions take the place of the instruction.
SOURCE = """
#ifndef KBITC_MMA_S8
#define KBITC_MMA_S8
__device__ __forceinline__ void kbitc_mma_s8_k32(int* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                                 unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void kbitc_mma_s8_k16(int* c, unsigned a0, unsigned a1, unsigned b0) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
}
#endif
"""


def mma_k32(c: Any, at: int, a: list[Any], b: list[Any]) -> Any:
    """The call for k = 32: c[at .. at + 3] (local int32 buffer) += A B; a has 4 words, b has 2 (uint32)."""
    return cuda_func_call("kbitc_mma_s8_k32", tirx.address_of(c[at]), *a, *b, source_code=SOURCE)


def mma_k16(c: Any, at: int, a: list[Any], b: list[Any]) -> Any:
    """The call for k = 16: a has 2 words, b has 1."""
    return cuda_func_call("kbitc_mma_s8_k16", tirx.address_of(c[at]), *a, *b, source_code=SOURCE)


def mma_means(a: npt.NDArray[np.int8], b: npt.NDArray[np.int8], c: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The same in numpy: a int8 [16, k], b int8 [k, 8], c int32 [16, 8]."""
    return np.asarray((c + a.astype(np.int64) @ b.astype(np.int64)).astype(np.int32))
