"""The budget solver: one type per unit, least total cost, bytes within the budget.

A multiple-choice knapsack. The linear relaxation is solved exactly on each unit's lower convex hull
(its value is the Lagrangian bound, a certificate); rounding it down is within one hull step of the
bound, which is nothing for thousands of units. Where that gap matters HiGHS closes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from .errors import BudgetError

# HiGHS is exact in well under a second up to here, and is asked whenever the hull leaves a larger gap.
_SMALL_UNITS = 300
_MAX_EXACT_UNITS = 5_000
_GAP = 1e-4
# Relative gap that rounding alone can leave: an optimum.
_PROVEN = 1e-10
_TIME_LIMIT_S = 20.0
# HiGHS stops at an absolute gap of 1e-6, so costs are scaled to make the optimum about this large.
_OBJECTIVE_SCALE = 1e6
# Units whose costs are below this share of the optimum are invisible to HiGHS and solved afterwards.
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Solution:
    """`choice` [units] indexes the options; `gap` is (cost - lower_bound) / lower_bound, 0 when proven optimal."""

    choice: np.ndarray
    cost: float
    size: int
    lower_bound: float
    method: str

    @property
    def gap(self) -> float:
        if self.cost <= self.lower_bound:
            return 0.0
        return (self.cost - self.lower_bound) / self.lower_bound if self.lower_bound > 0 else float("inf")


def solve_budget(
    cost: np.ndarray, size: np.ndarray, budget: int, *, hull_only: bool = False, exact: bool = False
) -> Solution:
    """Choose one option per unit: least summed `cost` with summed `size` <= `budget`.

    `hull_only` leaves HiGHS out: always fast, and within one step of one unit of the bound.
    `exact` asks HiGHS for a proven optimum however many units there are and however long it takes.

    `cost` float [units, options], inf where a unit does not have the option; `size` int [units,
    options] in bytes (any unit works). BudgetError when even the smallest options exceed the budget.
    ValueError for shapes that differ, NaN or negative costs, or a unit without options.
    """
    cost, size = np.asarray(cost, dtype=np.float64), np.asarray(size, dtype=np.int64)
    if cost.shape != size.shape or cost.ndim != 2:
        raise ValueError(f"cost {cost.shape} and size {size.shape} must both be [units, options]")
    if np.isnan(cost).any() or (cost < 0).any() or np.isinf(cost).all(axis=1).any():
        raise ValueError("costs must be non-negative numbers, with at least one finite option per unit")
    smallest = int(np.where(np.isfinite(cost), size, np.iinfo(np.int64).max).min(axis=1).sum())
    if smallest > budget:
        raise BudgetError(f"the budget of {budget} bytes is below the smallest allocation, {smallest} bytes")
    # Powers of two keep every ratio exact while taming the huge spread that a large gamma produces.
    top = cost[np.isfinite(cost)].max(initial=0.0)
    scale = 2.0 ** min(-np.ceil(np.log2(top)), 1023.0) if top > 0 else 1.0
    choice, bound, method = _solve(cost * scale, size, budget, hull_only, exact)
    rows = np.arange(len(cost))
    return Solution(
        choice, float(cost[rows, choice].sum()), int(size[rows, choice].sum()), float(bound / scale), method
    )


def _solve(
    cost: np.ndarray, size: np.ndarray, budget: int, hull_only: bool = False, exact: bool = False
) -> tuple[np.ndarray, float, str]:
    rows = np.arange(len(cost))
    choice, bound = _solve_hull(cost, size, budget)
    _fill(cost, size, budget, choice)
    value = float(cost[rows, choice].sum())
    method = "hull"
    near = value <= bound or (len(cost) > _SMALL_UNITS and value <= bound * (1 + (_PROVEN if exact else _GAP)))
    if hull_only or near or (len(cost) > _MAX_EXACT_UNITS and not exact):
        return choice, bound, method
    found, found_bound = _solve_highs(cost, size, budget, value, None if exact else _TIME_LIMIT_S)
    bound = max(bound, found_bound)
    if found is not None:
        _resolve_negligible(cost, size, budget, found, value, exact)
        _fill(cost, size, budget, found)
        if cost[rows, found].sum() <= value:
            choice, method = found, "highs"
    return choice, min(bound, float(cost[rows, choice].sum())), method


def _solve_hull(cost: np.ndarray, size: np.ndarray, budget: int) -> tuple[np.ndarray, float]:
    """The relaxation's optimum rounded down, and its value (a lower bound on any allocation's cost)."""
    rows = np.arange(len(cost))
    finite = np.isfinite(cost)
    # Start: the smallest option of each unit, the cheapest one among equals.
    least = np.where(finite, size, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    current = np.where(finite & (size == least), cost, np.inf).argmin(axis=1)
    start = current.copy()
    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    ceiling = np.full(len(cost), np.inf)
    active = rows
    while len(active):
        at = current[active]
        gain = cost[active, at][:, None] - np.where(finite[active], cost[active], np.inf)
        grow = size[active] - size[active, at][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where((grow > 0) & (gain > 0), gain / grow, -np.inf)
        best = slope.max(axis=1)
        # Of options on one line take the farthest: the nearer ones are not corners of the hull.
        to = np.where(slope == best[:, None], grow, -1).argmax(axis=1)
        going = best > 0
        active, to = active[going], to[going]
        picked = (np.flatnonzero(going), to)
        # On a line of options rounding may make a later slope the steeper one; order needs them falling.
        ceiling[active] = np.minimum(best[going], ceiling[active])
        steps.append((active, to, ceiling[active], grow[picked]))
        current[active] = to
    choice = start
    bound = float(cost[rows, choice].sum())
    slack = budget - int(size[rows, choice].sum())
    if not steps:
        return choice, bound
    unit, to, slope, grow = (np.concatenate(column) for column in zip(*steps, strict=True))
    # Slopes fall along each unit's hull, and the sort is stable, so steps of a unit stay in order.
    order = np.argsort(-slope, kind="stable")
    unit, to, slope, grow = unit[order], to[order], slope[order], grow[order]
    used = np.cumsum(grow)
    n_whole = int(np.searchsorted(used, slack, side="right"))
    choice[unit[:n_whole]] = to[:n_whole]
    spent = int(used[n_whole - 1]) if n_whole else 0
    bound = float(cost[rows, choice].sum())
    if n_whole < len(unit):
        bound -= float(slope[n_whole]) * (slack - spent)
    # Rounding error of these sums must not lift the bound above the true one.
    return choice, max(bound * (1 - 1e-12), 0.0)


def _fill(cost: np.ndarray, size: np.ndarray, budget: int, choice: np.ndarray) -> None:
    """Spend what is left: repeatedly take the upgrade with the best cost per byte that still fits (in place)."""
    rows = np.arange(len(cost))
    slack = budget - int(size[rows, choice].sum())
    gain = cost[rows, choice][:, None] - cost
    grow = size - size[rows, choice][:, None]
    while True:
        usable = (grow <= slack) & (gain > 0)
        if not usable.any():
            return
        value = np.where(usable, gain / np.maximum(grow, 1), -np.inf)
        unit, option = np.unravel_index(int(value.argmax()), value.shape)
        slack -= int(grow[unit, option])
        choice[unit] = option
        gain[unit] = cost[unit, option] - cost[unit]
        grow[unit] = size[unit] - size[unit, option]


def _solve_highs(
    cost: np.ndarray, size: np.ndarray, budget: int, incumbent: float, time_limit_s: float | None
) -> tuple[np.ndarray | None, float]:
    """HiGHS on the same problem: a feasible choice (or None) and a proven lower bound."""
    unit, option = np.nonzero(np.isfinite(cost))
    least = np.where(np.isfinite(cost), size, np.iinfo(np.int64).max).min(axis=1)
    extra = size[unit, option] - least[unit]
    slack = budget - int(least.sum())
    divisor = int(np.gcd.reduce(extra)) or 1
    column = np.arange(len(unit))
    one_each = LinearConstraint(coo_array((np.ones(len(unit)), (unit, column))).tocsr(), 1, 1)
    within = LinearConstraint((extra // divisor).astype(np.float64)[None, :], -np.inf, slack // divisor)
    # An option dearer than the incumbent as a whole can be in no optimum; cutting it keeps numbers sane.
    with np.errstate(over="ignore"):
        weights = cost[unit, option] / incumbent * _OBJECTIVE_SCALE
    useful = weights <= _OBJECTIVE_SCALE * (1 + 1e-9)
    result = milp(
        np.where(useful, weights, 0.0),
        integrality=np.ones(len(unit)),
        bounds=Bounds(np.zeros(len(unit)), useful.astype(np.float64)),  # pyright: ignore[reportArgumentType]
        constraints=[one_each, within],
        options={"mip_rel_gap": 0.0, **({} if time_limit_s is None else {"time_limit": time_limit_s})},
    )
    bound = (
        0.0
        if result.mip_dual_bound is None
        else float(result.mip_dual_bound) / _OBJECTIVE_SCALE * incumbent * (1 - 1e-9)
    )
    if result.x is None:
        return None, bound
    choice = np.full(len(cost), -1)
    taken = result.x > 0.5
    choice[unit[taken]] = option[taken]
    rows = np.arange(len(cost))
    if (choice < 0).any() or int(size[rows, choice].sum()) > budget:
        return None, bound
    return choice, bound


def _resolve_negligible(
    cost: np.ndarray, size: np.ndarray, budget: int, choice: np.ndarray, incumbent: float, exact: bool
) -> None:
    """Choose again, with what the others leave, for units too cheap for HiGHS to have seen (in place)."""
    rows = np.arange(len(cost))
    dearest = np.where(np.isfinite(cost), cost, 0.0).max(axis=1)
    tiny = dearest < _NEGLIGIBLE * incumbent
    if not tiny.any() or tiny.all():
        return
    left = budget - int(size[rows, choice][~tiny].sum())
    choice[tiny] = _solve(cost[tiny], size[tiny], left, exact=exact)[0]
