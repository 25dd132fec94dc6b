"""How often each expert would be used, from weights alone: random vectors sent through a layer's router.

What is simulated is what llama.cpp computes, because that is what runs the file: of groups of experts it takes those
whose best two score highest in sum, also for the one model that was trained to rank them by their best expert.
Multipliers of embeddings, residuals and outputs play no part, since a norm stands between them and every router.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .arch.routers import ROUTER_RULES, UNSIMULATED, Gating, RouterRule
from .checkpoint import Source
from .errors import SourceError

DEFAULT_VECTORS = 1 << 15
_BATCH = 1 << 12
# llama.cpp divides gate weights by no less than the smallest normal number of half precision.
_LEAST_SUM = 2.0**-14


@dataclass(frozen=True, eq=False)
class Router:
    """A layer's router: `weights` [E, H] and what surrounds them, all float32.

    Its input is a normalised vector times `norm` [H], plus `norm_bias`; `bias` [E] is added to the logits and
    `selection_bias` [E] to the scores by which experts are chosen, not to gate weights. Llama-4-like models multiply
    an expert's input by its gate weight instead of its output, which changes neither.
    """

    weights: np.ndarray
    norm: np.ndarray
    n_used: int
    gating: Gating = Gating.SOFTMAX
    normalise: bool = False
    scale: float = 1.0
    n_groups: int = 1
    n_groups_used: int = 1
    bias: np.ndarray | None = None
    norm_bias: np.ndarray | None = None
    selection_bias: np.ndarray | None = None


@dataclass(frozen=True)
class Mass:
    """By expert, float64 [E]: `count` is the share of vectors routed to it, `gate2` its mean squared gate weight.

    Counts sum to the number of experts used. Gate weights are 0 where the expert is not chosen.
    """

    count: np.ndarray
    gate2: np.ndarray


class Routing(NamedTuple):
    """Experts `chosen` for each vector, in no order, with their `gates` and `scores`, all [n, n_used].

    Scores are gate weights before they are renormalised and scaled.
    """

    chosen: np.ndarray
    gates: np.ndarray
    scores: np.ndarray


def read_routers(source: Source) -> dict[int, Router]:
    """The router of every layer that has expert stacks; SourceError when a layer's is missing or not understood."""
    if reason := UNSIMULATED.get(source.architecture):
        raise SourceError(
            f"{source.label}: routing of {source.architecture} cannot be simulated: {reason}",
            "use --strategy mse, which needs no routing",
        )
    prefix = f"{source.architecture}."
    metadata = {field.key.removeprefix(prefix): field for field in source.fields if field.key.startswith(prefix)}
    sizes = {stack.bid: stack.n_experts for stack in source.stacks}
    return {bid: _read_router(source, metadata, bid, n_experts) for bid, n_experts in sizes.items()}


def simulate(router: Router, n_vectors: int = DEFAULT_VECTORS, seed: int = 0) -> Mass:
    """Route seeded Gaussian vectors of unit root mean square.

    A count p has the standard error sqrt(p (1 - p) / n_vectors): for 8 of 128 experts 4.3 % of the mean count with
    8192 vectors, 2.1 % with the default, which takes about 0.2 s a layer. Logits are drawn directly: with weights x
    norm = R^T Q^T they depend on a Gaussian vector z only by the few numbers Q^T z, which are Gaussian, and by |z|.
    """
    n_experts, width = router.weights.shape
    scaled = router.weights.astype(np.float64) * router.norm
    upper = np.linalg.qr(scaled.T, mode="r")
    shift = _logits(router, np.zeros(width) if router.norm_bias is None else router.norm_bias)
    rng = np.random.default_rng(seed)
    count, gate2 = np.zeros(n_experts), np.zeros(n_experts)
    for start in range(0, n_vectors, _BATCH):
        inside = rng.standard_normal((min(_BATCH, n_vectors - start), len(upper)))
        outside = 2 * rng.standard_gamma((width - len(upper)) / 2, len(inside))
        length = np.sqrt((inside**2).sum(axis=1) + outside)
        chosen, gates, _ = _choose(router, inside @ upper * (np.sqrt(width) / length)[:, None] + shift)
        count += np.bincount(chosen.ravel(), minlength=n_experts)
        gate2 += np.bincount(chosen.ravel(), gates.ravel() ** 2, minlength=n_experts)
    return Mass(count / n_vectors, gate2 / n_vectors)


def route(router: Router, inputs: np.ndarray) -> Routing:
    """Where router inputs [n, H] go."""
    return _choose(router, _logits(router, inputs))


def _logits(router: Router, inputs: np.ndarray) -> np.ndarray:
    logits = inputs.astype(np.float64) @ router.weights.T.astype(np.float64)
    return logits if router.bias is None else logits + router.bias


