"""What a budget is divided over before a strategy spends it: the whole model, each layer, or each projection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import BudgetError
from .strategies import Allocation, Problem, Strategy, Unit

_GROUP_OF: dict[str, Callable[[Unit], tuple[str, str]]] = {
    "layer": lambda unit: ("layer", str(unit.bid)),
    "projection": lambda unit: ("projection", unit.proj),
}


def allocate_scope(strategy: Strategy, problem: Problem, scope: str) -> Allocation:
    """`strategy` on the whole problem ("global"), or on each layer or projection with its share of the budget.

    Shares are in proportion to weights, so that each part gets the same bits per weight. BudgetError
    names the part whose share is too small.
    """
    if scope == "global":
        return strategy.allocate(problem)
    parts: dict[tuple[str, str], list[int]] = {}
    for u, unit in enumerate(problem.units):
        parts.setdefault(_GROUP_OF[scope](unit), []).append(u)
    total = sum(unit.n_weights for unit in problem.units)
    found = []
    for (kind, name), rows in parts.items():
        n_weights = sum(problem.units[u].n_weights for u in rows)
        part = problem.part(rows, problem.budget * n_weights // total)
        try:
            found.append(strategy.allocate(part))
        except BudgetError as error:
            bits = part.budget * 8 / n_weights
            raise BudgetError(
                f"{kind} {name}: its share of the budget, {bits:.4g} bits per weight, is too small: {error.message}",
                "ask for more, or use --scope global",
            ) from None
    return _join(problem, list(parts.values()), found)


def _join(problem: Problem, parts: list[list[int]], found: list[Allocation]) -> Allocation:
    def spread(values: list[np.ndarray | None]) -> np.ndarray | None:
        whole: np.ndarray | None = None
        for rows, piece in zip(parts, values, strict=True):
            if piece is None:
                return None
            whole = np.zeros(len(problem.units), piece.dtype) if whole is None else whole
            whole[rows] = piece
        return whole

    def total(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    choice = spread([a.choice for a in found])
    assert choice is not None
    cost, bound = total([a.cost for a in found]), total([a.lower_bound for a in found])
    return Allocation(
        choice=choice,
        unit_cost=spread([a.unit_cost for a in found]),
        cost=cost,
        lower_bound=bound,
        gap=None if cost is None or bound is None else max(cost - bound, 0.0) / bound if bound > 0 else 0.0,
        method=" and ".join(sorted({a.method for a in found})),
        parameters=found[0].parameters,
        sensitivity=spread([a.sensitivity for a in found]),
        weights={key: w for a in found for key, w in (a.weights or {}).items()} or None,
    )
