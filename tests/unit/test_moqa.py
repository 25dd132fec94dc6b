"""MoQa: clusters that satisfy fuzzy c-means' own equations, levels by hand, and a repair done move by move."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.expert_problems import calibrate, model, pose, spent, types_of

from alphaq_gguf.calibration import Calibration, LayerUsage
from alphaq_gguf.errors import AlphaQError, BudgetError
from alphaq_gguf.qtypes import NOMINAL_BITS, QType
from alphaq_gguf.scope import allocate_scope
from alphaq_gguf.strategies import Allocation, Problem
from alphaq_gguf.strategies.moqa import MoQa, classify, fuzzy_c_means, meet_budget

Q2, Q3, Q4, Q5, Q6, Q8 = QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q5_K, QType.Q6_K, QType.Q8_0


# The clusters.


def textbook_memberships(values: list[float], centres: list[float]) -> list[list[float]]:
    """u_ij = 1 / sum_k (d_ij / d_ik)^(2 / (m - 1)) for m = 2, value by value."""
    return [[1 / sum((abs(x - c) / abs(x - other)) ** 2 for other in centres) for c in centres] for x in values]


def textbook_centres(values: list[float], memberships: list[list[float]]) -> list[float]:
    """v_j = sum_i u_ij^m x_i / sum_i u_ij^m."""
    return [
        sum(u[j] ** 2 * x for u, x in zip(memberships, values, strict=True)) / sum(u[j] ** 2 for u in memberships)
        for j in range(len(memberships[0]))
    ]


def textbook_clusters(values: list[float], centres: list[float]) -> list[float]:
    """Both equations in turn from these centres."""
    for _ in range(2000):
        centres = textbook_centres(values, textbook_memberships(values, centres))
    return centres


@given(st.integers(0, 10**6), st.integers(5, 60), st.sampled_from([0.1, 0.5, 1.5]))
@settings(deadline=None, max_examples=60)
def test_centres_and_memberships_satisfy_each_other_s_equations(seed, n, spread):
    values = np.random.default_rng(seed).lognormal(0, spread, n)
    centres, memberships = fuzzy_c_means(values, 4)
    assert (np.diff(centres) >= 0).all()
    assert memberships == pytest.approx(np.array(textbook_memberships(values.tolist(), centres.tolist())), rel=1e-6)
    assert textbook_centres(values.tolist(), memberships.tolist()) == pytest.approx(centres.tolist(), rel=1e-5)


def planted(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Values in four tight groups, shuffled, and which group each is of."""
    group = rng.permutation(np.repeat(np.arange(4), 8))
    return np.array([1.0, 3.0, 7.0, 12.0])[group] + rng.normal(0, 0.05, len(group)), group


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found_and_the_textbook_s_from_their_means(seed):
    values, group = planted(np.random.default_rng(seed))
    levels, gaps = classify(values)
    assert levels.tolist() == group.tolist()
    assert gaps.min() > 0.9
    means = [float(values[group == j].mean()) for j in range(4)]
    assert fuzzy_c_means(values, 4)[0] == pytest.approx(textbook_clusters(values.tolist(), means), rel=1e-6)


def test_a_doubtful_expert_takes_the_lower_of_its_two_levels():
    for middle, level in ((2.0, 0), (5.0, 1), (9.5, 2)):
        values = np.append(np.repeat([1.0, 3.0, 7.0, 12.0], 50) + np.tile(np.linspace(-0.01, 0.01, 50), 4), middle)
        levels, gaps = classify(values)
        assert gaps[-1] < 0.1
        assert levels[-1] == level
        # Clearly nearer to the upper one, it goes up.
        values[-1] = middle + 0.3
        levels, gaps = classify(values)
        assert gaps[-1] > 0.1
        assert levels[-1] == level + 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.25] * 4, [0, 0, 0, 0]),
        ([1.0], [0]),
        ([0.1 + 0.2, 0.3, 0.3], [0, 0, 0]),
        ([1.0, 2.0, 1.0, 2.0, 2.0], [0, 1, 0, 1, 1]),
        ([5.0, 1.0, 2.0, 1.0], [2, 0, 1, 0]),
        ([8.0, 1.0, 2.0, 4.0], [3, 0, 1, 2]),
    ],
)
def test_fewer_distinct_values_than_levels_take_the_lowest(values, expected):
    levels, gaps = classify(np.array(values))
    assert levels.tolist() == expected
    assert gaps == pytest.approx(1)


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([1e-12, 3.0, 1e9]))
@settings(deadline=None, max_examples=40)
def test_neither_the_order_nor_the_scale_of_values_matters(seed, n, scale):
    rng = np.random.default_rng(seed)
    values = rng.lognormal(0, 1, n)
    order = rng.permutation(n)
    levels, gaps = classify(values)
    turned_levels, turned_gaps = classify(values[order])
    assert turned_levels.tolist() == levels[order].tolist()
    assert turned_gaps == pytest.approx(gaps[order], abs=1e-6)
    assert classify(values * scale)[1] == pytest.approx(gaps, abs=1e-5)


