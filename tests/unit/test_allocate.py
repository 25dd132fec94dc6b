"""The budget solver against exhaustive search, meet in the middle, tables over bytes, and scipy's HiGHS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import eye_array, kron

from alphaq_gguf.allocate import solve_budget
from alphaq_gguf.errors import BudgetError
from alphaq_gguf.knapsack import fill, relax, search
from alphaq_gguf.qtypes import K_TYPES, NOMINAL_BITS, row_bytes


def exhaustive(cost: np.ndarray, size: np.ndarray, budget: int) -> float:
    """Least cost over every combination of options; infinite when none fits."""
    rows = np.arange(len(cost))
    combinations = itertools.product(range(cost.shape[1]), repeat=len(cost))
    return min(float(cost[rows, c].sum()) for c in map(list, combinations) if size[rows, c].sum() <= budget)


def meet_in_the_middle(cost: np.ndarray, size: np.ndarray, budget: int) -> float:
    """Exact optimum: all combinations of each half; every left one takes the cheapest right one that fits."""

    def combine(costs: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total_cost, total_size = np.zeros(1), np.zeros(1, dtype=np.int64)
        for unit_cost, unit_size in zip(costs, sizes, strict=True):
            total_cost = (total_cost[:, None] + unit_cost).ravel()
            total_size = (total_size[:, None] + unit_size).ravel()
        return total_cost, total_size

    half = len(cost) // 2
    left_cost, left_size = combine(cost[:half], size[:half])
    right_cost, right_size = combine(cost[half:], size[half:])
    order = np.argsort(right_size, kind="stable")
    cheapest = np.minimum.accumulate(right_cost[order])
    found = np.searchsorted(right_size[order], budget - left_size, side="right") - 1
    return float((left_cost + cheapest[found])[found >= 0].min())


def relaxation(cost: np.ndarray, size: np.ndarray, budget: int) -> float:
    """Value of the LP in which a unit may mix its options."""
    n_units, n_options = cost.shape
    one_each = np.kron(np.eye(n_units), np.ones(n_options))
    scale = cost.max()
    result = linprog(
        cost.ravel() / scale,
        A_ub=size.reshape(1, -1) / size.max(),
        b_ub=[budget / size.max()],
        A_eq=one_each,
        b_eq=np.ones(n_units),
        bounds=(0, None),
        method="highs",
    )
    assert result.status == 0
    return result.fun * scale


def integer_program(cost: np.ndarray, size: np.ndarray, budget: int) -> np.ndarray:
    """An optimal choice by HiGHS, whose tolerance is absolute, so costs are scaled up."""
    one_each = kron(eye_array(len(cost)), np.ones((1, cost.shape[1])), format="csr")
    step = np.gcd.reduce(size, axis=None)
    result = milp(
        cost.ravel() * (1e7 / cost.min(axis=1).sum()),
        integrality=np.ones(cost.size),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(size.reshape(1, -1) // step, ub=budget // step),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert result.status == 0
    return result.x.reshape(cost.shape).argmax(axis=1)


def table_of_bytes(cost: np.ndarray, size: np.ndarray, budget: int, needed: Sequence[int] = ()) -> float:
    """The optimum with all `needed` options in use, from the least cost by bytes and by which of them are in use."""
    best = {(0, frozenset()): 0.0}
    for unit_cost, unit_size in zip(cost.tolist(), size.tolist(), strict=True):
        grown: dict[tuple[int, frozenset[int]], float] = {}
        for (used, seen), value in best.items():
            for option, (more_cost, more_size) in enumerate(zip(unit_cost, unit_size, strict=True)):
                key = used + more_size, seen | {option} & set(needed)
                if key[0] <= budget and value + more_cost < grown.get(key, math.inf):
                    grown[key] = value + more_cost
        best = grown
    return min((value for (_, seen), value in best.items() if len(seen) == len(needed)), default=math.inf)


def gguf_instance(gamma: float, n_units: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Stacks of three widths under the six K-quant choices, with AlphaQ's analytic cost."""
    rng = np.random.default_rng(seed)
    n_cols = rng.choice([256, 1024, 2048], n_units)
    n_rows = rng.choice([512, 1408], n_units)
    sensitivity = (4.5 / rng.uniform(3, 6.4, n_units)) ** gamma
    variance = rng.uniform(1e-4, 1e-3, n_units)
    bits = np.array([NOMINAL_BITS[q] for q in K_TYPES])
    cost = (sensitivity * variance * n_rows * n_cols)[:, None] * 4.0**-bits
    size = np.array([[r * row_bytes(q, int(c)) for q in K_TYPES] for r, c in zip(n_rows, n_cols, strict=True)])
    return cost, size


