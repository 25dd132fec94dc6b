"""What one type per stack costs: the predicted error of the best allocation per expert, per stack, and uniform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from .allocate import solve_budget
from .budget import AllocationSettings, make_problem, make_units, size_range
from .checkpoint import ExpertStack
from .errors import BudgetError
from .measurements import Key
from .qtypes import QType
from .strategies import STRATEGIES, Problem, Unit
from .strategies.base import cost_table


@dataclass(frozen=True)
class Losses:
    """Predicted errors at equal bytes; `uniform` is None where no single type fits them."""

    per_expert: float
    per_stack: float
    uniform: float | None

    @property
    def kept(self) -> float | None:
        """The share of the gain over uniform that is left when the experts of a stack share a type."""
        if self.uniform is None or not self.uniform > self.per_expert:
            return None
        return (self.uniform - self.per_stack) / (self.uniform - self.per_expert)


@dataclass(frozen=True)
class StackingLoss:
    """`total` compares allocations of the whole model, `layers` those of each layer at the bytes it has."""

    total: Losses
    layers: dict[int, Losses]


def stacking_loss(
    stacks: Sequence[ExpertStack],
    fixed: dict[str, QType],
    settings: AllocationSettings,
    signals: Problem,
    weights: dict[Key, float],
    bytes_of_layer: Mapping[int, int],
) -> StackingLoss | None:
    """Solve for the least cost per expert, per stack and uniform, at the bytes an allocation gave each layer.

    `signals` holds the measured errors, `weights` what each matrix' error counts. None when no
    allocation by stacks fits the bytes.
    """
    tables = []
    for granularity in ("expert", "stack"):
        units = make_units(stacks, fixed, settings.types, granularity)
        shape = make_problem(units, replace(settings, bpw=1.0, containers=False), alignment=1)
        known = replace(shape, alphas=signals.alphas, distortions=signals.distortions, analytic=signals.analytic)
        tables.append((known, cost_table(known, weights)))
    total = _compare(tables, lambda unit: True, sum(bytes_of_layer.values()))
    layers = {
        bid: _compare(tables, lambda unit, bid=bid: unit.bid == bid, n_bytes)
        for bid, n_bytes in sorted(bytes_of_layer.items())
    }
    return None if total is None else StackingLoss(total, {bid: found for bid, found in layers.items() if found})


def _compare(
    tables: Sequence[tuple[Problem, np.ndarray]], belongs: Callable[[Unit], bool], n_bytes: int
) -> Losses | None:
    """Losses of the units that belong, at `n_bytes` in all; None when their stacks do not fit."""
    best = []
    uniform = None
    for problem, cost in tables:
        rows = [u for u, unit in enumerate(problem.units) if belongs(unit)]
        part = problem.part(rows, n_bytes)
        if size_range(part)[0] > n_bytes:
            return None
        best.append(solve_budget(cost[rows], part.size, n_bytes).cost)
        if all(unit.xid is None for unit in part.units):
            with suppress(BudgetError):
                choice = STRATEGIES["uniform"].allocate(part).choice
                uniform = float(cost[rows, choice].sum())
    per_expert, per_stack = best
    # What stacks can do experts can do as well, should the search of many experts have been given up.
    return Losses(min(per_expert, per_stack), per_stack, uniform)
