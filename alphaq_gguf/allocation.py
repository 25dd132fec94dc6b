"""From a source and a budget to a recipe: measure what the strategy needs, let it spend, say what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
    smallest_choice,
)
from .calibration.imatrix import ImportanceMatrix, open_importance
from .checkpoint import Source
from .encode import ENCODERS, Encoder, find_encoder
from .layout import alignment_of, plan_file
from .measurements import key_of
from .memory import ContextSettings, MemoryNeed, memory_need
from .outcome import make_recipe
from .qtypes import QType
from .recipe import Recipe
from .reporter import Reporter, Silent
from .scope import allocate_within
from .signals import mass_of, measure_masses, measure_signals, needs_of, read_calibration
from .spread import warnings_about
from .stacking import stacking_loss
from .strategies import STRATEGIES, Allocation, Problem
from .tensor_types import choose_types

TOOL = f"alphaq-gguf {__version__}"
# A number as long as any that a recipe holds, where none is measured yet.
_SOME_NUMBER = 1.2345678901234567e-05
_SOME_SIZE = 10**15
# More than the settings of both measurements take in the recipe, which are known only when measuring begins.
_SETTINGS_BYTES = 1024


def allocate(
    source: Source,
    settings: AllocationSettings,
    *,
    cache_dir: Path,
    alphas_file: Path | None = None,
    encoder: Encoder | None = None,
    device: str = "cpu",
    threads: int = 1,
    reporter: Reporter | None = None,
) -> Recipe:
    """Choose a type for every expert stack of `source` within the budget, by the errors of `encoder` (libggml's).

    BudgetError, before anything is measured, when no allocation fits; it names the feasible range.
    """
    reporter = reporter or Silent()
    encoder = encoder or find_encoder()
    strategy = STRATEGIES[settings.strategy]
    # Errors are measured for every strategy: what stacking costs is told of all of them.
    needs = needs_of(strategy, settings) | {"distortions"}
    frame = frame_problem(source, settings, reporter)
    # Before anything is measured: what is wrong with the file should not come to light after an hour.
    calibration = read_calibration(source, settings, needs, reporter)
    masses = {}
    if mass := mass_of(strategy, settings):
        masses = measure_masses(
            source, mass, settings, calibration, cache_dir=cache_dir, threads=threads, reporter=reporter
        )
    problem, measured = measure_signals(
        source,
        settings,
        needs,
        replace(frame.problem, masses=masses),
        cache_dir=cache_dir,
        alphas_file=alphas_file,
        calibration=calibration,
        imatrix=frame.imatrix,
        encoder=encoder,
        device=device,
        threads=threads,
        reporter=reporter,
    )
    if "alphas" in strategy.needs:
        for line in warnings_about(measured.alphas):
            reporter.warn(line)
    budget = frame.problem.budget
    while True:
        allocation = allocate_within(strategy, replace(problem, budget=budget), settings.scope)
        recipe = make_recipe(frame.base, problem, allocation, settings, measured, frame.imatrix, encoder.name)
        recipe.result["stacking"] = _stacking(source, frame.fixed, settings, problem, allocation, recipe)
        if settings.granularity != "stack" and not settings.containers:
            return recipe
        recipe.result["file_bytes"] = plan_file(source, recipe, frame.imatrix).size
        if frame.need is not None:
            recipe.result["memory_bytes"] = recipe.result["file_bytes"] + frame.need.beside_weights
        # The recipe travels in the file's metadata, so its own length can push the file over by a few bytes.
        excess = 0 if frame.file_limit is None else recipe.result["file_bytes"] - frame.file_limit
        if excess <= 0:
            return recipe
        budget -= excess


@dataclass(frozen=True)
class Frame:
    """What every allocation of a source is made within: the problem with its budget, and a recipe without units.

    `fixed` are the types the user set for stacks, `imatrix` is what weighs rounding; `file_limit` and `need` are
    there when the budget is a file size or memory.
    """

    base: Recipe
    problem: Problem
    fixed: dict[str, QType]
    imatrix: ImportanceMatrix | None
    file_limit: int | None
    need: MemoryNeed | None


def frame_problem(source: Source, settings: AllocationSettings, reporter: Reporter) -> Frame:
    """Units, sizes and budget; UsageError or BudgetError when they make no sense, before anything is measured."""
    check_budget(settings)
    tensor_types, fixed = choose_types(source, settings.overrides)
    units = make_units(source.stacks, fixed, settings.types, settings.granularity)
    problem = make_problem(units, settings, alignment_of(source))
    base = Recipe(
        TOOL, source.fingerprint, source.architecture, {}, {}, (), tensor_types, granularity=settings.granularity
    )
    imatrix = read_imatrix(source, settings.imatrix, reporter)
    need, file_limit = None, settings.size_bytes
    if settings.fit_bytes is not None:
        need = memory_beside(source, settings.n_ctx, reporter)
        file_limit = settings.fit_bytes - need.beside_weights
    overhead = 0 if file_limit is None else overhead_bytes(source, base, settings, imatrix)
    budget = budget_bytes(settings, problem, overhead, file_limit)
    return Frame(base, replace(problem, budget=budget), fixed, imatrix, file_limit, need)


def read_imatrix(source: Source, path: Path | None, reporter: Reporter) -> ImportanceMatrix | None:
    """The importance matrix of `source` at `path`, with a word on what it does not cover."""
    if path is None:
        return None
    imatrix = open_importance(path, source)
    for remark in imatrix.remarks:
        reporter.warn(remark)
    if unrouted := imatrix.never_routed():
        count = sum(unrouted.values())
        total = sum(stack.n_experts for stack in source.stacks)
        reporter.warn(
            f"{imatrix.label}: {count} of {total} expert matrices were reached by no token (most in "
            f"{max(unrouted, key=unrouted.__getitem__)}): they are rounded without weights"
        )
    return imatrix


def _stacking(
    source: Source,
    fixed: dict[str, QType],
    settings: AllocationSettings,
    problem: Problem,
    allocation: Allocation,
    recipe: Recipe,
) -> dict[str, Any] | None:
    """What one type per stack costs at the bytes the allocation spends.

    Errors count as the allocation's cost table weighs them, all the same where it has none.
    """
    weights = allocation.weights or {key_of(m): 1.0 for stack in source.stacks for m in stack.matrices}
    spent: dict[int, int] = {}
    for unit in recipe.units:
        spent[unit.layer] = spent.get(unit.layer, 0) + unit.n_bytes
    found = stacking_loss(source.stacks, fixed, settings, problem, weights, spent)
    if found is None:
        return None
    layers = {str(layer): {**asdict(losses), "kept": losses.kept} for layer, losses in found.layers.items()}
    return {**asdict(found.total), "kept": found.total.kept, "layers": layers}


def memory_beside(source: Source, n_ctx: int, reporter: Reporter) -> MemoryNeed:
    need = memory_need(source.fields, source.tensors, ContextSettings(n_ctx))
    for note in need.notes:
        reporter.note(note)
    return need


def overhead_bytes(
    source: Source, base: Recipe, settings: AllocationSettings, imatrix: ImportanceMatrix | None = None
) -> int:
    """Bytes of the file beside its expert stacks, with a recipe as long as the real one will be."""
    granularity = settings.granularity if settings.containers else "stack"
    settings = replace(settings, bpw=None, granularity=granularity)
    problem = make_problem(make_units(source.stacks, {}, None, granularity), settings, alignment_of(source))
    # Two types in every stack of experts, so that the file tells of containers.
    is_odd = [unit.xid is not None and unit.xid % 2 == 1 for unit in problem.units]
    choice = np.where(is_odd, problem.size.argmax(axis=1), smallest_choice(problem))
    numbers = np.full(len(choice), _SOME_NUMBER)
    placeholder = Allocation(choice, numbers, *[_SOME_NUMBER] * 3, method="exact", sensitivity=numbers)
    base, encoder = replace(base, granularity=granularity), max(ENCODERS, key=len)
    provisional = make_recipe(base, problem, placeholder, settings, None, imatrix, encoder)
    alphas = dict.fromkeys(("alpha_median", "alpha_min", "alpha_max"), _SOME_NUMBER)
    longest = tuple(replace(unit, **alphas) for unit in provisional.units)
    # As long as any size, so that the answer does not depend on the size that is asked for.
    for key in ("size_bytes", "fit_bytes"):
        if provisional.settings[key] is not None:
            provisional.settings[key] = _SOME_SIZE
    losses = dict.fromkeys(("per_expert", "per_stack", "uniform", "kept"), _SOME_NUMBER)
    layers = {str(unit.layer): losses for unit in longest}
    provisional.result["stacking"] = {**losses, "layers": layers}
    size = plan_file(source, replace(provisional, units=longest), imatrix).size
    return size + _SETTINGS_BYTES - problem.n_bytes(choice)
