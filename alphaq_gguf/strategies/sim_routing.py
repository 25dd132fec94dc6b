"""Simulated routing: an expert's error counts as much as random vectors are routed to it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from ..measure import key_of
from .base import Allocation, Problem, solve_costs

FLOOR = 0.01
"""The least mass of an expert, as a share of its layer's mean.

Text reaches experts that random vectors do not, so none may be free of cost. A bit less quadruples an error: at a
hundredth of the mass an expert gives up 3.3 bits, nearly all that lies between Q2_K and Q6_K, and less mass than
that could hardly take more from it.
"""


class SimRouting:
    name = "sim-routing"
    needs = frozenset({"routing", "distortions"})
    summary = "encoding error weighted by how often random vectors reach the expert, from weights alone"

    def allocate(self, problem: Problem) -> Allocation:
        floored = with_floor(problem.masses)
        weights = {key_of(m): floored[m.bid, m.xid] for unit in problem.units for m in unit.matrices}
        return solve_costs(problem, weights, {})


def with_floor(masses: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """Masses by (layer, expert), raised to the floor."""
    layers: dict[int, list[float]] = defaultdict(list)
    for (bid, _), mass in masses.items():
        layers[bid].append(mass)
    least = {bid: FLOOR * float(np.mean(found)) for bid, found in layers.items()}
    return {(bid, xid): max(mass, least[bid]) for (bid, xid), mass in masses.items()}
