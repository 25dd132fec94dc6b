"""Router norm and MaxVar (arXiv 2604.06515): experts with a short router row, or rows that vary much, get more bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

from ..errors import BudgetError, UsageError
from .base import Allocation, Problem
from .levels import available_bits, choice_at, choose_levels, level_columns, level_sizes

ZETA = 3.0
"""How many times the row variance of an expert above it lifts an expert in the order."""


class RouterNorm:
    name = "router-norm"
    needs = frozenset({"router", "row_variances"})
    summary = (
        "more bits for experts with a small router norm or a large row variance, from weights alone; not for stacks"
    )
    source = "arXiv 2604.06515"
    experts_only = True

    def allocate(self, problem: Problem) -> Allocation:
        """The method at the highest average of nominal bits that fits, then single experts raised while they fit.

        The bytes spent never fall when the budget grows: a higher average fits only above the old budget, and
        experts are raised in the same order until the first does not fit.
        """
        layers = _order_experts(problem)
        bits = available_bits(problem)
        # Tables by expert in order of precision, one layer after another: [experts, levels] of bytes.
        columns = level_columns(problem, bits)
        experts = [units for layer in layers for units in layer]
        size = level_sizes(problem, columns, experts)
        lengths = [len(layer) for layer in layers]
        chosen, average, top = _highest_average(size, lengths, bits, problem.budget)
        _raise_experts(chosen, size, lengths, top, problem.budget)
        choice = choice_at(columns, experts, chosen)
        return Allocation(choice, method="router norm order", parameters={"average_bits": average})


def order_by_norm(norms: Sequence[float]) -> list[int]:
    """A layer's experts by ascending router norm, highest precision first; ties by index."""
    return sorted(range(len(norms)), key=lambda s: norms[s])


def promote(order: Sequence[int], variances: Sequence[float]) -> list[int]:
    """The order after MaxVar had its say: from last to first, an expert moves up to the first that it outdoes by ZETA.

    One pass is enough: whatever moves later is inserted above another only if it varies more.
    """
    current = list(order)
    for s in reversed(order):
        above = current[: current.index(s)]
        k = next((k for k, c in enumerate(above) if ZETA * variances[c] < variances[s]), None)
        if k is not None:
            current.remove(s)
            current.insert(k, s)
    return current


def level_counts(n: int, average: float | Fraction, levels: Sequence[int]) -> tuple[int, ...]:
    """How many of `n` experts get each level, lowest first, for an `average` within one, two or three levels.

    Three levels must be equally spaced. Halves are rounded to even. The swap of two middle experts for a low and
    a high one leaves the average alone; it is done until no two are left where the average lies in the
    upper third, until the middle would fall below the experts so raised where it lies in the middle third.
    """
    low, high = levels[0], levels[-1]
    if len(levels) == 1:
        return (n,)
    if len(levels) == 2:
        n_high = round(n * (average - low) / (high - low))
        return n - n_high, n_high
    middle = levels[1]
    n_low = n_high = 0
    if average >= middle:
        n_high = round(n * (average - middle) / (high - middle))
    else:
        n_low = n - round(n * (average - low) / (middle - low))
    n_middle = n - n_low - n_high
    to_high, spread = 3 * (high - average), high - low
    swaps = n_middle // 2 if to_high < spread else n_middle // 3 if to_high <= 2 * spread else 0
    return n_low + swaps, n_middle - 2 * swaps, n_high + swaps


def _order_experts(problem: Problem) -> list[list[list[int]]]:
    """For each layer its experts in order of precision, each as the indices of its units."""
    units_of: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for u, unit in enumerate(problem.units):
        if unit.xid is None:
            raise UsageError(
                f"router-norm orders the experts of a layer, but {unit.name} gets one type for all of them",
                "use --granularity expert or expert-shared",
            )
        units_of[unit.bid][unit.xid].append(u)
    # Taken from the names, since a part of a model (--scope projection) may hold no gates; experts without gates start
    # with `up`.
    variances: dict[tuple[int, int], float] = {}
    for first in ("up", "gate"):
        variances |= {
            (int(stack.split(".")[1]), xid): value
            for (stack, xid, proj), value in problem.row_variances.items()
            if proj == first
        }
    layers = []
    for bid, experts in sorted(units_of.items()):
        xids = sorted(experts)
        order = order_by_norm([problem.router_norms[bid, xid] for xid in xids])
        order = promote(order, [variances[bid, xid] for xid in xids])
        layers.append([experts[xids[i]] for i in order])
    return layers


def _highest_average(
    size: np.ndarray, lengths: Sequence[int], bits: Sequence[int], budget: int
) -> tuple[np.ndarray, float, int]:
    """(levels [experts], average, highest level of the mix) of the highest average that fits; levels index `bits`.

    Averages are those that some layer meets exactly, the same in all layers. BudgetError when none fits.
    """
    averages = {
        low + Fraction((high - low) * i, n) for low, high in pairwise(bits) for n in set(lengths) for i in range(n)
    }
    rows, least = np.arange(len(size)), int(size[:, 0].sum())
    for average in sorted(averages | {Fraction(bits[-1])}, reverse=True):
        levels = choose_levels(bits, average)
        top = bits.index(levels[-1])
        vectors = {}
        for n in set(lengths):
            counts = level_counts(n, average, levels)
            vectors[n] = np.repeat(np.arange(top, top - len(levels), -1), counts[::-1])
        chosen = np.concatenate([vectors[n] for n in lengths])
        if size[rows, chosen].sum() <= budget:
            return chosen, float(average), top
    raise BudgetError(f"the budget of {budget} bytes is below the smallest allocation, {least} bytes")


def _raise_experts(chosen: np.ndarray, size: np.ndarray, lengths: Sequence[int], top: int, budget: int) -> None:
    """Raise each layer's first expert below `top` by a level, layer by layer and over again, until one does not fit."""
    starts = np.cumsum([0, *lengths])
    left = budget - int(size[np.arange(len(size)), chosen].sum())
    while (chosen < top).any():
        for start, stop in pairwise(starts):
            below = np.flatnonzero(chosen[start:stop] < top)
            if not len(below):
                continue
            expert = start + below[0]
            step = int(size[expert, chosen[expert] + 1] - size[expert, chosen[expert]])
            if step > left:
                return
            chosen[expert] += 1
            left -= step
