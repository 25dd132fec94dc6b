"""The stages composed: source -> measurements -> recipe -> GGUF. This module is the public Python API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .budget import (
    AllocationSettings,
    budget_bytes,
    check_budget,
    make_problem,
    make_units,
    size_range,
    smallest_choice,
    unit_bytes,
)
from .checkpoint import Source, open_source
from .encode import encode_rows
from .forecast import MEMORY_SIZES, Forecast, fit_memory, group_stacks
from .gguf_file import TensorInfo
from .layout import Plan, alignment_of, plan_file
from .measure import AlphaSettings, Measurements, key_of, measure
from .memory import ContextSettings, MemoryNeed, memory_need
from .prefetch import prefetch
from .qtypes import FLOAT_TYPES
from .recipe import Recipe, RecipeUnit, check_recipe, load_recipe
from .reporter import Reporter, Silent
from .spread import spread_of, warnings_about
from .strategies import STRATEGIES, Allocation, Problem
from .tensor_types import choose_types
from .writer import check_output, write_gguf

__all__ = [
    "AllocationSettings",
    "Conversion",
    "Plan",
    "allocate",
    "convert",
    "forecast",
    "load_recipe",
    "measure_source",
    "open_source",
    "plan_file",
]

TOOL = f"alphaq-gguf {__version__}"
# Weights read and encoded at once: 16 MiB of float32, enough for every core to have a share.
_CHUNK_WEIGHTS = 1 << 22
# A number as long as any that a recipe holds, where none is measured yet.
_SOME_NUMBER = 1.2345678901234567e-05
# More than the settings of both measurements take in the recipe, which are known only when measuring begins.
_SETTINGS_BYTES = 1024
# As long as a real one, where no weights are read.
_NO_FINGERPRINT = "0" * 64


@dataclass(frozen=True)
class Conversion:
    """A finished conversion. `resumed_bytes` were already there from an interrupted run."""

    path: Path
    size: int
    recipe: Recipe
    resumed_bytes: int


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


def allocate(
    source: Source,
    settings: AllocationSettings,
    *,
    cache_dir: Path,
    alphas_file: Path | None = None,
    device: str = "cpu",
    threads: int = 1,
    reporter: Reporter | None = None,
) -> Recipe:
    """Choose a type for every expert stack of `source` within the budget.

    BudgetError, before anything is measured, when no allocation fits; it names the feasible range.
    """
    reporter = reporter or Silent()
    check_budget(settings)
    strategy = STRATEGIES[settings.strategy]
    tensor_types, fixed = choose_types(source, settings.overrides)
    units = make_units(source.stacks, fixed, settings.types)
    problem = make_problem(units, settings, alignment_of(source))
    base = Recipe(TOOL, source.fingerprint, source.architecture, {}, {}, (), tensor_types)
    need = None if settings.fit_bytes is None else _memory_need(source, settings.n_ctx, reporter)
    file_limit = settings.size_bytes
    if settings.fit_bytes is not None and need is not None:
        file_limit = settings.fit_bytes - need.beside_weights
    budget = budget_bytes(settings, problem, _overhead(source, base, problem, settings), file_limit)

    analytic = problem.analytic and "distortions" in strategy.needs
    needs_alphas = "alphas" in strategy.needs or analytic
    measured = measure(
        source,
        alphas=settings.alphas if needs_alphas else None,
        distortion=settings.distortion if "distortions" in strategy.needs and not analytic else None,
        qtypes={unit.name: unit.options for unit in units},
        cache_dir=cache_dir,
        given_alphas=alphas_file if needs_alphas else None,
        device=device,
        threads=threads,
        reporter=reporter,
    )
    if "alphas" in strategy.needs:
        for line in warnings_about(measured.alphas):
            reporter.warn(line)
    problem = replace(problem, alphas=measured.alphas, distortions=measured.distortions)
    while True:
        recipe = _recipe(base, problem, strategy.allocate(replace(problem, budget=budget)), settings, measured)
        recipe.result["file_bytes"] = plan_file(source, recipe).size
        if need is not None:
            recipe.result["memory_bytes"] = recipe.result["file_bytes"] + need.beside_weights
        # The recipe travels in the file's metadata, so its own length can push the file over by a few bytes.
        excess = 0 if file_limit is None else recipe.result["file_bytes"] - file_limit
        if excess <= 0:
            return recipe
        budget -= excess


def convert(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    threads: int = 1,
    reporter: Reporter | None = None,
) -> Conversion:
    """Write the GGUF that `recipe` makes of `source` to `out`, in one pass and atomically.

    OutputError when `out` cannot be written, AlphaQError when the recipe is for another source,
    WeightError on NaN or infinite weights. An interrupted run continues when called again.
    """
    check_recipe(recipe, source, "recipe")
    check_output(out, force=force, inputs=source.files)
    plan = plan_file(source, recipe)

    def produce(info: TensorInfo) -> Iterator[np.ndarray]:
        stored = source.tensors[info.name]
        step = max(1, _CHUNK_WEIGHTS // max(info.n_cols, 1))
        spans = [(start, min(start + step, info.n_rows)) for start in range(0, info.n_rows, step)]
        # Floats always pass through float32, exactly, because that is where NaN is looked for.
        copy = stored.qtype == info.qtype and info.qtype not in FLOAT_TYPES
        read = source.read_bytes if copy else source.read_rows
        chunks = prefetch(lambda span=span: read(info.name, *span) for span in spans)
        for rows in chunks:
            yield rows if copy else encode_rows(rows, info.qtype, threads)

    resumed = write_gguf(out, plan.header, plan.tensors, plan.size, produce, reporter)
    return Conversion(out, plan.size, recipe, resumed)


def forecast(source: Source, settings: AllocationSettings, n_ctx: int, *, reporter: Reporter | None = None) -> Forecast:
    """What `source` can become with the types `settings` allow, and what of it runs in how much memory.

    Reads no weights; a budget in `settings` is not looked at.
    """
    settings = replace(settings, bpw=None)
    tensor_types, fixed = choose_types(source, settings.overrides)
    units = make_units(source.stacks, fixed, settings.types)
    problem = make_problem(units, settings, alignment_of(source))
    base = Recipe(TOOL, _NO_FINGERPRINT, source.architecture, {}, {}, (), tensor_types)
    other = _overhead(source, base, problem, settings) + source.omitted_bytes
    need = _memory_need(source, n_ctx, reporter or Silent())
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


def _memory_need(source: Source, n_ctx: int, reporter: Reporter) -> MemoryNeed:
    need = memory_need(source.fields, source.tensors, ContextSettings(n_ctx))
    for note in need.notes:
        reporter.note(note)
    return need


def _overhead(source: Source, base: Recipe, problem: Problem, settings: AllocationSettings) -> int:
    """Bytes of the file beside its expert stacks, with a recipe as long as the real one will be."""
    choice = smallest_choice(problem)
    rows = np.arange(len(choice))
    numbers = np.full(len(choice), _SOME_NUMBER)
    placeholder = Allocation(choice, numbers, *[_SOME_NUMBER] * 3, method="highs", sensitivity=numbers)
    provisional = _recipe(base, problem, placeholder, settings, None)
    alphas = dict.fromkeys(("alpha_median", "alpha_min", "alpha_max"), _SOME_NUMBER)
    longest = tuple(replace(unit, **alphas) for unit in provisional.units)
    size = plan_file(source, replace(provisional, units=longest)).size
    return size + _SETTINGS_BYTES - int(problem.size[rows, choice].sum())


def _recipe(
    base: Recipe,
    problem: Problem,
    allocation: Allocation,
    settings: AllocationSettings,
    measured: Measurements | None,
) -> Recipe:
    units = []
    for u, unit in enumerate(problem.units):
        qtype = problem.qtypes[int(allocation.choice[u])]
        spread = spread_of(measured.alphas[key_of(m)] for m in unit.matrices) if measured and measured.alphas else None
        units.append(
            RecipeUnit(
                tensor=unit.name,
                layer=unit.bid,
                proj=unit.proj,
                n_weights=unit.n_weights,
                qtype=qtype,
                n_bytes=unit_bytes(unit, qtype),
                alpha_median=spread.median if spread else None,
                alpha_min=spread.low if spread else None,
                alpha_max=spread.high if spread else None,
                sensitivity=None if allocation.sensitivity is None else float(allocation.sensitivity[u]),
                cost=None if allocation.unit_cost is None else float(allocation.unit_cost[u]),
            )
        )
    recorded: dict[str, Any] = {
        "strategy": settings.strategy,
        "bpw": settings.bpw,
        "size_bytes": settings.size_bytes,
        "fit_bytes": settings.fit_bytes,
        "n_ctx": None if settings.fit_bytes is None else settings.n_ctx,
        "gamma": settings.gamma,
        "alpha_reference": settings.alpha_reference,
        "seed": settings.alphas.seed,
        "distortion": settings.distortion.kind,
        "types": None if settings.types is None else [q.name for q in settings.types],
        "tensor_types": [f"{pattern}={qtype.name}" for pattern, qtype in settings.overrides],
        "alphas": measured.alpha_header if measured else {},
        "distortions": measured.distortion_header if measured else {},
    }
    recipe = replace(base, settings=recorded, result={}, units=tuple(units))
    recipe.result.update(
        {
            "expert_bpw": recipe.expert_bpw,
            "expert_bytes": recipe.expert_bytes,
            **allocation.parameters,
            "cost": allocation.cost,
            "lower_bound": allocation.lower_bound,
            "gap": allocation.gap,
            "method": allocation.method,
            "distortion_standard_error": _relative_error(problem, allocation, measured),
        }
    )
    return recipe


def _relative_error(problem: Problem, allocation: Allocation, measured: Measurements | None) -> float | None:
    """Standard error of the allocation's summed squared error from sampling rows, relative to the sum."""
    if not measured or not measured.distortions:
        return None
    chosen = [
        measured.distortions[key_of(m), problem.qtypes[int(allocation.choice[u])]]
        for u, unit in enumerate(problem.units)
        for m in unit.matrices
    ]
    total = sum(d.squared_error for d in chosen)
    return float(np.sqrt(sum(d.standard_error**2 for d in chosen)) / total) if total else 0.0
