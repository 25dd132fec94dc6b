"""Simulated routing: an expert's error counts as much as random vectors are routed to it."""

from __future__ import annotations

from ..measurements import key_of
from .base import Allocation, Problem, solve_costs


class SimRouting:
    name = "sim-routing"
    needs = frozenset({"routing", "distortions"})
    summary = "encoding error weighted by how often random vectors reach the expert, from weights alone"
    source = "this project"

    def allocate(self, problem: Problem) -> Allocation:
        # The masses of a problem weigh every cost table; without anything else they are this strategy.
        return solve_costs(problem, {key_of(m): 1.0 for unit in problem.units for m in unit.matrices}, {})
