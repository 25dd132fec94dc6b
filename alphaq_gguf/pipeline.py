"""The stages composed: source -> measurements -> recipe -> GGUF. This module is the public Python API."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .allocation import TOOL, allocate, memory_beside, overhead_bytes
from .budget import AllocationSettings, make_problem, make_units, size_range
from .checkpoint import Source, open_source
from .conversion import Conversion, check_imatrix, convert
from .forecast import MEMORY_SIZES, Forecast, fit_memory, group_stacks
from .layout import Plan, alignment_of, plan_file
from .measure import measure
from .measurements import AlphaSettings, Measurements
from .recipe import Recipe, load_recipe
from .reporter import Reporter, Silent
from .spread import warnings_about
from .tensor_types import choose_types

__all__ = [
    "AllocationSettings",
    "Conversion",
    "Plan",
    "allocate",
    "check_imatrix",
    "convert",
    "forecast",
    "load_recipe",
    "measure_source",
    "open_source",
    "plan_file",
]

# As long as a real one, where no weights are read.
_NO_FINGERPRINT = "0" * 64


def measure_source(
    source: Source,
    settings: AlphaSettings,
    *,
    cache_dir: Path,
    device: str = "cpu",
    threads: int = 1,
    reporter: Reporter | None = None,
) -> Measurements:
    """Alphas of every expert matrix of `source`, reused from `cache_dir` where settings match."""
    reporter = reporter or Silent()
    found = measure(
        source,
        alphas=settings,
        distortion=None,
        qtypes={},
        cache_dir=cache_dir,
        device=device,
        threads=threads,
        reporter=reporter,
    )
    for line in warnings_about(found.alphas):
        reporter.warn(line)
    return found


def forecast(source: Source, settings: AllocationSettings, n_ctx: int, *, reporter: Reporter | None = None) -> Forecast:
    """What `source` can become with the types `settings` allow, and what of it runs in how much memory.

    Reads no weights; a budget in `settings` is not looked at.
    """
    settings = replace(settings, bpw=None)
    tensor_types, fixed = choose_types(source, settings.overrides)
    units = make_units(source.stacks, fixed, settings.types)
    problem = make_problem(units, settings, alignment_of(source))
    base = Recipe(TOOL, _NO_FINGERPRINT, source.architecture, {}, {}, (), tensor_types)
    other = overhead_bytes(source, base, settings) + source.omitted_bytes
    need = memory_beside(source, n_ctx, reporter or Silent())
    least, most = size_range(problem)
    n_expert_weights = sum(unit.n_weights for unit in units)
    return Forecast(
        architecture=source.architecture,
        n_layers=1 + max(stack.bid for stack in source.stacks),
        n_weights=sum(info.n_weights for info in source.tensors.values()),
        n_expert_weights=n_expert_weights,
        groups=group_stacks(source.stacks, settings.types),
        least_bpw=least * 8 / n_expert_weights,
        most_bpw=most * 8 / n_expert_weights,
        least_bytes=other + least,
        most_bytes=other + most,
        other_bytes=other,
        is_estimate=source.omitted_bytes > 0,
        n_ctx=n_ctx,
        need=need,
        fits=fit_memory(problem, other, need, MEMORY_SIZES),
    )
