"""Budgets of stored bytes against brute force: every type of every expert, laid out as a file would."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from expert_problems import model, pose, stack, with_signals
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alphaq_gguf.allocate import Solution, solve_budget
from alphaq_gguf.budget import size_range
from alphaq_gguf.contained import solve_stacks, stack_options, store
from alphaq_gguf.container import container_bytes, lay_out, stack_type
from alphaq_gguf.errors import BudgetError
from alphaq_gguf.qtypes import K_TYPES, LEGACY_TYPES, QType, bpw, fits, row_bytes
from alphaq_gguf.scope import allocate_within
from alphaq_gguf.strategies import STRATEGIES, Problem

Q2, Q3, Q4, Q6, Q8 = QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q6_K, QType.Q8_0
Shape = tuple[int, int, int]


def stored(shape: Shape, types: Sequence[QType], alignment: int = 1) -> int:
    """Bytes of the tensor that holds these experts, up to where the next one starts."""
    return -(-container_bytes(stack_type(shape, types)[0], shape) // alignment) * alignment


def as_types(qtypes: Sequence[QType], choice: np.ndarray) -> list[QType]:
    return [qtypes[t] for t in choice]


def columns(cost: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(cost[0])).tolist()


def every_choice(shape: Shape, qtypes: Sequence[QType], cost: np.ndarray) -> Iterator[tuple[int, float]]:
    """(stored bytes, cost) of all choices of a stack's types."""
    for choice in itertools.product(columns(cost), repeat=shape[0]):
        yield stored(shape, [qtypes[t] for t in choice]), float(cost[np.arange(shape[0]), choice].sum())


