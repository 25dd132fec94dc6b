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

    Where the budget does not pay for both levels, without that condition.
    """
    try:
        found = solve_budget(cost, size, budget, needed=range(cost.shape[1])[-2:])
    except BudgetError:
        found = solve_budget(cost, size, budget)
    return found.choice, found.lower_bound
