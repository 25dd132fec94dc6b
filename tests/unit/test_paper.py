"""Allocation from a table of alphas: against integer programs written from the formula, and exhaustive search."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import eye_array, kron

from alphaq_gguf.errors import AlphaQError, BudgetError
from alphaq_gguf.paper import PaperSettings, TableMatrix, allocate_table, histogram, mean_bits


def random_table(n: int, seed: int = 0, sizes: Sequence[int] = ()) -> list[TableMatrix]:
    rng = np.random.default_rng(seed)
    return [
        TableMatrix(
            f"layers.{i // 3}.{kind}",
            str(i // 3),
            kind,
            float(rng.uniform(3, 6.4)),
            float(rng.uniform(1e-4, 1e-3)),
            int(rng.choice(sizes)) if sizes else None,
        )
        for i, kind in zip(range(n), itertools.cycle(["gate", "up", "down"]), strict=False)
    ]


def formula(matrices: list[TableMatrix], levels: Sequence[int], gamma: float) -> np.ndarray:
    """s v 2^(-2b) for every matrix and level, straight from the paper, by weights where they are known."""
    median = statistics.median(m.alpha for m in matrices)
    return np.array(
        [
            [
                (median / max(m.alpha, 1e-8)) ** gamma * max(m.variance, 1e-12) * 2.0 ** (-2 * b) * (m.n_weights or 1)
                for b in levels
            ]
            for m in matrices
        ]
    )


def constraints(matrices: list[TableMatrix], levels: Sequence[int], bits: float):
    """(one level each, bits spent, the most that may be spent); one variable a matrix and level."""
    weight = np.array([m.n_weights or 1 for m in matrices])
    one_each = kron(eye_array(len(matrices)), np.ones((1, len(levels))), format="csr")
    spent = (weight[:, None] * np.array(levels)).reshape(1, -1).astype(float)
    # A hair above the budget, whose decimal has no exact binary form.
    return one_each, spent, float(bits * weight.sum() * (1 + 1e-12))


def integer_optimum(
    matrices: list[TableMatrix], levels: Sequence[int], bits: float, gamma: float
) -> tuple[float, list[int]]:
    """Least cost and the bits of every matrix. HiGHS' tolerance is absolute, so costs are scaled up."""
    cost = formula(matrices, levels, gamma)
    scale = 1e7 / cost[:, [b <= bits for b in levels]].min(axis=1).sum()
    one_each, spent, most = constraints(matrices, levels, bits)
    result = milp(
        cost.ravel() * scale,
        integrality=np.ones(cost.size),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent, ub=most)],
        options={"mip_rel_gap": 0.0},
    )
    assert result.status == 0
    choice = result.x.reshape(cost.shape).argmax(axis=1)
    return float(cost[np.arange(len(cost)), choice].sum()), [levels[c] for c in choice]


def check_promises(matrices: list[TableMatrix], settings: PaperSettings, gamma: float):
    """Allocate; what is reported must be what the formula gives for the bits chosen."""
    found = allocate_table(matrices, settings)
    cost = formula(matrices, settings.levels, gamma)
    chosen = [settings.levels.index(int(b)) for b in found.bits]
    assert found.solution.cost == pytest.approx(cost[np.arange(len(cost)), chosen].sum(), rel=1e-9)
    weights = [m.n_weights or 1 for m in matrices]
    exact_mean = sum(int(b) * w for b, w in zip(found.bits, weights, strict=True)) / sum(weights)
    assert exact_mean <= settings.bits
    assert mean_bits(matrices, found.bits) == pytest.approx(exact_mean, rel=1e-12)
    assert sum(histogram(found.bits).values()) == len(matrices)
    return found


LEVELS = [(2, 3, 4), (2, 3, 4, 5, 6, 7, 8), (2, 4, 8), (1, 3, 4, 8)]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("gamma", [0, 1, 12])
@pytest.mark.parametrize(("n", "bits"), [(5, 2.3), (17, 3.5), (60, 2.5), (300, 3.05)])
def test_the_allocation_is_that_of_an_integer_program(n, bits, gamma, levels, exact):
    matrices = random_table(n, seed=n)
    found = check_promises(matrices, PaperSettings(bits, levels, gamma, exact), gamma)
    optimum, chosen = integer_optimum(matrices, levels, bits, gamma)
    assert found.solution.cost == pytest.approx(optimum, rel=1e-9)
    assert found.solution.lower_bound <= optimum * (1 + 1e-9)
    assert found.solution.gap <= 1e-8
    # Random costs have one optimum.
    assert found.bits.tolist() == chosen


