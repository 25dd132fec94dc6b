"""The budget solver: one type per unit, least total cost, bytes within the budget.

A multiple-choice knapsack. Its linear relaxation gives a lower bound, a certificate; rounding it down is within one
step of one unit of the bound, and a search that starts from there closes the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from .errors import BudgetError
from .knapsack import fill, relax, search

# States that the search may look at unless a proof is asked for: seconds, and less than a gigabyte.
_MAX_STATES = 1e7


@dataclass(frozen=True)
class Solution:
    """`choice` [units] indexes the options; `gap` is (cost - lower_bound) / lower_bound, 0 when proven optimal.

    `method` is "exact" where the optimum is proven, "bounded" where the search was given up.
    """

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
    cost: np.ndarray,
    size: np.ndarray,
    budget: int,
    *,
    needed: Sequence[int] = (),
    exact: bool = False,
) -> Solution:
    """Choose one option per unit: least summed `cost` with summed `size` <= `budget`, each in `needed` by some unit.

    Tens of thousands of units take well under a second, adversarial costs a few, and what they leave is a small gap.
    `exact` proves the optimum however long it takes.

    `cost` float [units, options], inf where a unit does not have the option; `size` int [units, options] in bytes
    (any unit works). BudgetError when even the smallest options exceed the budget, or the smallest with those needed.
    ValueError for shapes that differ, NaN or negative costs, or a unit without options.
    """
    cost, size = np.asarray(cost, dtype=np.float64), np.asarray(size, dtype=np.int64)
    if cost.shape != size.shape or cost.ndim != 2:
        raise ValueError(f"cost {cost.shape} and size {size.shape} must both be [units, options]")
    finite = np.isfinite(cost)
    if np.isnan(cost).any() or (cost < 0).any() or not finite.any(axis=1).all():
        raise ValueError("costs must be non-negative numbers, with at least one finite option per unit")
    least = _least(cost, size)
    smallest = int(least.sum())
    if smallest > budget:
        raise BudgetError(f"the budget of {budget} bytes is below the smallest allocation, {smallest} bytes")
    # Powers of two keep every ratio exact while taming the huge spread that a large gamma produces.
    top = cost[finite].max(initial=0.0)
    scale = 2.0 ** min(-np.ceil(np.log2(top)), 1023.0) if top > 0 else 1.0
    scaled = cost * scale
    # Bytes that no allocation can spend would widen the gap.
    step = int(np.gcd.reduce((size - least[:, None])[finite])) or 1
    payable = budget - (budget - smallest) % step
    relaxed = relax(scaled, size, payable)
    choice = fill(scaled, size, payable, relaxed.choice)
    if not set(needed) <= set(choice.tolist()):
        choice = _with_needed(scaled, size, payable, relaxed.rate, needed)
    rows = np.arange(len(cost))
    choice, bound = search(scaled, size, payable, relaxed, choice, needed, np.inf if exact else _MAX_STATES)
    method = "exact" if bound == scaled[rows, choice].sum() else "bounded"
    total = float(cost[rows, choice].sum())
    bound = total if method == "exact" else min(float(bound / scale), total)
    return Solution(choice, total, int(size[rows, choice].sum()), bound, method)


def _least(cost: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Bytes [units] of each unit's smallest option."""
    return np.where(np.isfinite(cost), size, np.iinfo(np.int64).max).min(axis=1)


def _with_needed(cost: np.ndarray, size: np.ndarray, budget: int, rate: float, needed: Sequence[int]) -> np.ndarray:
    """Some choice with the needed options in use, by the units where that costs least or, if it must be, fits best."""
    options = np.array(needed)
    extra = size - _least(cost, size)[:, None]
    loss = cost + rate * extra
    for price in (loss - loss.min(axis=1, keepdims=True), np.where(np.isfinite(cost), extra, np.inf)):
        try:
            units, columns = linear_sum_assignment(price[:, options])
        except ValueError:
            break
        forced = cost.copy()
        forced[units] = np.inf
        forced[units, options[columns]] = cost[units, options[columns]]
        if len(units) == len(options) and int(_least(forced, size).sum()) <= budget:
            return fill(forced, size, budget, relax(forced, size, budget).choice)
    raise BudgetError(f"{budget} bytes do not pay for an allocation with each of the options {list(needed)}")
