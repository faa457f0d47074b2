"""Which kernel call of a module belongs to which layer: what a measurement by layer needs to know.

The virtual machine runs the calls of a function in the order in which they were emitted. So the i-th call of a kernel
is the i-th record of it, as long as only one function calls it (`kbitc.bundle.profile`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

RelaxExpr = Any


@dataclass
class Call:
    """One emitted kernel call.

    Attributes:
        kernel: name of the kernel in the library.
        function: number of the function that calls it; 0 is main.
        layers: names of the nodes that it works for; several when they share what it makes.
        rule: kernel rule that emitted it; "" outside of contractions.
        outputs: number of its last arguments that it writes.
        result: whether it gives the result of the contraction.
    """

    kernel: str
    function: int
    layers: list[str]
    rule: str
    outputs: int
    result: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {
            "kernel": self.kernel, "function": self.function, "layers": self.layers, "rule": self.rule,
            "outputs": self.outputs, "result": self.result,
        }  # fmt: skip


@dataclass
class Calls:
    """The records of a lowering, and whose kernels are being emitted."""

    records: list[Call] = field(default_factory=list)
    functions: int = 1
    _layer: str = ""
    _rule: str = ""
    # By variable: the call that made it. The variable is kept so that its hash, its identity in TVM, stays its own.
    _made: dict[int, tuple[RelaxExpr, Call]] = field(default_factory=dict)

    @contextmanager
    def working_for(self, layer: str, rule: str = "") -> Iterator[None]:
        """Calls that are added meanwhile belong to this layer."""
        before = self._layer, self._rule
        self._layer, self._rule = layer, rule
        try:
            yield
        finally:
            self._layer, self._rule = before

    def add(self, kernel: str, function: int, given: Sequence[RelaxExpr], made: Sequence[RelaxExpr]) -> None:
        """Note a call; what helped another layer before (a quantized activation) helps this one too."""
        if self._rule:
            for source in given:
                _, helper = self._made.get(hash(source), (None, None))
                if helper is not None and not helper.result and self._layer not in helper.layers:
                    helper.layers.append(self._layer)
        call = Call(kernel, function, [self._layer], self._rule, len(made))
        self.records.append(call)
        if self._rule:
            self._made.update({hash(variable): (variable, call) for variable in made})

    def give_result(self, variable: RelaxExpr) -> None:
        """Note that a variable is the result of its contraction."""
        _, call = self._made.get(hash(variable), (None, None))
        if call is not None:
            call.result = True
