"""Integer matrix products and convolutions: `kernels/qgemv.py` (dp4a) and `kernels/qgemm.py` (tensor cores)."""

from __future__ import annotations

from kbitc.targets.cuda.kernels.product import make_product
from kbitc.targets.cuda.kernels.quantize import make_quantize
from kbitc.targets.rules.product import IntegerProduct

INTEGER_PRODUCT = IntegerProduct(("dp4a",), make_quantize, lambda spec, target, name: make_product(spec, name))
