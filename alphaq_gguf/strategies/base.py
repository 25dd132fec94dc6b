"""The strategy protocol: a problem (units, options, sizes, budget, signals) in, one option per unit out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from ..allocate import Solution, solve_budget
from ..calibration import Calibration
from ..checkpoint import ExpertMatrix
from ..contained import Stored, solve_stacks, store
from ..errors import AlphaQError
from ..gguf_file import align
from ..measurements import Alpha, Distortion, Key, key_of
from ..qtypes import NOMINAL_BITS, QType, stock_substitute


@dataclass(frozen=True)
class Unit:
    """What gets one type: a stack of experts, one expert's part of a stack, or one expert whole.

    `xid` is None for a stack; `proj` is "all" for a whole expert, whose matrices may differ in what fits
    their rows: `matrix_type` says what each of them takes.
    """

    name: str
    bid: int
    proj: str
    n_weights: int
    matrices: tuple[ExpertMatrix, ...]
    options: tuple[QType, ...]
    xid: int | None = None

    @property
    def n_cols(self) -> int:
        """Length of the rows, of the first matrix where they differ."""
        return self.matrices[0].n_cols


@dataclass(frozen=True)
class Problem:
    """Units, their options and what is known about them.

    `qtypes` are the columns of every table; `size` int64 [units, types] in bytes, `allowed` bool
    [units, types]; `budget` in bytes. `gamma` None asks for the rule of choose_gamma. `masses`, by which
    costs are multiplied where there are any, and `router_norms` are by (layer, expert); `row_variances`
    hold the largest variance of a row. `calibration` says how text uses the experts; `exponents` are PMQ's of
    frequency, gate weight and error. `stack_alignment` is there when the units are experts of stacks in a file and the
    budget counts what that stores: the bytes that stacks are aligned to.
    """

    units: tuple[Unit, ...]
    qtypes: tuple[QType, ...]
    size: np.ndarray
    allowed: np.ndarray
    budget: int
    alphas: dict[Key, Alpha] = field(default_factory=dict)
    distortions: dict[tuple[Key, QType], Distortion] = field(default_factory=dict)
    masses: dict[tuple[int, int], float] = field(default_factory=dict)
    router_norms: dict[tuple[int, int], float] = field(default_factory=dict)
    row_variances: dict[Key, float] = field(default_factory=dict)
    calibration: Calibration | None = None
    exponents: tuple[float, float, float] = (1.0, 1.0, 2.0)
    analytic: bool = False
    gamma: float | None = None
    alpha_reference: str = "all"
    seed: int = 0
    stack_alignment: int | None = None

    def part(self, rows: Sequence[int], budget: int) -> Problem:
        """The problem of these units alone, with a budget of their own."""
        units = tuple(self.units[u] for u in rows)
        return replace(self, units=units, size=self.size[rows], allowed=self.allowed[rows], budget=budget)

    def n_bytes(self, choice: np.ndarray) -> int:
        """What the budget counts of a choice: the units' bytes, or what a file stores. ValueError as for `stacks`."""
        if self.stack_alignment is None:
            return int(self.size[np.arange(len(self.units)), choice].sum())
        return sum(align(stored.n_bytes, self.stack_alignment) for stored in self.stacks(choice).values())

    def stacks(self, choice: np.ndarray) -> dict[str, Stored]:
        """How each expert stack is stored when its experts are units that have these types.

        ValueError for a stack that no GGUF type holds.
        """
        matrices: dict[str, dict[int, list[ExpertMatrix]]] = {}
        types: dict[str, dict[int, QType]] = {}
        for unit, t in zip(self.units, choice, strict=True):
            for matrix in unit.matrices:
                matrices.setdefault(matrix.stack, {}).setdefault(matrix.xid, []).append(matrix)
                types.setdefault(matrix.stack, {})[matrix.xid] = matrix_type(matrix, self.qtypes[int(t)])
        return {
            name: store(_shape(list(experts.values())), [types[name][xid] for xid in sorted(experts)])
            for name, experts in matrices.items()
        }


@dataclass(frozen=True)
class Allocation:
    """`choice` [units] indexes `Problem.qtypes`; costs are None where the strategy has no cost table.

    `parameters` are what the strategy settled on by itself (gamma, ...), for the recipe; `weights` what
    each matrix' squared error counts in the cost table.
    """

    choice: np.ndarray
    unit_cost: np.ndarray | None = None
    cost: float | None = None
    lower_bound: float | None = None
    gap: float | None = None
    method: str = ""
    parameters: dict[str, float] = field(default_factory=dict)
    sensitivity: np.ndarray | None = None
    weights: dict[Key, float] | None = None


class Strategy(Protocol):
    """One way to spend the budget.

    `needs` names what it reads of a Problem: NEEDS lists all there is. `source` is where it was published.
    A strategy that can only tell single experts apart has `experts_only`, which is looked for by name.
    """

    name: str
    needs: frozenset[str]
    summary: str
    source: str

    def allocate(self, problem: Problem) -> Allocation: ...


