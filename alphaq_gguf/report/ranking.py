"""What files are held against each other by, and which of them no other beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..compare.data import Comparison, Evaluation
from ..evaluate.metrics import Estimate
from .wording import ENGINES, quoted, short_names

# Standard errors of a difference beyond which it counts as one, and the tokens up to which they mean nothing.
_ERRORS, _TOO_FEW = 2, 10


def chosen(comparison: Comparison) -> dict[str, Evaluation]:
    """By file, in order, the evaluation that figures and words go by.

    In the first engine that gives all files a KLD, so that none is favoured by its engine; else each in its first.
    """
    finite = [e for e in comparison.evaluations if is_finite(e)]
    files = {e.file for e in finite}
    common = [engine for engine in ENGINES if {e.file for e in finite if e.engine == engine} == files]
    found: dict[str, Evaluation] = {}
    for candidate in comparison.candidates:
        by_engine = {e.engine: e for e in finite if e.file == candidate.name}
        for engine in common or ENGINES:
            if engine in by_engine:
                found.setdefault(candidate.name, by_engine[engine])
    return found


def is_finite(evaluation: Evaluation) -> bool:
    """Whether its KLD is a number; a broken file's is none."""
    return math.isfinite(evaluation.divergence.kld.value)


def kld_of(comparison: Comparison) -> dict[str, Estimate]:
    """The mean KLD by file."""
    return {name: evaluation.divergence.kld for name, evaluation in chosen(comparison).items()}


def pareto(comparison: Comparison) -> list[str]:
    """Files that no other beats in both size and KLD, smallest first."""
    kld = kld_of(comparison)
    size = {name: comparison.candidate(name).n_bytes for name in kld}
    front = [name for name in kld if not any(beats(size, kld, other, name) for other in kld)]
    return sorted(front, key=lambda name: (size[name], kld[name].value))


def beats(size: dict[str, int], kld: dict[str, Estimate], one: str, other: str) -> bool:
    """Whether file `one` is no worse than `other` in both, and better in one of them."""
    mine, its = (size[one], kld[one].value), (size[other], kld[other].value)
    return mine[0] <= its[0] and mine[1] <= its[1] and mine != its


def front_by_place(comparison: Comparison) -> list[list[str]]:
    """The files of `pareto`, those of the same size and KLD together: they tie."""
    kld = kld_of(comparison)
    places: dict[tuple[int, float], list[str]] = {}
    for name in pareto(comparison):
        places.setdefault((comparison.candidate(name).n_bytes, kld[name].value), []).append(name)
    return list(places.values())


def too_few(comparison: Comparison) -> bool:
    """Whether so few tokens were scored that their standard errors mean nothing."""
    return comparison.text.n_scored <= _TOO_FEW


def differs(comparison: Comparison, one: Estimate, other: Estimate) -> bool:
    """Whether the two, of `comparison`, lie more than twice the standard error of their difference apart."""
    return not too_few(comparison) and abs(one.value - other.value) > _ERRORS * math.hypot(
        one.standard_error, other.standard_error
    )


def router_agreement(routers: dict[int, float]) -> tuple[float, int, float] | None:
    """Mean over layers, the worst layer, and its share."""
    if not routers:
        return None
    worst = min(routers, key=lambda layer: routers[layer])
    return sum(routers.values()) / len(routers), worst, routers[worst]


def with_short_names(comparison: Comparison) -> Comparison:
    """The same with files called by what tells them apart, for words and labels."""
    files = [candidate.name for candidate in comparison.candidates]
    return _renamed(comparison, dict(zip(files, short_names(files), strict=True)))


def with_quoted_names(comparison: Comparison) -> Comparison:
    """The same with names set off, for sentences."""
    return _renamed(comparison, {c.name: quoted(c.name) for c in comparison.candidates})


def _renamed(comparison: Comparison, names: dict[str, str]) -> Comparison:
    def renamed(items: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(replace(item, file=names.get(item.file, item.file)) for item in items)

    return replace(
        comparison,
        candidates=tuple(replace(c, name=names[c.name]) for c in comparison.candidates),
        evaluations=renamed(comparison.evaluations),
        cross=renamed(comparison.cross),
        tasks=renamed(comparison.tasks),
    )
