"""Kernel rules and schedule rules of NVIDIA GPUs, in priority order."""

from kbitc.targets.cuda.rules.floats import FloatProduct, GroupedConvolution, QuantizedEmbedding
from kbitc.targets.cuda.rules.product import INTEGER_PRODUCT
from kbitc.targets.cuda.rules.schedule import SCHEDULE_RULES
from kbitc.targets.reference.integer import PlainIntegers

RULES = [PlainIntegers(), INTEGER_PRODUCT, QuantizedEmbedding(), FloatProduct(), GroupedConvolution()]

__all__ = ["RULES", "SCHEDULE_RULES"]