MASS_FLOOR = 0.01
"""The least mass of an expert, as a share of its layer's mean.

Text reaches experts that random vectors do not, so none may be free of cost. A bit less quadruples an error: at a
hundredth of the mass an expert gives up 3.3 bits, nearly all that lies between Q2_K and Q6_K, and less mass than
that could hardly take more from it.
"""

NEEDS = {
    "alphas": "weights: spectra of expert matrices",
    "distortions": "weights: encoding errors of expert matrices",
    "routing": "weights: routers, with simulated vectors",
    "router": "weights: routers",
    "row_variances": "weights: variances of rows",
    "usage": "calibration: tokens routed to each expert, and with what weight",
    "significance": "calibration: gate weights x activations of each expert",
    "block_errors": "calibration: change of a block's output by each expert and type",
    "self_usage": "weights: tokens routed to each expert in text that the model writes itself",
}
"""What strategies can ask to be measured, and what of the model it takes."""


def matrix_type(matrix: ExpertMatrix, qtype: QType) -> QType:
    """What a matrix takes when its unit is given `qtype`: that, or llama.cpp's substitute where rows do not fit."""
    return stock_substitute(qtype, matrix.n_cols)


def matrix_distortion(problem: Problem, matrix: ExpertMatrix, qtype: QType) -> float:
    """Squared error of a matrix under a type: measured, or analytic n * v * 2^(-2b) with nominal bits b.

    The analytic form is AlphaQ's (A.4) summed over the matrix' weights, so that matrices count by
    their element count; v = max(population variance, 1e-12).
    """
    key, qtype = key_of(matrix), matrix_type(matrix, qtype)
    if problem.analytic:
        variance = max(problem.alphas[key].variance, 1e-12)
        return matrix.n_rows * matrix.n_cols * variance * 2.0 ** (-2 * NOMINAL_BITS[qtype])
    return problem.distortions[key, qtype].squared_error


def cost_table(problem: Problem, weights: dict[Key, float]) -> np.ndarray:
    """Cost [units, types]: the sum over a unit's matrices of weight x distortion; inf where not allowed."""
    cost = np.full(problem.size.shape, np.inf)
    for u, unit in enumerate(problem.units):
        for t, qtype in enumerate(problem.qtypes):
            if problem.allowed[u, t]:
                cost[u, t] = sum(weights[key_of(m)] * matrix_distortion(problem, m, qtype) for m in unit.matrices)
    return cost


def solve_costs(problem: Problem, weights: dict[Key, float], parameters: dict[str, float]) -> Allocation:
    """Allocate by the cost table that `weights` give, times the experts' masses where the problem has them."""
    if problem.masses:
        masses = with_floor(problem.masses)
        weights = {
            key_of(m): weights[key_of(m)] * masses[m.bid, m.xid] for unit in problem.units for m in unit.matrices
        }
    cost = cost_table(problem, weights)
    if not np.isfinite(cost[problem.allowed]).all():
        raise AlphaQError("the cost table overflows", "use a smaller --gamma")
    solution = _solve(problem, cost)
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
        weights=weights,
    )


def _solve(problem: Problem, cost: np.ndarray) -> Solution:
    """The least cost within the budget, stack by stack where that counts what a file stores of stacks."""
    if problem.stack_alignment is None or any(unit.proj == "all" for unit in problem.units):
        return solve_budget(cost, problem.size, problem.budget)
    rows: dict[str, list[int]] = defaultdict(list)
    # Experts lie in a stack by their number.
    for u in sorted(range(len(problem.units)), key=lambda u: problem.units[u].xid or 0):
        rows[problem.units[u].matrices[0].stack].append(u)
    stacks = [(_shape([problem.units[u].matrices for u in found]), found) for found in rows.values()]
    return solve_stacks(stacks, problem.qtypes, cost, problem.budget, problem.stack_alignment)


def _shape(experts: Sequence[Sequence[ExpertMatrix]]) -> tuple[int, int, int]:
    """[experts, rows, columns] of the stack that these matrices are, by expert."""
    return len(experts), sum(matrix.n_rows for matrix in experts[0]), experts[0][0].n_cols


def with_floor(masses: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """Masses by (layer, expert), raised to the floor."""
    layers: dict[int, list[float]] = defaultdict(list)
    for (bid, _), mass in masses.items():
        layers[bid].append(mass)
    least = {bid: MASS_FLOOR * float(np.mean(found)) for bid, found in layers.items()}
    return {(bid, xid): max(mass, least[bid]) for (bid, xid), mass in masses.items()}


def calibration_of(problem: Problem) -> Calibration:
    """What calibration found; AlphaQError where there is none."""
    if problem.calibration is None:
        raise AlphaQError(
            "how text uses the experts is not known", "measure it with `alphaq-gguf calibrate` and give --calibration"
        )
    return problem.calibration


def check_numbers(found: np.ndarray, what: str) -> np.ndarray:
    """`found`, if it holds non-negative numbers only; AlphaQError otherwise."""
    if not (np.isfinite(found) & (found >= 0)).all():
        raise AlphaQError(
            f"{what}: not all are numbers from 0 on", "calibrate again, with more text if a layer was not reached"
        )
    return found
