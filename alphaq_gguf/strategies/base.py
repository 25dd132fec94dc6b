"""The strategy protocol: a problem (units, options, sizes, budget, signals) in, one option per unit out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..allocate import solve_budget
from ..checkpoint import ExpertMatrix
from ..errors import AlphaQError
from ..measure import Alpha, Distortion, Key, key_of
from ..qtypes import NOMINAL_BITS, QType


@dataclass(frozen=True)
class Unit:
    """What gets one type: a stack of experts. `n_cols` decides which types fit."""

    name: str
    bid: int
    proj: str
    n_cols: int
    n_weights: int
    matrices: tuple[ExpertMatrix, ...]
    options: tuple[QType, ...]


@dataclass(frozen=True)
class Problem:
    """Units, their options and what is known about them.

    `qtypes` are the columns of every table; `size` int64 [units, types] in bytes, `allowed` bool
    [units, types]; `budget` in bytes. `gamma` None asks for the rule of choose_gamma.
    """

    units: tuple[Unit, ...]
    qtypes: tuple[QType, ...]
    size: np.ndarray
    allowed: np.ndarray
    budget: int
    alphas: dict[Key, Alpha] = field(default_factory=dict)
    distortions: dict[tuple[Key, QType], Distortion] = field(default_factory=dict)
    analytic: bool = False
    gamma: float | None = None
    alpha_reference: str = "all"
    seed: int = 0


@dataclass(frozen=True)
class Allocation:
    """`choice` [units] indexes `Problem.qtypes`; costs are None where the strategy has no cost table.

    `parameters` are what the strategy settled on by itself (gamma, ...), for the recipe.
    """

    choice: np.ndarray
    unit_cost: np.ndarray | None = None
    cost: float | None = None
    lower_bound: float | None = None
    gap: float | None = None
    method: str = ""
    parameters: dict[str, float] = field(default_factory=dict)
    sensitivity: np.ndarray | None = None


class Strategy(Protocol):
    """One way to spend the budget. `needs` names the measurements it reads: "alphas", "distortions"."""

    name: str
    needs: frozenset[str]
    summary: str

    def allocate(self, problem: Problem) -> Allocation: ...


def matrix_distortion(problem: Problem, matrix: ExpertMatrix, qtype: QType) -> float:
    """Squared error of a matrix under a type: measured, or analytic n * v * 2^(-2b) with nominal bits b.

    The analytic form is AlphaQ's (A.4) summed over the matrix' weights, so that matrices count by
    their element count; v = max(population variance, 1e-12).
    """
    key = key_of(matrix)
    if problem.analytic:
        variance = max(problem.alphas[key].variance, 1e-12)
        return matrix.n_rows * matrix.n_cols * variance * 2.0 ** (-2 * NOMINAL_BITS[qtype])
    return problem.distortions[key, qtype].squared_error


def solve_costs(problem: Problem, weights: dict[Key, float], parameters: dict[str, float]) -> Allocation:
    """Allocate by the cost table sum over a unit's matrices of weight x distortion."""
    cost = np.full(problem.size.shape, np.inf)
    for u, unit in enumerate(problem.units):
        for t, qtype in enumerate(problem.qtypes):
            if problem.allowed[u, t]:
                cost[u, t] = sum(weights[key_of(m)] * matrix_distortion(problem, m, qtype) for m in unit.matrices)
    if not np.isfinite(cost[problem.allowed]).all():
        raise AlphaQError("the cost table overflows", "use a smaller --gamma")
    solution = solve_budget(cost, problem.size, problem.budget)
    sensitivity = np.array([np.mean([weights[key_of(m)] for m in unit.matrices]) for unit in problem.units])
    return Allocation(
        choice=solution.choice,
        unit_cost=cost[np.arange(len(cost)), solution.choice],
        cost=solution.cost,
        lower_bound=solution.lower_bound,
        gap=solution.gap,
        method=solution.method,
        parameters=parameters,
        sensitivity=sensitivity,
    )
