"""Divergences held against float64 arithmetic from the definitions, and rows of 16 bits against what they stand for."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.special import log_softmax, rel_entr
from scipy.stats import sem

from alphaq_gguf.evaluate.metrics import (
    HISTOGRAM_EDGES,
    TOKEN,
    compress,
    own_loss,
    row_words,
    scored,
    summarize,
    token_stats,
)

LOGITS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.floats(-60, 60, width=16))


def decode(rows: np.ndarray, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities float64 [n, n_vocab] and scales [n] of compressed rows, from their bytes."""
    parts = [struct.unpack(f"<2f{n_vocab}H", row.tobytes()[: 8 + 2 * n_vocab]) for row in rows]
    table = np.array(parts, np.float64)
    return table[:, :1] * table[:, 2:] + table[:, 1:2], table[:, 0]


def made_up(n: int, n_vocab: int, spread: float, noise: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Logits of a base and of a model near it, and true tokens."""
    draw = np.random.default_rng(seed)
    base = draw.normal(0, spread, (n, n_vocab)).astype(np.float32) + np.float32(12)
    model = base + draw.normal(0, noise, base.shape).astype(np.float32)
    return base, model, draw.integers(0, n_vocab, n)


@pytest.mark.parametrize(("n_vocab", "expected"), [(1, 6), (2, 6), (399, 404), (400, 404), (151936, 151940)])
def test_rows_have_an_even_number_of_codes(n_vocab: int, expected: int) -> None:
    assert row_words(n_vocab) == expected


@pytest.mark.parametrize(("n_ctx", "positions"), [(512, range(256, 511)), (5, range(2, 4)), (4, range(2, 3))])
def test_the_second_half_is_scored(n_ctx: int, positions: range) -> None:
    assert range(n_ctx)[scored(n_ctx)] == positions


@given(LOGITS)
def test_rows_hold_log_probabilities_to_half_a_step(logits: np.ndarray) -> None:
    n, n_vocab = logits.shape
    rows = compress(logits)
    assert rows.dtype == np.uint16
    assert rows.shape == (n, row_words(n_vocab))
    assert not rows[:, 4 + n_vocab :].any()
    exact = log_softmax(logits.astype(np.float64), axis=-1)
    found, scales = decode(rows, n_vocab)
    span = np.minimum(np.ptp(logits.astype(np.float64), axis=1), 16)
    np.testing.assert_allclose(scales, span / 65535, rtol=1e-6)
    expected = np.maximum(exact, exact.max(axis=-1, keepdims=True) - 16)
    assert (abs(found - expected) <= scales[:, None] / 2 + 1e-5).all()


@given(LOGITS, st.integers(0, 2**32 - 1))
def test_every_token_counts_as_the_definitions_say(logits: np.ndarray, seed: int) -> None:
    n, n_vocab = logits.shape
    draw = np.random.default_rng(seed)
    model = draw.normal(0, 8, logits.shape).astype(np.float32)
    targets = draw.integers(0, n_vocab, n)
    rows = compress(logits)
    stats = token_stats(model, rows, targets)
    log_base, _ = decode(rows, n_vocab)
    log_p = log_softmax(model.astype(np.float64), axis=-1)
    every = np.arange(n)
    np.testing.assert_allclose(stats["nll"], -log_p[every, targets], atol=2e-5)
    np.testing.assert_allclose(stats["nll_base"], -log_base[every, targets], atol=2e-5)
    np.testing.assert_allclose(stats["nll_base"], own_loss(rows, targets), atol=0)
    # What lies within rounding of the cut may fall on either side of it.
    terms = np.where(log_base > -16, np.exp(log_base) * (log_base - log_p), 0)
    doubt = np.where(abs(log_base + 16) < 1e-4, abs(np.exp(log_base) * (log_base - log_p)), 0)
    assert (abs(stats["kld"] - terms.sum(axis=-1)) <= doubt.sum(axis=-1) + 5e-5).all()
    best = log_base.max(axis=-1)
    clear = (log_base >= best[:, None] - 1e-5).sum(axis=-1) == 1
    same = log_base.argmax(axis=-1) == log_p.argmax(axis=-1)
    np.testing.assert_array_equal(stats["same_top"][clear], same[clear])


@pytest.mark.parametrize("n_vocab", [1000, 1001])
def test_divergence_is_that_of_the_uncompressed_models(n_vocab: int) -> None:
    base, model, targets = made_up(200, n_vocab, spread=3, noise=0.3)
    stats = token_stats(model, compress(base), targets)
    p, q = (log_softmax(logits.astype(np.float64), axis=-1) for logits in (base, model))
    expected = rel_entr(np.exp(p), np.exp(q)).sum(axis=-1)
    assert expected.min() > 1e-3
    np.testing.assert_allclose(stats["kld"], expected, rtol=5e-3)
    np.testing.assert_allclose(stats["kld"].mean(), expected.mean(), rtol=2e-4)
    np.testing.assert_array_equal(stats["same_top"], p.argmax(axis=-1) == q.argmax(axis=-1))


def test_base_probabilities_up_to_the_cut_count_nothing() -> None:
    # Two tokens of a half each; the third has exp(-15.4) or exp(-16.6) in the base, and hardly any in the model.
    model = np.array([[0, 0, -2000]], np.float32)
    for third, counts in ((-14.7, True), (-15.9, False)):
        kld = token_stats(model, compress(np.array([[0, 0, third]], np.float32)), np.array([0]))["kld"]
        log_p = third - np.log(2)
        term = np.exp(log_p) * (log_p + 2000 + np.log(2))
        assert term > 1e-4
        assert kld == pytest.approx(term if counts else 0, abs=5e-6)


def test_of_equally_likely_tokens_the_first_is_the_top() -> None:
    logits = np.array([[0, 3, 3, 1], [5, 5, 5, 5], [0, 1, 2, 3]], np.float32)
    tied = token_stats(logits, compress(logits), np.zeros(3, int))
    assert tied["same_top"].tolist() == [True, True, True]
    # Which of two tokens is ahead by less than half a step, 16 bits do not keep.
    near = np.array([[0, 2, 2.00001, -9]], np.float32)
    assert token_stats(near, compress(near), np.zeros(1, int))["same_top"].tolist() == [False]


def test_logits_that_are_no_numbers_show_in_the_rows() -> None:
    rows = compress(np.array([[0, 1, 2], [0, np.nan, 2]], np.float32))
    assert np.isfinite(rows[0, :4].view(np.float32)).all()
    assert np.isnan(rows[1, :4].view(np.float32)).all()


def test_summary_is_that_of_the_statistics_textbook() -> None:
    base, model, targets = made_up(1001, 50, spread=2, noise=0.5)
    stats = token_stats(model, compress(base), targets)
    perplexity, base_perplexity, found = summarize(stats)
    for estimate, losses in ((perplexity, stats["nll"]), (base_perplexity, stats["nll_base"])):
        assert estimate.value == pytest.approx(np.exp(losses.mean()))
        assert estimate.standard_error == pytest.approx(estimate.value * sem(losses))
    assert found.kld.value == pytest.approx(stats["kld"].mean())
    assert found.kld.standard_error == pytest.approx(sem(stats["kld"]))
    ordered = sorted(stats["kld"])
    assert (found.kld_median, found.kld_max) == pytest.approx((ordered[500], ordered[1000]))
    assert found.kld_p999 == pytest.approx(ordered[999])
    assert found.top1.value == pytest.approx(stats["same_top"].mean())
    assert found.top1.standard_error == pytest.approx(sem(stats["same_top"].astype(float)))
    squares = (np.exp(-stats["nll"]) - np.exp(-stats["nll_base"])) ** 2
    assert found.rms_dp.value == pytest.approx(np.sqrt(squares.mean()))
    # The error of a root: that of what is under it, times the root's slope.
    assert found.rms_dp.standard_error == pytest.approx(sem(squares) / (2 * np.sqrt(squares.mean())))
    counts, _ = np.histogram(np.log10(stats["kld"]), HISTOGRAM_EDGES)
    assert found.histogram == tuple(counts)
    assert counts.sum() == 1001


def test_quantiles_lie_between_neighbours() -> None:
    for klds in (np.linspace(0, 1, 1500) ** 3, np.array([0.25]), np.array([3.0, 1.0])):
        stats = np.zeros(len(klds), TOKEN)
        stats["kld"] = klds
        found = summarize(stats)[2]
        assert found.kld_p999 == pytest.approx(np.quantile(klds, 0.999), rel=1e-5)
        assert found.kld_median == pytest.approx(np.median(klds))


def test_the_outer_bins_are_open() -> None:
    stats = np.zeros(6, TOKEN)
    stats["kld"] = [-1e-5, 0, 1e-12, 200, 2e-8, 1]
    histogram = summarize(stats)[2].histogram
    assert len(histogram) == len(HISTOGRAM_EDGES) - 1 == 40
    # 1 is an edge: it belongs to what lies above.
    assert HISTOGRAM_EDGES[32] == 0
    assert (histogram[0], histogram[1], histogram[32], histogram[-1], sum(histogram)) == (3, 1, 1, 1, 6)


def test_few_tokens_and_broken_models_have_a_summary() -> None:
    stats = np.zeros(11, TOKEN)
    stats["nll"], stats["kld"], stats["same_top"] = np.arange(11) * 1e4, np.arange(11), True
    perplexity, base, found = summarize(stats)
    assert (perplexity.value, base.value, base.standard_error) == (np.inf, 1, 0)
    assert (found.top1.value, found.top1.standard_error) == (1, 0)
    assert found.kld.standard_error == pytest.approx(1)
    # llama-perplexity gives no error of ten tokens.
    assert summarize(stats[:10])[2].kld.standard_error == 0
    assert summarize(stats[:1])[2].rms_dp.value == 0
