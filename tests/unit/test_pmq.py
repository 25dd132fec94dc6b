"""PMQ: costs by loops over the definition, mixes against brute force, shares of the budget by bisection."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.expert_problems import calibrate, model, pose, spent, stack, types_of

from alphaq_gguf.calibration import Calibration, LayerUsage
from alphaq_gguf.calibration.data import WHOLE
from alphaq_gguf.errors import AlphaQError, BudgetError
from alphaq_gguf.qtypes import NOMINAL_BITS, QType, stock_substitute
from alphaq_gguf.scope import allocate_scope
from alphaq_gguf.strategies import Allocation, Problem
from alphaq_gguf.strategies.pmq import PMQ, cost_table, has_upper_levels, share_out, solve_mix

Q2, Q3, Q4, Q5, Q6, Q8 = QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q5_K, QType.Q6_K, QType.Q8_0


def calibrated(problem: Problem, seed: int = 0) -> Problem:
    return replace(problem, calibration=calibrate(problem, np.random.default_rng(seed)))


def known(problem: Problem) -> Calibration:
    assert problem.calibration is not None
    return problem.calibration


# The costs.


@pytest.mark.parametrize("exponents", [(1.0, 1.0, 2.0), (1.0, 1.5, 1.0), (0.0, 0.0, 2.0)])
@pytest.mark.parametrize("granularity", ["expert", "expert-shared", "stack"])
def test_the_cost_is_frequency_times_gate_weight_times_relative_error(granularity, exponents):
    problem = replace(calibrated(pose(model((5, 3)), granularity=granularity)), exponents=exponents)
    a, b, c = exponents
    calibration = known(problem)
    found = cost_table(problem)
    for bid in range(2):
        rows = [u for u, unit in enumerate(problem.units) if unit.bid == bid]
        projs = {problem.units[u].proj for u in rows}
        errors = calibration.block_errors
        usage = calibration.layers[bid]
        n = usage.tokens.shape[1]
        mean = np.mean([errors[bid, xid, proj, q] for xid in range(n) for proj in projs for q in problem.qtypes])
        for u in rows:
            unit = problem.units[u]
            for t, qtype in enumerate(problem.qtypes):
                cost = 0.0
                for xid in range(n) if unit.xid is None else [unit.xid]:
                    frequency = usage.tokens[:, xid].sum() / 2000
                    assert usage.scores is not None
                    gate = usage.scores[:, xid].sum() / 2000
                    eps = math.sqrt(errors[bid, xid, unit.proj, qtype] / mean)
                    cost += frequency**a * gate**b * eps**c
                assert found[u, t] == pytest.approx(cost)


def test_an_expert_without_tokens_counts_with_a_hundredth_of_each_mean():
    problem = calibrated(pose(model((4,)), granularity="expert-shared", types=(Q2, Q4)))
    calibration = known(problem)
    used = np.array([[0.0, 4.0, 3.0, 5.0]])
    errors = {key: value for key, value in calibration.block_errors.items() if key[1] != 0}
    layers = {0: LayerUsage(tokens=used, scores=used)}
    found = cost_table(replace(problem, calibration=Calibration("texts", ("text",), (10,), layers, errors)))
    mean = {q: sum(errors[0, xid, WHOLE, q] for xid in (1, 2, 3)) / 3 for q in (Q2, Q4)}
    layer_mean = np.mean(
        [errors[0, x, WHOLE, q] for x in (1, 2, 3) for q in (Q2, Q4)] + [m / 100 for m in mean.values()]
    )
    expected = [(3.0 / 1000) ** 2 * mean[q] / 100 / layer_mean for q in (Q2, Q4)]
    assert found[0] == pytest.approx(expected)
    assert found[0, 0] > found[0, 1] > 0


def test_experts_not_encoded_whole_count_with_the_sum_of_their_matrices_in_the_types_those_take():
    # Rows of 352 take Q4_0 for Q2_K and Q5_0 for Q4_K.
    problem = calibrated(pose(model((3,), down_cols=352), granularity="expert-shared", types=(Q2, Q4, *LEGACY)))
    calibration = known(problem)
    parts = {key: value for key, value in calibration.block_errors.items() if key[2] != WHOLE}
    summed = {
        (0, xid, WHOLE, q): parts[0, xid, "gate", q]
        + parts[0, xid, "up", q]
        + parts[0, xid, "down", stock_substitute(q, 352)]
        for xid in range(3)
        for q in problem.qtypes
    }
    by_parts = cost_table(replace(problem, calibration=replace(calibration, block_errors=parts)))
    assert by_parts == pytest.approx(
        cost_table(replace(problem, calibration=replace(calibration, block_errors=summed)))
    )


LEGACY = (QType.Q4_0, QType.Q5_0)


def test_a_fused_stack_counts_with_the_sum_of_gate_and_up():
    problem = calibrated(pose([stack(0, "gate_up", 3, n_rows=8), stack(0, "down", 3)], granularity="stack"))
    calibration = known(problem)
    summed = {
        (0, xid, "gate_up", q): calibration.block_errors[0, xid, "gate", q] + calibration.block_errors[0, xid, "up", q]
        for xid in range(3)
        for q in problem.qtypes
    }
    both = replace(calibration, block_errors=calibration.block_errors | summed)
    assert cost_table(problem) == pytest.approx(cost_table(replace(problem, calibration=both)))


# The mix of a layer.


def brute_force(cost: np.ndarray, size: np.ndarray, budget: int) -> tuple[float, float]:
    """(least cost with both upper levels in use, least cost without that condition)."""
    best = free = math.inf
    n_levels = cost.shape[1]
    rows = np.arange(len(cost))
    for levels in itertools.product(range(n_levels), repeat=len(cost)):
        if size[rows, levels].sum() <= budget:
            total = float(cost[rows, levels].sum())
            free = min(free, total)
            if n_levels - 1 in levels and (n_levels < 2 or n_levels - 2 in levels):
                best = min(best, total)
    return best, free


@st.composite
def layers(draw):
    """Costs that fall and sizes that grow with the level, some alike."""
    n, n_levels = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    cost = -np.sort(-(rng.lognormal(0, 2, (n, 1)) * rng.uniform(0.1, 1, (n, n_levels))), axis=1)
    if draw(st.booleans()):
        size = np.cumsum(rng.integers(1, 20, (n, n_levels)), axis=1)
    else:
        size = np.repeat(np.cumsum(rng.integers(1, 20, (1, n_levels)), axis=1), n, axis=0)
    low, high = int(size[:, 0].sum()), int(size[:, -1].sum())
    return cost, size, draw(st.integers(low, high))


@given(layers())
@settings(deadline=None, max_examples=200)
def test_a_mix_is_the_best_with_both_upper_levels_else_the_best(layer):
    cost, size, budget = layer
    mix, bound = solve_mix(cost, size, budget)
    rows = np.arange(len(cost))
    assert size[rows, mix].sum() <= budget
    best, free = brute_force(cost, size, budget)
    expected = best if math.isfinite(best) else free
    assert has_upper_levels(mix, cost.shape[1]) >= math.isfinite(best)
    found = cost[rows, mix].sum()
    assert found == pytest.approx(expected, rel=1e-12)
    assert bound == pytest.approx(expected, rel=1e-12)


def test_five_hundred_experts_are_solved_to_the_gap():
    rng = np.random.default_rng(1)
    cost = rng.lognormal(0, 1.5, (1536, 1)) * [1, 0.26, 0.06] * rng.uniform(0.95, 1.05, (1536, 3))
    size = np.array([[84, 110, 144]] * 1024 + [[144, 144, 176]] * 512)
    budget = int(size.sum(axis=0) @ [0.55, 0.3, 0.15])
    mix, bound = solve_mix(cost, size, budget)
    assert np.take_along_axis(size, mix[:, None], axis=1).sum() <= budget
    assert bound <= np.take_along_axis(cost, mix[:, None], axis=1).sum() <= bound * (1 + 1.1e-4)


# The shares of layers.


@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(0, 1.1))
@settings(deadline=None, max_examples=100)
def test_shares_are_equal_per_weight_within_what_layers_can_take(seed, n, share):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 1000, n)
    least = rng.integers(1, 5 * weights + 1)
    most = least + rng.integers(0, 5 * weights + 1)
    budget = int(least.sum() + share * (most.sum() - least.sum()))
    found = share_out(budget, least.tolist(), most.tolist(), weights.tolist())
    low, high = 0.0, 20.0
    for _ in range(100):
        rate = (low + high) / 2
        low, high = (rate, high) if np.clip(rate * weights, least, most).sum() <= budget else (low, rate)
    assert np.abs(np.array(found) - np.clip(low * weights, least, most)).max() < 1.001
    assert sum(found) <= budget
    assert sum(found) > min(budget, most.sum()) - n


def test_shares_below_the_least_are_refused_with_both_numbers():
    assert share_out(30, [10, 20], [50, 60], [7, 3]) == [10, 20]
    assert share_out(200, [10, 20], [50, 60], [7, 3]) == [50, 60]
    with pytest.raises(BudgetError, match=r"29 .* 30 bytes"):
        share_out(29, [10, 20], [50, 60], [7, 3])


# The allocation.


def gap_of(problem: Problem, found: Allocation) -> float:
    """The reported gap, after checking all that an allocation reports of its costs."""
    assert found.unit_cost == pytest.approx(cost_table(problem)[np.arange(len(found.choice)), found.choice])
    assert found.unit_cost is not None
    assert found.cost == pytest.approx(found.unit_cost.sum())
    assert found.weights is None
    assert found.cost is not None
    assert found.lower_bound is not None
    assert found.gap is not None
    assert found.lower_bound <= found.cost <= found.lower_bound * (1 + found.gap) * (1 + 1e-9)
    return found.gap


@pytest.mark.parametrize("seed", range(3))
def test_each_layer_is_the_best_mix_at_its_share(seed):
    # Two layers of equal shape have half each; three levels around an average of three bits.
    problem = calibrated(pose(model((5, 5)), granularity="expert-shared"), seed)
    column = {q: t for t, q in enumerate(problem.qtypes)}
    window = [column[q] for q in (Q2, Q3, Q4)]
    problem = replace(problem, budget=int(problem.size[:, window[1]].sum()) + 7)
    found = PMQ().allocate(problem)
    cost = cost_table(problem)[:, window]
    best = sum(
        brute_force(cost[rows], problem.size[rows][:, window], problem.budget // 2)[0]
        for rows in np.split(np.arange(10), 2)
    )
    assert found.cost == pytest.approx(best, rel=1e-4)
    assert gap_of(problem, found) <= 1e-4
    assert found.parameters == {
        "frequency_exponent": 1.0, "gate_exponent": 1.0, "error_exponent": 2.0, "layers_without_both_levels": 0
    }  # fmt: skip
    for bid in range(2):
        types = {t for (b, _), by_proj in types_of(problem, found).items() if b == bid for t in by_proj.values()}
        assert {Q3, Q4} <= types <= {Q2, Q3, Q4}


def test_what_cannot_be_paid_is_dropped_and_told():
    problem = calibrated(pose(model((3, 3)), 0.0))
    found = PMQ().allocate(problem)
    assert spent(problem, found) == problem.budget
    assert found.parameters["layers_without_both_levels"] == 2


def test_stacks_are_solved_over_the_whole_model():
    problem = calibrated(pose(model((4, 6)), 0.4, "stack", types=(Q2, Q4, Q6)))
    found = PMQ().allocate(problem)
    best = brute_force(cost_table(problem), problem.size, problem.budget)[1]
    assert found.cost == pytest.approx(best, rel=1e-9)
    assert gap_of(problem, found) < 1e-8
    assert "layers_without_both_levels" not in found.parameters


def test_the_whole_range_is_feasible_and_nothing_below():
    fixed = {"blk.0.ffn_down_exps.weight": Q8}
    for granularity in ("expert", "expert-shared", "stack"):
        for down_cols, stays in ((256, fixed if granularity != "expert-shared" else {}), (352, {})):
            for share in (0.0, 1.0):
                problem = calibrated(pose(model((3, 2), down_cols), share, granularity, fixed=stays))
                assert spent(problem, PMQ().allocate(problem)) == problem.budget
            least = replace(problem, budget=pose(model((3, 2), down_cols), 0.0, granularity, fixed=stays).budget - 1)
            with pytest.raises(BudgetError, match=rf"{least.budget} .* {least.budget + 1} bytes"):
                PMQ().allocate(least)


PROBLEMS = st.builds(
    calibrated,
    st.builds(
        pose,
        st.builds(model, st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), st.sampled_from([256, 352])),
        st.floats(0, 1),
        st.sampled_from(["expert", "expert-shared", "stack"]),
        st.sampled_from([None, (Q2, Q4, QType.Q4_0), (Q3, Q4, Q6, Q8), (Q2, Q3, Q5, QType.Q5_1, QType.Q5_0)]),
    ),
    st.integers(0, 999),
)


@given(PROBLEMS)
@settings(deadline=None, max_examples=60)
def test_the_budget_is_kept_with_at_most_three_neighbouring_levels_in_a_layer(problem):
    found = PMQ().allocate(problem)
    assert all(problem.allowed[u, t] for u, t in enumerate(found.choice))
    assert spent(problem, found) <= problem.budget
    gap_of(problem, found)
    for place in {(unit.bid, unit.proj) for unit in problem.units if unit.xid is not None}:
        rows = [u for u, unit in enumerate(problem.units) if (unit.bid, unit.proj) == place]
        bits = {NOMINAL_BITS[problem.qtypes[found.choice[u]]] for u in rows}
        offered = sorted({NOMINAL_BITS[problem.qtypes[t]] for t in np.flatnonzero(problem.allowed[rows[0]])})
        assert len(bits) <= 3
        assert offered.index(max(bits)) - offered.index(min(bits)) <= 2


@pytest.mark.parametrize("scope", ["layer", "projection"])
@pytest.mark.parametrize("granularity", ["expert", "stack"])
def test_parts_of_a_model_keep_the_budget(scope, granularity):
    problem = calibrated(pose(model((6, 5)), 0.4, granularity))
    found = allocate_scope(PMQ(), problem, scope)
    assert 0 < spent(problem, found) <= problem.budget
    assert found.cost is not None


# What is refused.


def with_usage(problem: Problem, **changes) -> Problem:
    calibration = known(problem)
    layers = {bid: replace(usage, **changes) for bid, usage in calibration.layers.items()}
    return replace(problem, calibration=replace(calibration, label="some.gguf", layers=layers))


def test_what_is_missing_is_named_with_a_word_on_how_to_get_it():
    problem = calibrated(pose(model((4,)), types=(Q2, Q4)))
    with pytest.raises(AlphaQError, match="alphaq-gguf calibrate"):
        PMQ().allocate(replace(problem, calibration=None))
    with pytest.raises(AlphaQError, match=r"some\.gguf: no scores .* layer 0"):
        PMQ().allocate(with_usage(problem, scores=None))
    errors = {key: value for key, value in known(problem).block_errors.items() if key[3] != Q4}
    lacking = replace(known(problem), block_errors=errors)
    with pytest.raises(AlphaQError, match=r"some texts: no errors of the output of layer 0 by \w+ as Q4_K") as caught:
        PMQ().allocate(replace(problem, calibration=lacking))
    assert "alphaq-gguf calibrate" in caught.value.hint


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_what_is_no_number_is_refused(bad):
    problem = calibrated(pose(model((2,))))
    values = np.array([[1.0, bad]])
    for name, what in (("tokens", "tokens"), ("scores", "gate weights")):
        with pytest.raises(AlphaQError, match=rf"some\.gguf: {what} in layer 0"):
            PMQ().allocate(with_usage(problem, **{name: values}))
    errors = known(problem).block_errors | {(0, 1, "down", Q3): bad}
    with pytest.raises(AlphaQError, match="output of layer 0 by down"):
        PMQ().allocate(replace(problem, calibration=replace(known(problem), block_errors=errors)))


def test_exponents_beyond_all_measure_are_refused():
    problem = replace(calibrated(pose(model((3,)))), exponents=(1.0, 1.0, 5000.0))
    with pytest.raises(AlphaQError, match="smaller exponents"):
        PMQ().allocate(problem)