# The repair.


def repair_move_by_move(size, start, order, budget) -> list[int] | None:
    """One move at a time, each weighed by the whole sum; None when nothing fits."""
    levels = list(start)

    def total() -> int:
        return sum(int(size[g][level]) for g, level in enumerate(levels))

    up = total() <= budget
    for _ in range(len(size[0])):
        for g in order:
            if not up and total() <= budget:
                return levels
            if up and levels[g] + 1 < len(size[0]):
                levels[g] += 1
                if total() > budget:
                    levels[g] -= 1
                    return levels
            elif not up and levels[g] > 0:
                levels[g] -= 1
    return levels if total() <= budget else None


@given(st.integers(0, 10**6), st.integers(1, 7), st.floats(0, 1))
@settings(deadline=None, max_examples=150)
def test_the_budget_is_met_as_by_single_moves(seed, n, share):
    rng = np.random.default_rng(seed)
    size = np.sort(rng.integers(1, 30, (n, 4)), axis=1)
    start, order = rng.integers(0, 4, n), rng.permutation(n)
    low, high = int(size[:, 0].sum()), int(size[:, 3].sum())
    budget = round(low + share * (high - low))
    found = meet_budget(size, start, order, budget)
    assert found.tolist() == repair_move_by_move(size, start.tolist(), order.tolist(), budget)
    assert size[np.arange(n), found].sum() <= budget
    with pytest.raises(BudgetError, match=rf"{low - 1} .* {low} bytes"):
        meet_budget(size, start, order, low - 1)


# The allocation.


def calibrated(problem: Problem, significance: list[list[list[float]]]) -> Problem:
    """By layer, dataset and expert."""
    layers = {
        bid: LayerUsage(tokens=np.ones(np.shape(values)), significance=np.array(values))
        for bid, values in enumerate(significance)
    }
    datasets = tuple(f"text {i}" for i in range(len(significance[0])))
    return replace(problem, calibration=Calibration("texts", datasets, (10,) * len(datasets), layers))


EIGHT = [12.0, 1.0, 7.0, 3.1, 0.9, 12.2, 6.9, 3.0]
LEVELS_OF_EIGHT = [Q8, Q2, Q6, Q4, Q2, Q8, Q6, Q4]


def at_the_sum(problem: Problem, types: list[QType]) -> Problem:
    """The budget that pays for one type per expert of a layer, in all its projections."""
    column = {q: t for t, q in enumerate(problem.qtypes)}
    total = sum(int(problem.size[u, column[types[unit.xid or 0]]]) for u, unit in enumerate(problem.units))
    return replace(problem, budget=total)


def expert_types(problem: Problem, bid: int = 0) -> list[QType]:
    types = types_of(problem, MoQa().allocate(problem))
    assert all(len(set(found.values())) == 1 for found in types.values())
    return [next(iter(types[place].values())) for place in sorted(types) if place[0] == bid]


@pytest.mark.parametrize("granularity", ["expert", "expert-shared"])
def test_four_clusters_get_eight_six_four_and_two_bits(granularity):
    problem = calibrated(pose(model((8,)), granularity=granularity), [[EIGHT]])
    assert expert_types(at_the_sum(problem, LEVELS_OF_EIGHT)) == LEVELS_OF_EIGHT


def test_a_byte_less_moves_the_least_certain_expert_down_and_a_step_more_moves_it_up():
    problem = at_the_sum(calibrated(pose(model((8,))), [[EIGHT]]), LEVELS_OF_EIGHT)
    _, gaps = classify(np.array(EIGHT) / sum(EIGHT))
    down = {Q8: Q6, Q6: Q4, Q4: Q2}
    movable = [x for x in np.argsort(gaps) if LEVELS_OF_EIGHT[x] in down]
    expected = [down[q] if x == movable[0] else q for x, q in enumerate(LEVELS_OF_EIGHT)]
    assert expert_types(replace(problem, budget=problem.budget - 1)) == expected
    up = {low: high for high, low in down.items()}
    movable = [x for x in np.argsort(gaps) if LEVELS_OF_EIGHT[x] in up]
    more = [up[q] if x == movable[0] else q for x, q in enumerate(LEVELS_OF_EIGHT)]
    assert expert_types(at_the_sum(problem, more)) == more


def test_datasets_count_the_same_however_long_and_their_spread_is_told():
    # The second text has a thousand times the tokens, and the sum of both would see nothing of the first.
    one, other = [8.0, 4.0, 2.0, 1.0, 1.0], [1000.0, 2000.0, 4000.0, 8000.0, 1000.0]
    shares = np.array([np.array(values) / sum(values) for values in (one, other)])
    problem = calibrated(pose(model((5,))), [[one, other]])
    found = MoQa().allocate(problem)
    by_shares = MoQa().allocate(calibrated(problem, [[shares.mean(axis=0).tolist()]]))
    assert found.choice.tolist() == by_shares.choice.tolist()
    deviation = [math.sqrt(((a - b) / 2) ** 2) for a, b in shares.T]
    assert found.parameters["dynamics"] == pytest.approx(sum(deviation))
    assert by_shares.parameters["dynamics"] == 0


