"""The multiple-choice knapsack: its linear relaxation, rounding it, and the search for the optimum from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Counted for each step of the search beside its states: about what it takes without any.
_STATES_OF_A_STEP = 1000


@dataclass(frozen=True)
class Relaxation:
    """The optimum when units may mix two options, rounded down to `choice` [units].

    `bound` is its cost, which no choice can beat, and `rate` the cost per byte there.
    """

    choice: np.ndarray
    bound: float
    rate: float


def relax(cost: np.ndarray, size: np.ndarray, budget: int) -> Relaxation:
    """Solve the linear relaxation on each unit's lower convex hull; the smallest options must fit the budget."""
    rows = np.arange(len(cost))
    finite = np.isfinite(cost)
    # Start: the smallest option of each unit, the cheapest one among equals.
    least = np.where(finite, size, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    choice = np.where(finite & (size == least), cost, np.inf).argmin(axis=1)
    slack = budget - int(size[rows, choice].sum())
    current = choice.copy()
    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    ceiling = np.full(len(cost), np.inf)
    active = rows
    while len(active):
        at = current[active]
        gain = cost[active, at][:, None] - np.where(finite[active], cost[active], np.inf)
        grow = size[active] - size[active, at][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where((grow > 0) & (gain > 0), gain / grow, -np.inf)
        best = slope.max(axis=1)
        # Of options on one line take the farthest: the nearer ones are not corners of the hull.
        to = np.where(slope == best[:, None], grow, -1).argmax(axis=1)
        going = best > 0
        active, to = active[going], to[going]
        picked = (np.flatnonzero(going), to)
        # On a line of options rounding may make a later slope the steeper one; order needs them falling.
        ceiling[active] = np.minimum(best[going], ceiling[active])
        steps.append((active, to, ceiling[active], grow[picked]))
        current[active] = to
    if not steps:
        return Relaxation(choice, float(cost[rows, choice].sum()), 0.0)
    unit, to, slope, grow = (np.concatenate(column) for column in zip(*steps, strict=True))
    # Slopes fall along each unit's hull, and the sort is stable, so steps of a unit stay in order.
    order = np.argsort(-slope, kind="stable")
    unit, to, slope, grow = unit[order], to[order], slope[order], grow[order]
    used = np.cumsum(grow)
    n_whole = int(np.searchsorted(used, slack, side="right"))
    choice[unit[:n_whole]] = to[:n_whole]
    costs = cost[rows, choice]
    if n_whole == len(unit):
        return Relaxation(choice, float(costs.sum()), 0.0)
    # The next step in part, as a mean: differences would lose small costs beside large ones.
    u, share = unit[n_whole], (slack - int(used[n_whole] - grow[n_whole])) / grow[n_whole]
    costs[u] = (1 - share) * costs[u] + share * cost[u, to[n_whole]]
    return Relaxation(choice, float(costs.sum()), float(slope[n_whole]))


def fill(cost: np.ndarray, size: np.ndarray, budget: int, choice: np.ndarray) -> np.ndarray:
    """Spend what `choice` leaves: repeatedly take the upgrade with the best cost per byte that still fits."""
    rows = np.arange(len(cost))
    choice = choice.copy()
    slack = budget - int(size[rows, choice].sum())
    gain = cost[rows, choice][:, None] - cost
    grow = size - size[rows, choice][:, None]
    while True:
        usable = (grow <= slack) & (gain > 0)
        if not usable.any():
            return choice
        value = np.where(usable, gain / np.maximum(grow, 1), -np.inf)
        unit, option = np.unravel_index(int(value.argmax()), value.shape)
        slack -= int(grow[unit, option])
        choice[unit] = option
        gain[unit] = cost[unit, option] - cost[unit]
        grow[unit] = size[unit] - size[unit, option]


def search(
    cost: np.ndarray,
    size: np.ndarray,
    budget: int,
    relaxed: Relaxation,
    known: np.ndarray,
    needed: Sequence[int] = (),
    limit: float = np.inf,
) -> tuple[np.ndarray, float]:
    """(choice [units], lower bound): the least cost with each option in `needed` in use; `known` is some such choice.

    A dynamic program over deviations from `relaxed`, those that lose least per byte first (Pisinger, EJOR 83, 1995).
    The bound is the cost of the choice, unless about `limit` states were too few to prove that.
    """
    rows = np.arange(len(cost))
    base, rate = relaxed.choice, relaxed.rate
    # The bytes and the cost that an option adds, and what that loses at the relaxation's price of bytes.
    extra = size - size[rows, base][:, None]
    rise = cost - cost[rows, base][:, None]
    loss = np.maximum(rise + rate * extra, 0.0)
    room = budget - int(size[rows, base].sum())
    # Losses from here on are no better than the best choice so far.
    leeway = float(loss[rows, known].sum()) + rate * (room - int(extra[rows, known].sum()))
    useful = loss < leeway
    useful[rows, base] = False
    core = _core(base, extra, rise, useful, (room + leeway / rate if rate > 0 else np.inf), len(needed))
    with np.errstate(divide="ignore", invalid="ignore"):
        price = np.where(useful, loss / np.abs(extra), np.inf)[core]
    up, down = (
        np.where(side, price, np.inf).min(axis=1, initial=np.inf) for side in (extra[core] > 0, extra[core] < 0)
    )
    order = np.minimum(_ranks(up), _ranks(down)).argsort(kind="stable")
    core = core[order]
    # What a byte more or less costs at least when only the units after each may deviate.
    up, down = _least_after(up[order], rate), _least_after(down[order], np.inf)
    flag = np.zeros(cost.shape[1], dtype=np.int64)
    flag[list(needed)] = 1 << np.arange(len(needed))
    outside = np.bitwise_or.reduce(np.delete(flag[base], core), initial=0)
    after = np.bitwise_or.accumulate(np.append(flag[base[core]], outside)[::-1])[::-1][1:]

    # States: the bytes and the cost added so far, which of the needed options are in use, and a bound on the loss.
    used, added, flags, bound = np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1)
    steps, best, n_states = [], None, 0
    for k, u in enumerate(core):
        options = np.flatnonzero(loss[u] < leeway)
        n_before = len(used)
        n_states += _STATES_OF_A_STEP + len(options) * n_before
        if n_before == 0 or n_states > limit:
            break
        used = (extra[u, options][:, None] + used).ravel()
        added = (rise[u, options][:, None] + added).ravel()
        flags = (flag[options][:, None] | flags).ravel()
        away = room - used
        bound = added + rate * used + np.where(away >= 0, up[k], -down[k]) * away
        better = np.flatnonzero(bound < leeway)
        kept = better[_undominated(used[better], added[better], flags[better])]
        used, added, flags, bound = used[kept], added[kept], flags[kept], bound[kept]
        option, parent = np.divmod(kept, n_before)
        steps.append((u, parent.astype(np.int32), options[option].astype(np.int16)))
        complete = np.flatnonzero((used <= room) & ((flags | after[k]) == flag.sum()))
        if len(complete):
            state = complete[added[complete].argmin()]
            if added[state] + rate * room < leeway:
                leeway, best = float(added[state] + rate * room), (k, state)
    else:
        # Nothing is open: no state may deviate any further.
        bound = bound[:0]
    choice = known
    if best is not None:
        choice, (last, state) = base.copy(), best
        for u, parent, option in reversed(steps[: last + 1]):
            choice[u], state = option[state], parent[state]
    total = float(cost[rows, choice].sum())
    return choice, min(total, relaxed.bound + float(bound.min(initial=np.inf)))


def _core(
    base: np.ndarray, extra: np.ndarray, rise: np.ndarray, useful: np.ndarray, reach: float, n_needed: int
) -> np.ndarray:
    """The units that may deviate from `base`; the bytes that deviations add differ from none by less than `reach`.

    Of equal units only as many as do so in some optimum. There, but for one unit for each needed option, no
    deviations add up to no bytes. In an order that keeps their sum near zero all its values differ then, so there
    are no more deviations than values.
    """
    core = np.flatnonzero(useful.any(axis=1))
    steps = extra[useful]
    widest, step = np.abs(steps).max(initial=0), np.gcd.reduce(steps) or 1
    most = ((2 + 2 * n_needed) * float(widest) + reach) / step + n_needed
    kind = np.unique(np.column_stack([base[core], extra[core], rise[core]]), axis=0, return_inverse=True)[1].ravel()
    order = kind.argsort(kind="stable")
    rank = np.arange(len(core)) - np.searchsorted(kind[order], kind[order])
    return np.sort(core[order[rank < most]])


def _ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort(kind="stable").argsort(kind="stable")


def _least_after(prices: np.ndarray, last: float) -> np.ndarray:
    """For each unit the least of the prices of those after it, and of `last`."""
    return np.minimum.accumulate(np.append(prices, last)[::-1])[::-1][1:]


def _undominated(used: np.ndarray, added: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """Indices of states that cost less than all others with the same needed options in use and no more bytes."""
    found = []
    for value in np.unique(flags):
        own = np.flatnonzero(flags == value)
        own = own[used[own].argsort(kind="stable")]
        own = own[added[own] < np.minimum.accumulate(np.append(np.inf, added[own]))[:-1]]
        found.append(own[np.append(np.diff(used[own]) > 0, True)])
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)