def budget_at(size: np.ndarray, share: float) -> int:
    low, high = int(size.min(axis=1).sum()), int(size.max(axis=1).sum())
    return low + int(share * (high - low))


@pytest.mark.parametrize("gamma", [0, 1, 12, 200])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.2, 0.45, 0.8, 0.999])
def test_twelve_units_are_solved_to_the_exact_optimum(gamma, share):
    for seed in range(2):
        cost, size = gguf_instance(gamma, seed=seed)
        budget = budget_at(size, share)
        optimum = meet_in_the_middle(cost, size, budget)
        solution = solve_budget(cost, size, budget)
        rows = np.arange(len(cost))
        assert solution.size == size[rows, solution.choice].sum() <= budget
        assert solution.cost == pytest.approx(cost[rows, solution.choice].sum(), rel=1e-12)
        assert solution.cost == pytest.approx(optimum, rel=1e-9)
        assert solution.lower_bound <= optimum * (1 + 1e-9)
        assert solution.gap <= 1e-8


@pytest.mark.parametrize("gamma", [0, 1, 12])
@pytest.mark.parametrize("share", [0.03, 0.2, 0.45, 0.8])
def test_the_lower_bound_is_the_linear_relaxation_or_better(gamma, share):
    cost, size = gguf_instance(gamma, seed=3)
    budget = budget_at(size, share)
    bound = relaxation(cost, size, budget)
    assert bound <= meet_in_the_middle(cost, size, budget) * (1 + 1e-9)
    assert relax(cost, size, budget).bound == pytest.approx(bound, rel=1e-9)
    assert solve_budget(cost, size, budget).lower_bound >= bound * (1 - 1e-9)


@pytest.mark.parametrize("n_units", [24, 72, 144, 288])
@pytest.mark.parametrize(("gamma", "share"), [(0, 0.3), (1, 0.05), (4, 0.6), (12, 0.25)])
def test_stacks_of_real_sizes_get_the_types_that_an_integer_program_gives(n_units, gamma, share):
    cost, size = gguf_instance(gamma, n_units, seed=n_units)
    budget = budget_at(size, share)
    optimum, solution = integer_program(cost, size, budget), solve_budget(cost, size, budget)
    assert (solution.method, solution.gap) == ("exact", 0)
    assert solution.cost == pytest.approx(cost[np.arange(n_units), optimum].sum(), rel=1e-9)
    # Random costs have one optimum.
    assert np.bincount(solution.choice).tolist() == np.bincount(optimum).tolist()


