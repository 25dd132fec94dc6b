"""A control: AlphaQ with the opposite sign, so that light-tailed experts get the bits."""

from __future__ import annotations

from .alphaq import gamma_and_alphas, sensitivities
from .base import Allocation, Problem, solve_costs


class InverseAlpha:
    name = "inverse-alpha"
    needs = frozenset({"alphas", "distortions"})
    summary = "alphaq with -gamma (negative control: it should lose)"
    source = "control"

    def allocate(self, problem: Problem) -> Allocation:
        gamma, alphas = gamma_and_alphas(problem)
        return solve_costs(problem, sensitivities(alphas, -gamma, problem.alpha_reference), {"gamma": -gamma})
