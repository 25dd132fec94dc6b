"""Empirical spectral densities (ESD) of weight matrices and power-law exponents fitted to their tails.

Method: AlphaQ (arXiv 2606.04980), which fits PL_Alpha_Hill to spectra sampled as in FARMS: 128 x 128
tiles, so that the exponent does not depend on the matrix' aspect ratio. Tensors in, numbers out.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

TILE = 128
SAMPLED_TILES = 256
# Tiles decomposed per batch: bounds memory (64 tiles = 8 MiB in float64) and keeps all threads busy.
_BATCH = 64
# A tail whose threshold lies this far under the largest eigenvalue is rounding noise, not a spectrum.
_RANK_TOLERANCE = 1e-12
# Eigenvalues closer than this are equal but for the rounding of float32 weights.
_SPREAD_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fit:
    """A fitted tail: exponent `alpha` (None when `problem` says why there is none), `k` tail eigenvalues of `n`."""

    alpha: float | None
    k: int
    n: int
    xmin: float
    problem: str = ""


def count_tiles(n_rows: int, n_cols: int) -> int:
    """Whole 128 x 128 tiles in a matrix; 0 when a side is shorter, and the full spectrum is used."""
    return (n_rows // TILE) * (n_cols // TILE)


def full_spectrum(weight: torch.Tensor) -> torch.Tensor:
    """ESD of `weight` [n_rows, n_cols]: lambda = sigma^2, ascending, float64 [min(n_rows, n_cols)].

    From the Gram matrix of the shorter side in float64.
    """
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    wide = wide.to(torch.float64)
    return torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0)


def farms_spectrum(weight: torch.Tensor, max_tiles: int | None = None, seed: int = 0, threads: int = 1) -> torch.Tensor:
    """Pooled ESD of the 128 x 128 tiles of `weight` [n_rows, n_cols], ascending, float64 [128 x tiles].

    Stride 128, remainders dropped (FARMS as AlphaQ uses it). With more than `max_tiles` tiles that
    many are drawn without replacement from `seed`. ValueError when a side is under 128.
    """
    tall, wide = weight.shape[0] // TILE, weight.shape[1] // TILE
    if not tall * wide:
        raise ValueError(f"a {weight.shape[0]} x {weight.shape[1]} matrix has no {TILE} x {TILE} tile")
    tiles = weight[: tall * TILE, : wide * TILE].reshape(tall, TILE, wide, TILE).transpose(1, 2)
    tiles = tiles.reshape(-1, TILE, TILE)
    if max_tiles is not None and len(tiles) > max_tiles:
        order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(seed))[:max_tiles]
        tiles = tiles[order.sort().values.to(tiles.device)]

    def decompose(batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(torch.float64)
        return torch.linalg.eigvalsh(batch @ batch.mT)

    batches = tiles.split(_BATCH)
    if threads > 1 and weight.device.type == "cpu" and len(tiles) > 1:
        # One LAPACK call a tile: parallel over batches, because threads inside such small calls only cost.
        step = max(1, min(_BATCH, -(-len(tiles) // threads)))
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            spectra = list(pool.map(decompose, tiles.split(step)))
    else:
        spectra = [decompose(batch) for batch in batches]
    return torch.cat([s.flatten() for s in spectra]).sort().values.clamp_min(0)


def hill_alpha(esd: torch.Tensor, k: int) -> float:
    """alpha = 1 + k / sum_{i=1..k} ln(lambda_(n-i+1) / lambda_(n-k)), lambda ascending (AlphaQ, A.2)."""
    n = len(esd)
    return 1 + k / float(torch.log(esd[n - k :] / esd[n - k - 1]).sum())


def hill_k(n: int) -> int:
    """AlphaQ's tail: a tenth of the eigenvalues, at least 10, clamped to [1, n - 1]."""
    return max(1, min(max(10, n // 10), n - 1))


def median_k(n: int) -> int:
    """TempBalance's tail (arXiv 2312.00359): the upper half of the eigenvalues."""
    return max(1, n // 2)


def ks_peak_k(esd: torch.Tensor) -> int:
    """The tail of AlphaPruning and FARMS: least Kolmogorov-Smirnov distance with xmin near the histogram's peak.

    Peak of a 100-bin histogram of log10(lambda); candidates xmin from 0.95 to 1.5 times the peak's
    lower edge (arXiv 2410.10912, "fix-finger"). Falls back to the nearest eigenvalue when none lies there.
    """
    n = len(esd)
    logs = torch.log10(esd.clamp_min(torch.finfo(esd.dtype).tiny))
    low, high = float(logs[0]), float(logs[-1])
    counts = torch.histc(logs, 100, min=low, max=high)
    peak = 10 ** (low + int(counts.argmax()) * (high - low) / 100)
    inside = ((esd >= 0.95 * peak) & (esd <= 1.5 * peak)).nonzero().flatten()
    inside = inside[inside < n - 1]
    if not len(inside):
        inside = (esd - peak).abs().argmin().clamp(max=n - 2).reshape(1)
    best_k, best_distance = n - 1 - int(inside[0]), float("inf")
    for first in inside.tolist():
        # The tail is lambda_first and above; xmin is the eigenvalue just below, as in hill_alpha.
        k = n - 1 - first
        tail, xmin = esd[first + 1 :], esd[first]
        if xmin <= _RANK_TOLERANCE * esd[-1] or esd[-1] <= xmin * (1 + _SPREAD_TOLERANCE):
            continue
        alpha = hill_alpha(esd, k)
        empirical = torch.arange(k, dtype=esd.dtype, device=esd.device) / k
        distance = float(((1 - (tail / xmin) ** (1 - alpha)) - empirical).abs().max())
        if distance < best_distance:
            best_k, best_distance = k, distance
    return best_k


ESTIMATORS: dict[str, Callable[[torch.Tensor], int]] = {
    "hill": lambda esd: hill_k(len(esd)),
    "median": lambda esd: median_k(len(esd)),
    "ks-peak": ks_peak_k,
}


def fit_alpha(esd: torch.Tensor, estimator: str = "hill") -> Fit:
    """Fit the tail of an ascending ESD [n] with a named rule for the tail's length.

    `Fit.problem` is set, and alpha is None, where no exponent exists: fewer than 2 eigenvalues, a
    zero matrix, a tail that reaches into zero eigenvalues (rank-deficient), or a tail without spread.
    KeyError for an unknown estimator.
    """
    rule = ESTIMATORS[estimator]
    n = len(esd)
    if n < 2:
        return Fit(None, 0, n, 0.0, "fewer than 2 eigenvalues")
    largest = float(esd[-1])
    if largest <= 0:
        return Fit(None, 0, n, 0.0, "all-zero matrix")
    if float(esd[-2]) <= _RANK_TOLERANCE * largest:
        return Fit(None, 0, n, 0.0, "rank-one matrix")
    k = rule(esd)
    xmin = float(esd[n - k - 1])
    if xmin <= _RANK_TOLERANCE * largest:
        return Fit(None, k, n, xmin, f"rank-deficient: the tail of {k} reaches zero eigenvalues")
    if largest <= xmin * (1 + _SPREAD_TOLERANCE):
        return Fit(None, k, n, xmin, "no spread: all tail eigenvalues are equal")
    return Fit(hill_alpha(esd, k), k, n, xmin)
