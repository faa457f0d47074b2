"""Chooses the planner of a budget: what fits a size, what keeps a time, or the smallest plan that keeps a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbitc import catalog
from kbitc.kernel_times import KernelTimes, priced, within_time
from kbitc.options import CompileOptions, default_scheme
from kbitc.passes.allocate.choices import make_problem
from kbitc.passes.allocate.survey import survey
from kbitc.passes.allocate.uniform import Accepts
from kbitc.planner import MEASURED_WITH, SOLVERS, Fitting, Planner, smallest_within
from kbitc.quant.plan import QuantPlan, read_plan

if TYPE_CHECKING:
    import onnx_ir as ir

    from kbitc.passes.verify.score import Score


def budget_planner(
    model: ir.Model,
    base: QuantPlan,
    feeds: Sequence[Mapping[str, Any]],
    options: CompileOptions,
    accepts: Accepts,
    others: Callable[[QuantPlan, int], int] | None,
    judge: Callable[[QuantPlan], Score],
    times: Callable[[], KernelTimes],
) -> Planner:
    """The planner of a budget.

    Args:
        model: canonical graph.
        base: the plan without the budget.
        feeds: samples to measure on.
        options: its budget has at least one limit, its scheme is not None.
        accepts: what the target and the form of the result can hold.
        others: (plan, bytes of its weights as counted) -> bytes beside them, estimated; None: an attempt tells.
        judge: scores a plan.
        times: predicts what the kernels of the base plan take.
    """
    pinned = () if options.plan is None else tuple(request.tensor for request in read_plan(options.plan))
    solver = catalog.find(SOLVERS, MEASURED_WITH, "solver")
    scheme = options.scheme or default_scheme()
    problem = make_problem(model, survey(model), base, pinned, scheme, options.activation, accepts, feeds, solver.solve)
    budget, predicted = options.budget, times()
    if budget.microseconds is not None:
        return within_time(problem, budget, predicted, base, judge)
    problem = priced(problem, predicted)
    if budget.size is None and budget.bpw is None:
        return smallest_within(problem, budget, judge)
    return Fitting(problem, budget, others or (lambda plan, counted: 0), judge if budget.max_drop is not None else None)