def test_a_stack_takes_the_level_nearest_its_experts_mean():
    # Nominal bits of the experts: 8, 2, 6, 4, 2, 8, 6, 4 mean 5, halfway: the lower; and 8, 6, 6, 4 mean 6.
    other = [12.0, 7.0, 7.1, 3.0, 12.1, 7.0, 6.9, 3.1]
    problem = calibrated(pose(model((8, 8)), granularity="stack"), [[EIGHT], [other]])
    column = {q: t for t, q in enumerate(problem.qtypes)}
    expected = [Q4] * 3 + [Q6] * 3
    budget = sum(int(problem.size[u, column[q]]) for u, q in enumerate(expected))
    found = MoQa().allocate(replace(problem, budget=budget))
    assert [problem.qtypes[t] for t in found.choice] == expected


def test_other_types_stand_for_the_levels_they_reach():
    # Three bits are the next for the two of a level, five for four, and nothing is larger than five.
    problem = calibrated(pose(model((8,)), types=(Q3, Q5)), [[EIGHT]])
    expected = [Q3 if q == Q2 else Q5 for q in LEVELS_OF_EIGHT]
    assert expert_types(at_the_sum(problem, expected)) == expected


def test_types_the_user_fixed_stay():
    fixed = {"blk.0.ffn_down_exps.weight": Q8}
    problem = calibrated(pose(model((8,)), 0.3, fixed=fixed), [[EIGHT]])
    types = types_of(problem, MoQa().allocate(problem))
    assert {found["down"] for found in types.values()} == {Q8}
    assert len({found["gate"] for found in types.values()}) > 1


@pytest.mark.parametrize("scope", ["layer", "projection"])
@pytest.mark.parametrize("granularity", ["expert", "expert-shared", "stack"])
def test_parts_of_a_model_keep_the_budget_and_tell_the_whole_dynamics(scope, granularity):
    problem = pose(model((6, 5)), 0.4, granularity)
    problem = replace(problem, calibration=calibrate(problem, np.random.default_rng(0)))
    found = allocate_scope(MoQa(), problem, scope)
    assert 0 < spent(problem, found) <= problem.budget
    assert found.parameters == MoQa().allocate(problem).parameters


PROBLEMS = st.builds(
    lambda problem, seed: replace(problem, calibration=calibrate(problem, np.random.default_rng(seed))),
    st.builds(
        pose,
        st.builds(model, st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), st.sampled_from([256, 352])),
        st.floats(0, 1),
        st.sampled_from(["expert", "expert-shared", "stack"]),
        st.sampled_from([None, (Q2, Q4, QType.Q4_0), (Q3, Q4, Q6, Q8), (Q2, Q3, Q5, QType.Q5_1, QType.Q5_0)]),
    ),
    st.integers(0, 999),
)


def bits_of(problem: Problem, found: Allocation) -> list[int]:
    return [NOMINAL_BITS[problem.qtypes[t]] for t in found.choice]


@given(PROBLEMS, st.floats(0, 0.3))
@settings(deadline=None, max_examples=60)
def test_a_larger_budget_is_kept_and_never_lowers_a_unit(problem, more):
    larger = replace(problem, budget=problem.budget + int(more * problem.budget))
    found, other = MoQa().allocate(problem), MoQa().allocate(larger)
    assert all(problem.allowed[u, t] for u, t in enumerate(found.choice))
    assert spent(problem, found) <= problem.budget
    assert spent(problem, found) <= spent(larger, other) <= larger.budget
    assert all(a <= b for a, b in zip(bits_of(problem, found), bits_of(larger, other), strict=True))


@given(PROBLEMS)
@settings(deadline=None, max_examples=30)
def test_the_order_of_units_is_irrelevant(problem):
    backwards = replace(problem, units=problem.units[::-1], size=problem.size[::-1], allowed=problem.allowed[::-1])
    assert MoQa().allocate(backwards).choice.tolist() == MoQa().allocate(problem).choice[::-1].tolist()


def test_without_significance_there_is_a_word_on_how_to_get_it():
    problem = pose(model((4,)))
    with pytest.raises(AlphaQError, match="alphaq-gguf calibrate"):
        MoQa().allocate(problem)
    counts = Calibration("plain.gguf", ("text",), (10,), {0: LayerUsage(tokens=np.ones((1, 4)))})
    with pytest.raises(AlphaQError, match=r"plain\.gguf: no significance .* layer 0"):
        MoQa().allocate(replace(problem, calibration=counts))


@pytest.mark.parametrize("values", [[1.0, math.nan, 1.0, 1.0], [0.0] * 4, [1.0, math.inf, 1.0, 1.0], [3.0, -1, 1, 1]])
def test_significance_that_is_no_number_is_refused(values):
    with pytest.raises(AlphaQError, match="texts: significance in layer 0") as caught:
        MoQa().allocate(calibrated(pose(model((4,))), [[[1.0] * 4, values]]))
    assert "calibrate again" in caught.value.hint
