"""What there is to decide and what it may cost: units with their options, sizes, and the budget in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from .checkpoint import ExpertMatrix, ExpertStack
from .errors import BudgetError, UsageError
from .gguf_file import align
from .measurements import AlphaSettings, DistortionSettings
from .qtypes import QType, bpw, candidates, row_bytes
from .recipe import GRANULARITIES
from .strategies import Problem, Unit
from .strategies.base import matrix_type
from .tensor_types import Override

DEFAULT_CONTEXT = 8192
ROUTING_MASSES = ("none", "count", "gate2", "true-count", "true-gate2")
SCOPES = ("global", "layer", "projection")


@dataclass(frozen=True)
class AllocationSettings:
    """What to allocate. Exactly one of `bpw` (over expert weights), `size_bytes` (whole file) and
    `fit_bytes` (memory for the file, and for what running it at a context of `n_ctx` tokens takes) is given.

    `granularity` is what gets a type of its own, one of GRANULARITIES. Where that is no stack, `containers` has the
    budget count what a GGUF stores, stacks of several types with the unused bytes of their containers, and not the
    experts' own bytes alone. `scope` is what the budget is divided over evenly first, one of SCOPES. `routing_mass`,
    one of ROUTING_MASSES, multiplies costs by how much random vectors use an expert, or text ("true-"); None leaves it
    to the strategy. `initial_router` is a safetensors file with the routers before training. `imatrix` weighs rounding
    and tells how text uses the experts, unless `calibration` does. `exponents` are PMQ's of frequency, gate weight and
    error. `gamma` None asks for the rule 1 / std(ln alpha); `types` restricts the types of expert stacks;
    `overrides` set the types of single tensors.
    """

    bpw: float | None = None
    size_bytes: int | None = None
    fit_bytes: int | None = None
    n_ctx: int = DEFAULT_CONTEXT
    granularity: str = "stack"
    containers: bool = True
    scope: str = "global"
    strategy: str = "alphaq"
    gamma: float | None = None
    alpha_reference: str = "all"
    routing_mass: str | None = None
    initial_router: Path | None = None
    calibration: Path | None = None
    imatrix: Path | None = None
    exponents: tuple[float, float, float] = (1.0, 1.0, 2.0)
    types: tuple[QType, ...] | None = None
    overrides: tuple[Override, ...] = ()
    alphas: AlphaSettings = field(default_factory=AlphaSettings)
    distortion: DistortionSettings = field(default_factory=DistortionSettings)


def make_units(
    stacks: Sequence[ExpertStack],
    fixed: dict[str, QType],
    types: tuple[QType, ...] | None,
    granularity: str = "stack",
) -> tuple[Unit, ...]:
    """What gets a type of its own, with the types the user fixed or allowed and its rows can take.

    One unit per stack, per expert of each stack ("expert"), or per expert of a layer with all its
    projections ("expert-shared"). UsageError when `types` leaves a unit without any.
    """
    if granularity not in GRANULARITIES:
        raise UsageError(f"granularity {granularity!r}: expected one of {', '.join(GRANULARITIES)}")
    options = {}
    for stack in stacks:
        options[stack.name] = (fixed[stack.name],) if stack.name in fixed else candidates(stack.n_cols, types)
        if not options[stack.name]:
            names = ", ".join(q.name for q in types or ())
            raise UsageError(
                f"--types {names}: none fits {stack.name} with rows of {stack.n_cols}",
                f"add one of {', '.join(q.name for q in candidates(stack.n_cols))}",
            )
    if granularity == "expert-shared":
        return _shared_units(stacks, options)
    units = []
    for stack in stacks:
        groups: list[tuple[int | None, list[ExpertMatrix]]] = [(None, stack.matrices)]
        if granularity == "expert":
            groups = [(xid, list(ms)) for xid, ms in groupby(stack.matrices, key=lambda m: m.xid)]
        for xid, matrices in groups:
            name = stack.name if xid is None else f"{stack.name} expert {xid}"
            units.append(_unit(name, stack.proj, matrices, options[stack.name], xid))
    return tuple(units)


def _shared_units(stacks: Sequence[ExpertStack], options: dict[str, tuple[QType, ...]]) -> tuple[Unit, ...]:
    """One unit per expert; a type is an option where each matrix can take it or llama.cpp's substitute for it."""
    matrices: dict[tuple[int, int], list[ExpertMatrix]] = {}
    for stack in stacks:
        for matrix in stack.matrices:
            matrices.setdefault((stack.bid, matrix.xid), []).append(matrix)
    units = []
    for (bid, xid), group in matrices.items():
        every = sorted({q for m in group for q in options[m.stack]}, key=bpw)
        shared = tuple(q for q in every if all(matrix_type(m, q) in options[m.stack] for m in group))
        name = f"blk.{bid} expert {xid}"
        if not shared:
            raise UsageError(
                f"{name}: no type suits all its projections", "use --granularity expert, or allow more with --types"
            )
        units.append(_unit(name, "all", group, shared, xid))
    return tuple(units)


