"""What came of an allocation, as a recipe."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .budget import AllocationSettings, matrices_bytes
from .calibration.imatrix import ImportanceMatrix
from .measurements import Measurements, key_of
from .recipe import Recipe, RecipeUnit
from .spread import spread_of
from .strategies import Allocation, Problem
from .strategies.base import matrix_type


def make_recipe(
    base: Recipe,
    problem: Problem,
    allocation: Allocation,
    settings: AllocationSettings,
    measured: Measurements | None,
    imatrix: ImportanceMatrix | None,
    encoder: str,
) -> Recipe:
    """`base` with a unit for each choice, the settings behind it and what they led to, but for the file's size."""
    units = []
    for u, unit in enumerate(problem.units):
        # A whole expert's choice is told tensor by tensor, in the types its rows really take.
        parts = [list(group) for _, group in groupby(unit.matrices, key=lambda m: m.stack)]
        for matrices in parts:
            qtype = matrix_type(matrices[0], problem.qtypes[int(allocation.choice[u])])
            known = measured and measured.alphas
            spread = spread_of(known[key_of(m)] for m in matrices) if known else None
            cost = None if allocation.unit_cost is None or len(parts) > 1 else float(allocation.unit_cost[u])
            units.append(
                RecipeUnit(
                    tensor=matrices[0].stack,
                    layer=unit.bid,
                    proj=unit.proj if len(parts) == 1 else matrices[0].proj,
                    n_weights=sum(m.n_rows * m.n_cols for m in matrices),
                    qtype=qtype,
                    n_bytes=matrices_bytes(matrices, qtype),
                    expert=unit.xid,
                    alpha_median=spread.median if spread else None,
                    alpha_min=spread.low if spread else None,
                    alpha_max=spread.high if spread else None,
                    sensitivity=None if allocation.sensitivity is None else float(allocation.sensitivity[u]),
                    cost=cost,
                )
            )
    recorded: dict[str, Any] = {
        "strategy": settings.strategy,
        "scope": settings.scope,
        "containers": None if settings.granularity == "stack" else settings.containers,
        "bpw": settings.bpw,
        "size_bytes": settings.size_bytes,
        "fit_bytes": settings.fit_bytes,
        "n_ctx": None if settings.fit_bytes is None else settings.n_ctx,
        "gamma": settings.gamma,
        "alpha_reference": settings.alpha_reference,
        "routing_mass": settings.routing_mass,
        "initial_router": None if settings.initial_router is None else settings.initial_router.name,
        "calibration": None if settings.calibration is None else settings.calibration.name,
        "imatrix": None if imatrix is None else {"file": Path(imatrix.label).name, "digest": imatrix.digest},
        "encoder": encoder,
        "exponents": settings.exponents if settings.strategy == "pmq" else None,
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
            **_stored(problem, allocation, recipe),
            **allocation.parameters,
            "cost": allocation.cost,
            "lower_bound": allocation.lower_bound,
            "gap": allocation.gap,
            "method": allocation.method,
            "distortion_standard_error": _relative_error(problem, allocation, measured),
        }
    )
    return recipe


def _stored(problem: Problem, allocation: Allocation, recipe: Recipe) -> dict[str, Any]:
    """Bytes of the experts: their own, or what a file stores where the budget counts that."""
    if problem.stack_alignment is None:
        return {"expert_bpw": recipe.expert_bpw, "expert_bytes": recipe.expert_bytes}
    stacks = problem.stacks(allocation.choice).values()
    n_bytes = sum(stack.n_bytes for stack in stacks)
    return {
        "expert_bpw": n_bytes * 8 / sum(unit.n_weights for unit in problem.units),
        "expert_bytes": n_bytes,
        "wasted_bytes": n_bytes - sum(stack.n_payload_bytes for stack in stacks),
        "containers": sum(stack.is_container for stack in stacks),
    }


def _relative_error(problem: Problem, allocation: Allocation, measured: Measurements | None) -> float | None:
    """Standard error of the allocation's summed squared error from sampling rows, relative to the sum."""
    if not measured or not measured.distortions:
        return None
    chosen = [
        measured.distortions[key_of(m), matrix_type(m, problem.qtypes[int(allocation.choice[u])])]
        for u, unit in enumerate(problem.units)
        for m in unit.matrices
    ]
    total = sum(d.squared_error for d in chosen)
    return float(np.sqrt(sum(d.standard_error**2 for d in chosen)) / total) if total else 0.0
