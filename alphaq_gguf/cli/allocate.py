"""`alphaq-gguf allocate`: choose a type for every expert stack and save the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..pipeline import allocate
from ..recipe import save_recipe, tensor_type_lines, to_json
from ..strategy_comparison import compare_strategies, to_plain
from ..writer import check_output, replacing, write_atomically
from .allocation_options import ALL_STRATEGIES, AlphaOptions, BudgetOptions
from .options import EncodingOptions, OutputOptions, SourceOptions, grouped
from .show import show_comparison, show_recipe

NAME = "allocate"


@grouped
def command(
    checkpoint: SourceOptions,
    budget: BudgetOptions,
    alphas: AlphaOptions,
    machine: EncodingOptions,
    shown: OutputOptions,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Recipe file (JSON) to write.")] = None,
    tensor_type_file: Annotated[
        Path | None, typer.Option(help="Also write what `llama-quantize --tensor-type-file` reads.")
    ] = None,
) -> None:
    """Spend a bit budget over the expert stacks and save the choice as a recipe for `convert --recipe`."""
    console = shown.console()
    settings = budget.settings(alphas.settings())
    if tensor_type_file is not None and settings.granularity != "stack":
        raise UsageError("--tensor-type-file: llama-quantize knows one type per tensor", "use --granularity stack")
    source = checkpoint.open(console)
    outputs = [path for path in (output, tensor_type_file) if path is not None]
    if len(outputs) == 2 and outputs[0].resolve() == outputs[1].resolve():
        raise UsageError(f"--output and --tensor-type-file are the same file: {output}")
    for path in outputs:
        check_output(path, force=shown.force, inputs=source.files)
    if settings.strategy == ALL_STRATEGIES:
        if outputs:
            raise UsageError("--strategy all compares strategies and saves none", "choose one to save its recipe")
        found = compare_strategies(source, settings, alphas_file=budget.alphas, reporter=console, **machine.measuring())
        show_comparison(console, found)
        console.json(to_plain(found))
        return
    recipe = allocate(source, settings, alphas_file=budget.alphas, reporter=console, **machine.measuring())
    if output is not None:
        with replacing(output) as temporary:
            save_recipe(recipe, temporary)
    if tensor_type_file is not None:
        write_atomically(tensor_type_file, tensor_type_lines(recipe))
    show_recipe(console, recipe)
    for path in outputs:
        console.result(f"Wrote {path}")
    console.json(to_json(recipe))
