"""How much alphas differ: what the allocation can steer by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .measurements import Alpha, Key

TINY_SPREAD = 0.01
"""std(ln alpha) below which ranking experts by alpha is ranking noise (sampling alone moves alpha by 0.5 %)."""


@dataclass(frozen=True)
class Spread:
    """Statistics of a group of alphas; `log_std` is std(ln alpha)."""

    count: int
    low: float
    median: float
    high: float
    log_std: float


def spread_of(alphas: Iterable[Alpha]) -> Spread | None:
    """Statistics of the alphas that exist, None when none does."""
    values = np.array([a.alpha for a in alphas if a.alpha is not None])
    if not len(values):
        return None
    return Spread(
        len(values),
        float(values.min()),
        float(np.median(values)),
        float(values.max()),
        float(np.log(values).std()),
    )


def spread_by(alphas: Mapping[Key, Alpha], layer_of: Mapping[str, int]) -> dict[tuple[int, str], Spread]:
    """Spread per (layer, projection), in order; `layer_of` maps stack names to layers."""
    groups: dict[tuple[int, str], list[Alpha]] = defaultdict(list)
    for (stack, _, proj), found in alphas.items():
        groups[layer_of[stack], proj].append(found)
    order = {"gate": 0, "up": 1, "down": 2}
    found_spreads = {name: spread_of(group) for name, group in groups.items()}
    return {
        name: spread
        for name in sorted(found_spreads, key=lambda name: (name[0], order[name[1]]))
        if (spread := found_spreads[name]) is not None
    }


def warnings_about(alphas: Mapping[Key, Alpha]) -> list[str]:
    """What a user must know before trusting these alphas, one line each."""
    lines = []
    problems: dict[str, list[Key]] = defaultdict(list)
    for key, found in alphas.items():
        if found.problem:
            problems[found.problem.split(":")[0]].append(key)
    for problem, keys in problems.items():
        stack, xid, proj = keys[0]
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        lines.append(
            f"{problem}: {stack} expert {xid} ({proj}){more}: no alpha, counted with the neutral sensitivity 1"
        )
    kinds = {found.spectrum for found in alphas.values()}
    if len(kinds) > 1:
        lines.append(
            "some matrices have a side under 128 and got a full-spectrum alpha, which has another scale: "
            "they are compared among themselves only"
        )
    overall = spread_of(alphas.values())
    if overall is None:
        lines.append("no matrix has an alpha: alphaq allocates by encoding error alone")
    elif overall.log_std < TINY_SPREAD:
        lines.append(
            f"alphas spread by only {100 * overall.log_std:.2f} %: too little to steer by; compare with --strategy mse"
        )
    return lines
