"""Kernels that reach a machine's limits: reads at memory speed, multiply-adds at the speed of the registers.

Each runs as `tasks` parallel tasks, so that the limits of several threads can be probed too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import GROUP
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.ftile import Registers
from kbitc.targets.kernels.isa import Feed, Isa

# Sums that hide the latency of an addition or multiply-add.
CHAINS = 8
# The operands of the multiply-adds, in bytes: they stay in the first-level cache.
OPERAND_BYTES = 8192
# Levels that every instruction set multiplies as they are, and some sum in 16 bits.
FOUR_BITS = Feed(bias=0, ends=(0, 15))


@dataclass(frozen=True)
class Probe:
    """A kernel, the (shape, dtype) of its arguments, and the bytes or operations of one call."""

    function: Any
    arguments: tuple[tuple[tuple[int, ...], str], ...]
    amount: int


def make_read(size: int, tasks: int, lanes: int, name: str) -> Probe:
    """Sums x f32 [n], about `size` bytes, into out f32 [tasks, CHAINS * lanes]."""
    step = CHAINS * lanes * tasks
    count = size // 4 // step * step

    def body() -> None:
        x, out = v.argument("x", (count,), "float32"), v.argument("out", (tasks, CHAINS * lanes), "float32")
        each = count // tasks
        with v.root(), builder.parallel(v.i64(0), v.i64(tasks)) as task:
            sums = [v.register(lanes, "float32") for _ in range(CHAINS)]
            for total in sums:
                v.put(total, v.full(0.0, "float32", lanes), lanes)

            def step(i: Any) -> None:
                for chain, total in enumerate(sums):
                    loaded = v.load(x, [task * each + i * (CHAINS * lanes) + chain * lanes], lanes)
                    v.put(total, v.get(total, lanes) + loaded, lanes)

            v.loop(each // (CHAINS * lanes), step)
            for chain, total in enumerate(sums):
                v.store(out, [task, chain * lanes], v.get(total, lanes), lanes)

    arguments = (((count,), "float32"), ((tasks, CHAINS * lanes), "float32"))
    return Probe(v.kernel(name, body), arguments, 4 * count)


def make_float_peak(registers: Registers, rounds: int, tasks: int, name: str) -> Probe:
    """Multiplies and adds x f32 [n] into out f32 [tasks, sums * lanes]."""
    lanes = registers.lanes

    def factors(x: Any) -> list[Any]:
        return [v.bind(v.splat(x[v.i64(r)], lanes)) for r in range(_rows(registers.count))]

    def prepared(x: Any, at: Any) -> Any:
        return v.bind(v.load(x, [at], lanes))

    def add(total: Any, loaded: Any, factor: Any) -> Any:
        return total + loaded * factor

    work = _Work(rounds, tasks, lanes, lanes, "float32", "float32", registers.count, 1)
    return work.kernel(name, factors, prepared, add, 2 * lanes)


def make_integer_peak(isa: Isa, rounds: int, tasks: int, name: str) -> Probe:
    """Integer dot products of x uint8 [n] into out int32 [tasks, sums * lanes], or int16 of twice as many lanes."""

    def words(x: Any) -> list[Any]:
        fours = [v.load(x, [GROUP * r], GROUP) for r in range(_rows(isa.registers))]
        return [isa.broadcast(v.bind(v.reinterpret(four, "int32", 1))) for four in fours]

    def levels(x: Any, at: Any) -> Any:
        return isa.split(v.bind(v.load(x, [at], isa.bytes)), FOUR_BITS)

    narrow = bool(isa.chain(FOUR_BITS))

    def add(sums: Any, levels: Any, activations: Any) -> Any:
        return isa.narrow(sums, levels, activations, FOUR_BITS) if narrow else isa.dot(sums, levels, activations)

    lanes, dtype = (2 * isa.lanes, "int16") if narrow else (isa.lanes, "int32")
    # The portable set holds several registers of every operand.
    held = 1 if narrow or isa.lanes > 8 else 2
    work = _Work(rounds, tasks, lanes, isa.bytes, "uint8", dtype, isa.registers, held)
    return work.kernel(name, words, levels, add, 2 * GROUP * isa.lanes)


def _rows(registers: int) -> int:
    """Multiplications that use one loaded vector."""
    return 4 if registers >= 32 else 2


@dataclass(frozen=True)
class _Work:
    """A loop over operands in the first-level cache; every vector of them meets `_rows` factors held in registers.

    Attributes:
        rounds: passes over the operands.
        tasks: parallel tasks.
        lanes: of a sum.
        width: elements of a loaded vector.
        dtype, sum_dtype: types of operands and sums.
        registers: vector registers.
        held: registers of one operand.
    """

    rounds: int
    tasks: int
    lanes: int
    width: int
    dtype: str
    sum_dtype: str
    registers: int
    held: int

    def kernel(
        self,
        name: str,
        factors: Callable[[Any], list[Any]],
        prepared: Callable[[Any, Any], Any],
        add: Callable[[Any, Any, Any], Any],
        operations: int,
    ) -> Probe:
        """The kernel of an operation; `operations` are those of one `add`."""
        rows = _rows(self.registers)
        vectors = (self.registers - 2 - self.held * (rows + 1)) // rows
        count = OPERAND_BYTES // (4 if self.dtype == "float32" else 1)
        steps = count // (vectors * self.width)
        shape = (self.tasks, rows * vectors * self.lanes)

        def body() -> None:
            x, out = v.argument("x", (count,), self.dtype), v.argument("out", shape, self.sum_dtype)
            with v.root(), builder.parallel(v.i64(0), v.i64(self.tasks)) as task:
                sums = [[v.register(self.lanes, self.sum_dtype) for _ in range(rows)] for _ in range(vectors)]
                for total in (total for row in sums for total in row):
                    v.put(total, v.full(0, self.sum_dtype, self.lanes), self.lanes)
                held = factors(x)

                def step(s: Any) -> None:
                    for i, row in enumerate(sums):
                        loaded = prepared(x, (s * vectors + i) * self.width)
                        for total, factor in zip(row, held, strict=True):
                            v.put(total, add(v.get(total, self.lanes), loaded, factor), self.lanes)

                v.loop(self.rounds, lambda _: v.loop(steps, step))
                for at, total in enumerate(total for row in sums for total in row):
                    v.store(out, [task, at * self.lanes], v.get(total, self.lanes), self.lanes)

        amount = self.rounds * steps * rows * vectors * operations * self.tasks
        return Probe(v.kernel(name, body), (((count,), self.dtype), (shape, self.sum_dtype)), amount)
