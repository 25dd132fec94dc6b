"""`alphaq-gguf paper`: AlphaQ's own allocation of nominal bits, from a table of published alphas."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..console import Console
from ..errors import UsageError
from ..paper import (
    COLUMNS,
    DEFAULT_LEVELS,
    LEAST_ALPHA,
    SIZE_COLUMNS,
    PaperAllocation,
    PaperSettings,
    TableMatrix,
    allocate_table,
    histogram,
    mean_bits,
    read_table,
)
from ..writer import check_output, write_atomically
from .options import OutputOptions, grouped
from .show import gap_text

NAME = "paper"
OUTPUT_COLUMNS = (*COLUMNS, "sensitivity", "bits")


@grouped
def command(
    table: Annotated[Path, typer.Argument(help=f"CSV file with the columns {', '.join(COLUMNS)}.", show_default=False)],
    shown: OutputOptions,
    bits: Annotated[float, typer.Option(help="Largest mean of nominal bits over matrices.", show_default=False)],
    levels: Annotated[str, typer.Option(help="Bits a matrix may get, comma-separated.")] = ",".join(
        map(str, DEFAULT_LEVELS)
    ),
    gamma: Annotated[
        float | None,
        typer.Option(
            help="Strength of alpha; 0 ignores it. The authors' command line takes 1. (default: 1 / std(ln alpha))",
            show_default=False,
        ),
    ] = None,
    weighted: Annotated[
        bool,
        typer.Option(
            "--weighted",
            help=f"Count each matrix by its weights (column {' or '.join(SIZE_COLUMNS)}), not all equally.",
        ),
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Prove the optimum for tables of any size, however long it takes.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Allocation to write, .csv or .json.", show_default=False)
    ] = None,
) -> None:
    """Spend nominal bits as AlphaQ's authors do, from a table of alphas and variances, without the weights."""
    console = shown.console()
    if gamma is not None and not 0 <= gamma <= 1000:
        raise UsageError(f"--gamma {gamma:g}: expected a number from 0 to 1000")
    if output is not None:
        if output.suffix not in (".csv", ".json"):
            raise UsageError(f"--output {output}: expected a name that ends in .csv or .json")
        check_output(output, force=shown.force, inputs=[table])
    settings = PaperSettings(bits, _parse_levels(levels), gamma, exact)
    matrices = read_table(table, weighted=weighted)
    if no_exponents := sum(m.alpha < LEAST_ALPHA for m in matrices):
        console.warn(f"{no_exponents} of {len(matrices)} alphas are below {LEAST_ALPHA:g} and count as that")
    found = allocate_table(matrices, settings)
    data = _to_json(table, settings, weighted, matrices, found)
    if output is not None:
        write_atomically(output, json.dumps(data, indent=2) + "\n" if output.suffix == ".json" else _to_csv(data))
    _show(console, matrices, found, settings)
    if output is not None:
        console.result(f"Wrote {output}")
    console.json(data)


def _parse_levels(text: str) -> tuple[int, ...]:
    """`2,3,4` -> levels, ascending; UsageError otherwise."""
    try:
        levels = sorted(int(part) for part in text.split(","))
    except ValueError:
        levels = []
    if not levels or levels[0] < 1 or levels[-1] > 16 or len(set(levels)) < len(levels):
        raise UsageError(
            f"--levels {text!r}: expected different whole numbers from 1 to 16", "for example --levels 2,3,4"
        )
    return tuple(levels)


def _groups(matrices: Sequence[TableMatrix]) -> dict[str, np.ndarray]:
    """Module type -> the indices of its matrices, in the table's order."""
    types = np.array([m.module_type for m in matrices])
    return {kind: np.flatnonzero(types == kind) for kind in dict.fromkeys(types.tolist())}


def _show(console: Console, matrices: list[TableMatrix], found: PaperAllocation, settings: PaperSettings) -> None:
    """How many matrices got each level, by module type, the objective, and how near the optimum it is."""
    everything = np.arange(len(matrices))
    rows = []
    for kind, at in {**_groups(matrices), "all": everything}.items():
        counts = histogram(found.bits[at])
        mean = mean_bits([matrices[i] for i in at], found.bits[at])
        rows.append([kind, *(str(counts.get(level, 0)) for level in settings.levels), f"{mean:.4g}"])
    console.table("Matrices by bits", ["module type", *map(str, settings.levels), "mean bits"], rows)
    solution = found.solution
    console.result(f"gamma {found.gamma:.4g}")
    console.result(f"Objective {solution.cost:.10g}, {gap_text(solution.gap, solution.method)}")
    console.result(
        f"Mean {mean_bits(matrices, found.bits):.6g} bits of {settings.bits:g} over {len(matrices)} matrices"
    )


def _to_json(
    table: Path, settings: PaperSettings, weighted: bool, matrices: list[TableMatrix], found: PaperAllocation
) -> dict[str, Any]:
    solution = found.solution
    return {
        "table": str(table),
        "settings": {
            "bits": settings.bits,
            "levels": list(settings.levels),
            "gamma": found.gamma,
            "weighted": weighted,
            "exact": settings.exact,
        },
        "result": {
            "objective": solution.cost,
            "lower_bound": solution.lower_bound,
            "gap": solution.gap,
            "method": solution.method,
            "mean_bits": mean_bits(matrices, found.bits),
            "histogram": histogram(found.bits),
            "module_types": {kind: histogram(found.bits[at]) for kind, at in _groups(matrices).items()},
        },
        "matrices": [
            {
                **{column: getattr(matrix, column) for column in COLUMNS},
                "sensitivity": float(sensitivity),
                "bits": int(bits),
            }
            for matrix, sensitivity, bits in zip(matrices, found.sensitivity, found.bits, strict=True)
        ],
    }


def _to_csv(data: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, OUTPUT_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(data["matrices"])
    return out.getvalue()
