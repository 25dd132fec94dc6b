"""What one type per stack costs: planted cases with a known loss, and none where experts do not differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaq_gguf.budget import AllocationSettings, make_problem, make_units, matrices_bytes
from alphaq_gguf.checkpoint import ExpertStack
from alphaq_gguf.measurements import Distortion, key_of
from alphaq_gguf.qtypes import QType
from alphaq_gguf.stacking import stacking_loss
from alphaq_gguf.strategies import Problem

Q2, Q4 = QType.Q2_K, QType.Q4_K
SETTINGS = AllocationSettings(bpw=1.0, types=(Q2, Q4))


def stack(bid: int, n_experts: int, proj: str = "gate") -> ExpertStack:
    return ExpertStack(f"blk.{bid}.ffn_{proj}_exps.weight", bid, proj, n_experts, 256, 256)


def signals(stacks: list[ExpertStack], errors: dict[tuple[int, int], float]) -> Problem:
    """Q2_K costs an expert what `errors` says by (layer, expert), Q4_K a tenth of it."""
    units = make_units(stacks, {}, SETTINGS.types)
    problem = make_problem(units, SETTINGS, 1)
    for s in stacks:
        for m in s.matrices:
            error = errors[m.bid, m.xid]
            problem.distortions[key_of(m), Q2] = Distortion(error, 0.0)
            problem.distortions[key_of(m), Q4] = Distortion(error / 10, 0.0)
    return problem


def loss(stacks: list[ExpertStack], errors: dict[tuple[int, int], float], spent: dict[int, int]):
    problem = signals(stacks, errors)
    weights = {key_of(m): 1.0 for s in stacks for m in s.matrices}
    return stacking_loss(stacks, {}, SETTINGS, problem, weights, spent)


def expert_bytes(qtype: QType) -> int:
    return matrices_bytes(stack(0, 1).matrices, qtype)


def test_a_planted_loss_is_found() -> None:
    # One important expert in each of two stacks; bytes for two experts at Q4_K and two at Q2_K.
    stacks = [stack(0, 2), stack(1, 2)]
    errors = {(0, 0): 100.0, (0, 1): 1.0, (1, 0): 100.0, (1, 1): 1.0}
    each = expert_bytes(Q2) + expert_bytes(Q4)
    found = loss(stacks, errors, {0: each, 1: each})
    assert found is not None
    # Per expert both important ones get Q4_K; per stack one whole stack does; uniform nobody.
    assert found.total.per_expert == pytest.approx(10 + 1 + 10 + 1)
    assert found.total.per_stack == pytest.approx(10.1 + 101)
    assert found.total.uniform == pytest.approx(202)
    assert found.total.kept == pytest.approx((202 - 111.1) / (202 - 22))
    # Within a layer there are bytes for one expert at Q4_K, which no stack can use.
    assert [(layer.per_expert, layer.per_stack, layer.kept) for layer in found.layers.values()] == [
        (pytest.approx(11), pytest.approx(101), pytest.approx(0)),
        (pytest.approx(11), pytest.approx(101), pytest.approx(0)),
    ]


def test_experts_that_do_not_differ_lose_nothing() -> None:
    stacks = [stack(bid, 4) for bid in range(3)]
    errors = {(bid, xid): 5.0 for bid in range(3) for xid in range(4)}
    low, high = 4 * expert_bytes(Q2), 4 * expert_bytes(Q4)
    found = loss(stacks, errors, {0: low, 1: high, 2: high})
    assert found is not None
    assert found.total.per_expert == found.total.per_stack == pytest.approx(4 * 5 + 8 * 0.5)
    assert found.total.kept == pytest.approx(1)
    assert all(layer.per_expert == layer.per_stack for layer in found.layers.values())


def test_bytes_that_no_allocation_by_stacks_fits_give_no_comparison() -> None:
    assert loss([stack(0, 2)], {(0, 0): 1.0, (0, 1): 1.0}, {0: expert_bytes(Q2)}) is None


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_best_per_expert_is_never_worse_than_the_best_per_stack(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    stacks = [stack(bid, 3, proj) for bid in range(2) for proj in ("gate", "up", "down")]
    errors = {(bid, xid): float(rng.exponential()) for bid in range(2) for xid in range(3)}
    low, high = 9 * expert_bytes(Q2), 9 * expert_bytes(Q4)
    spent = {bid: int(low + share * (high - low)) for bid in range(2)}
    found = loss(stacks, errors, spent)
    assert found is not None
    for losses in (found.total, *found.layers.values()):
        assert losses.per_expert <= losses.per_stack
        assert losses.uniform is not None
        assert losses.per_stack <= losses.uniform
        assert losses.kept is None or 0 <= losses.kept <= 1
