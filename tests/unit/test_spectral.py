"""Spectra against singular values in float64, exponents against closed forms and loops written from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sources import gaussian

from alphaq_gguf.spectral import (
    ESTIMATORS,
    count_tiles,
    farms_spectrum,
    fit_alpha,
    full_spectrum,
    hill_alpha,
    hill_k,
    median_k,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def squared_singular_values(weight: np.ndarray) -> np.ndarray:
    """sigma^2 by an SVD in float64, ascending."""
    return np.sort(torch.linalg.svdvals(torch.from_numpy(weight).double()).numpy() ** 2)


def naive_tile_spectra(weight: np.ndarray) -> list[np.ndarray]:
    """sigma^2 of every whole 128 x 128 tile, by an SVD each."""
    return [
        squared_singular_values(weight[i : i + 128, j : j + 128])
        for i in range(0, weight.shape[0] - 127, 128)
        for j in range(0, weight.shape[1] - 127, 128)
    ]


def naive_alpha(esd: np.ndarray, k: int) -> float:
    """PL_Alpha_Hill written out: lambda_(n-i+1) over lambda_(n-k), one-based, i = 1..k."""
    n = len(esd)
    return 1 + k / sum(math.log(esd[n - i] / esd[n - k - 1]) for i in range(1, k + 1))


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0, 6.0])
def test_pareto_samples_give_back_their_density_exponent(exponent):
    # p(x) ~ x^-exponent for x >= 1: inverse of the survival function x^(1 - exponent).
    uniform = np.random.default_rng(int(exponent * 10)).random(200_000)
    esd = torch.from_numpy(np.sort(uniform ** (-1 / (exponent - 1))))
    fit = fit_alpha(esd)
    assert fit.k == 20_000
    # The estimator's standard deviation is (exponent - 1) / sqrt(k).
    assert fit.alpha == pytest.approx(exponent, abs=4 * (exponent - 1) / math.sqrt(fit.k))


@pytest.mark.parametrize(("n", "ratio"), [(100, 1.5), (40, 1.01), (2, 3.0), (11, 2.0)])
def test_a_geometric_spectrum_gives_the_closed_form(n, ratio):
    esd = torch.tensor([ratio**i for i in range(n)], dtype=torch.float64)
    for estimator in ("hill", "median"):
        fit = fit_alpha(esd, estimator)
        assert fit.alpha == pytest.approx(1 + 2 / ((fit.k + 1) * math.log(ratio)), rel=1e-9)


def test_hill_alpha_equals_the_formula_written_out():
    esd = np.sort(np.random.default_rng(1).lognormal(size=500))
    for k in (1, 10, 250, 499):
        assert hill_alpha(torch.from_numpy(esd), k) == pytest.approx(naive_alpha(esd, k), rel=1e-12)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 2), (10, 9), (11, 10), (50, 10), (109, 10), (110, 11), (1000, 100)])
def test_hill_k_is_a_tenth_at_least_ten_and_below_n(n, k):
    assert hill_k(n) == k


@given(st.integers(2, 10**6))
def test_tails_leave_an_eigenvalue_for_the_threshold(n):
    assert 1 <= hill_k(n) <= n - 1
    assert 1 <= median_k(n) <= n - 1


@pytest.mark.parametrize("shape", [(256, 384), (300, 400), (128, 128), (255, 129)])
def test_farms_spectrum_equals_an_svd_of_every_whole_tile(shape):
    weight = gaussian(*shape)
    spectra = naive_tile_spectra(weight)
    expected = np.sort(np.concatenate(spectra))
    esd = farms_spectrum(torch.from_numpy(weight))
    assert len(spectra) == count_tiles(*shape)
    assert esd.dtype == torch.float64
    np.testing.assert_allclose(esd.numpy(), expected, rtol=1e-9, atol=1e-11 * expected[-1])
    fit = fit_alpha(esd)
    assert fit.alpha == pytest.approx(naive_alpha(expected, fit.k), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_decomposed_in_double_precision(dtype):
    weight = torch.from_numpy(gaussian(128, 256)).to(dtype)
    expected = np.sort(np.concatenate(naive_tile_spectra(weight.float().numpy())))
    np.testing.assert_allclose(farms_spectrum(weight).numpy(), expected, rtol=1e-9, atol=1e-11 * expected[-1])


@pytest.mark.parametrize("shape", [(64, 200), (200, 64), (100, 100), (1, 7)])
def test_full_spectrum_equals_an_svd_of_the_matrix(shape):
    weight = gaussian(*shape)
    expected = squared_singular_values(weight)
    esd = full_spectrum(torch.from_numpy(weight))
    np.testing.assert_allclose(esd.numpy(), expected, rtol=1e-9, atol=1e-11 * expected[-1])


def test_gaussian_matrices_have_the_published_check_values():
    weight = torch.from_numpy(gaussian(1408, 2048))
    assert fit_alpha(farms_spectrum(weight)).alpha == pytest.approx(6.34, abs=0.05)
    assert fit_alpha(full_spectrum(weight)).alpha == pytest.approx(7.27, abs=0.1)


@given(seed=st.integers(0, 99), exponent=st.floats(-12, 12), estimator=st.sampled_from(sorted(ESTIMATORS)))
@settings(deadline=None, max_examples=30)
def test_scaling_a_matrix_leaves_alpha_unchanged(seed, exponent, estimator):
    weight = torch.from_numpy(gaussian(40, 60, seed=seed)).double()
    alpha = fit_alpha(full_spectrum(weight), estimator).alpha
    scaled = fit_alpha(full_spectrum(weight * 2.0 ** round(exponent)), estimator).alpha
    assert scaled == pytest.approx(alpha, rel=1e-9)
    if estimator != "ks-peak":  # histogram edges move by rounding, and a count with them
        assert fit_alpha(full_spectrum(weight * 10**exponent), estimator).alpha == pytest.approx(alpha, rel=1e-6)


@given(seed=st.integers(0, 99), rows=st.integers(2, 50), cols=st.integers(2, 50))
@settings(deadline=None, max_examples=30)
def test_transposing_leaves_the_full_spectrum_alpha_unchanged(seed, rows, cols):
    weight = torch.from_numpy(gaussian(rows, cols, seed=seed))
    alpha = fit_alpha(full_spectrum(weight)).alpha
    assert fit_alpha(full_spectrum(weight.T)).alpha == pytest.approx(alpha, rel=1e-6)


def test_a_sample_is_whole_tiles_without_repetition():
    weight = gaussian(640, 512)
    spectra = naive_tile_spectra(weight)
    esd = farms_spectrum(torch.from_numpy(weight), max_tiles=7, seed=3).numpy()
    assert len(esd) == 7 * 128

    def present(values: np.ndarray) -> bool:
        nearest = esd[np.clip(np.searchsorted(esd, values), 1, len(esd) - 1)[:, None] - [[1, 0]]]
        return bool((np.abs(nearest - values[:, None]).min(axis=1) <= 1e-10 * values[-1]).all())

    assert sum(present(spectrum) for spectrum in spectra) == 7


def test_a_sample_follows_its_seed():
    weight = torch.from_numpy(gaussian(512, 512))
    first, again, other = (farms_spectrum(weight, max_tiles=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    enough = farms_spectrum(weight, max_tiles=16, seed=1)
    assert torch.equal(enough, farms_spectrum(weight))


def test_a_sampled_alpha_lies_near_that_of_all_tiles():
    weight = torch.from_numpy(gaussian(1024, 1024))
    everything = fit_alpha(farms_spectrum(weight)).alpha
    for seed in range(4):
        assert fit_alpha(farms_spectrum(weight, max_tiles=16, seed=seed)).alpha == pytest.approx(everything, rel=0.05)


@pytest.mark.parametrize("threads", [2, 3, 100])
def test_threads_do_not_change_the_spectrum(threads):
    weight = torch.from_numpy(gaussian(384, 640))
    assert torch.equal(farms_spectrum(weight, threads=threads), farms_spectrum(weight))


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_the_median_estimator_takes_the_upper_half(n):
    esd = np.sort(np.random.default_rng(n).lognormal(size=n))
    fit = fit_alpha(torch.from_numpy(esd), "median")
    assert fit.k == n // 2
    assert fit.alpha == pytest.approx(naive_alpha(esd, n // 2), rel=1e-9)


def naive_ks_peak(esd: np.ndarray) -> tuple[int, float]:
    """(k, alpha) of least KS distance among thresholds from 0.95 to 1.5 times the histogram's peak."""
    logs = np.log10(esd)
    counts, edges = np.histogram(logs, bins=100, range=(logs[0], logs[-1]))
    peak = 10 ** edges[int(counts.argmax())]
    best = (math.inf, 0, 0.0)
    for first in range(len(esd) - 1):
        xmin = esd[first]
        if not 0.95 * peak <= xmin <= 1.5 * peak:
            continue
        k = len(esd) - 1 - first
        alpha = naive_alpha(esd, k)
        distance = max(abs(1 - (esd[first + 1 + i] / xmin) ** (1 - alpha) - i / k) for i in range(k))
        best = min(best, (distance, k, alpha))
    return best[1], best[2]


