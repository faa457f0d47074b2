"""The kernel and schedule rules of NEON, in order of preference."""

from __future__ import annotations

from kbitc.targets.cpu.rules import float as float_rules
from kbitc.targets.cpu.rules import integer, quantized
from kbitc.targets.cpu.rules.schedule import SCHEDULE_RULES
from kbitc.targets.cpu.rules.unpacked import UnpackedConv
from kbitc.targets.reference.contraction import ReferenceContraction
from kbitc.targets.reference.integer import PlainIntegers

RULES = [*integer.RULES, PlainIntegers(), UnpackedConv(), *quantized.RULES, *float_rules.RULES, ReferenceContraction()]

__all__ = ["RULES", "SCHEDULE_RULES"]
