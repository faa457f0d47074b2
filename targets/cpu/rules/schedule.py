"""Schedules of TE groups on CPUs, in order of preference."""

from __future__ import annotations

from kbitc.targets.cpu.rules.byte_table import byte_table
from kbitc.targets.cpu.rules.elementwise import elementwise
from kbitc.targets.cpu.rules.plain import plain_loops
from kbitc.targets.cpu.rules.reduction import reduction
from kbitc.targets.cpu.rules.rows import rows
from kbitc.targets.rules.base import ScheduleRule

SCHEDULE_RULES: list[ScheduleRule] = [byte_table, elementwise, reduction, rows, plain_loops]
