"""How one model's probabilities differ from another's, token by token, by llama-perplexity's protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

HISTOGRAM_EDGES = tuple(i / 4 for i in range(-32, 9))

TOKEN = np.dtype([("nll", "f8"), ("nll_base", "f8"), ("kld", "f8"), ("same_top", "?")])
"""What is known of one scored token: its loss in the model and in the base, KL(base || model), same likeliest token."""

# Differences of log-probability from the likeliest token that a compressed row resolves.
_RANGE = 16
# Base log-probabilities from here down count nothing in the KLD.
_CUT = -16
# Words that hold a row's scale and least log-probability, both float32.
_HEAD = 4


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) per token, in nats, and what else differs, over all scored tokens.

    `top1` is the share of tokens whose likeliest successor both agree on, `rms_dp` the root mean square difference of
    the true token's probability. `histogram` counts tokens by log10 KLD between neighbours of HISTOGRAM_EDGES; the
    first and the last bin are open.
    """

    kld: Estimate
    kld_median: float
    kld_p999: float
    kld_max: float
    top1: Estimate
    rms_dp: Estimate
    histogram: tuple[int, ...]


def scored(n_ctx: int) -> slice:
    """Positions of a window whose logits count; the tokens that they must predict come one later."""
    return slice(n_ctx // 2, n_ctx - 1)


def row_words(n_vocab: int) -> int:
    """uint16 words of a compressed row: two float32, a code per token, and one more to make an odd count even."""
    return _HEAD + n_vocab + n_vocab % 2


def compress(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in 16 bits: float32 [n, n_vocab] -> uint16 [n, row_words].

    A row is (scale, least) as float32, then codes: log p = scale * code + least. Tokens further than 16 below the
    likeliest are all taken for that far.
    """
    n, n_vocab = logits.shape
    rows = np.zeros((n, row_words(n_vocab)), np.uint16)
    heads = rows[:, :_HEAD].view(np.float32)
    for row, head, codes in zip(logits, heads, rows[:, _HEAD : _HEAD + n_vocab], strict=True):
        top = row.max()
        low = np.maximum(row.min(), top - _RANGE)
        scale = (top - low) / np.float32(65535)
        head[:] = scale, low - top - _log_sum_exp(row, top)
        if scale > 0:
            codes[:] = np.rint((np.maximum(row, low) - low) * (1 / scale))
    return rows


def token_stats(logits: np.ndarray, base: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """TOKEN [n] of a model's logits float32 [n, n_vocab] held against compressed rows of the base [n, row_words].

    In float32 with sums in float64, as llama-perplexity does. Base probabilities up to exp(-16) are left out of the
    KLD, which can therefore come out a little below zero.
    """
    stats = np.empty(len(logits), TOKEN)
    for i, (row, words, target) in enumerate(zip(logits, base, targets, strict=True)):
        top = row.argmax()
        log_p = row - (row[top] + _log_sum_exp(row, row[top]))
        log_base = _expand(words)[: row.size]
        counts = log_base > _CUT
        terms = np.exp(log_base[counts]) * (log_base[counts] - log_p[counts])
        stats[i] = -log_p[target], -log_base[target], terms.sum(dtype=np.float64), top == log_base.argmax()
    return stats


def own_loss(base: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of `targets` [n] in the base itself, float64 [n], from its rows [n, row_words]."""
    return np.array([-_expand(words)[target] for words, target in zip(base, targets, strict=True)], np.float64)


def summarize(stats: np.ndarray) -> tuple[Estimate, Estimate, Divergence]:
    """Perplexity of the model and of the base, and how they diverge, of TOKEN [n], as llama-perplexity prints them."""
    p_differences = np.exp(-stats["nll"]) - np.exp(-stats["nll_base"])
    square = _mean(p_differences**2)
    rms = math.sqrt(square.value)
    top1 = float(stats["same_top"].mean())
    klds = np.sort(stats["kld"].astype(np.float32))
    bins = np.searchsorted(np.power(10, HISTOGRAM_EDGES[1:-1]), stats["kld"], side="right")
    divergence = Divergence(
        kld=_mean(stats["kld"]),
        kld_median=float(np.median(klds)),
        kld_p999=_quantile(klds, 0.999),
        kld_max=float(klds[-1]),
        top1=Estimate(top1, math.sqrt(top1 * (1 - top1) / max(len(stats) - 1, 1))),
        rms_dp=Estimate(rms, 0.5 / rms * square.standard_error if rms else 0.0),
        histogram=tuple(np.bincount(bins, minlength=len(HISTOGRAM_EDGES) - 1).tolist()),
    )
    return _perplexity(stats["nll"]), _perplexity(stats["nll_base"]), divergence


def _log_sum_exp(row: np.ndarray, top: np.float32) -> np.float32:
    """log of the sum of exp(row - top)."""
    return np.float32(np.log(np.exp(row - top).sum(dtype=np.float64)))


def _expand(words: np.ndarray) -> np.ndarray:
    """Log-probabilities of a compressed row, float32, with one too many where the vocabulary is odd."""
    scale, least = words[:_HEAD].view(np.float32)
    return words[_HEAD:] * scale + least


def _mean(values: np.ndarray) -> Estimate:
    """llama-perplexity gives no error for ten values or fewer."""
    n = len(values)
    return Estimate(float(values.mean()), math.sqrt(values.var() / (n - 1)) if n > 10 else 0.0)


def _perplexity(losses: np.ndarray) -> Estimate:
    loss = _mean(losses)
    # A broken model's can be too large for a float.
    with np.errstate(over="ignore"):
        value = float(np.exp(loss.value))
    return Estimate(value, value * loss.standard_error)


def _quantile(ordered: np.ndarray, fraction: float) -> float:
    """Linear between neighbours, its place in float32: with many values that shows in the printed digits."""
    place = np.float32(fraction) * np.float32(len(ordered) - 1)
    i = int(place)
    share = place - np.float32(i)
    return float((1 - share) * ordered[i] + share * ordered[min(i + 1, len(ordered) - 1)])
