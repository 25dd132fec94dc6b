"""A control: encoding error alone, every expert counted the same (AlphaQ with gamma = 0)."""

from __future__ import annotations

from ..measurements import key_of
from .base import Allocation, Problem, solve_costs


class MeanSquaredError:
    name = "mse"
    needs = frozenset({"distortions"})
    summary = "encoding error alone, from weights alone (control: gamma = 0)"
    source = "control"

    def allocate(self, problem: Problem) -> Allocation:
        return solve_costs(problem, {key_of(m): 1.0 for u in problem.units for m in u.matrices}, {})
