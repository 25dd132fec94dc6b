"""A control: one type for all experts, the largest that fits, with llama.cpp's own substitutions."""

from __future__ import annotations

import numpy as np

from ..errors import BudgetError
from ..qtypes import QType, bpw, stock_substitute
from .base import Allocation, Problem, Unit


class Uniform:
    name = "uniform"
    needs: frozenset[str] = frozenset()
    summary = "one type for all experts, the largest within the budget (control)"
    source = "control"

    def allocate(self, problem: Problem) -> Allocation:
        column = {qtype: t for t, qtype in enumerate(problem.qtypes)}
        best: np.ndarray | None = None
        smallest, largest = None, -1
        for level in sorted(problem.qtypes, key=bpw):
            choice = np.array([column[_at_level(unit, level)] for unit in problem.units])
            total = int(problem.size[np.arange(len(choice)), choice].sum())
            smallest = total if smallest is None else min(smallest, total)
            if largest < total <= problem.budget:
                best, largest = choice, total
        if best is None:
            raise BudgetError(
                f"no single type fits {problem.budget} bytes: the smallest uniform allocation has {smallest}"
            )
        return Allocation(choice=best, method="largest uniform type")


def _at_level(unit: Unit, level: QType) -> QType:
    """The unit's type when all are asked to be `level`: llama.cpp's substitute, else the next larger option."""
    for wanted in (level, stock_substitute(level, unit.n_cols)):
        if wanted in unit.options:
            return wanted
    larger = [q for q in unit.options if bpw(q) >= bpw(level)]
    return min(larger, key=bpw) if larger else max(unit.options, key=bpw)
