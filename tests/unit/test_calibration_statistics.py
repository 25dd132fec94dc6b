"""Sums over tokens: plain loops, and what must not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaq_gguf.calibration.statistics import LayerSums, TokenSample

STACKS = ("blk.3.ffn_up_exps.weight", "blk.3.ffn_down_exps.weight")


def batch(seed: int, n_tokens: int, n_experts: int = 5, n_used: int = 2, n_cols: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(n_experts), (n_tokens, 1)), axis=1)
    gates, scores, activations = rng.random((3, n_tokens, n_used), dtype=np.float32)
    return {
        "chosen": order[:, :n_used].astype(np.int32),
        "gates": gates,
        "scores": scores,
        "activations": activations,
        "up": rng.standard_normal((n_tokens, n_cols), dtype=np.float32),
        "down": rng.standard_normal((n_tokens, n_used, n_cols + 1), dtype=np.float32),
    }


def add(sums: LayerSums, dataset: int, tokens: dict[str, np.ndarray]) -> LayerSums:
    sums.add_tokens(dataset, *(tokens[name] for name in ("chosen", "gates", "scores", "activations")))
    sums.add_inputs(STACKS[0], tokens["chosen"], tokens["up"])
    sums.add_inputs(STACKS[1], tokens["chosen"], tokens["down"])
    return sums


def assert_same(found: LayerSums, expected: LayerSums) -> None:
    assert found.arrays().keys() == expected.arrays().keys()
    for name, values in expected.arrays().items():
        np.testing.assert_allclose(found.arrays()[name], values, rtol=1e-12, atol=0, err_msg=name)


def test_sums_are_those_of_plain_loops():
    sums = LayerSums(2, 5)
    expected = {name: np.zeros((2, 5)) for name in vars(sums.usage)}
    up, down, counts = np.zeros((5, 7)), np.zeros((5, 8)), np.zeros(5)
    for dataset, seed, n_tokens in ((0, 1, 40), (1, 2, 9), (0, 3, 1)):
        tokens = batch(seed, n_tokens)
        add(sums, dataset, tokens)
        for t in range(n_tokens):
            for k in range(2):
                expert = tokens["chosen"][t, k]
                gate, score, mean = (float(tokens[name][t, k]) for name in ("gates", "scores", "activations"))
                for name, value in {
                    "tokens": 1,
                    "gates": gate,
                    "squared_gates": gate * gate,
                    "scores": score,
                    "activations": mean,
                    "significance": gate * mean,
                }.items():
                    expected[name][dataset, expert] += value
                up[expert] += [float(v) ** 2 for v in tokens["up"][t]]
                down[expert] += [float(v) ** 2 for v in tokens["down"][t, k]]
                counts[expert] += 1
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(sums.usage, name), values, rtol=1e-12, err_msg=name)
    for stack, values in zip(STACKS, (up, down), strict=True):
        assert sums.moments[stack].sums.dtype == np.float32
        np.testing.assert_allclose(sums.moments[stack].sums, values, rtol=1e-6)
        assert (sums.moments[stack].counts == counts).all()


def test_many_small_squares_do_not_vanish_beside_a_large_sum():
    # In float32 a million ones added to 2^25 one by one leave it as it is.
    sums = LayerSums(1, 1)
    sums.add_inputs("stack", np.zeros((1, 1), int), np.full((1, 1), 2.0**12.5, np.float32))
    sums.add_inputs("stack", np.zeros((1 << 20, 1), int), np.ones((1 << 20, 1), np.float32))
    assert sums.moments["stack"].sums[0, 0] == pytest.approx(2**25 + 2**20, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(0, 30), st.randoms(use_true_random=False))
def test_the_order_of_tokens_is_irrelevant(seed, n_tokens, random):
    tokens = batch(seed, n_tokens)
    random.shuffle(order := list(range(n_tokens)))
    shuffled = {name: values[np.array(order, dtype=int)] for name, values in tokens.items()}
    assert_same(add(LayerSums(1, 5), 0, shuffled), add(LayerSums(1, 5), 0, tokens))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12)), max_size=4), st.integers(0, 4))
def test_merging_is_adding(batches, cut):
    together, first, second = LayerSums(2, 5), LayerSums(2, 5), LayerSums(2, 5)
    for i, (dataset, n_tokens) in enumerate(batches):
        add(together, dataset, batch(i, n_tokens))
        add(first if i < cut else second, dataset, batch(i, n_tokens))
    unchanged = LayerSums.from_arrays(second.arrays())
    first.merge(second)
    assert_same(first, together)
    # What was merged in is not tied to it.
    add(first, 0, batch(9, 3))
    assert_same(second, unchanged)


def test_sums_survive_an_npz_and_go_on(tmp_path: Path):
    sums = add(LayerSums(2, 5), 1, batch(0, 20))
    np.savez(tmp_path / "sums.npz", allow_pickle=False, **sums.arrays())
    with np.load(tmp_path / "sums.npz") as arrays:
        resumed = LayerSums.from_arrays(arrays)
    assert resumed.n_experts == 5
    assert_same(add(resumed, 0, batch(1, 7)), add(sums, 0, batch(1, 7)))


def test_what_is_not_finite_is_noticed():
    tokens = batch(0, 4)
    assert add(LayerSums(1, 5), 0, tokens).is_finite
    tokens["down"][2, 1, 3] = np.nan
    assert not add(LayerSums(1, 5), 0, tokens).is_finite
    tokens["down"][2, 1, 3] = 0
    tokens["gates"][0, 0] = np.inf
    assert not add(LayerSums(1, 5), 0, tokens).is_finite


@pytest.mark.parametrize(
    "change",
    [
        {"chosen": np.zeros(4, int)},
        {"chosen": np.zeros((4, 2))},
        {"chosen": np.full((4, 2), 5)},
        {"chosen": np.full((4, 2), -1)},
        {"gates": np.ones((4, 1))},
        {"scores": np.ones((3, 2))},
        {"activations": np.ones(8)},
        {"up": np.ones((3, 7))},
        {"down": np.ones((4, 3, 8))},
    ],
)
def test_wrong_shapes_are_errors(change):
    with pytest.raises(ValueError, match=r"expected|inputs|experts"):
        add(LayerSums(1, 5), 0, {**batch(0, 4), **change})


def test_sums_of_other_shapes_do_not_mix():
    sums = add(LayerSums(1, 5), 0, batch(0, 4))
    with pytest.raises(ValueError, match="expected inputs of 7 columns, found 6"):
        sums.add_inputs(STACKS[0], np.zeros((1, 1), int), np.ones((1, 6)))
    for other in (add(LayerSums(1, 5), 0, batch(0, 4, n_cols=6)), LayerSums(2, 5), LayerSums(1, 4)):
        with pytest.raises(ValueError, match="expected shape"):
            sums.merge(other)


def test_a_sample_has_as_many_tokens_everywhere():
    inputs, chosen, gates = np.ones((3, 4), np.float32), np.zeros((3, 2), int), np.ones((3, 2), np.float32)
    assert TokenSample(inputs, chosen, gates, 0.5).share == 0.5
    for wrong in ((inputs[:2], chosen, gates), (inputs, chosen, gates[:, :1]), (inputs, chosen[0], gates[0])):
        with pytest.raises(ValueError, match="expected"):
            TokenSample(*wrong, 0.5)
