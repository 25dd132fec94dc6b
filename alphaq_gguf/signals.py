"""All that a strategy can ask to know of a model, measured or read, in the form of a Problem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .budget import AllocationSettings, wanted_types
from .checkpoint import Source
from .measure import Measurements, measure
from .reporter import Reporter
from .strategies import Problem


def measure_signals(
    source: Source,
    settings: AllocationSettings,
    needs: frozenset[str],
    problem: Problem,
    *,
    cache_dir: Path,
    alphas_file: Path | None,
    device: str,
    threads: int,
    reporter: Reporter,
) -> tuple[Problem, Measurements]:
    """`problem` with all that a strategy needs to know of the model."""
    analytic = problem.analytic and "distortions" in needs
    needs_alphas = "alphas" in needs or analytic
    measured = measure(
        source,
        alphas=settings.alphas if needs_alphas else None,
        distortion=settings.distortion if "distortions" in needs and not analytic else None,
        qtypes=wanted_types(problem.units),
        cache_dir=cache_dir,
        given_alphas=alphas_file if needs_alphas else None,
        device=device,
        threads=threads,
        reporter=reporter,
    )
    return replace(problem, alphas=measured.alphas, distortions=measured.distortions), measured
