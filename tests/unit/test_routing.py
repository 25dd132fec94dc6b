"""Simulated routing: closed forms, permutations, and what files must hold to be simulated."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from small_sources import expert_tensors, gaussian

from alphaq_gguf.arch.routers import Gating
from alphaq_gguf.checkpoint import ExpertMatrix, Source, open_source
from alphaq_gguf.errors import SourceError
from alphaq_gguf.measurements import Distortion, key_of
from alphaq_gguf.qtypes import QType, row_bytes
from alphaq_gguf.routing import Mass, Router, read_routers, route, simulate
from alphaq_gguf.strategies import Problem, Unit
from alphaq_gguf.strategies.base import MASS_FLOOR
from alphaq_gguf.strategies.sim_routing import SimRouting

WIDTH = 4096
N = 1 << 14


def router(weights: np.ndarray, n_used: int = 1, **changes: Any) -> Router:
    return replace(Router(weights.astype(np.float32), np.ones(weights.shape[1], np.float32), n_used), **changes)


def error(share: float, n_vectors: int = N) -> float:
    """Five standard errors of a share."""
    return 5 * math.sqrt(share * (1 - share) / n_vectors)


def test_orthogonal_rows_of_one_length_share_the_vectors():
    mass = simulate(router(np.eye(8, WIDTH), 3), N)
    assert mass.count == pytest.approx(np.full(8, 3 / 8), abs=error(3 / 8))


def test_a_bias_moves_vectors_as_the_normal_distribution_says():
    # Logits differ by N(0.5, 2 x 0.7^2); so high a width makes unit-RMS vectors Gaussian in two directions.
    mass = simulate(router(0.7 * np.eye(2, WIDTH), bias=np.array([0.5, 0], np.float32)), N)
    share = float(norm.cdf(0.5 / (0.7 * math.sqrt(2))))
    assert mass.count == pytest.approx([share, 1 - share], abs=error(share))


@pytest.mark.parametrize("where", ["weights", "norm"])
def test_a_row_that_drowns_the_others_is_chosen_for_every_second_vector(where):
    weights, scale = np.eye(5, WIDTH), np.ones(WIDTH, np.float32)
    if where == "weights":
        weights[3] *= 1e4
    else:
        scale[3] = 1e4
    mass = simulate(router(weights, norm=scale), N)
    expected = np.array([1, 1, 1, 4, 1]) / 8
    assert np.abs(mass.count - expected).max() < error(0.5)


def test_a_selection_bias_chooses_an_expert_without_changing_its_gate_weight():
    bias = np.array([9, 0, -9, 0], np.float32)
    mass = simulate(router(np.zeros((4, WIDTH)), 2, gating=Gating.SIGMOID, selection_bias=bias, scale=3.0), 100)
    assert (mass.count[0], mass.count[2]) == (1, 0)
    assert mass.gate2[0] == pytest.approx((3 * 0.5) ** 2)


def test_groups_rank_by_the_sum_of_their_best_two():
    # The best expert of all is in the first group, the better pair in the second.
    logits = np.array([3, -9, -9, 2, 1, 2.5], np.float32)
    grouped = router(
        np.zeros((6, WIDTH)), 2, gating=Gating.SIGMOID, bias=logits, n_groups=2, n_groups_used=1, normalise=True
    )
    assert list(simulate(grouped, 10).count) == [0, 0, 0, 1, 0, 1]
    assert list(simulate(replace(grouped, n_groups=1), 10).count) == [1, 0, 0, 0, 0, 1]
    third, last = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-2.5))
    assert simulate(grouped, 10).gate2[[3, 5]] == pytest.approx([(g / (third + last)) ** 2 for g in (third, last)])


@pytest.mark.parametrize(
    ("gating", "gates"),
    [
        (Gating.SOFTMAX, [0.6, 0.3]),
        (Gating.SOFTMAX_OF_CHOSEN, [2 / 3, 1 / 3]),
        (Gating.SIGMOID, [6 / 7, 3 / 4]),
        (Gating.SQRT_SOFTPLUS, [math.sqrt(math.log(7)), math.sqrt(math.log(4))]),
    ],
)
def test_gate_weights_by_hand(gating, gates):
    fixed = router(np.zeros((3, 8)), 2, gating=gating, bias=np.log([6, 1, 3]).astype(np.float32))
    assert simulate(fixed, 10).gate2 == pytest.approx([gates[0] ** 2, 0, gates[1] ** 2])
    normalised = [gate / sum(gates) for gate in gates]
    assert simulate(replace(fixed, normalise=True, scale=2.5), 10).gate2[[0, 2]] == pytest.approx(
        [(2.5 * gate) ** 2 for gate in normalised]
    )


@pytest.mark.parametrize(
    ("gating", "scores"),
    [(Gating.SOFTMAX, [0.6, 0.3]), (Gating.SOFTMAX_OF_CHOSEN, [2 / 3, 1 / 3]), (Gating.SIGMOID, [6 / 7, 3 / 4])],
)
def test_scores_are_gate_weights_before_they_are_renormalised_and_scaled(gating, scores):
    fixed = router(np.eye(3, 8), 2, gating=gating, bias=np.log([6, 1, 3]).astype(np.float32), normalise=True, scale=2.5)
    found = route(fixed, np.zeros((4, 8)))
    by_expert = np.zeros((4, 3))
    np.put_along_axis(by_expert, found.chosen, found.scores, axis=1)
    assert by_expert == pytest.approx(np.tile([scores[0], 0, scores[1]], (4, 1)))
    assert found.gates == pytest.approx(2.5 * found.scores / sum(scores))


def test_gate_weights_are_not_divided_by_less_than_llama_cpp_divides_by():
    faint = router(np.zeros((2, 8)), gating=Gating.SIGMOID, normalise=True, bias=np.array([-12, -13], np.float32))
    assert simulate(faint, 10).gate2[0] == pytest.approx((2**14 / (1 + math.exp(12))) ** 2)


def test_a_norm_with_a_bias_adds_it_to_every_vector():
    weights = 0.7 * np.eye(2, WIDTH)
    shifted = router(weights, norm_bias=np.eye(1, WIDTH, dtype=np.float32)[0])
    biased = router(weights, bias=np.array([0.7, 0], np.float32))
    assert simulate(shifted, N).count == pytest.approx(simulate(biased, N).count)


def explicit(router: Router, n_vectors: int, seed: int) -> Mass:
    """The definition, with vectors of full width."""
    n_experts, width = router.weights.shape
    vectors = np.random.default_rng(seed).standard_normal((n_vectors, width))
    vectors /= np.sqrt((vectors**2).mean(axis=1, keepdims=True))
    gates = np.zeros((n_vectors, n_experts))
    chosen, weights, _ = route(router, vectors * router.norm)
    np.put_along_axis(gates, chosen, weights, axis=1)
    return Mass((gates > 0).mean(axis=0), (gates**2).mean(axis=0))


# Narrow ones, where the length of a vector matters, and more experts than dimensions.
@pytest.mark.parametrize(("n_experts", "width"), [(8, 64), (6, 7), (12, 5), (4, 4)])
@pytest.mark.parametrize("gating", [Gating.SOFTMAX, Gating.SIGMOID])
def test_logits_drawn_directly_are_those_of_vectors(n_experts, width, gating):
    weights = gaussian(n_experts, width, seed=width, scale=1 / math.sqrt(width))
    changes = {"norm": np.linspace(0.5, 2, width, dtype=np.float32), "bias": gaussian(n_experts, scale=0.3)}
    one = router(weights, 3, gating=gating, **changes)
    found, expected = simulate(one, 2 * N), explicit(one, 2 * N, seed=1)
    # Both are samples.
    assert np.abs(found.count - expected.count).max() < math.sqrt(2) * error(0.5, 2 * N)
    assert found.gate2 == pytest.approx(expected.gate2, abs=math.sqrt(2) * error(0.5, 2 * N) * expected.gate2.max())


def test_vectors_of_two_dimensions_have_a_fixed_length():
    # Of a unit-RMS vector (x, y) on the circle of radius sqrt(2), |x| > 1 for half of them: x > 1 for a quarter.
    assert simulate(router(np.array([[1, 0], [0, 0]]), bias=np.array([-1, 0], np.float32)), N).count == pytest.approx(
        [0.25, 0.75], abs=error(0.25)
    )


@st.composite
def routers(draw: st.DrawFn) -> Router:
    n_groups = draw(st.integers(1, 3))
    n_experts = n_groups * draw(st.integers(2, 4))
    used = draw(st.integers(1, n_groups))
    n_used = draw(st.integers(1, n_experts // n_groups * used))
    seed = draw(st.integers(0, 2**31))
    gating = draw(st.sampled_from(Gating)) if n_groups == 1 else draw(st.sampled_from([Gating.SOFTMAX, Gating.SIGMOID]))
    return router(
        gaussian(n_experts, 12, seed=seed, scale=0.3),
        n_used,
        gating=gating,
        normalise=draw(st.booleans()),
        norm=1 + gaussian(12, seed=seed + 1, scale=0.2),
        n_groups=n_groups,
        n_groups_used=used,
        bias=gaussian(n_experts, seed=seed + 2) if draw(st.booleans()) else None,
        selection_bias=gaussian(n_experts, seed=seed + 3, scale=0.1) if draw(st.booleans()) else None,
    )


@settings(deadline=None, max_examples=40)
@given(routers(), st.integers(0, 5))
def test_counts_sum_to_the_number_of_experts_used(router, seed):
    mass = simulate(router, 100, seed)
    assert mass.count.sum() == pytest.approx(router.n_used)
    assert ((mass.count >= 0) & (mass.count <= 1)).all()
    assert ((mass.gate2 > 0) == (mass.count > 0)).all()


@settings(deadline=None, max_examples=40)
@given(routers(), st.randoms(use_true_random=False))
def test_permuting_experts_permutes_masses(one, random):
    # Groups move as a whole, experts within them.
    order = np.arange(len(one.weights)).reshape(one.n_groups, -1)
    random.shuffle(rows := [list(group) for group in order])
    for row in rows:
        random.shuffle(row)
    order = np.array(rows).ravel()
    permuted = {name: None if (v := getattr(one, name)) is None else v[order] for name in ("bias", "selection_bias")}
    other = replace(one, weights=one.weights[order], **permuted)
    before, after = explicit(one, 500, 0), explicit(other, 500, 0)
    assert after.count == pytest.approx(before.count[order])
    assert after.gate2 == pytest.approx(before.gate2[order])
    n = 1 << 13
    assert np.abs(simulate(other, n).count - simulate(one, n).count[order]).max() < math.sqrt(2) * error(0.5, n)


def test_the_same_seed_gives_the_same_masses():
    one = router(gaussian(8, 32), 2)
    assert (simulate(one, 9000, 3).count == simulate(one, 9000, 3).count).all()
    assert (simulate(one, 9000, 3).count != simulate(one, 9000, 4).count).any()


METADATA = {"expert_used_count": 2}


def moe_source(
    path: Path, metadata: dict[str, Any] = METADATA, *, architecture: str = "newmoe", **changes: Any
) -> Source:
    """A layer with 4 experts; `changes` replace or (None) drop tensors, `__` standing for a dot."""
    tensors = {**expert_tensors(4), "blk.0.ffn_norm.weight": np.linspace(0.5, 2, 256, dtype=np.float32)}
    tensors |= {f"blk.0.{name.replace('__', '.')}": tensor for name, tensor in changes.items()}
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        if tensor is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_source(path)


def test_an_unknown_architecture_is_a_softmax_and_the_best_few(tmp_path):
    source = moe_source(tmp_path / "m.gguf")
    (found,) = read_routers(source).values()
    assert (found.weights == expert_tensors(4)["blk.0.ffn_gate_inp.weight"]).all()
    assert (found.norm == np.linspace(0.5, 2, 256, dtype=np.float32)).all()
    assert (found.gating, found.n_used, found.normalise, found.scale) == (Gating.SOFTMAX, 2, False, 1.0)
    assert found.bias is found.selection_bias is found.norm_bias is None


def test_metadata_and_optional_tensors_are_read(tmp_path):
    metadata = {
        "expert_used_count": [2, 3],
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "expert_group_count": 2,
        "expert_group_used_count": 1,
    }
    rows: dict[str, Any] = {
        name: gaussian(size, seed=i)
        for i, (name, size) in enumerate(
            [("ffn_gate_inp__bias", 4), ("exp_probs_b__bias", 4), ("post_attention_norm__weight", 256)]
        )
    }
    rows["post_attention_norm__bias"] = gaussian(256)
    source = moe_source(tmp_path / "m.gguf", metadata, ffn_norm__weight=None, **rows)
    (found,) = read_routers(source).values()
    assert (found.gating, found.normalise, found.scale, found.n_used) == (Gating.SIGMOID, True, 2.5, 2)
    assert (found.n_groups, found.n_groups_used) == (2, 1)
    for value, name in [
        (found.bias, "ffn_gate_inp__bias"),
        (found.selection_bias, "exp_probs_b__bias"),
        (found.norm, "post_attention_norm__weight"),
        (found.norm_bias, "post_attention_norm__bias"),
    ]:
        assert value is not None
        assert (value == rows[name]).all()


def test_llama_cpp_overrules_metadata_where_it_does_not_read_it(tmp_path):
    metadata = {**METADATA, "expert_gating_func": 2, "expert_weights_norm": True}
    (found,) = read_routers(moe_source(tmp_path / "m.gguf", metadata, architecture="qwen2moe")).values()
    assert (found.gating, found.normalise) == (Gating.SOFTMAX, False)


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        (METADATA, {"ffn_gate_inp__weight": None}, r"blk\.0\.ffn_gate_inp\.weight: expected \[4, any\], found no such"),
        (METADATA, {"ffn_gate_inp__weight": gaussian(5, 256)}, r"expected \[4, any\], found shape \[5, 256\]"),
        (METADATA, {"ffn_gate_inp__weight": gaussian(2, 4, 256)}, r"found shape \[2, 4, 256\]"),
        (METADATA, {"ffn_norm__weight": None}, r"blk\.0\.ffn_norm\.weight: expected \[256\], found no such tensor"),
        (METADATA, {"exp_probs_b__bias": gaussian(3)}, r"exp_probs_b\.bias: expected \[4\], found shape \[3\]"),
        ({}, {}, "layer 0 cannot choose 0 of 4 experts"),
        ({"expert_used_count": 5}, {}, "layer 0 cannot choose 5 of 4 experts"),
        ({**METADATA, "expert_group_count": 3}, {}, "2 of 4 experts from 1 of 3 groups"),
        ({**METADATA, "expert_group_count": 4}, {}, "2 of 4 experts from 1 of 4 groups"),
        ({"expert_used_count": 3, "expert_group_count": 2}, {}, "3 of 4 experts from 1 of 2 groups"),
        ({**METADATA, "expert_gating_func": 7}, {}, "expert_gating_func is 7, expected 1 to 4"),
    ],
)
def test_what_cannot_be_simulated_is_an_error(tmp_path, metadata, changes, message):
    source = moe_source(tmp_path / "m.gguf", metadata, **changes)
    with pytest.raises(SourceError, match=message):
        read_routers(source)


def test_an_architecture_that_routes_otherwise_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="residual stream"):
        read_routers(moe_source(tmp_path / "m.gguf", architecture="smallthinker"))


def problem(masses: list[float], budget: int) -> Problem:
    """One layer of experts with one matrix each, a unit each, all equally hard to encode."""
    qtypes = (QType.Q2_K, QType.Q6_K)
    matrices = [ExpertMatrix("stack", 0, xid, "down", 0, 1, 256) for xid in range(len(masses))]
    units = tuple(Unit(f"{m.xid}", 0, "down", 256, (m,), qtypes, xid=m.xid) for m in matrices)
    size = np.array([[row_bytes(qtype, 256) for qtype in qtypes]] * len(masses))
    errors = dict(zip(qtypes, (1.0, 0.1), strict=True))
    return Problem(
        units,
        qtypes,
        size,
        np.ones(size.shape, dtype=bool),
        budget,
        distortions={(key_of(m), qtype): Distortion(errors[qtype], 0) for m in matrices for qtype in qtypes},
        masses={(0, xid): mass for xid, mass in enumerate(masses)},
    )


def test_experts_that_are_used_most_get_the_bits():
    small, large = (row_bytes(qtype, 256) for qtype in (QType.Q2_K, QType.Q6_K))
    found = SimRouting().allocate(problem([0.1, 0.9, 0.3, 0.7], 2 * small + 2 * large))
    assert list(found.choice) == [0, 1, 0, 1]
    assert found.cost == pytest.approx(0.1 + 0.3 + 0.1 * (0.9 + 0.7))


def test_an_expert_that_no_vector_reached_still_costs():
    small, large = (row_bytes(qtype, 256) for qtype in (QType.Q2_K, QType.Q6_K))
    found = SimRouting().allocate(problem([0.0, 0.5, 0.5], small + 2 * large))
    assert list(found.choice) == [0, 1, 1]
    assert found.cost == pytest.approx(MASS_FLOOR / 3 + 0.1 * (0.5 + 0.5))
    # With bytes to spare it gets them.
    assert list(SimRouting().allocate(problem([0.0, 0.5, 0.5], 3 * large)).choice) == [1, 1, 1]
