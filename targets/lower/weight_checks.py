"""Leaves out the checks of weights at the start of every run.

Before:
    vm.builtin.check_tensor_info(weight_1, 2, "int8");  vm.builtin.match_shape(weight_1, heap, 2, 0, 96, 0, 768)
After: nothing. Of a MobileNetV2's 680 calls of built-in functions in a run, 520 are such.
Keeps the checks of inputs, and what the kernels themselves check of their arguments. The shapes of weights have no
symbols, so that nothing reads what their match would have noted.
"""

from __future__ import annotations

from typing import Any

INPUTS = "kbitc.inputs"
CHECKS = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")


def mark_inputs(module: Any, inputs: int) -> Any:
    """The module with the number of inputs of main, which stand before its weights, as an attribute."""
    module["main"] = module["main"].with_attr(INPUTS, inputs)
    return module


def drop_weight_checks(module: Any) -> Any:
    """The module, after VMShapeLower, without the checks of main's weights."""
    from tvm import relax

    main = module["main"]
    if main.attrs is None or INPUTS not in main.attrs:
        return module
    # A variable's hash is its identity in TVM.
    weights = {hash(weight) for weight in main.params[int(main.attrs[INPUTS]) :]}

    def is_check(binding: Any) -> bool:
        call = binding.value
        if not isinstance(call, relax.Call) or not isinstance(call.op, relax.ExternFunc) or not call.args:
            return False
        return call.op.global_symbol in CHECKS and hash(call.args[0]) in weights

    body = main.body
    blocks = [
        type(block)([binding for binding in block.bindings if not is_check(binding)], block.span)
        for block in body.blocks
    ]
    module = module.clone()
    module["main"] = relax.Function(
        main.params, relax.SeqExpr(blocks, body.body), main.ret_ty, main.is_pure, main.attrs, main.span
    )
    return module
