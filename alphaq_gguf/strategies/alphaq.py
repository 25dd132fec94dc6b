"""AlphaQ (arXiv 2606.04980): heavier-tailed experts, which are better trained, get more bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from ..measurements import Alpha, Key
from .base import Allocation, Problem, solve_costs

MAX_GAMMA = 200.0
"""The largest exponent in the authors' ablation; the rule below is capped here."""


class AlphaQ:
    name = "alphaq"
    needs = frozenset({"alphas", "distortions"})
    summary = "encoding error weighted by (median alpha / alpha)^gamma, from weights alone"
    source = "arXiv 2606.04980"

    def allocate(self, problem: Problem) -> Allocation:
        gamma, alphas = gamma_and_alphas(problem)
        return solve_costs(problem, sensitivities(alphas, gamma, problem.alpha_reference), {"gamma": gamma})


def gamma_and_alphas(problem: Problem) -> tuple[float, dict[Key, Alpha]]:
    """The exponent asked for, or chosen by the rule over the whole model, and the alphas."""
    return choose_gamma(problem.alphas) if problem.gamma is None else problem.gamma, problem.alphas


def choose_gamma(alphas: Mapping[Key, Alpha]) -> float:
    """gamma = 1 / std(ln alpha) over expert matrices, at most 200.

    The models in AlphaQ's ablation need exponents from 10 to 200, in inverse proportion to the
    spread of their alphas; this rule puts one standard deviation of alpha at a factor of e in
    sensitivity. Within one kind of spectrum only, since their scales differ.
    """
    logs = [np.log(group) for group in _by_kind(alphas).values()]
    if not logs:
        return 1.0
    centred = np.concatenate([group - group.mean() for group in logs])
    spread = float(centred.std())
    return min(1 / spread, MAX_GAMMA) if spread > 0 else MAX_GAMMA


def sensitivities(alphas: Mapping[Key, Alpha], gamma: float, reference: str = "all") -> dict[Key, float]:
    """s = (median(alpha) / max(alpha, 1e-8))^gamma for every matrix (AlphaQ, A.3).

    `reference` is what the median is taken over: "all", "projection" or "stack", and always one kind
    of spectrum. A matrix without an exponent gets the neutral 1. ValueError for another reference.
    """
    group_of = {
        "all": lambda key, a: (a.spectrum,),
        "projection": lambda key, a: (a.spectrum, key[2]),
        "stack": lambda key, a: (a.spectrum, key[0]),
    }.get(reference)
    if group_of is None:
        raise ValueError(f"unknown alpha reference {reference!r}")
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for key, found in alphas.items():
        if found.alpha is not None:
            groups[group_of(key, found)].append(found.alpha)
    medians = {name: float(np.median(values)) for name, values in groups.items()}
    with np.errstate(over="ignore"):
        return {
            key: 1.0
            if found.alpha is None
            else float(np.exp(gamma * np.log(medians[group_of(key, found)] / max(found.alpha, 1e-8))))
            for key, found in alphas.items()
        }


def _by_kind(alphas: Mapping[Key, Alpha]) -> dict[str, np.ndarray]:
    groups: dict[str, list[float]] = defaultdict(list)
    for found in alphas.values():
        if found.alpha is not None:
            groups[found.spectrum].append(found.alpha)
    return {kind: np.array(values) for kind, values in groups.items()}