class Model:
    """Some stacks with random costs that fall with size, and the least cost at any budget by brute force."""

    def __init__(self, shapes: Sequence[Shape], qtypes: Sequence[QType], alignment: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.shapes, self.qtypes, self.alignment = list(shapes), sorted(qtypes, key=bpw), alignment
        starts = np.cumsum([0, *(shape[0] for shape in shapes)])
        # Experts of a stack lie anywhere among the units.
        order = rng.permutation(starts[-1])
        self.stacks = [(s, order[a:b].tolist()) for s, (a, b) in zip(shapes, itertools.pairwise(starts), strict=True)]
        self.cost = np.full((starts[-1], len(qtypes)), np.inf)
        for shape, rows in self.stacks:
            for t, qtype in enumerate(self.qtypes):
                if fits(qtype, shape[2]):
                    self.cost[rows, t] = rng.lognormal(0, 1, shape[0]) * 4.0 ** -bpw(qtype) * rng.uniform(0.5, 1.5)

    def solve(self, budget: int) -> Solution:
        return solve_stacks(self.stacks, self.qtypes, self.cost, budget, self.alignment)

    def stored(self, choice: np.ndarray) -> int:
        return sum(stored(shape, [self.qtypes[t] for t in choice[rows]], self.alignment) for shape, rows in self.stacks)

    def budget(self, share: float) -> int:
        """A share of the way from the smallest types for all to the largest."""
        sizes = [
            [
                -(-container_bytes(self.qtypes[t], shape) // self.alignment) * self.alignment
                for t in columns(self.cost[r])
            ]
            for shape, r in self.stacks
        ]
        low, high = sum(map(min, sizes)), sum(map(max, sizes))
        return int(low + share * (high - low))

    def least(self, budget: int, *, plain: bool = False) -> float:
        """The least cost of all choices, or of those with one type per stack."""
        best = {0: 0.0}
        for shape, rows in self.stacks:
            cost = self.cost[rows]
            options: dict[int, float] = {}
            choices = every_choice(shape, self.qtypes, cost)
            if plain:
                choices = ((stored(shape, [self.qtypes[t]] * shape[0]), cost[:, t].sum()) for t in columns(cost))
            for n_bytes, value in choices:
                n_bytes = -(-n_bytes // self.alignment) * self.alignment
                options[n_bytes] = min(value, options.get(n_bytes, math.inf))
            grown: dict[int, float] = {}
            for (used, value), (more, extra) in itertools.product(best.items(), options.items()):
                if used + more <= budget:
                    grown[used + more] = min(value + extra, grown.get(used + more, math.inf))
            best = grown
        return min(best.values(), default=math.inf)


# Four rows of 256 weights, and two of 32, take bytes that no multiple of the alignment divides.
SHAPES = st.tuples(st.integers(1, 4), st.sampled_from((1, 2, 3, 4, 32)), st.sampled_from((32, 256, 352, 512, 1408)))
TYPES = st.sets(st.sampled_from((*K_TYPES, QType.Q4_0, QType.Q5_1)), max_size=3).map(lambda found: {Q8, *found})


@st.composite
def models(draw, shapes=SHAPES) -> Model:
    found = draw(st.lists(shapes, min_size=1, max_size=3))
    return Model(found, tuple(draw(TYPES)), draw(st.sampled_from((1, 32))), draw(st.integers(0, 10**6)))


@given(models(), st.floats(0, 1))
@settings(deadline=None, max_examples=150)
def test_what_is_stored_fits_and_the_optimum_lies_between_bound_and_cost(model: Model, share: float) -> None:
    budget = model.budget(share)
    found = model.solve(budget)
    assert model.stored(found.choice) <= found.size <= budget
    assert found.cost == pytest.approx(model.cost[np.arange(len(model.cost)), found.choice].sum(), rel=1e-12)
    optimum = model.least(budget)
    assert found.lower_bound <= optimum * (1 + 1e-12)
    assert optimum <= found.cost * (1 + 1e-12)
    assert found.cost <= model.least(budget, plain=True) * (1 + 1e-12)
    assert (found.method == "exact") == (found.gap == 0)
    if found.method == "exact":
        assert found.cost == pytest.approx(optimum, rel=1e-12)


@given(models(st.tuples(st.integers(2, 4), st.just(32), st.sampled_from((256, 512, 352)))), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_the_optimum_is_proven_where_experts_leave_no_gaps(model: Model, share: float) -> None:
    # 32 rows take a multiple of 32 bytes whatever their type.
    found = model.solve(model.budget(share))
    assert (found.method, found.gap) == ("exact", 0)
    assert found.cost == pytest.approx(model.least(model.budget(share)), rel=1e-12)


@given(models(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_more_bytes_never_cost_more(model: Model, a: float, b: float) -> None:
    less, more = (model.solve(model.budget(share)) for share in sorted((a, b)))
    assume(more.method == "exact")
    assert more.cost <= less.cost * (1 + 1e-12)


def test_one_expert_that_matters_is_paid_by_what_a_container_leaves() -> None:
    # Four experts as Q3_K take 112,640 bytes. A container of that size holds a header up to byte 128, one expert as
    # Q4_K (36,864 bytes), one as Q3_K (28,160) and two as Q2_K (21,504 each), not one as Q6_K (53,760) beside others.
    shape, types = (4, 256, 256), (Q2, Q3, Q4, Q6)
    cost = np.array(
        [[9.0, 8.0, 1.0, 0.5], [0.2, 0.1, 0.09, 0.08], [0.02, 0.01, 0.009, 0.008], [0.02, 0.01, 0.009, 0.008]]
    )
    found = solve_stacks([(shape, range(4))], types, cost, 112_640)
    assert as_types(types, found.choice) == [Q4, Q3, Q2, Q2]
    assert (found.size, found.cost, found.method) == (112_640, pytest.approx(1.14), "exact")
    # With a byte less it is IQ3_XXS, 100,352 bytes, with at most two experts above Q2_K and none above Q3_K.
    found = solve_stacks([(shape, range(4))], types, cost, 112_639)
    assert as_types(types, found.choice) == [Q3, Q3, Q2, Q2]
    assert (found.size, found.cost, found.method) == (100_352, pytest.approx(8.14), "exact")


def test_a_header_that_nothing_pays_for_leaves_stacks_plain() -> None:
    # Sixty-four experts of 32 weights take 1152 bytes as Q4_0; a header alone takes 1064.
    shape, types = (64, 1, 32), LEGACY_TYPES
    cost = np.random.default_rng(0).lognormal(0, 2, 64)[:, None] * np.array([1.0, 0.3, 0.2, 0.01])
    for option in stack_options(shape, types, cost):
        assert not store(shape, as_types(types, option.choice)).is_container
    budget = container_bytes(QType.Q5_1, shape)
    found = solve_stacks([(shape, range(64))], types, cost, budget)
    assert (set(found.choice.tolist()), found.size) == ({2}, budget)


def test_rows_of_1408_get_containers_of_types_that_suit_them() -> None:
    shape, types = (6, 64, 1408), LEGACY_TYPES
    cost = np.random.default_rng(0).lognormal(0, 2, 6)[:, None] * np.array([1.0, 0.3, 0.2, 0.01])
    sizes = {container_bytes(q, shape) for q in QType if q.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "I8", "Q8_0")}
    options = stack_options(shape, types, cost)
    assert {option.n_bytes for option in options} == sizes
    for option in options:
        assert option.cost == min(value for n, value in every_choice(shape, types, cost) if n <= option.n_bytes)
    assert any(store(shape, as_types(types, option.choice)).is_container for option in options)


def test_a_gap_that_does_not_fit_is_seen_and_certified() -> None:
    # Sums of blocks that fit a container but for the gap between two types, in some of many small stacks.
    missed = 0
    for seed, n_rows in itertools.product(range(6), (1, 3)):
        rng = np.random.default_rng(seed)
        shape, types = (5, n_rows, 512), (Q2, Q3, Q4, QType.Q5_0)
        cost = -np.sort(-rng.lognormal(0, 1, (5, 4)), axis=1)
        sizes = {container_bytes(q, shape) for q in QType if fits(q, 512)}
        blocks = np.array([[n_rows * row_bytes(q, 512) for q in types]] * 5)
        choices = list(every_choice(shape, types, cost))
        for option in stack_options(shape, types, cost):
            chosen = as_types(types, option.choice)
            assert stored(shape, chosen) <= option.n_bytes
            best = min(value for n, value in choices if n <= option.n_bytes)
            assert option.lower_bound <= best <= option.cost
            if option.n_bytes in sizes and len(set(chosen)) > 1:
                ideal = solve_budget(cost, blocks, option.n_bytes - 128)
                end = lay_out(shape, as_types(types, ideal.choice)).payload_end
                missed += end > option.n_bytes
    assert missed > 0


def test_a_budget_below_the_smallest_types_is_refused() -> None:
    shape = (4, 32, 256)
    least = container_bytes(Q2, shape)
    cost = np.ones((4, 2))
    assert solve_stacks([(shape, range(4))], (Q2, Q4), cost, least).choice.tolist() == [0] * 4
    with pytest.raises(BudgetError, match=str(least)):
        solve_stacks([(shape, range(4))], (Q2, Q4), cost, least - 1)


def in_containers(problem: Problem, share: float) -> Problem:
    """The problem with a share of the range of stored bytes to spend."""
    counted = replace(problem, stack_alignment=32)
    least, most = size_range(counted)
    return replace(counted, budget=int(least + share * (most - least)))


def stored_of(problem: Problem, choice: np.ndarray) -> int:
    """Stored bytes of a model whose stacks have four rows, from what each expert's rows take."""
    substitutes = {Q2: QType.Q4_0, Q3: QType.Q4_0, Q4: QType.Q5_0, QType.Q5_K: QType.Q5_1, Q6: Q8}
    types: dict[str, dict[int, QType]] = {}
    cols: dict[str, int] = {}
    for unit, t in zip(problem.units, choice, strict=True):
        for m in unit.matrices:
            qtype = problem.qtypes[t]
            types.setdefault(m.stack, {})[m.xid] = qtype if fits(qtype, m.n_cols) else substitutes[qtype]
            cols[m.stack] = m.n_cols
    rows = {m.stack: m.n_rows for unit in problem.units for m in unit.matrices}
    return sum(
        stored((len(found), rows[name], cols[name]), [found[xid] for xid in range(len(found))], 32)
        for name, found in types.items()
    )


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("scope", ["global", "layer"])
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
    st.sampled_from((256, 352)),
    st.sampled_from(("expert", "expert-shared")),
    st.floats(0.1, 1),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=12)
def test_every_strategy_keeps_to_stored_bytes(name, scope, n_experts, down_cols, granularity, share, seed) -> None:
    problem = in_containers(with_signals(pose(model(tuple(n_experts), down_cols), 0.5, granularity), seed), share)
    try:
        found = allocate_within(STRATEGIES[name], problem, scope)
    except BudgetError:
        # A layer's share may be too small.
        assert scope == "layer"
        return
    assert stored_of(problem, found.choice) == problem.n_bytes(found.choice) <= problem.budget
    if found.cost is not None and found.lower_bound is not None:
        assert found.lower_bound <= found.cost


@given(st.integers(0, 99), st.floats(0, 1), st.sampled_from((256, 352)))
@settings(deadline=None, max_examples=20)
def test_whole_experts_of_one_type_are_bounded_by_brute_force(seed: int, share: float, down_cols: int) -> None:
    types = (Q2, Q4, Q8) if down_cols == 256 else (Q2, Q4, Q8, QType.Q4_0, QType.Q5_0)
    problem = pose(
        [stack(0, proj, 5, down_cols if proj == "down" else 256, 32) for proj in ("gate", "down")],
        granularity="expert-shared",
        types=types,
    )
    problem = in_containers(with_signals(problem, seed), share)
    found = allocate_within(STRATEGIES["mse"], replace(problem, masses={}), "global")
    cost = np.full(problem.size.shape, np.inf)
    for u, unit in enumerate(problem.units):
        for t, q in enumerate(problem.qtypes):
            if problem.allowed[u, t]:
                real = {m.proj: q if fits(q, m.n_cols) else {Q2: QType.Q4_0, Q4: QType.Q5_0}[q] for m in unit.matrices}
                cost[u, t] = sum(
                    problem.distortions[(m.stack, m.xid, m.proj), real[m.proj]].squared_error for m in unit.matrices
                )
    options = [np.flatnonzero(row).tolist() for row in problem.allowed]
    least = min(
        float(cost[np.arange(5), choice].sum())
        for choice in map(np.array, itertools.product(*options))
        if stored_of(problem, choice) <= problem.budget
    )
    assert found.cost is not None
    assert found.lower_bound is not None
    assert found.lower_bound <= least * (1 + 1e-12)
    assert least <= found.cost * (1 + 1e-12)


def test_little_is_left_of_a_budget_by_strategies_that_know_no_containers() -> None:
    stacks = [stack(bid, proj, 16, n_rows=64) for bid in range(6) for proj in ("gate", "up", "down")]
    problem = with_signals(pose(stacks, granularity="expert-shared"), 0)
    for share in (0.1, 0.3, 0.6):
        asked = in_containers(problem, share)
        found = allocate_within(STRATEGIES["mse"], asked, "global")
        # One layer's step to the next container.
        step = 3 * (container_bytes(Q8, (16, 64, 256)) - container_bytes(QType.Q6_K, (16, 64, 256)))
        assert asked.budget - step <= stored_of(asked, found.choice) <= asked.budget


def test_types_that_no_tensor_holds_are_passed_over() -> None:
    # Two experts of 32 weights as F32 and F16 take 192 bytes, and no tensor of 64 weights more than 256.
    stacks = [stack(0, "gate", 2, n_cols=32, n_rows=1)]
    problem = replace(with_signals(pose(stacks, types=(QType.F16, QType.F32)), 0), stack_alignment=1)
    with pytest.raises(ValueError, match="no GGUF type holds"):
        problem.n_bytes(np.array([0, 1]))
    for budget, expected in ((128, 0), (192, 0), (255, 0), (256, 1)):
        found = allocate_within(STRATEGIES["random"], replace(problem, budget=budget), "global")
        assert found.choice.tolist() == [expected] * 2
