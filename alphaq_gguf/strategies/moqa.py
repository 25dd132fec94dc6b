"""MoQa (arXiv 2503.21135): experts clustered by gate weight x activation in texts; higher clusters get more bits."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from ..calibration import Calibration
from ..errors import BudgetError
from .base import Allocation, Problem, calibration_of, check_numbers
from .levels import choice_at, level_columns, level_sizes

LEVELS = (2, 4, 6, 8)
"""Nominal bits of the clusters, from the least significant to the most."""

DOUBT = 0.1
"""An expert whose two best memberships differ by less takes the lower level."""

_MAX_ROUNDS = 1000
# Of values whose mean is 1.
_TOLERANCE = 1e-9
# Of gaps and shares that are told apart.
_DIGITS = 9


class MoQa:
    name = "moqa"
    needs = frozenset({"significance"})
    summary = "8, 6, 4 or 2 bits by clusters of the experts' gate weights x activations in calibration texts"
    source = "arXiv 2503.21135"

    def allocate(self, problem: Problem) -> Allocation:
        """The clusters' levels, then single experts moved by a level, the least certain first, to meet the budget.

        The publication has experts and no budget. A stack takes the level nearest the mean of its experts', and
        the mean of their gaps. The bytes spent never fall when the budget grows: moves come in one order.
        """
        calibration = calibration_of(problem)
        layers = set(calibration.layers) | {unit.bid for unit in problem.units}
        significance = {bid: _significance(calibration, bid) for bid in sorted(layers)}
        groups: dict[tuple[int, int | str], list[int]] = defaultdict(list)
        for u, unit in enumerate(problem.units):
            groups[unit.bid, unit.name if unit.xid is None else unit.xid].append(u)
        keys = sorted(groups)
        mean = {bid: significance[bid].mean(axis=0) for bid in {bid for bid, _ in keys}}
        found = {bid: classify(values) for bid, values in mean.items()}
        start, gaps, means = [], [], []
        for key in keys:
            levels, gap = found[key[0]]
            xids = sorted({m.xid for m in problem.units[groups[key][0]].matrices})
            start.append(np.ceil(levels[xids].mean() - 0.5))
            gaps.append(gap[xids].mean())
            means.append(mean[key[0]][xids].mean())
        units = [groups[key] for key in keys]
        columns = level_columns(problem, LEVELS)
        size = level_sizes(problem, columns, units)
        # Sums over experts in another order end on other digits. Of equal gaps the less significant comes first.
        order = np.lexsort((np.round(means, _DIGITS), np.round(gaps, _DIGITS)))
        chosen = meet_budget(size, np.array(start, dtype=np.int64), order, problem.budget)
        dynamics = float(np.mean([shares.std(axis=0).sum() for shares in significance.values()]))
        return Allocation(choice_at(columns, units, chosen), method="fuzzy clusters", parameters={"dynamics": dynamics})


def fuzzy_c_means(values: np.ndarray, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """(centres ascending, memberships [values, centres]) of positive `values` by fuzzy c-means with m = 2.

    Starts from centres evenly spread over the range. Where there are no more distinct values than clusters, up to
    rounding, each is a centre.
    """
    mean = values.mean()
    scaled = values / mean
    # Sorted, so that the order of experts does not even change how sums are rounded.
    ordered = np.sort(scaled)
    centres = np.unique(ordered.round(9))
    if len(centres) > n_clusters:
        centres = np.linspace(ordered[0], ordered[-1], n_clusters)
    for _ in range(_MAX_ROUNDS):
        weights = _memberships(ordered, centres) ** 2
        before, centres = centres, (weights * ordered[:, None]).sum(axis=0) / weights.sum(axis=0)
        if np.abs(centres - before).max() < _TOLERANCE:
            break
    centres = np.sort(centres)
    return centres * mean, _memberships(scaled, centres)


def classify(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index into LEVELS, gap between the two best memberships) of each expert of a layer, by its significance.

    Experts of fewer distinct values than levels take the lowest ones.
    """
    memberships = fuzzy_c_means(values, len(LEVELS))[1]
    if memberships.shape[1] == 1:
        return np.zeros(len(values), dtype=np.int64), np.ones(len(values))
    best = np.argsort(-memberships, axis=1, kind="stable")[:, :2]
    first, second = np.take_along_axis(memberships, best, axis=1).T
    gaps = first - second
    return np.where(gaps < DOUBT, best.min(axis=1), best[:, 0]), gaps


def meet_budget(size: np.ndarray, start: np.ndarray, order: np.ndarray, budget: int) -> np.ndarray:
    """Levels [groups] within `budget`, from `start`: groups move by one level in `order`, round after round.

    Down until they fit, or up until the next does not. `size` are bytes [groups, levels]. BudgetError when none fit.
    """
    left = budget - int(size[np.arange(len(size)), start].sum())
    step = 1 if left >= 0 else -1
    moved, growth = [], []
    for level in range(size.shape[1] - 1):
        at = start[order] + level * step
        inside = (at + step >= 0) & (at + step < size.shape[1])
        movers, at = order[inside], at[inside]
        moved.append(movers)
        growth.append(size[movers, at + step] - size[movers, at])
    total = np.cumsum(np.concatenate(growth))
    n_moves = int((total <= left).sum()) if left >= 0 else int((total > left).sum()) + 1
    if n_moves > len(total):
        least = int(size[:, 0].sum())
        raise BudgetError(f"the budget of {budget} bytes is below the smallest allocation, {least} bytes")
    levels = start.copy()
    np.add.at(levels, np.concatenate(moved)[:n_moves], step)
    return levels


def _significance(calibration: Calibration, bid: int) -> np.ndarray:
    """Shares [datasets, experts]; AlphaQError where no token of a dataset reached the layer."""
    with np.errstate(invalid="ignore"):
        return check_numbers(calibration.significance(bid), f"{calibration.label}: significance in layer {bid}")


def _memberships(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Inverse squared distances as shares [values, centres]; a value at a centre belongs to it alone."""
    nearness = 1 / np.maximum((values[:, None] - centres) ** 2, 1e-30)
    return nearness / nearness.sum(axis=1, keepdims=True)
