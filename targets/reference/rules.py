"""The rules of the reference target: every contraction as plain TE loops, every group unscheduled."""

from __future__ import annotations

from kbitc.targets.cpu.rules.plain import plain_loops
from kbitc.targets.reference.contraction import ReferenceContraction
from kbitc.targets.rules.base import ScheduleRule

RULES = [ReferenceContraction()]
# Not for speed: it keeps the passes of TVM from taking exponential time over nested names.
SCHEDULE_RULES: list[ScheduleRule] = [plain_loops]