def awkward_instance(kind: str, n_units: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes at random up to a million, and costs that have nothing to do with them, follow them, or equal them."""
    rng = np.random.default_rng(seed)
    size = np.sort(rng.integers(1, 10**6, (n_units, 4)), axis=1)
    cost = {
        "independent": rng.uniform(0.1, 1, size.shape),
        "falling": -np.sort(-rng.lognormal(0, 2, size.shape), axis=1),
        "correlated": 1.1e6 - size + rng.uniform(0, 1e5, size.shape),
        "constant gain": 2e6 - size - 1e5 * np.arange(4),
        "difference": 1e6 - size,
    }[kind]
    return cost, size


@pytest.mark.parametrize("kind", ["independent", "falling", "correlated", "constant gain", "difference"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.95])
def test_awkward_sizes_and_costs_are_solved_to_the_optimum(kind, share):
    for seed in range(3):
        cost, size = awkward_instance(kind, 11, seed)
        budget = budget_at(size, share)
        solution = solve_budget(cost, size, budget)
        assert solution.cost == pytest.approx(meet_in_the_middle(cost, size, budget), rel=1e-12)
        assert (solution.method, solution.gap) == ("exact", 0)


@pytest.mark.parametrize("kind", ["independent", "falling", "correlated"])
def test_many_awkward_units_are_solved_like_an_integer_program(kind):
    cost, size = awkward_instance(kind, 90, 1)
    budget = budget_at(size, 0.4)
    expected = cost[np.arange(90), integer_program(cost, size, budget)].sum()
    assert solve_budget(cost, size, budget).cost == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_equal_units_are_solved_to_the_optimum(seed, exact):
    # Round numbers, so that there are many optima; every third time a hundred equal units more.
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, 30 if seed % 3 else 130)
    cost, size = rng.integers(1, 40, (4, 3)).astype(float)[kinds], rng.integers(1, 14, (4, 3))[kinds]
    cost[rng.random(cost.shape) < 0.02] = np.inf
    cost[:, 1] = np.where(np.isfinite(cost).any(axis=1), cost[:, 1], 1.0)
    budget = budget_at(size, rng.uniform(0.3, 0.9))
    solution = solve_budget(cost, size, budget, exact=exact)
    assert solution.cost == pytest.approx(table_of_bytes(cost, size, budget), rel=1e-12)
    assert (solution.method, solution.gap) == ("exact", 0)


@pytest.mark.parametrize("budget", range(500, 520))
def test_as_many_equal_units_change_as_fill_the_budget(budget):
    # Steps of 7 bytes are a little better than those of 11, and up to ten of them must go for those that fit.
    cost, size = np.array([[7.0, 0.0]] * 40 + [[10.9, 0.0]] * 40), np.array([[1, 8]] * 40 + [[1, 12]] * 40)
    counts = itertools.product(range(41), repeat=2)
    expected = min(716 - 7 * a - 10.9 * b for a, b in counts if 80 + 7 * a + 11 * b <= budget)
    solution = solve_budget(cost, size, budget)
    assert (solution.cost, solution.gap) == (pytest.approx(expected, rel=1e-12), 0)


def test_seventy_thousand_equal_units_are_proven():
    # 50,000 bytes beyond the least, for steps of 3 and of 5 bytes.
    size, cost = np.array([[1, 4, 6]] * 70_000), np.array([[10.0, 4.0, 0.5]] * 70_000)
    solution = solve_budget(cost, size, 120_000, exact=True)
    assert solution.cost == 700_000 - max(6 * n + 9.5 * ((50_000 - 3 * n) // 5) for n in range(16_667))
    assert solution.gap == 0


@pytest.mark.parametrize("seed", range(40))
def test_needed_options_are_in_use_at_the_least_cost(seed):
    rng = np.random.default_rng(seed)
    n_units, n_options = rng.integers(1, 30), rng.integers(2, 5)
    kinds = rng.integers(0, 3 if seed % 2 else 30, n_units)
    cost = -np.sort(-rng.lognormal(0, 2, (30, n_options)), axis=1)[kinds]
    size = np.sort(rng.integers(1, 12, (30, n_options)), axis=1)[kinds]
    cost[:, 1:][rng.random((n_units, n_options - 1)) < 0.1] = np.inf
    needed = rng.choice(n_options, rng.integers(1, 3), replace=False).tolist()
    for share in (0, 0.1, 0.4, 0.9, 1.5):
        budget = budget_at(size, share)
        optimum = table_of_bytes(cost, size, budget, needed)
        if math.isinf(optimum):
            with pytest.raises(BudgetError, match="do not pay for"):
                solve_budget(cost, size, budget, needed=needed)
            continue
        solution = solve_budget(cost, size, budget, needed=needed)
        assert set(needed) <= set(solution.choice.tolist())
        assert solution.size == size[np.arange(n_units), solution.choice].sum() <= budget
        assert solution.cost == pytest.approx(optimum, rel=1e-12)
        assert solution.gap == 0


def test_a_needed_option_is_found_where_it_barely_fits():
    # The first unit loses nothing by it, but does not fit.
    cost, size = np.array([[100.0, 0.0], [0.0, 0.0]]), np.array([[1, 10], [1, 3]])
    assert solve_budget(cost, size, 4, needed=[1]).choice.tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["falling", "constant gain"])
def test_a_search_that_is_given_up_certifies_what_it_found(kind):
    cost, size = awkward_instance(kind, 12, 7)
    budget = budget_at(size, 0.4)
    optimum = meet_in_the_middle(cost, size, budget)
    relaxed = relax(cost, size, budget)
    known = fill(cost, size, budget, relaxed.choice)
    rows = np.arange(12)
    found = []
    for limit in (0, 2000, 4000, 8000, 16_000, 10**6):
        choice, bound = search(cost, size, budget, relaxed, known, limit=limit)
        assert size[rows, choice].sum() <= budget
        total = float(cost[rows, choice].sum())
        assert relaxed.bound <= bound <= optimum * (1 + 1e-12)
        assert optimum * (1 - 1e-12) <= total <= cost[rows, known].sum()
        found.append((total, bound))
    assert found[0] == (cost[rows, known].sum(), relaxed.bound)
    assert found == sorted(found, key=lambda pair: -pair[0])
    # Half-way both are better than the relaxation knew, and at the end they meet.
    assert any(total < found[0][0] and found[0][1] < bound < total for total, bound in found)
    assert found[-1] == (pytest.approx(optimum, rel=1e-12), found[-1][0])


def test_what_takes_too_long_to_prove_keeps_its_certified_gap():
    # Gains that do not depend on the unit make millions of states that are equally good.
    rng = np.random.default_rng(1)
    size = np.sort(rng.integers(1, 10**6, (288, 6)), axis=1)
    cost, budget = 2e6 - size - 1e5 * np.arange(6), int(0.5 * size.max(axis=1).sum())
    solution, quick = solve_budget(cost, size, budget), relax(cost, size, budget)
    quick_cost = cost[np.arange(288), fill(cost, size, budget, quick.choice)].sum()
    assert solution.method == "bounded"
    lagrangian = max((cost + m * size).min(axis=1).sum() - m * budget for m in np.linspace(0.5, 2, 1001))
    assert lagrangian * (1 - 1e-9) <= quick.bound <= solution.lower_bound < solution.cost <= quick_cost
    assert solution.gap < 1e-3


def test_subset_sums_are_found_without_a_word(capfd):
    # Branch and bound is lost here, and HiGHS prints.
    cost, size = awkward_instance("difference", 60, 0)
    budget = budget_at(size, 0.5)
    solution = solve_budget(cost, size, budget)
    assert (solution.size, solution.cost) == (budget, 60e6 - budget)
    assert capfd.readouterr() == ("", "")


def test_bytes_that_no_allocation_can_spend_leave_no_gap():
    cost, size = np.array([[9.0, 3.0, 0.0]] * 3), np.array([[7, 21, 35]] * 3)
    for budget in range(49, 63):
        solution = solve_budget(cost, size, budget)
        assert (solution.cost, solution.gap) == (15, 0)


def test_a_large_instance_keeps_its_budget_and_a_small_certified_gap():
    cost, size = gguf_instance(12, n_units=70_000, seed=5)
    budget = budget_at(size, 0.3)
    solution = solve_budget(cost, size, budget)
    rows = np.arange(len(cost))
    assert size[rows, solution.choice].sum() == solution.size <= budget
    assert solution.gap < 1e-4
    # The bound is a Lagrangian: recomputed here as the best of many multipliers.
    multipliers = np.geomspace(1e-12, 1e3, 300) * cost.mean() / size.mean()
    lagrangian = max((cost + m * size).min(axis=1).sum() - m * budget for m in multipliers)
    assert lagrangian <= solution.cost * (1 + 1e-9)
    assert solution.lower_bound >= lagrangian * (1 - 1e-9)


NUMBERS = st.integers(0, 20).map(float) | st.floats(1e-6, 1e6)


@st.composite
def instances(draw, max_units: int = 4, max_options: int = 4):
    """Small instances with absent options, ties, dominated options and round numbers, and a feasible budget."""
    n_units, n_options = draw(st.integers(1, max_units)), draw(st.integers(1, max_options))
    number = NUMBERS | st.just(math.inf)
    cost = np.array(
        draw(st.lists(st.lists(number, min_size=n_options, max_size=n_options), min_size=n_units, max_size=n_units))
    )
    sizes = st.lists(st.integers(1, 30), min_size=n_options, max_size=n_options)
    size = np.array(draw(st.lists(sizes, min_size=n_units, max_size=n_units)))
    unusable = np.isinf(cost).all(axis=1)
    cost[unusable, 0] = 1.0
    finite = np.where(np.isfinite(cost), size, 10**6)
    low = int(finite.min(axis=1).sum())
    budget = draw(st.integers(low, low + int(size.max(axis=1).sum())))
    return cost, size, budget


def check(cost: np.ndarray, size: np.ndarray, budget: int) -> float:
    """Solve, check everything a solution promises, return its cost."""
    solution = solve_budget(cost, size, budget)
    rows = np.arange(len(cost))
    assert solution.size == size[rows, solution.choice].sum()
    assert solution.size <= budget
    assert np.isfinite(cost[rows, solution.choice]).all()
    assert solution.cost == pytest.approx(cost[rows, solution.choice].sum(), rel=1e-12)
    assert 0 <= solution.lower_bound <= solution.cost
    return solution.cost


@given(instances())
@settings(deadline=None, max_examples=150)
def test_small_instances_reach_the_exhaustive_optimum_within_the_budget(instance):
    cost, size, budget = instance
    assert check(cost, size, budget) == pytest.approx(exhaustive(cost, size, budget), rel=1e-9, abs=1e-12)


@given(instances(max_units=8), st.integers(0, 60))
@settings(deadline=None, max_examples=60)
def test_cost_never_rises_with_the_budget(instance, more):
    cost, size, budget = instance
    assert check(cost, size, budget + more) <= check(cost, size, budget) * (1 + 1e-9)


@given(instances(max_units=8), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_the_order_of_units_and_options_is_irrelevant(instance, random):
    cost, size, budget = instance
    units, options = list(range(cost.shape[0])), list(range(cost.shape[1]))
    random.shuffle(units)
    random.shuffle(options)
    shuffled = check(cost[units][:, options], size[units][:, options], budget)
    assert shuffled == pytest.approx(check(cost, size, budget), rel=1e-9, abs=1e-12)


@given(instances(max_units=8), st.integers(-300, 300))
@settings(deadline=None, max_examples=60)
def test_scaling_all_costs_scales_the_optimum(instance, exponent):
    cost, size, budget = instance
    scaled = check(cost * 10.0**exponent, size, budget) / 10.0**exponent
    assert scaled == pytest.approx(check(cost, size, budget), rel=1e-9, abs=1e-12)


@given(instances(), st.data())
@settings(deadline=None, max_examples=60)
def test_another_option_never_makes_the_optimum_worse(instance, data):
    cost, size, budget = instance
    n_units = len(cost)
    extra_cost = data.draw(st.lists(NUMBERS, min_size=n_units, max_size=n_units))
    extra_size = data.draw(st.lists(st.integers(1, 30), min_size=n_units, max_size=n_units))
    wider = check(np.column_stack([cost, extra_cost]), np.column_stack([size, extra_size]), budget)
    assert wider <= check(cost, size, budget) * (1 + 1e-9)


@given(
    st.lists(st.sets(st.integers(1, 29), min_size=3, max_size=3), min_size=1, max_size=3), st.integers(1, 9), st.data()
)
@settings(deadline=None, max_examples=100)
def test_options_whose_costs_lie_on_one_line_keep_the_budget(sizes, tenths, data):
    # Exactly collinear but for rounding, so a unit's slopes may come out rising by an ulp.
    size = np.array([sorted(s) for s in sizes])
    check((30 - size) * (tenths / 10), size, data.draw(st.integers(size[:, 0].sum(), size[:, 2].sum())))


@pytest.mark.parametrize(
    ("size", "slope", "budget"), [([3, 17, 24], 0.9, 16), ([6, 25, 26], 0.6, 24), ([1, 27, 28], 0.8, 26)]
)
def test_rising_slopes_from_rounding_do_not_break_the_budget(size, slope, budget):
    assert check((30 - np.array([size])) * slope, np.array([size]), budget) == pytest.approx((30 - size[0]) * slope)


@pytest.mark.parametrize("top", [1e-320, 1e-310, 1e-200, 1.0, 1e200])
def test_costs_of_any_magnitude_are_solved(top):
    cost, size = np.array([[8.0, 1.0], [2.0, 0.5]]) / 8 * top, np.array([[1, 2], [1, 2]])
    solution = solve_budget(cost, size, 3)
    assert solution.choice.tolist() == [1, 0]
    assert solution.lower_bound <= solution.cost


@pytest.mark.parametrize("least", [5e-324, 1e-309, 1e-200, 0.0])
def test_an_optimum_far_below_the_other_costs_is_found(least):
    solution = solve_budget(np.array([[1.0, 0.0], [1.0, least]]), np.array([[1, 1], [1, 1]]), 2)
    assert solution.choice.tolist() == [1, 1]
    assert solution.lower_bound <= solution.cost == least


def test_costs_of_very_different_magnitude_are_each_optimal():
    # Two knapsacks that share a budget: the tiny one must be optimal in what the huge one leaves.
    huge = np.array([[1e30, 1e10], [1e30, 1e10]])
    tiny = np.array([[7.0, 5.0, 1.0], [6.0, 3.0, 2.0], [9.0, 8.0, 4.0]]) * 1e-20
    cost = np.full((5, 3), np.inf)
    cost[:2, :2], cost[2:] = huge, tiny
    size = np.array([[1, 4, 4], [1, 4, 4], [1, 2, 4], [1, 2, 5], [1, 3, 4]])
    for budget in range(11, 22):
        solution = solve_budget(cost, size, budget)
        assert solution.choice[:2].tolist() == [1, 1]
        tiny_cost = tiny[np.arange(3), solution.choice[2:]].sum()
        assert tiny_cost == pytest.approx(exhaustive(tiny, size[2:], budget - 8), rel=1e-9)


def test_a_missing_option_is_never_taken():
    cost = np.array([[np.inf, 1.0, np.inf], [5.0, np.inf, 0.0]])
    size = np.array([[1, 10, 2], [3, 1, 50]])
    solution = solve_budget(cost, size, 13)
    assert solution.choice.tolist() == [1, 0]
    assert (solution.cost, solution.size) == (6.0, 13)


def test_free_units_take_any_option_and_leave_no_gap():
    solution = solve_budget(np.zeros((3, 2)), np.array([[1, 2]] * 3), 3)
    assert (solution.cost, solution.size, solution.gap) == (0.0, 3, 0.0)


def test_no_units_cost_nothing():
    solution = solve_budget(np.empty((0, 3)), np.empty((0, 3), dtype=int), 0)
    assert (solution.cost, solution.size, len(solution.choice)) == (0.0, 0, 0)


def test_a_budget_below_the_smallest_allocation_is_refused_with_both_numbers():
    cost, size = np.ones((2, 2)), np.array([[10, 20], [5, 6]])
    assert solve_budget(cost, size, 15).size == 15
    with pytest.raises(BudgetError, match=r"14 .* 15"):
        solve_budget(cost, size, 14)


def test_a_missing_option_does_not_make_a_budget_feasible():
    with pytest.raises(BudgetError, match="20"):
        solve_budget(np.array([[np.inf, 1.0]]), np.array([[1, 20]]), 19)


@pytest.mark.parametrize(
    ("cost", "size"),
    [
        pytest.param([[1.0, math.nan]], [[1, 2]], id="nan"),
        pytest.param([[1.0, -1e-9]], [[1, 2]], id="negative"),
        pytest.param([[1.0, -math.inf]], [[1, 2]], id="minus-infinity"),
        pytest.param([[1.0, 2.0], [math.inf, math.inf]], [[1, 2], [1, 2]], id="unit-without-options"),
        pytest.param([[1.0, 2.0]], [[1, 2, 3]], id="other-shape"),
        pytest.param([1.0, 2.0], [1, 2], id="one-dimensional"),
        pytest.param([[], []], [[], []], id="no-options"),
    ],
)
def test_malformed_tables_are_a_value_error(cost, size):
    with pytest.raises(ValueError, match="cost"):
        solve_budget(np.array(cost), np.array(size), 100)