def _unit(name: str, proj: str, matrices: Sequence[ExpertMatrix], options: tuple[QType, ...], xid: int | None) -> Unit:
    n_weights = sum(m.n_rows * m.n_cols for m in matrices)
    return Unit(name, matrices[0].bid, proj, n_weights, tuple(matrices), options, xid)


def matrices_bytes(matrices: Iterable[ExpertMatrix], qtype: QType) -> int:
    """Stored bytes of matrices whose unit is given a type, without alignment."""
    return sum(m.n_rows * row_bytes(matrix_type(m, qtype), m.n_cols) for m in matrices)


def wanted_types(units: Iterable[Unit]) -> dict[str, tuple[QType, ...]]:
    """Stack -> the types whose error its matrices must be measured under."""
    wanted: dict[str, set[QType]] = {}
    for unit in units:
        for matrix in unit.matrices:
            wanted.setdefault(matrix.stack, set()).update(matrix_type(matrix, q) for q in unit.options)
    return {stack: tuple(sorted(found, key=bpw)) for stack, found in wanted.items()}


def make_problem(units: tuple[Unit, ...], settings: AllocationSettings, alignment: int) -> Problem:
    """The problem before anything is measured. A budget for the whole file pays for alignment too.

    Where units are experts and the settings ask for containers, what they are stored in is aligned, and they are not.
    """
    qtypes = tuple(sorted({q for unit in units for q in unit.options}, key=bpw))
    # Experts lie next to each other inside a stack; only stacks are aligned.
    is_stack = all(unit.xid is None for unit in units)
    padding = alignment if settings.bpw is None else 1
    step = padding if is_stack else 1
    size = [
        [align(matrices_bytes(unit.matrices, q), step) if q in unit.options else 0 for q in qtypes] for unit in units
    ]
    return Problem(
        units,
        qtypes,
        np.array(size, dtype=np.int64),
        np.array([[q in unit.options for q in qtypes] for unit in units]),
        0,
        analytic=settings.distortion.kind == "analytic",
        gamma=settings.gamma,
        alpha_reference=settings.alpha_reference,
        exponents=settings.exponents,
        seed=settings.alphas.seed,
        stack_alignment=padding if settings.containers and settings.granularity != "stack" else None,
    )


def smallest_choice(problem: Problem) -> np.ndarray:
    """The option of least size of every unit, int [units]."""
    return np.where(problem.allowed, problem.size, np.iinfo(np.int64).max).argmin(axis=1)


def size_range(problem: Problem) -> tuple[int, int]:
    """(least, most) bytes that the units take when all have their smallest or their largest type."""
    return problem.n_bytes(smallest_choice(problem)), problem.n_bytes(problem.size.argmax(axis=1))


def check_budget(settings: AllocationSettings) -> None:
    """UsageError unless exactly one budget is given."""
    if sum(given is not None for given in (settings.bpw, settings.size_bytes, settings.fit_bytes)) != 1:
        raise UsageError(
            "give exactly one budget",
            "--bpw 3.5 (over expert weights), --size 8GiB (whole file) or --fit 12GiB (memory to run it in)",
        )


def budget_bytes(settings: AllocationSettings, problem: Problem, overhead: int, file_limit: int | None) -> int:
    """The bytes expert stacks may take: within `file_limit` together with `overhead`, else by `settings.bpw`.

    BudgetError when that is below what is feasible; its message names the feasible range.
    """
    n_weights = sum(unit.n_weights for unit in problem.units)
    least, most = size_range(problem)
    if file_limit is not None:
        budget = file_limit - overhead
        if budget >= least:
            return min(budget, most)
        smallest, largest = overhead + least, overhead + most
        if settings.fit_bytes is not None:
            beside = settings.fit_bytes - file_limit
            raise BudgetError(
                f"{settings.fit_bytes:,} bytes of memory are too few at a context of {settings.n_ctx}: KV cache and "
                f"buffers take {beside:,}, the smallest file {smallest:,}",
                f"allow at least --fit {beside + smallest}, or a shorter --ctx",
            )
        raise BudgetError(
            f"a file of {file_limit:,} bytes is impossible: feasible are {smallest:,} to {largest:,} bytes",
            f"ask for at least --size {smallest}, or allow smaller types with --tensor-type",
        )
    assert settings.bpw is not None
    # A hair more than asked for, so that 3.4375 means all Q3_K in spite of rounding; NaN fails the test.
    wanted = settings.bpw * n_weights / 8 * (1 + 1e-12)
    if not wanted >= least:
        low = np.ceil(least * 8 / n_weights * 1000) / 1000
        raise BudgetError(
            f"{settings.bpw:g} bits per expert weight is impossible: feasible are {low:g} to {most * 8 / n_weights:g}",
            "ask for more, or allow smaller types with --types",
        )
    return most if wanted >= most else int(wanted)