def _choose(router: Router, logits: np.ndarray) -> Routing:
    scores = _scores(router.gating, logits)
    # Every gating rises with the logits, which unlike scores do not saturate.
    selection = logits if router.selection_bias is None and router.n_groups == 1 else scores
    if router.selection_bias is not None:
        selection = selection + router.selection_bias
    if router.n_groups > 1:
        groups = selection.reshape(len(selection), router.n_groups, -1)
        best_two = np.partition(groups, -2)[..., -2:].sum(axis=-1)
        kept = np.zeros(best_two.shape, dtype=bool)
        np.put_along_axis(kept, _top(best_two, router.n_groups_used), True, axis=1)
        selection = np.where(kept[..., None], groups, -np.inf).reshape(selection.shape)
    chosen = _top(selection, router.n_used)
    scores = np.take_along_axis(scores, chosen, axis=1)
    if router.gating == Gating.SOFTMAX_OF_CHOSEN:
        scores = _softmax(scores)
    gates = scores
    if router.normalise:
        gates = gates / np.maximum(gates.sum(axis=1, keepdims=True), _LEAST_SUM)
    return Routing(chosen, gates * router.scale, scores)


def _scores(gating: Gating, logits: np.ndarray) -> np.ndarray:
    match gating:
        case Gating.SOFTMAX:
            return _softmax(logits)
        case Gating.SIGMOID:
            return np.exp(-np.logaddexp(0, -logits))
        case Gating.SQRT_SOFTPLUS:
            return np.sqrt(np.logaddexp(0, logits))
        case Gating.SOFTMAX_OF_CHOSEN:
            return logits


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _top(values: np.ndarray, n: int) -> np.ndarray:
    """Columns of the n largest values in each row, in no order."""
    return np.argpartition(values, -n, axis=1)[:, -n:]


def _read_router(source: Source, metadata: dict[str, Any], bid: int, n_experts: int) -> Router:
    rule = ROUTER_RULES.get(source.architecture, RouterRule())

    def value(key: str, default: Any) -> Any:
        found = metadata[key].value if key in metadata else default
        return found[bid] if isinstance(found, list) else found

    def vector(name: str, length: int) -> np.ndarray | None:
        return _read(source, f"blk.{bid}.{name}", (length,)).ravel() if f"blk.{bid}.{name}" in source.tensors else None

    weights = _read(source, f"blk.{bid}.ffn_gate_inp.weight", (n_experts, None))
    width = weights.shape[1]
    norm = next((name for name in rule.norms if f"blk.{bid}.{name}.weight" in source.tensors), rule.norms[0])
    n_used = value("expert_used_count", 0)
    n_groups, n_groups_used = value("expert_group_count", 1) or 1, value("expert_group_used_count", 1)
    in_groups = n_experts // n_groups * (n_groups_used if n_groups > 1 else 1)
    uneven = n_groups > 1 and (n_experts % n_groups or n_groups >= n_experts or not 0 < n_groups_used <= n_groups)
    if uneven or not 0 < n_used <= in_groups:
        of_groups = f" from {n_groups_used} of {n_groups} groups" if n_groups > 1 else ""
        raise SourceError(
            f"{source.label}: layer {bid} cannot choose {n_used} of {n_experts} experts{of_groups}",
            f"correct {source.architecture}.expert_used_count and its like: convert the checkpoint to GGUF again",
        )
    return Router(
        weights=weights,
        norm=_read(source, f"blk.{bid}.{norm}.weight", (width,)).ravel(),
        n_used=n_used,
        gating=rule.gating or _gating(source, value("expert_gating_func", 0) or rule.default_gating),
        normalise=value("expert_weights_norm", False) if rule.normalise is None else rule.normalise,
        scale=value("expert_weights_scale", 0.0) or 1.0,
        n_groups=n_groups,
        n_groups_used=n_groups_used,
        bias=vector("ffn_gate_inp.bias", n_experts),
        norm_bias=vector(f"{norm}.bias", width),
        selection_bias=vector("exp_probs_b.bias", n_experts),
    )


def _gating(source: Source, number: int) -> Gating:
    try:
        return Gating(number)
    except ValueError:
        raise SourceError(
            f"{source.label}: {source.architecture}.expert_gating_func is {number}, expected 1 to {max(Gating):d}",
            "use --strategy mse, which needs no routing",
        ) from None


def _read(source: Source, name: str, expected: tuple[int | None, ...]) -> np.ndarray:
    """A tensor of the expected shape, None standing for any length, less leading dimensions of 1."""
    info = source.tensors.get(name)
    shape = info.shape[-len(expected) :] if info else ()
    fits = len(shape) == len(expected) and all(
        want in (None, found) for want, found in zip(expected, shape, strict=True)
    )
    if info is None or not fits or info.n_weights != math.prod(shape):
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        found = f"shape {list(info.shape)}" if info else "no such tensor"
        raise SourceError(
            f"{source.label}: routing cannot be simulated: {name}: expected [{wanted}], found {found}",
            "use --strategy mse, which needs no routing",
        )
    return source.read_rows(name)