@pytest.mark.parametrize("seed", range(5))
def test_the_ks_peak_estimator_equals_a_loop_over_its_definition(seed):
    weight = gaussian(120, 150, seed=seed) * np.random.default_rng(seed).lognormal(size=(1, 150)).astype(np.float32)
    esd = full_spectrum(torch.from_numpy(weight))
    k, alpha = naive_ks_peak(esd.numpy())
    fit = fit_alpha(esd, "ks-peak")
    assert fit.k == k
    assert fit.alpha == pytest.approx(alpha, rel=1e-9)


def low_rank(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(256, rank, generator=generator) @ torch.randn(rank, 256, generator=generator)


def orthogonal(dtype: torch.dtype) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(256, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[
        0
    ].to(dtype)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize(
    ("weight", "problems"),
    [
        pytest.param(torch.zeros(256, 256), ("all-zero",), id="zero"),
        pytest.param(torch.full((256, 256), 0.3), ("rank-one", "rank-deficient", "no spread"), id="constant"),
        pytest.param(low_rank(1), ("rank-one", "rank-deficient"), id="rank-one"),
        pytest.param(low_rank(3), ("rank-deficient",), id="rank-three"),
        pytest.param(torch.eye(128), ("no spread",), id="identity"),
        pytest.param(torch.eye(256), ("no spread", "rank-deficient"), id="identity-of-several-tiles"),
    ],
)
def test_degenerate_matrices_have_a_named_problem_and_no_alpha(weight, problems, estimator):
    for spectrum in (farms_spectrum, full_spectrum):
        fit = fit_alpha(spectrum(weight), estimator)
        assert fit.alpha is None
        assert fit.problem.startswith(problems)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_orthogonal_matrix_has_no_spread(dtype, estimator):
    fit = fit_alpha(full_spectrum(orthogonal(dtype)), estimator)
    assert fit.alpha is None
    assert fit.problem.startswith("no spread")


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_a_vector_has_too_few_eigenvalues(shape, estimator):
    fit = fit_alpha(full_spectrum(torch.ones(shape)), estimator)
    assert fit.alpha is None
    assert fit.problem == "fewer than 2 eigenvalues"


@given(
    esd=st.lists(st.sampled_from([0.0, 1e-300, 1e-13, 0.5, 1.0, 1.0 + 1e-15, 2.0, 1e12]), min_size=0, max_size=40),
    estimator=st.sampled_from(sorted(ESTIMATORS)),
)
@settings(deadline=None, max_examples=150)
def test_any_spectrum_gives_a_finite_alpha_or_a_problem(esd, estimator):
    fit = fit_alpha(torch.tensor(sorted(esd), dtype=torch.float64), estimator)
    if fit.alpha is None:
        assert fit.problem
    else:
        assert not fit.problem
        assert 1 < fit.alpha < math.inf


@pytest.mark.parametrize("shape", [(127, 500), (500, 127), (1, 1)])
def test_a_side_under_128_has_no_tiles(shape):
    assert count_tiles(*shape) == 0
    with pytest.raises(ValueError, match="has no 128 x 128 tile"):
        farms_spectrum(torch.ones(shape))


def test_an_unknown_estimator_is_a_key_error():
    with pytest.raises(KeyError, match="best-guess"):
        fit_alpha(torch.arange(1.0, 9.0), "best-guess")
