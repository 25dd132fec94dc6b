"""Strategies: AlphaQ's sensitivities and gamma by hand, controls against exhaustive choices."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaq_gguf.checkpoint import ExpertStack
from alphaq_gguf.errors import AlphaQError, BudgetError
from alphaq_gguf.measurements import Alpha, Distortion, key_of
from alphaq_gguf.qtypes import K_TYPES, LEGACY_TYPES, NOMINAL_BITS, QType, bpw, row_bytes, stock_substitute
from alphaq_gguf.strategies import STRATEGIES, Problem, Unit
from alphaq_gguf.strategies.alphaq import MAX_GAMMA, choose_gamma, sensitivities
from alphaq_gguf.strategies.base import NEEDS


def alpha(value: float | None, spectrum: str = "farms", variance: float = 1.0) -> Alpha:
    return Alpha(value, variance, 10, 128, spectrum, "" if value is not None else "all-zero matrix")


ALPHAS = {
    ("gate", 0, "gate"): alpha(2.0),
    ("gate", 1, "gate"): alpha(4.0),
    ("up", 0, "up"): alpha(5.0),
    ("up", 1, "up"): alpha(10.0),
    ("down", 0, "down"): alpha(20.0, "full"),
    ("down", 1, "down"): alpha(80.0, "full"),
    ("down", 2, "down"): alpha(None),
}


def test_sensitivity_is_the_median_over_alpha_to_the_gamma_within_one_kind_of_spectrum():
    # Medians: 4.5 of the farms spectra 2, 4, 5, 10; 50 of the full spectra 20, 80.
    expected = [4.5 / 2, 4.5 / 4, 4.5 / 5, 4.5 / 10, 50 / 20, 50 / 80, 1.0]
    for gamma in (0.0, 1.0, 3.0, -2.0):
        found = sensitivities(ALPHAS, gamma)
        assert list(found) == list(ALPHAS)
        assert list(found.values()) == pytest.approx([value**gamma for value in expected])


@pytest.mark.parametrize("reference", ["projection", "stack"])
def test_the_median_may_be_taken_within_a_projection_or_stack(reference):
    expected = [3 / 2, 3 / 4, 7.5 / 5, 7.5 / 10, 50 / 20, 50 / 80, 1.0]
    assert list(sensitivities(ALPHAS, 2.0, reference).values()) == pytest.approx([v**2 for v in expected])


def test_projections_span_stacks_of_several_layers():
    alphas = {("a", 0, "gate"): alpha(2.0), ("b", 0, "gate"): alpha(6.0), ("a", 0, "up"): alpha(7.0)}
    assert list(sensitivities(alphas, 1.0, "projection").values()) == pytest.approx([2.0, 4 / 6, 1.0])
    assert list(sensitivities(alphas, 1.0, "stack").values()) == pytest.approx([4.5 / 2, 1.0, 4.5 / 7])


def test_an_unknown_reference_is_a_value_error():
    with pytest.raises(ValueError, match="layer"):
        sensitivities(ALPHAS, 1.0, "layer")


def test_a_vanishing_alpha_is_bounded_from_below():
    alphas = {("a", 0, "gate"): alpha(0.0), ("a", 1, "gate"): alpha(2.0), ("a", 2, "gate"): alpha(4.0)}
    assert sensitivities(alphas, 1.0)["a", 0, "gate"] == pytest.approx(2.0 / 1e-8)


def test_gamma_is_the_reciprocal_of_the_spread_of_ln_alpha():
    alphas = {("a", i, "gate"): alpha(value) for i, value in enumerate([3.0, 4.0, 5.0, 6.4])}
    logs = [math.log(a.alpha or 0) for a in alphas.values()]
    mean = sum(logs) / 4
    assert choose_gamma(alphas) == pytest.approx(1 / math.sqrt(sum((x - mean) ** 2 for x in logs) / 4))


def test_gamma_counts_the_spread_within_each_kind_of_spectrum():
    farms = [math.log(v / math.sqrt(2 * 8)) for v in (2, 8)]
    full = [math.log(v / math.sqrt(100 * 400)) for v in (100, 400)]
    alphas = {("a", i, "gate"): alpha(v) for i, v in enumerate([2.0, 8.0])}
    alphas |= {("b", i, "gate"): alpha(v, "full") for i, v in enumerate([100.0, 400.0])}
    alphas["c", 0, "gate"] = alpha(None)
    assert choose_gamma(alphas) == pytest.approx(1 / math.sqrt(sum(x * x for x in farms + full) / 4))


@pytest.mark.parametrize("values", [[4.0], [4.0, 4.0], [4.0, 4.0000001]])
def test_gamma_is_capped_where_alphas_do_not_differ(values):
    assert choose_gamma({("a", i, "gate"): alpha(v) for i, v in enumerate(values)}) == MAX_GAMMA


def test_gamma_without_any_alpha_is_one():
    assert choose_gamma({("a", 0, "gate"): alpha(None)}) == choose_gamma({}) == 1.0


def make_unit(name: str, proj: str, n_experts: int, n_rows: int, n_cols: int, options: tuple[QType, ...]) -> Unit:
    stack = ExpertStack(name, 0, proj, n_experts, n_rows, n_cols)
    return Unit(name, 0, proj, stack.n_weights, tuple(stack.matrices), options)


def make_problem(units: list[Unit], budget_share: float, seed: int = 0, **settings) -> Problem:
    """A problem with random distortions that fall with size, random alphas and the real sizes."""
    rng = np.random.default_rng(seed)
    qtypes = tuple(sorted({q for u in units for q in u.options}, key=lambda q: (bpw(q), q.value)))
    allowed = np.array([[q in u.options for q in qtypes] for u in units])
    size = np.array(
        [[u.n_weights // u.n_cols * row_bytes(q, u.n_cols) if q in u.options else 0 for q in qtypes] for u in units]
    )
    low = np.where(allowed, size, 10**12).min(axis=1).sum()
    high = size.max(axis=1).sum()
    matrices = [m for u in units for m in u.matrices]
    alphas = {key_of(m): alpha(float(rng.uniform(3, 6.4)), variance=float(rng.uniform(0.5, 2))) for m in matrices}
    distortions = {
        (key_of(m), q): Distortion(float(rng.uniform(0.8, 1.2) * m.n_rows * m.n_cols * 4.0 ** -bpw(q)), 0.0)
        for m in matrices
        for q in qtypes
    }
    budget = int(low + budget_share * (high - low))
    return Problem(tuple(units), qtypes, size, allowed, budget, alphas, distortions, **settings)


def total(problem: Problem, choice: np.ndarray) -> int:
    return int(problem.size[np.arange(len(choice)), choice].sum())


UNITS = [
    make_unit("gate", "gate", 3, 64, 256, K_TYPES),
    make_unit("down", "down", 3, 256, 96, LEGACY_TYPES),
    make_unit("fused", "gate_up", 2, 128, 256, (QType.Q3_K, QType.Q8_0)),
]


def exhaustive_cost(problem: Problem, weight) -> float:
    """Least summed weight x distortion over every allowed combination within the budget."""
    options = [np.flatnonzero(row) for row in problem.allowed]
    best = math.inf
    for choice in itertools.product(*options):
        if total(problem, np.array(choice)) <= problem.budget:
            cost = sum(
                weight(key_of(m)) * problem.distortions[key_of(m), problem.qtypes[t]].squared_error
                for u, t in zip(problem.units, choice, strict=True)
                for m in u.matrices
            )
            best = min(best, cost)
    return best


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("gamma", [-5.0, 0.0, 1.0, 12.0])
def test_alphaq_minimises_the_weighted_distortion(gamma, share):
    problem = make_problem(UNITS, share, gamma=gamma)
    median = float(np.median([a.alpha for a in problem.alphas.values()]))
    found = STRATEGIES["alphaq"].allocate(problem)
    best = exhaustive_cost(problem, lambda key: (median / problem.alphas[key].alpha) ** gamma)
    assert found.cost == pytest.approx(best, rel=1e-9)
    assert found.unit_cost is not None
    assert found.unit_cost.sum() == pytest.approx(best, rel=1e-9)
    assert found.parameters == {"gamma": gamma}
    assert total(problem, found.choice) <= problem.budget


def test_a_unit_s_sensitivity_is_the_mean_of_its_matrices():
    problem = make_problem(UNITS, 0.5, gamma=3.0)
    median = float(np.median([a.alpha for a in problem.alphas.values()]))
    found = STRATEGIES["alphaq"].allocate(problem)
    expected = [np.mean([(median / problem.alphas[key_of(m)].alpha) ** 3 for m in u.matrices]) for u in UNITS]
    assert found.sensitivity == pytest.approx(expected)


def test_alphaq_without_a_gamma_uses_the_rule():
    problem = make_problem(UNITS, 0.5)
    assert STRATEGIES["alphaq"].allocate(problem).parameters == {"gamma": choose_gamma(problem.alphas)}


@given(seed=st.integers(0, 999), share=st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_mse_is_alphaq_with_gamma_zero(seed, share):
    problem = make_problem(UNITS, share, seed)
    mse = STRATEGIES["mse"].allocate(problem)
    alphaq = STRATEGIES["alphaq"].allocate(replace(problem, gamma=0.0))
    assert mse.choice.tolist() == alphaq.choice.tolist()
    assert mse.cost == alphaq.cost == pytest.approx(exhaustive_cost(problem, lambda key: 1.0), rel=1e-9)


def test_mse_needs_no_alphas():
    assert STRATEGIES["mse"].allocate(replace(make_problem(UNITS, 0.4), alphas={})).cost


def test_the_analytic_cost_is_variance_by_nominal_bits_over_all_weights():
    problem = replace(make_problem(UNITS[:2], 0.6, gamma=2.0, analytic=True), distortions={})
    problem.alphas["gate", 0, "gate"] = alpha(4.0, variance=0.0)
    found = STRATEGIES["alphaq"].allocate(problem)
    median = float(np.median([a.alpha for a in problem.alphas.values()]))
    for u, unit in enumerate(problem.units):
        bits = NOMINAL_BITS[problem.qtypes[found.choice[u]]]
        expected = sum(
            (median / problem.alphas[key_of(m)].alpha) ** 2
            * m.n_rows
            * m.n_cols
            * max(problem.alphas[key_of(m)].variance, 1e-12)
            / 4**bits
            for m in unit.matrices
        )
        assert found.unit_cost is not None
        assert found.unit_cost[u] == pytest.approx(expected)


def test_a_matrix_without_alpha_counts_with_its_plain_distortion():
    problem = make_problem(UNITS[:1], 0.5, gamma=50.0)
    problem.alphas["gate", 1, "gate"] = alpha(None)
    others = [problem.alphas["gate", i, "gate"].alpha for i in (0, 2)]
    found = STRATEGIES["alphaq"].allocate(problem)
    assert found.sensitivity == pytest.approx([np.mean([1.0, *((np.median(others) / np.array(others)) ** 50)])])


def test_a_gamma_beyond_all_measure_is_refused_with_a_hint():
    problem = make_problem(UNITS, 0.5, gamma=1e6)
    with pytest.raises(AlphaQError, match="smaller --gamma"):
        STRATEGIES["alphaq"].allocate(problem)


# Qwen1.5-MoE's shapes in small: gate and up with rows of a multiple of 256, down with rows of 1408.
WIDE = [
    make_unit("gate", "gate", 2, 1408, 512, K_TYPES),
    make_unit("up", "up", 2, 1408, 512, K_TYPES),
    make_unit("down", "down", 2, 512, 1408, LEGACY_TYPES),
]


@pytest.mark.parametrize("level", K_TYPES, ids=lambda q: q.name)
def test_uniform_gives_1408_wide_rows_what_llama_cpp_would(level):
    expected = [level, level, stock_substitute(level, 1408)]
    exact = sum(u.n_weights // u.n_cols * row_bytes(q, u.n_cols) for u, q in zip(WIDE, expected, strict=True))
    found = STRATEGIES["uniform"].allocate(replace(make_problem(WIDE, 0), budget=exact))
    problem = make_problem(WIDE, 0)
    assert [problem.qtypes[t] for t in found.choice] == expected


def test_uniform_falls_back_as_published():
    pairs = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q8_0": "Q8_0"}
    assert {q.name: stock_substitute(q, 1408).name for q in K_TYPES} == pairs


@given(seed=st.integers(0, 99), share=st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_uniform_takes_the_largest_level_within_the_budget_whatever_the_order_of_types(seed, share):
    units = [*WIDE[1:], make_unit("odd", "gate", 1, 8, 256, (QType.Q5_K, QType.Q5_0))]
    problem = make_problem(units, share)
    shuffled = np.random.default_rng(seed).permutation(len(problem.qtypes))
    turned = replace(
        problem,
        qtypes=tuple(problem.qtypes[i] for i in shuffled),
        size=problem.size[:, shuffled],
        allowed=problem.allowed[:, shuffled],
    )
    found = STRATEGIES["uniform"].allocate(problem)
    assert total(problem, found.choice) <= problem.budget
    assert all(problem.allowed[u, t] for u, t in enumerate(found.choice))
    assert total(turned, STRATEGIES["uniform"].allocate(turned).choice) == total(problem, found.choice)


def test_uniform_refuses_a_budget_below_its_smallest_level():
    problem = replace(make_problem(WIDE, 0), budget=1)
    smallest = total(problem, STRATEGIES["uniform"].allocate(make_problem(WIDE, 0)).choice)
    with pytest.raises(BudgetError, match=str(smallest)):
        STRATEGIES["uniform"].allocate(problem)


def test_every_strategy_is_registered_under_its_name_with_a_summary():
    for name, strategy in STRATEGIES.items():
        assert strategy.name == name
        assert strategy.summary
        assert strategy.source
        assert strategy.needs <= NEEDS.keys()


def test_the_registry_lists_methods_before_controls():
    methods = ["alphaq", "sim-routing", "self", "router-norm", "moqa", "pmq"]
    assert [*STRATEGIES] == [*methods, "mse", "uniform", "random", "inverse-alpha"]


def mixed_units() -> list[Unit]:
    wide = [make_unit(f"k{i}", "up", 2, 4, 256, K_TYPES) for i in range(5)]
    return [*wide, *(make_unit(f"l{i}", "down", 2, 4, 352, LEGACY_TYPES) for i in range(3))]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), share=st.floats(0.0, 1.0))
def test_random_stays_within_the_budget_and_leaves_nothing_that_one_step_could_spend(seed, share):
    problem = replace(make_problem(mixed_units(), share), seed=seed)
    choice = STRATEGIES["random"].allocate(problem).choice
    left = problem.budget - total(problem, choice)
    assert left >= 0
    for u, t in enumerate(choice):
        assert problem.allowed[u, t]
        larger = [s - problem.size[u, t] for s in problem.size[u][problem.allowed[u]] if s > problem.size[u, t]]
        assert not larger or min(larger) > left


def test_random_repeats_with_its_seed_and_differs_between_seeds():
    problem = make_problem(mixed_units(), 0.5)
    choices = [tuple(STRATEGIES["random"].allocate(replace(problem, seed=seed)).choice) for seed in range(12)]
    assert choices[3] == tuple(STRATEGIES["random"].allocate(replace(problem, seed=3)).choice)
    assert len(set(choices)) > 6


@pytest.mark.parametrize("gamma", [1.0, 12.0])
def test_inverse_alpha_is_alphaq_on_reciprocal_alphas(gamma):
    problem = make_problem(mixed_units(), 0.4, gamma=gamma)
    # An even number of alphas has no single median; one more makes the reciprocal of the median exact.
    keys = list(problem.alphas)[:-1]
    alphas = {key: problem.alphas[key] for key in keys} | {list(problem.alphas)[-1]: alpha(None)}
    flipped = {key: replace(a, alpha=None if a.alpha is None else 1 / a.alpha) for key, a in alphas.items()}
    inverse = STRATEGIES["inverse-alpha"].allocate(replace(problem, alphas=alphas))
    expected = STRATEGIES["alphaq"].allocate(replace(problem, alphas=flipped))
    assert inverse.cost == pytest.approx(expected.cost)
    assert inverse.parameters == {"gamma": -gamma}
