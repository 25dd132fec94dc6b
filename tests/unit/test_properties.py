"""What every strategy promises on any model: budgets kept, and costs that answer to budgets, types and names alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.expert_problems import model, pose, spent, with_signals

from alphaq_gguf.allocate import solve_budget
from alphaq_gguf.budget import matrices_bytes
from alphaq_gguf.measurements import key_of
from alphaq_gguf.qtypes import K_TYPES, QType
from alphaq_gguf.strategies import STRATEGIES, Allocation, Problem, pmq
from alphaq_gguf.strategies.base import cost_table

GRANULARITIES = ("stack", "expert", "expert-shared")
TYPES = (None, (QType.Q2_K, QType.Q4_K, QType.Q4_0), (QType.Q3_K, QType.Q5_0, QType.Q6_K, QType.Q8_0))
MODELS = st.builds(model, st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), st.sampled_from([256, 352]))
# More experts than clusters, so that there are no ties.
MANY = st.builds(model, st.lists(st.integers(5, 9), min_size=1, max_size=2).map(tuple), st.sampled_from([256, 352]))
COST_TABLES = ("alphaq", "sim-routing", "self", "mse", "inverse-alpha")


@st.composite
def problems(draw, granularities: tuple[str, ...] = GRANULARITIES, models=MODELS) -> Problem:
    shape = pose(
        draw(models), draw(st.floats(0, 1)), draw(st.sampled_from(granularities)), draw(st.sampled_from(TYPES))
    )
    return with_signals(shape, draw(st.integers(0, 10**6)))


def allocate(name: str, problem: Problem) -> Allocation:
    """As the command line poses it: masses are for those who ask for them."""
    asks = STRATEGIES[name].needs & {"routing", "self_usage"}
    return STRATEGIES[name].allocate(problem if asks else replace(problem, masses={}))


def cost_of(found: Allocation) -> float:
    assert found.cost is not None
    return found.cost


def slack(*found: Allocation) -> float:
    """The factor by which costs may differ: the largest gap, and rounding."""
    return 1 + 1e-9 + max(a.gap or 0.0 for a in found)


@pytest.mark.parametrize("name", STRATEGIES)
@given(problems(), st.data())
@settings(deadline=None, max_examples=25)
def test_no_strategy_exceeds_its_budget(name, problem, data):
    if getattr(STRATEGIES[name], "experts_only", False) and problem.units[0].xid is None:
        problem = data.draw(problems(GRANULARITIES[1:]))
    if name == "uniform":
        # A single type may need more than the least.
        problem = replace(problem, budget=problem.budget + int(problem.size.max(axis=1).sum()))
    found = allocate(name, problem)
    assert all(problem.allowed[u, t] for u, t in enumerate(found.choice))
    chosen = zip(problem.units, found.choice, strict=True)
    assert sum(matrices_bytes(unit.matrices, problem.qtypes[t]) for unit, t in chosen) <= problem.budget


@pytest.mark.parametrize("name", COST_TABLES)
@given(problems(), st.floats(0, 0.5))
@settings(deadline=None, max_examples=20)
def test_the_cost_never_rises_with_the_budget(name, problem, more):
    larger = allocate(name, replace(problem, budget=problem.budget + int(more * problem.budget)))
    assert cost_of(larger) <= cost_of(allocate(name, problem)) * slack(larger)


@given(problems(("stack",)), st.floats(0, 0.5))
@settings(deadline=None, max_examples=20)
def test_the_cost_of_pmq_s_stacks_never_rises_with_the_budget(problem, more):
    larger = allocate("pmq", replace(problem, budget=problem.budget + int(more * problem.budget)))
    assert cost_of(larger) <= cost_of(allocate("pmq", problem)) * slack(larger)


@pytest.mark.parametrize("name", [*COST_TABLES, "pmq"])
@given(problems(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_the_order_of_units_is_irrelevant(name, problem, random):
    order = list(range(len(problem.units)))
    random.shuffle(order)
    found, shuffled = allocate(name, problem), allocate(name, problem.part(order, problem.budget))
    assert 1 / slack(found) <= cost_of(shuffled) / cost_of(found) <= slack(shuffled)


@pytest.mark.parametrize("name", COST_TABLES)
@given(problems(), st.integers(-40, 40))
@settings(deadline=None, max_examples=20)
def test_errors_in_another_unit_change_nothing(name, problem, exponent):
    scale = 10.0**exponent
    scaled = {key: replace(d, squared_error=d.squared_error * scale) for key, d in problem.distortions.items()}
    found, other = allocate(name, problem), allocate(name, replace(problem, distortions=scaled))
    assert 1 / slack(found) <= cost_of(other) / scale / cost_of(found) <= slack(other)


@pytest.mark.parametrize("name", COST_TABLES)
@given(MODELS, st.floats(0, 1), st.sampled_from(GRANULARITIES), st.integers(0, 999), st.data())
@settings(deadline=None, max_examples=20)
def test_another_type_never_makes_the_best_worse(name, stacks, share, granularity, seed, data):
    # Q8_0 and Q4_0 fit all rows.
    few = (QType.Q8_0, QType.Q4_0, *data.draw(st.sets(st.sampled_from(K_TYPES))))
    more = (*few, *data.draw(st.sets(st.sampled_from((*K_TYPES, QType.Q5_0, QType.Q5_1, QType.IQ4_NL)))))
    narrow, wide = (with_signals(pose(stacks, share, granularity, types), seed) for types in (few, more))
    best = allocate(name, replace(wide, budget=narrow.budget))
    assert cost_of(best) <= cost_of(allocate(name, narrow)) * slack(best)


@pytest.mark.parametrize("name", COST_TABLES)
@given(MODELS, st.floats(0, 1), st.sampled_from(TYPES), st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_experts_of_their_own_types_are_never_worse_than_stacks(name, stacks, share, types, seed):
    whole, single = (with_signals(pose(stacks, share, g, types), seed) for g in ("stack", "expert"))
    by_expert = allocate(name, replace(single, budget=whole.budget))
    assert cost_of(by_expert) <= cost_of(allocate(name, whole)) * slack(by_expert)


@pytest.mark.parametrize("name", ["sim-routing", "self"])
@given(problems())
@settings(deadline=None, max_examples=20)
def test_masses_multiply_the_errors_of_their_experts(name, problem):
    # None below a hundredth of its layer's mean, which is raised to that.
    layers: dict[int, list[float]] = defaultdict(list)
    for (bid, _), mass in problem.masses.items():
        layers[bid].append(mass)
    weights = {
        key_of(m): max(problem.masses[m.bid, m.xid], sum(layers[m.bid]) / len(layers[m.bid]) / 100)
        for unit in problem.units
        for m in unit.matrices
    }
    found = allocate(name, problem)
    expected = solve_budget(cost_table(problem, weights), problem.size, problem.budget)
    assert found.weights == pytest.approx(weights)
    assert cost_of(found) == pytest.approx(expected.cost)


def permuted(problem: Problem, turned: dict[int, list[int]]) -> Problem:
    """The same model with expert x of a layer become expert turned[layer][x]."""
    calibration = problem.calibration
    assert calibration is not None
    layers = {}
    for bid, usage in calibration.layers.items():
        back = np.argsort(turned[bid])
        layers[bid] = replace(usage, **{k: None if v is None else v[:, back] for k, v in vars(usage).items()})
    errors = {(bid, turned[bid][x], *rest): value for (bid, x, *rest), value in calibration.block_errors.items()}
    return replace(problem, calibration=replace(calibration, layers=layers, block_errors=errors))


@pytest.mark.parametrize("name", ["moqa", "pmq"])
@given(problems(GRANULARITIES[1:], MANY), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_permuting_experts_permutes_the_choice(name, problem, seed):
    rng = np.random.default_rng(seed)
    layers: dict[int, list[int]] = defaultdict(list)
    for bid, xid in problem.masses:
        layers[bid].append(xid)
    turned = {bid: rng.permutation(len(xids)).tolist() for bid, xids in layers.items()}
    place = {(unit.bid, unit.proj, unit.xid): u for u, unit in enumerate(problem.units)}
    to = [place[unit.bid, unit.proj, turned[unit.bid][unit.xid or 0]] for unit in problem.units]
    before, other = allocate(name, problem), permuted(problem, turned)
    after = allocate(name, other).choice[to]
    assert spent(problem, replace(before, choice=after)) <= problem.budget
    if name == "moqa":
        assert after.tolist() == before.choice.tolist()
    else:
        # Mixes whose costs are equal within the gap may be exchanged.
        costs = pmq.cost_table(problem)[np.arange(len(to)), after]
        assert pmq.cost_table(other)[to, after] == pytest.approx(costs)
        assert costs.sum() == pytest.approx(cost_of(before), rel=2e-4)