@pytest.mark.parametrize("gamma", [0, 1, 12])
@pytest.mark.parametrize("bits", [2, 2.5, 3.1, 4])
def test_few_matrices_get_the_best_of_all_combinations(bits, gamma):
    levels = (2, 3, 4, 8) if bits < 4 else (2, 3, 4)
    for seed in range(5):
        matrices = random_table(5, seed=seed)
        cost = formula(matrices, levels, gamma)
        best, chosen = min(
            (sum(cost[u, levels.index(b)] for u, b in enumerate(every)), list(every))
            for every in itertools.product(levels, repeat=5)
            if sum(every) <= round(bits * 5, 9)
        )
        found = check_promises(matrices, PaperSettings(bits, levels, gamma), gamma)
        assert found.solution.cost == pytest.approx(best, rel=1e-12)
        assert found.bits.tolist() == chosen


@pytest.mark.parametrize("levels", [(2, 3, 5, 8), (2, 4, 7)])
def test_matrices_count_by_their_weights_where_they_are_known(levels):
    matrices = random_table(120, seed=3, sizes=(1000, 1408, 2048))
    for bits in (2.7, 4.2):
        found = check_promises(matrices, PaperSettings(bits, levels, 4, exact=True), 4)
        optimum, _ = integer_optimum(matrices, levels, bits, 4)
        assert found.solution.cost == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize(("n", "levels"), [(1000, (2, 3, 6)), (5000, (2, 3, 4, 6, 8)), (5001, (2, 4, 7))])
def test_large_tables_are_within_the_reported_gap_and_exact_closes_it(n, levels):
    matrices, bits, gamma = random_table(n, seed=1), 3.0003, 12
    quick = check_promises(matrices, PaperSettings(bits, levels, gamma), gamma)
    proven = check_promises(matrices, PaperSettings(bits, levels, gamma, exact=True), gamma)
    optimum, chosen = integer_optimum(matrices, levels, bits, gamma)
    assert optimum <= quick.solution.cost * (1 + 1e-9)
    assert quick.solution.cost <= optimum * (1 + quick.solution.gap) * (1 + 1e-9)
    assert quick.solution.gap == 0
    assert (proven.solution.method, proven.solution.gap) == ("exact", 0)
    assert proven.solution.cost == pytest.approx(optimum, rel=1e-9)
    assert histogram(proven.bits) == {b: chosen.count(b) for b in sorted(set(chosen))}


def test_the_lower_bound_is_no_looser_than_the_linear_relaxation():
    matrices, levels, bits = random_table(400, seed=4), (2, 4, 8), 3.3
    cost = formula(matrices, levels, 12)
    one_each, spent, most = constraints(matrices, levels, bits)
    relaxed = linprog(cost.ravel() * 1e6, A_eq=one_each, b_eq=np.ones(400), A_ub=spent, b_ub=[most], bounds=(0, 1))
    assert relaxed.status == 0
    found = allocate_table(matrices, PaperSettings(bits, levels, 12))
    assert relaxed.fun / 1e6 <= found.solution.lower_bound * (1 + 1e-9)


def test_the_exponent_follows_the_rule_unless_given():
    matrices = random_table(50, seed=6)
    rule = 1 / statistics.pstdev(float(np.log(m.alpha)) for m in matrices)
    found = allocate_table(matrices, PaperSettings(3))
    assert found.gamma == pytest.approx(rule, rel=1e-12)
    assert allocate_table(matrices, PaperSettings(3, gamma=1)).gamma == 1
    assert found.sensitivity == pytest.approx(
        [(statistics.median(m.alpha for m in matrices) / m.alpha) ** rule for m in matrices], rel=1e-9
    )


