"""What a budget is divided over before a strategy spends it: the whole model, each layer, or each projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .budget import smallest_choice
from .errors import BudgetError
from .strategies import Allocation, Problem, Strategy, Unit

_GROUP_OF: dict[str, Callable[[Unit], tuple[str, str]]] = {
    "layer": lambda unit: ("layer", str(unit.bid)),
    "projection": lambda unit: ("projection", unit.proj),
}

# Halvings of the range of bytes to spend: down to about a thousandth of a bit per weight.
_N_HALVINGS = 12


def allocate_within(strategy: Strategy, problem: Problem, scope: str) -> Allocation:
    """`allocate_scope` with what is stored within the budget, also by strategies that know nothing of containers.

    Those get as many of the experts' own bytes to spend as lead to a choice that fits. BudgetError when none does.
    """
    first = allocate_scope(strategy, problem, scope)
    if _fits(problem, first):
        return first
    least = problem.size[np.arange(len(problem.units)), smallest_choice(problem)]
    low, high = int(least.sum()), problem.budget
    best = _spend(strategy, problem, scope, low)
    best = best if best is not None and _fits(problem, best) else None
    for _ in range(_N_HALVINGS):
        if high - low < 2:
            break
        middle = (low + high) // 2
        found = _spend(strategy, problem, scope, middle)
        if found is not None and not _fits(problem, found):
            high = middle
        else:
            low, best = middle, found or best
    if best is None:
        raise BudgetError(
            f"{strategy.name} finds no choice of types that is stored in {problem.budget:,} bytes",
            "ask for more, or use --granularity stack",
        )
    if best.weights is None or best.cost is None or first.lower_bound is None:
        return best
    # No choice beats what the experts' own bytes would allow.
    bound = min(first.lower_bound, best.cost)
    gap = (best.cost - bound) / bound if bound > 0 else 0.0
    return replace(best, lower_bound=bound, gap=gap, method="exact" if gap == 0 else "bounded")


def _spend(strategy: Strategy, problem: Problem, scope: str, n_bytes: int) -> Allocation | None:
    """What the strategy makes of `n_bytes` of the experts' own; None when they are too few for it."""
    try:
        return allocate_scope(strategy, replace(problem, budget=n_bytes), scope)
    except BudgetError:
        return None


def _fits(problem: Problem, allocation: Allocation) -> bool:
    try:
        return problem.n_bytes(allocation.choice) <= problem.budget
    except ValueError:
        return False


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
