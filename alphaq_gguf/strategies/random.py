"""A control: bits thrown at expert stacks blindly, from a seed, until the budget is spent."""

from __future__ import annotations

import numpy as np

from .base import Allocation, Problem


class Random:
    name = "random"
    needs: frozenset[str] = frozenset()
    summary = "one random stack after another gets its next larger type, from --seed (negative control)"
    source = "control"

    def allocate(self, problem: Problem) -> Allocation:
        rng = np.random.default_rng(problem.seed)
        size = np.where(problem.allowed, problem.size, np.iinfo(np.int64).max)
        order = np.argsort(size, axis=1, kind="stable")
        n_options = problem.allowed.sum(axis=1)
        rows = np.arange(len(size))
        level = np.zeros(len(size), dtype=np.int64)
        left = problem.budget - int(size[rows, order[:, 0]].sum())
        while True:
            above = np.minimum(level + 1, n_options - 1)
            step = size[rows, order[rows, above]] - size[rows, order[rows, level]]
            open_units = np.flatnonzero((above > level) & (step <= left))
            if not len(open_units):
                return Allocation(order[rows, level], method="random steps")
            unit = rng.choice(open_units)
            level[unit] += 1
            left -= int(step[unit])
