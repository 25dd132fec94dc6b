"""The stages composed: source -> measurements -> recipe -> GGUF. This module is the public Python API."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFValueType

from . import __version__
from .checkpoint import ExpertStack, Source, open_source
from .encode import encode_rows
from .errors import BudgetError, UsageError
from .gguf_file import Field, TensorInfo, align, build_header, make_field
from .measure import AlphaSettings, DistortionSettings, Measurements, key_of, measure
from .qtypes import FLOAT_TYPES, QType, bpw, candidates, file_type, row_bytes
from .recipe import Recipe, RecipeUnit, check_recipe, load_recipe, to_json
from .reporter import Reporter, Silent
from .spread import spread_of, warnings_about
from .strategies import STRATEGIES, Allocation, Problem, Unit
from .tensor_types import Override, choose_types
from .writer import check_output, prefetch, write_gguf

__all__ = [
    "AllocationSettings",
    "Conversion",
    "Plan",
    "allocate",
    "convert",
    "load_recipe",
    "measure_source",
    "open_source",
    "plan_file",
]

TOOL = f"alphaq-gguf {__version__}"
# Weights read and encoded at once: 16 MiB of float32, enough for every core to have a share.
_CHUNK_WEIGHTS = 1 << 22
_ALIGNMENT_KEY = "general.alignment"
# Keys that describe the output and not the source.
_OWN_KEYS = ("general.file_type", "general.quantization_version", "general.quantized_by")


@dataclass(frozen=True)
class AllocationSettings:
    """What to allocate. Exactly one of `bpw` (over expert weights) and `size_bytes` (whole file) is given.

    `gamma` None asks for the rule 1 / std(ln alpha); `types` restricts the types of expert stacks;
    `overrides` set the types of single tensors.
    """

    bpw: float | None = None
    size_bytes: int | None = None
    strategy: str = "alphaq"
    gamma: float | None = None
    alpha_reference: str = "all"
    types: tuple[QType, ...] | None = None
    overrides: tuple[Override, ...] = ()
    alphas: AlphaSettings = field(default_factory=AlphaSettings)
    distortion: DistortionSettings = field(default_factory=DistortionSettings)


@dataclass(frozen=True)
class Plan:
    """A file laid out: header bytes, tensors with offsets in writing order, size in bytes."""

    header: bytes
    tensors: list[TensorInfo]
    size: int


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
    strategy = STRATEGIES[settings.strategy]
    tensor_types, fixed = choose_types(source, settings.overrides)
    units = _make_units(source.stacks, fixed, settings.types)
    qtypes = tuple(sorted({q for unit in units for q in unit.options}, key=bpw))
    allowed = np.array([[q in unit.options for q in qtypes] for unit in units])
    n_bytes = np.array(
        [[_stack_bytes(unit, q) if q in unit.options else 0 for q in qtypes] for unit in units],
        dtype=np.int64,
    )
    base = Recipe(TOOL, source.fingerprint, source.architecture, {}, {}, (), tensor_types)
    problem = Problem(
        units,
        qtypes,
        n_bytes,
        allowed,
        0,
        analytic=settings.distortion.kind == "analytic",
        gamma=settings.gamma,
        alpha_reference=settings.alpha_reference,
        seed=settings.alphas.seed,
    )

    # The budget is checked on a provisional recipe first, so that an impossible one costs no measuring.
    sizes = _budget_sizes(problem, source, settings)
    smallest = _recipe(base, problem, _extreme(problem, sizes, largest=False), settings, None)
    largest = _recipe(base, problem, _extreme(problem, sizes, largest=True), settings, None)
    problem = replace(problem, size=sizes)
    overhead = plan_file(source, smallest).size - _total(problem, smallest)
    budget = _check_budget(settings, problem, smallest, largest, overhead)

    needs = strategy.needs
    measured = Measurements({}, {}, {}, {})
    if needs:
        analytic = problem.analytic
        measured = measure(
            source,
            alphas=settings.alphas if "alphas" in needs or analytic else None,
            distortion=settings.distortion if "distortions" in needs and not analytic else None,
            qtypes={unit.name: unit.options for unit in units},
            cache_dir=cache_dir,
            given_alphas=alphas_file if "alphas" in needs or analytic else None,
            device=device,
            threads=threads,
            reporter=reporter,
        )
        if "alphas" in needs:
            for line in warnings_about(measured.alphas):
                reporter.warn(line)
    problem = replace(problem, alphas=measured.alphas, distortions=measured.distortions)
    while True:
        allocation = strategy.allocate(replace(problem, budget=budget))
        recipe = _recipe(base, replace(problem, size=n_bytes), allocation, settings, measured)
        if settings.size_bytes is None:
            break
        # The recipe travels in the file's metadata, so its own length can push the file over by a few bytes.
        excess = plan_file(source, recipe).size - settings.size_bytes
        if excess <= 0:
            break
        budget -= excess
    recipe.result["file_bytes"] = plan_file(source, recipe).size
    return recipe


def plan_file(source: Source, recipe: Recipe) -> Plan:
    """Lay out the file `recipe` makes of `source`, without reading any weights."""
    types = recipe.types
    infos = [TensorInfo(info.name, info.shape, types[info.name]) for info in source.tensors.values()]
    fields = _output_fields(source, recipe, infos)
    alignment = next((f.value for f in fields if f.key == _ALIGNMENT_KEY), 32)
    header, placed, size = build_header(fields, infos, alignment)
    return Plan(header, placed, size)


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


def _make_units(
    stacks: Sequence[ExpertStack], fixed: dict[str, QType], types: tuple[QType, ...] | None
) -> tuple[Unit, ...]:
    units = []
    for stack in stacks:
        options = (fixed[stack.name],) if stack.name in fixed else candidates(stack.n_cols, types)
        if not options:
            names = ", ".join(q.name for q in types or ())
            raise UsageError(
                f"--types {names}: none fits {stack.name} with rows of {stack.n_cols}",
                f"add one of {', '.join(q.name for q in candidates(stack.n_cols))}",
            )
        units.append(
            Unit(stack.name, stack.bid, stack.proj, stack.n_cols, stack.n_weights, tuple(stack.matrices), options)
        )
    return tuple(units)


def _stack_bytes(unit: Unit, qtype: QType) -> int:
    return unit.n_weights // unit.n_cols * row_bytes(qtype, unit.n_cols)


def _budget_sizes(problem: Problem, source: Source, settings: AllocationSettings) -> np.ndarray:
    """Bytes that count against the budget: a file-size budget pays for alignment too."""
    if settings.size_bytes is None:
        return problem.size
    alignment = next((f.value for f in source.fields if f.key == _ALIGNMENT_KEY), 32)
    return np.vectorize(lambda n: align(int(n), alignment), otypes=[np.int64])(problem.size)


def _extreme(problem: Problem, sizes: np.ndarray, *, largest: bool) -> Allocation:
    """The smallest or largest allocation there is."""
    masked = np.where(problem.allowed, sizes, -1 if largest else np.iinfo(np.int64).max)
    return Allocation(masked.argmax(axis=1) if largest else masked.argmin(axis=1))


def _total(problem: Problem, recipe: Recipe) -> int:
    """Bytes of a recipe's stacks in the budget's own measure."""
    column = {qtype: t for t, qtype in enumerate(problem.qtypes)}
    return sum(int(problem.size[u, column[unit.qtype]]) for u, unit in enumerate(recipe.units))


def _check_budget(
    settings: AllocationSettings, problem: Problem, smallest: Recipe, largest: Recipe, overhead: int
) -> int:
    """The budget in bytes for expert stacks; BudgetError or UsageError when there is no sensible one."""
    n_weights = sum(unit.n_weights for unit in problem.units)
    least, most = _total(problem, smallest), _total(problem, largest)
    if (settings.bpw is None) == (settings.size_bytes is None):
        raise UsageError("give exactly one budget", "--bpw 3.5 (over expert weights) or --size 8GiB (whole file)")
    if settings.size_bytes is not None:
        budget = settings.size_bytes - overhead
        if budget < least:
            raise BudgetError(
                f"a file of {settings.size_bytes:,} bytes is impossible: "
                f"feasible are {overhead + least:,} to {overhead + most:,} bytes",
                f"ask for at least {(overhead + least) / 2**30:.2f} GiB, or allow smaller types with --tensor-type",
            )
        return min(budget, most)
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
                n_bytes=_stack_bytes(unit, qtype),
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


def _output_fields(source: Source, recipe: Recipe, infos: Sequence[TensorInfo]) -> list[Field]:
    """The source's metadata unchanged, then what describes this file."""
    by_type: dict[QType, int] = {}
    for info in infos:
        by_type[info.qtype] = by_type.get(info.qtype, 0) + info.n_bytes
    kept = [f for f in source.fields if f.key not in _OWN_KEYS and not f.key.startswith("alphaq.")]
    own: list[tuple[str, GGUFValueType, Any]] = [
        ("general.quantized_by", GGUFValueType.STRING, "alphaq-gguf"),
        ("general.file_type", GGUFValueType.UINT32, int(file_type(by_type))),
        ("general.quantization_version", GGUFValueType.UINT32, GGML_QUANT_VERSION),
        ("alphaq.version", GGUFValueType.STRING, recipe.tool.removeprefix("alphaq-gguf ")),
        ("alphaq.strategy", GGUFValueType.STRING, str(recipe.settings.get("strategy"))),
        ("alphaq.expert_bpw", GGUFValueType.FLOAT32, recipe.expert_bpw),
        ("alphaq.source_hash", GGUFValueType.STRING, recipe.source),
    ]
    for key in ("bpw", "size_bytes"):
        if recipe.settings.get(key) is not None:
            vtype = GGUFValueType.FLOAT32 if key == "bpw" else GGUFValueType.UINT64
            own.append((f"alphaq.budget_{key}", vtype, recipe.settings[key]))
    if recipe.result.get("gamma") is not None:
        own.append(("alphaq.gamma", GGUFValueType.FLOAT32, recipe.result["gamma"]))
    # The file's own tensor table holds the other tensors' types, and file_bytes would describe the very
    # file it is in: leaving both out keeps the metadata small and the layout free of a cycle.
    data = {key: value for key, value in to_json(recipe).items() if key != "tensors"}
    data["result"] = {key: value for key, value in data["result"].items() if key != "file_bytes"}
    own.append(("alphaq.recipe", GGUFValueType.STRING, json.dumps(data, separators=(",", ":"))))
    return kept + [make_field(*entry) for entry in own]
