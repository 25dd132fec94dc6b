"""`alphaq-gguf alphas`: measure PL_Alpha_Hill of every expert matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import format_count
from ..ledger import format_value, render_ledger
from ..measure import alphas_header_text
from ..measurements import key_of
from ..meters import ALPHA_COLUMNS, alpha_row
from ..pipeline import measure_source
from ..spread import spread_by, spread_of
from ..writer import check_output, write_atomically
from .allocation_options import AlphaOptions
from .options import MachineOptions, OutputOptions, SourceOptions, grouped

NAME = "alphas"


@grouped
def command(
    checkpoint: SourceOptions,
    alphas: AlphaOptions,
    machine: MachineOptions,
    shown: OutputOptions,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV file to write; `--alphas` of other commands reads it.")
    ] = None,
) -> None:
    """Measure how heavy-tailed each expert's weight spectrum is (PL_Alpha_Hill; smaller = heavier tail)."""
    console = shown.console()
    settings = alphas.settings()
    source = checkpoint.open(console)
    if output is not None:
        check_output(output, force=shown.force, inputs=source.files)
    found = measure_source(source, settings, reporter=console, **machine.measuring())
    matrices = [matrix for stack in source.stacks for matrix in stack.matrices]
    rows = [
        {column: format_value(value) for column, value in alpha_row(m, found.alphas[key_of(m)]).items()}
        for m in matrices
    ]
    if output is not None:
        write_atomically(output, render_ledger(found.alpha_header, ALPHA_COLUMNS, rows))
    spreads = spread_by(found.alphas, {stack.name: stack.bid for stack in source.stacks})
    overall = spread_of(found.alphas.values())
    console.table(
        "Alpha per layer and projection",
        ["layer", "projection", "matrices", "min", "median", "max", "std(ln alpha)"],
        [
            [str(layer), proj, str(s.count), f"{s.low:.3f}", f"{s.median:.3f}", f"{s.high:.3f}", f"{s.log_std:.4f}"]
            for (layer, proj), s in spreads.items()
        ],
    )
    console.result(alphas_header_text(found.alpha_header))
    if overall:
        console.result(
            f"{overall.count} matrices ({format_count(sum(s.n_weights for s in source.stacks), 'weights')}): "
            f"alpha {overall.low:.3f} to {overall.high:.3f}, std(ln alpha) {overall.log_std:.4f}"
        )
    if output is not None:
        console.result(f"Wrote {output}")
    console.json({"settings": found.alpha_header, "alphas": rows, "output": str(output) if output else None})
