"""PMQ (MC-MoE, arXiv 2410.06270): frequency x gate weight x change of the block's output, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ..allocate import solve_budget
from ..calibration import Calibration
from ..errors import AlphaQError, BudgetError
from ..qtypes import QType
from .base import MASS_FLOOR, Allocation, Problem, calibration_of, check_numbers, matrix_type
from .levels import available_bits, choose_levels, level_columns

_GAP = 1e-4


class PMQ:
    name = "pmq"
    needs = frozenset({"usage", "block_errors"})
    summary = "change of the block's output weighted by the expert's frequency and gate weight in calibration texts"
    source = "arXiv 2410.06270"

    def allocate(self, problem: Problem) -> Allocation:
        """Per layer the best mix of three levels at the layer's share of the budget, with the upper two in use.

        Both are about experts; stacks are chosen for the least cost of the whole model.
        """
        cost = cost_table(problem)
        a, b, c = problem.exponents
        parameters = {"frequency_exponent": a, "gate_exponent": b, "error_exponent": c}
        if all(unit.xid is None for unit in problem.units):
            whole = solve_budget(cost, problem.size, problem.budget)
            choice, bound, method = whole.choice, whole.lower_bound, whole.method
        else:
            choice, bound, n_free = _solve_layers(problem, cost)
            method, parameters["layers_without_both_levels"] = "three levels per layer", n_free
        unit_cost = cost[np.arange(len(cost)), choice]
        total = float(unit_cost.sum())
        return Allocation(
            choice=choice,
            unit_cost=unit_cost,
            cost=total,
            lower_bound=min(bound, total),
            gap=max(total - bound, 0.0) / bound if bound > 0 else 0.0,
            method=method,
            parameters=parameters,
        )


def cost_table(problem: Problem) -> np.ndarray:
    """Cost [units, types] = sum over a unit's experts of frequency^a x gate weight^b x error^c; inf where not allowed.

    The error is the root of what its type adds to the squared output of the layer, over the layer's mean of those,
    so that layers count alike. Each factor is at least a hundredth of its layer's mean (the error: squared, and of its
    type), which is also what an expert without sampled tokens gets.
    """
    calibration = calibration_of(problem)
    a, b, c = problem.exponents
    some_unit = {(unit.bid, unit.proj): u for u, unit in enumerate(problem.units)}
    errors = {place: _squared_errors(problem, calibration, u) for place, u in some_unit.items()}
    tables = {}
    for bid in {bid for bid, _ in errors}:
        own = [place for place in errors if place[0] == bid]
        mean = np.concatenate([errors[place][np.isfinite(errors[place])] for place in own]).mean()
        frequency = _floored(check_numbers(calibration.frequency(bid), f"{calibration.label}: tokens in layer {bid}"))
        gate = _floored(check_numbers(calibration.score(bid), f"{calibration.label}: gate weights in layer {bid}"))
        with np.errstate(all="ignore"):
            weight = frequency**a * gate**b
            for place in own:
                tables[place] = weight[:, None] * (errors[place] / (mean or 1.0)) ** (c / 2)
    rows = [tables[unit.bid, unit.proj] for unit in problem.units]
    cost = np.array(
        [row.sum(axis=0) if unit.xid is None else row[unit.xid] for unit, row in zip(problem.units, rows, strict=True)]
    )
    if not np.isfinite(cost[problem.allowed]).all():
        raise AlphaQError("the cost table overflows", "use smaller exponents")
    return np.where(problem.allowed, cost, np.inf)


def share_out(budget: int, least: Sequence[int], most: Sequence[int], weights: Sequence[int]) -> list[int]:
    """Bytes of `budget` for each part: as many per weight in all, within the `least` and `most` that each can take.

    BudgetError when the budget is below the least of all.
    """
    if sum(least) > budget:
        raise BudgetError(f"the budget of {budget} bytes is below the smallest allocation, {sum(least)} bytes")
    limits = list(zip(least, most, weights, strict=True))

    def shares_at(rate: Fraction) -> list[Fraction]:
        return [min(max(rate * w, Fraction(low)), Fraction(high)) for low, high, w in limits]

    # Between two of these rates the sum of the shares grows evenly.
    rates = {Fraction(bound, w) for low, high, w in limits for bound in (low, high)}
    rate = max(r for r in rates if sum(shares_at(r)) <= budget)
    shares = shares_at(rate)
    growing = [w if low <= rate * w < high else 0 for low, high, w in limits]
    left = (budget - sum(shares)) / Fraction(sum(growing) or 1)
    return [int(share + left * w) for share, w in zip(shares, growing, strict=True)]


def _squared_errors(problem: Problem, calibration: Calibration, u: int) -> np.ndarray:
    """Squared errors [experts, types] of a layer's experts in the projection of unit `u`; inf where not allowed.

    Matrices that were not encoded as one count with the sum of theirs.
    """
    unit = problem.units[u]
    found = np.full((len(calibration.frequency(unit.bid)), len(problem.qtypes)), np.inf)
    for t in np.flatnonzero(problem.allowed[u]):
        qtype = problem.qtypes[t]
        errors = [_known_errors(calibration, unit.bid, unit.proj, qtype, len(found))]
        if errors[0] is None:
            parts = {m.proj: matrix_type(m, qtype) for m in unit.matrices}
            errors = [_known_errors(calibration, unit.bid, proj, part, len(found)) for proj, part in parts.items()]
        for error in errors:
            if error is None:
                raise AlphaQError(
                    f"{calibration.label}: no errors of the output of layer {unit.bid} by {unit.proj} as {qtype.name}",
                    "measure them with `alphaq-gguf calibrate`, or leave the type out with --types",
                )
        found[:, t] = np.sum([error for error in errors if error is not None], axis=0)
    return found


def _known_errors(calibration: Calibration, bid: int, proj: str, qtype: QType, n_experts: int) -> np.ndarray | None:
    """Squared errors [experts] by one type of one projection, or None where none is known."""
    values = [calibration.block_errors.get((bid, xid, proj, qtype)) for xid in range(n_experts)]
    known = [value for value in values if value is not None]
    if not known:
        return None
    check_numbers(np.array(known), f"{calibration.label}: errors of the output of layer {bid} by {proj}")
    return _floored(np.array([np.nan if value is None else value for value in values]))


def _floored(values: np.ndarray) -> np.ndarray:
    """Values raised to the floor; NaN, which stands for what was not seen, too."""
    return np.fmax(values, MASS_FLOOR * np.nanmean(values))


def _solve_layers(problem: Problem, cost: np.ndarray) -> tuple[np.ndarray, float, int]:
    """(choice [units], lower bound, layers whose share does not pay for both upper levels)."""
    layers: dict[int, list[int]] = defaultdict(list)
    for u, unit in enumerate(problem.units):
        layers[unit.bid].append(u)
    parts = [problem.part(rows, 0) for rows in layers.values()]
    bits = [available_bits(part) for part in parts]
    columns = [level_columns(part, b) for part, b in zip(parts, bits, strict=True)]
    totals = [
        np.take_along_axis(part.size, c, axis=1).sum(axis=0).tolist() for part, c in zip(parts, columns, strict=True)
    ]
    shares = share_out(
        problem.budget,
        [t[0] for t in totals],
        [t[-1] for t in totals],
        [sum(unit.n_weights for unit in part.units) for part in parts],
    )
    choice, bound, n_without = np.zeros(len(cost), dtype=np.int64), 0.0, 0
    for i, rows in enumerate(layers.values()):
        levels = choose_levels(bits[i], _average_bits(bits[i], totals[i], shares[i]))
        window = columns[i][:, [bits[i].index(b) for b in levels]]
        table, size = (np.take_along_axis(values[rows], window, axis=1) for values in (cost, problem.size))
        mix, mix_bound = solve_mix(table, size, shares[i])
        choice[rows] = window[np.arange(len(rows)), mix]
        bound += mix_bound
        n_without += not has_upper_levels(mix, len(levels))
    return choice, bound, n_without


def _average_bits(bits: Sequence[int], totals: Sequence[int], budget: int) -> Fraction:
    """The average of nominal bits that `budget` pays for, between levels whose bytes for all units are `totals`."""
    i = max(i for i, total in enumerate(totals) if total <= budget)
    if i == len(bits) - 1:
        return Fraction(bits[i])
    return bits[i] + Fraction((bits[i + 1] - bits[i]) * (budget - totals[i]), totals[i + 1] - totals[i])


def has_upper_levels(mix: np.ndarray, n_levels: int) -> bool:
    """Whether the highest level and the next are both in use."""
    return set(range(n_levels)[-2:]) <= set(mix.tolist())


def solve_mix(cost: np.ndarray, size: np.ndarray, budget: int) -> tuple[np.ndarray, float]:
    """(level of each unit, lower bound): least summed `cost` [units, levels] with both upper levels in use.

    Proven to a relative gap of 1e-4. Where the budget does not pay for both levels, without that condition.
    """
    quick = solve_budget(cost, size, budget, hull_only=True)
    n_levels = cost.shape[1]
    if has_upper_levels(quick.choice, n_levels):
        if quick.gap <= _GAP:
            return quick.choice, quick.lower_bound
        known = quick.cost
    else:
        known = _some_mix(cost, size, budget)
    mix = _search(cost, size, budget, known, range(n_levels)[-2:])
    if mix is None:
        mix = _search(cost, size, budget, quick.cost, ())
        assert mix is not None
    return mix, float(np.take_along_axis(cost, mix[:, None], axis=1).sum()) * (1 - 1e-12)


def _some_mix(cost: np.ndarray, size: np.ndarray, budget: int) -> float:
    """The cost of some mix with both upper levels in use; infinite when none is at hand."""
    table = cost.copy()
    for level in range(cost.shape[1])[-2:]:
        free = np.isfinite(table).all(axis=1)
        if not free.any():
            return np.inf
        unit = np.where(free, cost[:, level] - cost[:, 0], np.inf).argmin()
        table[unit, np.arange(cost.shape[1]) != level] = np.inf
    try:
        return solve_budget(table, size, budget, hull_only=True).cost
    except BudgetError:
        return np.inf


def _search(cost: np.ndarray, size: np.ndarray, budget: int, known: float, needed: Sequence[int]) -> np.ndarray | None:
    """Levels of the least cost with those `needed` in use, None if there are none; `known` is what some such cost.

    Dynamic programming over the bytes, restricted to levels that a multiplier of the bytes does not rule out.
    """
    rows = np.arange(len(cost))
    low, high = 0.0, float(np.ptp(cost)) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        used = size[rows, (cost + middle * size).argmin(axis=1)].sum()
        low, high = (middle, high) if used > budget else (low, middle)
    reduced = cost + high * size
    least = reduced.min(axis=1, keepdims=True)
    reduced -= least
    # What a mix may lose against the bound without being worse than the known one; more for rounding.
    leeway = (known - float(least.sum() - high * budget)) * (1 + 1e-9) + 1e-12 * float(least.sum())
    extra = size - size.min(axis=1, keepdims=True)
    slack = budget - int(size.min(axis=1).sum())
    flag = np.zeros(cost.shape[1], dtype=np.int64)
    flag[list(needed)] = 1 << np.arange(len(needed))
    lost, used, flags = np.zeros(1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    steps = []
    # Units without an alternative first, while there is a single state.
    for u in np.argsort((reduced <= leeway).sum(axis=1), kind="stable"):
        levels = np.flatnonzero(reduced[u] <= leeway)
        lost, used, flags = (
            (lost[:, None] + reduced[u, levels]).ravel(),
            (used[:, None] + extra[u, levels]).ravel(),
            (flags[:, None] | flag[levels]).ravel(),
        )
        # Of states with the same levels in use, those that cost less than all that take fewer bytes.
        spent = lost - high * used
        order = np.lexsort((spent, used, flags))
        order = order[(lost[order] <= leeway) & (used[order] <= slack)]
        keep = np.zeros(len(order), dtype=bool)
        for value in range(1 << len(needed)):
            own = np.flatnonzero(flags[order] == value)
            before = np.minimum.accumulate(np.append(np.inf, spent[order[own]]))[:-1]
            keep[own] = spent[order[own]] < before
        order = order[keep]
        parent, level = np.divmod(order, len(levels))
        steps.append((u, parent, levels[level]))
        lost, used, flags = lost[order], used[order], flags[order]
    complete = np.flatnonzero(flags == flag.sum())
    if not len(complete):
        return None
    state = complete[np.argmin((lost - high * used)[complete])]
    mix = np.zeros(len(cost), dtype=np.int64)
    for u, parent, level in reversed(steps):
        mix[u], state = level[state], parent[state]
    return mix
