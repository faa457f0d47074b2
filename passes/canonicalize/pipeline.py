"""Stage 2: any imported model becomes a small, fixed vocabulary of operators in opset-21 form."""

from __future__ import annotations

import onnx_ir as ir

from kbitc.passes.base import run_once, run_until_stable


def canonicalize(model: ir.Model) -> ir.Model:
    """Bring a model into canonical form, in place, and return it.

    Afterwards: opset 21 or later, nodes sorted, weights in initializers, no functions but kbitc's own, shapes folded,
    BatchNormalization and Gemm taken apart, LayerNormalization, Gelu, Softmax and HardSwish put together. Names,
    order, types and shapes of inputs and outputs stay.

    Raises:
        ModelError: constants that cannot be computed.
        UnsupportedError: an operator in training mode, or a form without equivalent.
    """
    # The list names the passes of this very package, so it can only be read once the package is loaded.
    from kbitc.passes.default import (
        CANONICALIZE_CHOOSE,
        CANONICALIZE_FINISH,
        CANONICALIZE_FORM,
        CANONICALIZE_SIMPLIFY,
    )

    run_once(model, CANONICALIZE_FORM)
    run_until_stable(model, CANONICALIZE_SIMPLIFY)
    while run_once(model, CANONICALIZE_CHOOSE).modified:
        run_until_stable(model, CANONICALIZE_SIMPLIFY)
    run_once(model, CANONICALIZE_FINISH)
    return model
