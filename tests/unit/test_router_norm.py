"""Router norm and MaxVar: the published level counts, orders by hand, and budgets kept by real bytes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit import expert_problems
from unit.expert_problems import model, spent, stack, types_of

from alphaq_gguf.budget import matrices_bytes
from alphaq_gguf.checkpoint import ExpertStack
from alphaq_gguf.errors import AlphaQError, BudgetError
from alphaq_gguf.measurements import key_of
from alphaq_gguf.qtypes import NOMINAL_BITS, QType, bpw
from alphaq_gguf.scope import allocate_scope
from alphaq_gguf.strategies import Problem
from alphaq_gguf.strategies.levels import choose_levels
from alphaq_gguf.strategies.router_norm import RouterNorm, level_counts, order_by_norm, promote

Q2, Q3, Q4, Q5, Q6, Q8 = QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q5_K, QType.Q6_K, QType.Q8_0


# The order.


def test_small_norms_come_first_and_ties_keep_their_index():
    assert order_by_norm([3.0, 1.0, 2.0, 1.0, 0.5]) == [4, 1, 3, 2, 0]
    assert order_by_norm([0.2, -0.1, -0.3]) == [2, 1, 0]
    assert order_by_norm([]) == []


@pytest.mark.parametrize(
    ("order", "variances", "expected"),
    [
        pytest.param([0, 1, 2, 3], [1, 1, 1, 3], [0, 1, 2, 3], id="three-times-is-not-more"),
        pytest.param([0, 1, 2, 3], [1, 1, 1, 3.1], [3, 0, 1, 2], id="last-to-first"),
        pytest.param([0, 1, 2, 3], [4, 1, 1, 10], [0, 3, 1, 2], id="past-the-small-only"),
        pytest.param([2, 0, 1], [1, 10, 40], [2, 1, 0], id="by-position-not-index"),
        pytest.param([0, 1, 2, 3], [1, 10, 1, 40], [3, 1, 0, 2], id="second-sees-the-first-moved"),
        pytest.param([0, 1, 2, 3], [1, 1, 5, 5], [3, 2, 0, 1], id="equals-that-move-swap"),
        pytest.param([3, 2, 1, 0], [9, 1, 1, 1], [0, 3, 2, 1], id="any-order"),
        pytest.param([0, 1, 2], [9, 1, 1], [0, 1, 2], id="already-first"),
        pytest.param([0, 1], [0, 0], [0, 1], id="zero"),
    ],
)
def test_an_expert_moves_up_to_the_first_it_outdoes_threefold(order, variances, expected):
    assert promote(order, variances) == expected


@given(st.lists(st.integers(1, 60), max_size=12), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_afterwards_no_expert_stands_below_one_it_outdoes_and_one_pass_is_enough(variances, random):
    order = list(range(len(variances)))
    random.shuffle(order)
    found = promote(order, variances)
    assert sorted(found) == sorted(order)
    assert not any(3 * variances[a] < variances[b] for i, a in enumerate(found) for b in found[i + 1 :])
    assert promote(found, variances) == found


# The levels.


@pytest.mark.parametrize(
    ("n", "average", "expected"),
    [
        (8, 1.5, (4, 4, 0)),
        (8, 1.75, (4, 2, 2)),
        (8, 2, (2, 4, 2)),
        (8, 2.125, (2, 3, 3)),
        (8, 2.25, (2, 2, 4)),
        (8, 2.5, (2, 0, 6)),
        (8, 2.75, (1, 0, 7)),
        (64, 2, (21, 22, 21)),
        (8, 1, (8, 0, 0)),
        (8, 3, (0, 0, 8)),
        # On the edges of the middle third, where neither end belongs to its neighbour.
        (6, Fraction(5, 3), (3, 2, 1)),
        (6, Fraction(7, 3), (1, 2, 3)),
    ],
)
def test_the_published_mixes_of_three_levels(n, average, expected):
    assert level_counts(n, average, (1, 2, 3)) == expected
    # Levels count by their distance alone.
    assert level_counts(n, 2 + 2 * average, (4, 6, 8)) == expected


@pytest.mark.parametrize(
    ("n", "average", "levels", "expected"),
    [
        (8, 2.5, (2, 3), (4, 4)),
        (8, 2.4, (2, 3), (5, 3)),
        (8, 2, (2, 3), (8, 0)),
        (8, 3, (2, 3), (0, 8)),
        (60, 6.5, (6, 8), (45, 15)),
        (1, 2.6, (2, 3), (0, 1)),
        (5, 4, (4,), (5,)),
    ],
)
def test_two_levels_and_one(n, average, levels, expected):
    assert level_counts(n, average, levels) == expected


def swap_one_by_one(n: int, average: float) -> tuple[int, int, int]:
    """The rule as it is published, for bits 1, 2 and 3: a loop that stops where the text says."""
    n_low = n_high = 0
    if average >= 2:
        n_high = round(n * (average - 2))
        n_middle = n - n_high
    else:
        n_middle = round(n * (average - 1))
        n_low = n - n_middle
    base = n_high
    while n_middle >= 2:
        low, middle, high = n_low + 1, n_middle - 2, n_high + 1
        if average < 3 - 4 / 3 or (average <= 3 - 2 / 3 and middle < high - base):
            break
        n_low, n_middle, n_high = low, middle, high
    return n_low, n_middle, n_high


@given(st.integers(1, 512), st.floats(1, 3))
def test_three_levels_follow_the_published_loop_and_meet_the_average(n, average):
    counts = level_counts(n, average, (1, 2, 3))
    assert counts == swap_one_by_one(n, average)
    assert min(counts) >= 0
    assert sum(counts) == n
    assert abs(np.dot(counts, (1, 2, 3)) - n * average) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        (2, (2, 3)),
        (2.5, (2, 3)),
        (2.6, (2, 3, 4)),
        (3.5, (2, 3, 4)),
        (3.6, (3, 4, 5)),
        (5.4, (4, 5, 6)),
        (5.6, (5, 6)),
        (6, (6, 8)),
        (7.9, (6, 8)),
        (8, (8,)),
    ],
)
def test_levels_are_the_nearest_equally_spaced_three_or_the_two_around(average, expected):
    assert choose_levels((2, 3, 4, 5, 6, 8), average) == expected


def test_levels_may_be_far_apart_or_alone():
    assert choose_levels((2, 4, 6), 3.5) == (2, 4, 6)
    assert choose_levels((4,), 4) == (4,)


# The allocation.


def pose(
    stacks: list[ExpertStack],
    share: float = 0.5,
    granularity: str = "expert",
    seed: int = 0,
    types: tuple[QType, ...] | None = None,
    fixed: dict[str, QType] | None = None,
) -> Problem:
    """A problem with random norms and variances that move nobody, and a share of the range of sizes to spend."""
    rng = np.random.default_rng(seed)
    matrices = [m for s in stacks for m in s.matrices]
    return replace(
        expert_problems.pose(stacks, share, granularity, types, fixed),
        router_norms={place: float(rng.uniform(1, 2)) for place in sorted({(m.bid, m.xid) for m in matrices})},
        row_variances={key_of(m): float(rng.uniform(1, 2.9)) for m in matrices},
    )


def gate_types(problem: Problem, bid: int = 0) -> list[str]:
    types = types_of(problem, RouterNorm().allocate(problem))
    return [types[b, x].get("gate", types[b, x].get("all", Q2)).name for b, x in sorted(types) if b == bid]


NORMS = [8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0]


def eight(bits_total: float, granularity: str = "expert") -> Problem:
    """One layer of eight experts with NORMS; the budget in stored bits per weight, summed over experts."""
    stacks = model((8,))
    problem = pose(stacks, granularity=granularity)
    per_expert = sum(s.n_weights for s in stacks) // 8
    norms = {(0, xid): norm for xid, norm in enumerate(NORMS)}
    return replace(problem, budget=round(bits_total * per_expert / 8), router_norms=norms)


@pytest.mark.parametrize("granularity", ["expert", "expert-shared"])
def test_a_budget_that_pays_for_a_published_mix_buys_it(granularity):
    # An average of 3 within 2, 3 and 4 bits: two experts low, four in the middle, two high.
    problem = eight(2 * bpw(Q2) + 4 * bpw(Q3) + 2 * bpw(Q4), granularity)
    found = RouterNorm().allocate(problem)
    assert spent(problem, found) == problem.budget
    assert found.parameters == {"average_bits": 3.0}
    assert gate_types(problem) == ["Q2_K", "Q4_K", "Q2_K", "Q4_K", "Q3_K", "Q3_K", "Q3_K", "Q3_K"]


def test_what_the_mix_leaves_raises_the_first_below_the_top_while_it_fits():
    # The mix at 2.875, its first middle expert raised to 4 bits, then the next for which a byte is missing.
    mix = 3 * bpw(Q2) + 3 * bpw(Q3) + 2 * bpw(Q4)
    expected = ["Q2_K", "Q4_K", "Q2_K", "Q4_K", "Q2_K", "Q3_K", "Q3_K", "Q3_K"]
    assert gate_types(eight(mix)) == expected
    almost = eight(2 * bpw(Q2) + 4 * bpw(Q3) + 2 * bpw(Q4))
    assert gate_types(replace(almost, budget=almost.budget - 1)) == expected
    # From two levels: all low but for the first two, and the third raised only when all its projections fit.
    two = eight(6 * bpw(Q2) + 2 * bpw(Q3))
    assert gate_types(two) == ["Q2_K", "Q3_K", "Q2_K", "Q3_K", "Q2_K", "Q2_K", "Q2_K", "Q2_K"]


def test_single_raises_go_round_the_layers():
    # Three layers of four share one average; 2.25 costs three raises, and the budget has two.
    problem = pose(model((4, 4, 4)), types=(Q2, Q3, Q4))
    least = int(problem.size[:, 0].sum())
    step = int(problem.size[0, 1] - problem.size[0, 0]) * 3
    problem = replace(problem, budget=least + 2 * step)
    types = types_of(problem, RouterNorm().allocate(problem))
    raised = [place for place, t in types.items() if t["gate"] == Q3]
    first = {bid: min(range(4), key=lambda x, b=bid: problem.router_norms[b, x]) for bid in range(3)}
    assert raised == [(0, first[0]), (1, first[1])]


@pytest.mark.parametrize("share", [0.1, 0.21, 0.37, 0.42, 0.55, 0.68, 0.73])
def test_the_order_of_units_is_irrelevant(share):
    problem = pose(model((3, 5, 4)), share)
    backwards = replace(problem, units=problem.units[::-1], size=problem.size[::-1], allowed=problem.allowed[::-1])
    found = RouterNorm().allocate(problem).choice
    assert RouterNorm().allocate(backwards).choice.tolist() == found[::-1].tolist()


def test_an_expert_whose_rows_vary_threefold_leaves_its_place_at_the_end():
    problem = eight(7 * bpw(Q2) + bpw(Q3))
    assert gate_types(problem) == ["Q2_K", "Q3_K", "Q2_K", "Q2_K", "Q2_K", "Q2_K", "Q2_K", "Q2_K"]
    problem.row_variances["blk.0.ffn_gate_exps.weight", 0, "gate"] = 9.0
    assert gate_types(problem)[:2] == ["Q3_K", "Q2_K"]
    problem.row_variances["blk.0.ffn_up_exps.weight", 7, "up"] = 1e9
    assert gate_types(problem)[:2] == ["Q3_K", "Q2_K"]


def test_fused_experts_are_judged_by_their_gate_and_gateless_ones_by_up():
    for projs, first in ((("gate_up", "down"), "gate"), (("up", "down"), "up")):
        stacks = [stack(0, proj, 4, n_rows=8) for proj in projs]
        problem = pose(stacks, types=(Q2, Q3))
        first_unit = [u for u, unit in enumerate(problem.units) if unit.xid == 0]
        budget = int(problem.size[:, 0].sum() + (problem.size[first_unit, 1] - problem.size[first_unit, 0]).sum())
        norms = {(0, xid): float(4 - xid) for xid in range(4)}
        variances = {key: 100.0 if key[1:] == (1, first) else 1.0 for key in problem.row_variances}
        problem = replace(problem, budget=budget, router_norms=norms, row_variances=variances)
        high = [place for place, t in types_of(problem, RouterNorm().allocate(problem)).items() if Q3 in t.values()]
        assert high == [(0, 1)]


def test_rows_that_no_k_quant_fits_take_the_next_larger_option():
    # Levels 2, 3 and 4 all mean Q4_0 for rows of 352; gate and up follow the level.
    per_level = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 8: "Q8_0"}
    seen = set()
    for share in np.linspace(0, 1, 60):
        problem = pose(model((6, 6), down_cols=352), float(share))
        for types in types_of(problem, RouterNorm().allocate(problem)).values():
            assert types["gate"] == types["up"]
            assert types["down"].name == per_level[NOMINAL_BITS[types["gate"]]]
            seen.add(types["gate"])
    assert seen == {Q2, Q3, Q4, Q5, Q6, Q8}


def test_of_equal_bits_the_smaller_then_the_better_type():
    types = (QType.Q4_0, QType.IQ4_NL, Q4, QType.Q5_1, QType.Q5_0)
    problem = pose(model((4,), down_cols=352), 0.0, types=types)
    for found in types_of(problem, RouterNorm().allocate(problem)).values():
        assert found == {"gate": Q4, "up": Q4, "down": QType.IQ4_NL}
    problem = pose(model((4,)), 1.0, types=types)
    assert gate_types(problem) == ["Q5_0"] * 4


def test_types_the_user_fixed_stay_and_are_paid_for():
    fixed = {"blk.0.ffn_down_exps.weight": Q8, "blk.1.ffn_gate_exps.weight": Q2}
    problem = pose(model((5, 5)), 0.4, fixed=fixed)
    found = RouterNorm().allocate(problem)
    types = types_of(problem, found)
    assert all(t["down"] == Q8 for (bid, _), t in types.items() if bid == 0)
    assert all(t["gate"] == Q2 for (bid, _), t in types.items() if bid == 1)
    assert spent(problem, found) <= problem.budget
    assert {t["gate"] for (bid, _), t in types.items() if bid == 0} != {Q2}


def test_the_whole_range_is_feasible_and_nothing_below():
    for granularity in ("expert", "expert-shared"):
        for down_cols in (256, 352):
            least = pose(model((3, 2), down_cols), 0.0, granularity)
            assert spent(least, RouterNorm().allocate(least)) == least.budget
            most = pose(model((3, 2), down_cols), 1.0, granularity)
            assert spent(most, RouterNorm().allocate(most)) == most.budget
            with pytest.raises(BudgetError, match=rf"{least.budget - 1} .* {least.budget} bytes"):
                RouterNorm().allocate(replace(least, budget=least.budget - 1))


def test_stacks_have_no_order_of_experts():
    with pytest.raises(AlphaQError, match="orders the experts of a layer") as caught:
        RouterNorm().allocate(pose(model((4,)), granularity="stack"))
    assert "--granularity expert or expert-shared" in caught.value.hint


@pytest.mark.parametrize("scope", ["layer", "projection"])
def test_parts_of_a_model_are_ordered_alike(scope):
    problem = pose(model((6, 6)), 0.3)
    found = allocate_scope(RouterNorm(), problem, scope)
    assert spent(problem, found) <= problem.budget
    for bid in range(2):
        # Parts of equal shapes and shares get equal types, in one order.
        types = types_of(problem, found)
        assert all(len(set(types[bid, xid].values())) == 1 for xid in range(6))
        assert len({t for xid in range(6) for t in types[bid, xid].values()}) > 1


PROBLEMS = st.builds(
    pose,
    st.builds(model, st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), st.sampled_from([256, 352])),
    st.floats(0, 1),
    st.sampled_from(["expert", "expert-shared"]),
    st.integers(0, 999),
    st.sampled_from([None, (Q2, Q4, QType.Q4_0), (Q3, Q4, Q6, Q8), (Q2, Q3, Q5, QType.Q5_1, QType.Q5_0)]),
)


@given(PROBLEMS)
@settings(deadline=None, max_examples=80)
def test_the_budget_is_kept_and_less_is_left_than_an_expert_s_next_level_costs(problem):
    found = RouterNorm().allocate(problem)
    real = sum(
        matrices_bytes(unit.matrices, problem.qtypes[t]) for unit, t in zip(problem.units, found.choice, strict=True)
    )
    assert all(problem.allowed[u, t] for u, t in enumerate(found.choice))
    assert real <= problem.budget
    bits = [NOMINAL_BITS[q] for q in problem.qtypes]
    steps: dict[tuple[int, int | None], int] = defaultdict(int)
    at_top = True
    for u, unit in enumerate(problem.units):
        smallest: dict[int, int] = {}
        for t in np.flatnonzero(problem.allowed[u]):
            smallest[bits[t]] = min(int(problem.size[u, t]), smallest.get(bits[t], 10**12))
        sizes = [size for _, size in sorted(smallest.items())]
        steps[unit.bid, unit.xid] += max((b - a for a, b in pairwise(sizes)), default=0)
        at_top = at_top and bits[found.choice[u]] == max(smallest)
    assert at_top or problem.budget - real < max(steps.values())


@given(PROBLEMS, st.floats(0, 0.3))
@settings(deadline=None, max_examples=80)
def test_a_larger_budget_never_spends_less(problem, more):
    larger = replace(problem, budget=problem.budget + int(more * problem.budget))
    assert spent(larger, RouterNorm().allocate(larger)) >= spent(problem, RouterNorm().allocate(problem))


def test_every_budget_spends_at_least_what_one_byte_less_does():
    least, most = (pose(model((8, 3)), share, types=(Q2, Q3, Q4, Q5)) for share in (0.0, 1.0))
    before = 0
    for budget in range(least.budget, most.budget + 1, 7):
        found = RouterNorm().allocate(replace(least, budget=budget))
        assert before <= spent(least, found) <= budget
        before = spent(least, found)


@given(PROBLEMS, st.floats(0.3, 3))
@settings(deadline=None, max_examples=60)
def test_a_smaller_norm_never_gets_fewer_bits_unless_maxvar_moved_it(problem, spread):
    # Variances within a factor of three move nobody; a larger spread lets only those that it moves get ahead.
    variances = {key: value**spread for key, value in problem.row_variances.items()}
    problem = replace(problem, row_variances=variances)
    types = types_of(problem, RouterNorm().allocate(problem))
    for bid, a in types:
        for other, b in types:
            if other != bid or problem.router_norms[bid, a] >= problem.router_norms[bid, b]:
                continue
            size_of = {x: sum(bpw(q) for q in types[bid, x].values()) for x in (a, b)}
            gate = {
                x: variances[f"blk.{bid}.ffn_gate_exps.weight", x, "gate"] for x in {x for c, x in types if c == bid}
            }
            moved = any(3 * low < gate[b] for low in gate.values())
            assert size_of[a] >= size_of[b] or moved


@given(PROBLEMS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_permuting_experts_permutes_the_choice(problem, random):
    layers: dict[int, list[int]] = defaultdict(list)
    for bid, xid in problem.router_norms:
        layers[bid].append(xid)
    turned = {bid: dict(zip(xids, random.sample(xids, len(xids)), strict=True)) for bid, xids in layers.items()}
    bid_of = {f"blk.{bid}.ffn_{proj}_exps.weight": bid for bid in layers for proj in ("gate", "up", "down")}
    variances = {key: value**3 for key, value in problem.row_variances.items()}
    problem = replace(problem, row_variances=variances)
    permuted = replace(
        problem,
        router_norms={(bid, turned[bid][x]): value for (bid, x), value in problem.router_norms.items()},
        row_variances={(s, turned[bid_of[s]][x], p): value for (s, x, p), value in variances.items()},
    )
    before = types_of(problem, RouterNorm().allocate(problem))
    after = types_of(permuted, RouterNorm().allocate(permuted))
    assert {(bid, turned[bid][x]): t for (bid, x), t in before.items()} == after