def test_alphas_and_variances_have_the_papers_floors():
    alphas, variances = (0.0, 2.0, 4.0), (0.0, 1e-13, 1.0)
    matrices = [TableMatrix(str(i), "0", "up", a, v) for i, (a, v) in enumerate(zip(alphas, variances, strict=True))]
    found = check_promises(matrices, PaperSettings(3, (2, 3, 4), 1), 1)
    assert found.sensitivity == pytest.approx([2e8, 1, 0.5], rel=1e-12)
    assert found.bits.tolist() == [3, 2, 4]


@pytest.mark.parametrize(("bits", "n", "total"), [(2.3, 10, 23), (3.1, 10, 31), (2.7, 10, 27), (2.9, 3, 8)])
def test_the_budget_is_the_decimal_that_was_asked_for(bits, n, total):
    assert allocate_table(random_table(n), PaperSettings(bits)).bits.sum() == total


@pytest.mark.parametrize("bits", [1.999, 4.001, 0.0, -1.0, float("nan"), float("inf")])
def test_a_mean_outside_the_levels_is_refused_with_the_range(bits):
    with pytest.raises(BudgetError, match="feasible are 2 to 4"):
        allocate_table(random_table(4), PaperSettings(bits, (2, 3, 4)))


def test_overflowing_sensitivities_are_refused():
    matrices = [TableMatrix(str(i), "0", "up", alpha, 1.0) for i, alpha in enumerate((1e-9, 5.0, 6.0))]
    with pytest.raises(AlphaQError, match="overflow with gamma 200"):
        allocate_table(matrices, PaperSettings(3, gamma=200))


@st.composite
def problems(draw, max_matrices: int = 9):
    """A small table, some of it with equal rows, and settings that are feasible."""
    numbers = st.tuples(st.floats(1.5, 8), st.floats(1e-6, 1e-1))
    rows = draw(st.lists(numbers | st.just((4.0, 1e-3)), min_size=1, max_size=max_matrices))
    matrices = [TableMatrix(f"m{i}", "0", "up", alpha, variance) for i, (alpha, variance) in enumerate(rows)]
    levels = tuple(sorted(draw(st.sets(st.integers(1, 10), min_size=1, max_size=4))))
    bits = draw(st.floats(levels[0], levels[-1]))
    return matrices, PaperSettings(bits, levels, draw(st.sampled_from([0.0, 1.0, 12.0])))


def cost_of(matrices: list[TableMatrix], settings: PaperSettings) -> float:
    assert settings.gamma is not None
    found = check_promises(matrices, settings, settings.gamma)
    assert found.solution.gap <= 1e-8
    return found.solution.cost


@given(problems(), st.floats(0, 3))
@settings(deadline=None, max_examples=60)
def test_the_objective_never_rises_with_the_budget(problem, more):
    matrices, asked = problem
    richer = replace(asked, bits=min(asked.bits + more, asked.levels[-1]))
    assert cost_of(matrices, richer) <= cost_of(matrices, asked) * (1 + 1e-8)


@given(problems(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_the_order_of_rows_is_irrelevant(problem, random):
    matrices, asked = problem
    shuffled = random.sample(matrices, len(matrices))
    assert cost_of(shuffled, asked) == pytest.approx(cost_of(matrices, asked), rel=1e-8)


@given(problems(), st.integers(-60, 60))
@settings(deadline=None, max_examples=60)
def test_scaling_all_variances_scales_the_objective_and_changes_no_bits(problem, exponent):
    # Powers of two, so that ties stay ties; no variance falls to its floor.
    matrices, asked = problem
    factor = 2.0 ** max(exponent, -19)
    scaled = [replace(m, variance=m.variance * factor) for m in matrices]
    assert cost_of(scaled, asked) == pytest.approx(cost_of(matrices, asked) * factor, rel=1e-8)
    assert allocate_table(scaled, asked).bits.tolist() == allocate_table(matrices, asked).bits.tolist()


@given(problems(), st.integers(1, 10))
@settings(deadline=None, max_examples=60)
def test_another_level_never_makes_it_worse(problem, level):
    matrices, asked = problem
    wider = replace(asked, levels=tuple(sorted({*asked.levels, level})))
    assert cost_of(matrices, wider) <= cost_of(matrices, asked) * (1 + 1e-8)
