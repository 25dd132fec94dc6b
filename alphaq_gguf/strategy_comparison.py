"""All strategies on one model at one budget: predicted error, bytes, types, and how much they agree."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from .allocation import frame_problem
from .budget import AllocationSettings, matrices_bytes
from .calibration.own_text import OWN
from .checkpoint import Source
from .encode import Encoder
from .errors import AlphaQError, UsageError
from .qtypes import bpw
from .reporter import Reporter, Silent
from .scope import allocate_within
from .signals import mass_of, measure_masses, measure_signals, needs_of, read_calibration
from .strategies import STRATEGIES, Problem
from .strategies.base import matrix_distortion, matrix_type


@dataclass(frozen=True)
class Result:
    """What one strategy made of the budget; `reason` says why it could not, and the rest is then empty.

    `squared_error` is the encoding error of all expert weights, the same measure for every strategy;
    `types` counts weights by type.
    """

    strategy: str
    squared_error: float | None = None
    expert_bytes: int = 0
    expert_bpw: float = 0.0
    types: dict[str, int] | None = None
    reason: str = ""


@dataclass(frozen=True)
class StrategyComparison:
    """`correlations`: Spearman's of bits per unit by pair of strategies, None where one of them is constant."""

    results: tuple[Result, ...]
    correlations: dict[tuple[str, str], float | None]


def compare_strategies(
    source: Source,
    settings: AllocationSettings,
    *,
    cache_dir: Path,
    alphas_file: Path | None = None,
    encoder: Encoder | None = None,
    device: str = "cpu",
    threads: int = 1,
    reporter: Reporter | None = None,
) -> StrategyComparison:
    """Let every strategy spend the same budget on `source`; `settings.strategy` is not looked at.

    BudgetError when nothing fits the budget.
    """
    reporter = reporter or Silent()
    needs = frozenset({"distortions"}).union(*(s.needs for s in STRATEGIES.values()))
    frame = frame_problem(source, settings, reporter)
    calibration = None
    # Of importance matrices some only round; strategies that need more say so themselves.
    with nullcontext() if settings.calibration else suppress(AlphaQError):
        calibration = read_calibration(source, settings, needs, reporter)
    problem, _ = measure_signals(
        source,
        settings,
        needs,
        frame.problem,
        cache_dir=cache_dir,
        alphas_file=alphas_file,
        calibration=calibration,
        imatrix=frame.imatrix,
        encoder=encoder,
        device=device,
        threads=threads,
        reporter=reporter,
    )
    results, bits = [], {}
    known_masses: dict[str | None, dict[tuple[int, int], float]] = {None: {}}
    for name, strategy in STRATEGIES.items():
        try:
            shared = settings if "router" in strategy.needs else replace(settings, initial_router=None)
            needs_of(strategy, shared)
            mass = mass_of(strategy, shared)
            if mass == OWN and (calibration is None or OWN not in calibration.datasets):
                raise UsageError("the model has to write text first", "choose it alone, or calibrate with --text self")
            if mass is not None and mass not in known_masses:
                known_masses[mass] = measure_masses(
                    source, mass, settings, calibration, cache_dir=cache_dir, threads=threads, reporter=reporter
                )
            # Only those that ask for masses may see them, because they weigh every cost table.
            own = replace(problem, masses=known_masses[mass])
            choice = allocate_within(strategy, own, settings.scope).choice
        except AlphaQError as error:
            results.append(Result(name, reason=f"{error.message} -> {error.hint}" if error.hint else error.message))
            continue
        results.append(_result(name, problem, choice))
        bits[name] = np.array([bpw(problem.qtypes[int(t)]) for t in choice])
    pairs = {(a, b): _correlate(bits[a], bits[b]) for a in bits for b in bits}
    return StrategyComparison(tuple(results), pairs)


def _result(name: str, problem: Problem, choice: np.ndarray) -> Result:
    error, types = 0.0, Counter()
    for unit, t in zip(problem.units, choice, strict=True):
        qtype = problem.qtypes[int(t)]
        for matrix in unit.matrices:
            error += matrix_distortion(problem, matrix, qtype)
            types[matrix_type(matrix, qtype).name] += matrix.n_rows * matrix.n_cols
    if problem.stack_alignment is None:
        n_bytes = sum(
            matrices_bytes(u.matrices, problem.qtypes[int(t)]) for u, t in zip(problem.units, choice, strict=True)
        )
    else:
        n_bytes = sum(stored.n_bytes for stored in problem.stacks(choice).values())
    n_weights = sum(unit.n_weights for unit in problem.units)
    return Result(name, error, n_bytes, n_bytes * 8 / n_weights, dict(types))


def _correlate(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def to_plain(comparison: StrategyComparison) -> dict[str, Any]:
    """The comparison as plain values."""
    return {
        "strategies": [result.__dict__ for result in comparison.results],
        "rank_correlations": [
            {"strategies": list(pair), "spearman": value} for pair, value in comparison.correlations.items()
        ],
    }
