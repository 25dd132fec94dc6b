"""`alphaq-gguf convert`: the main job, from checkpoint to GGUF."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..allocation import read_imatrix
from ..calibration.imatrix import open_importance
from ..console import format_count
from ..conversion import check_encoder
from ..errors import UsageError
from ..gguf_file import read_header
from ..guard import OPTIONS_KEY
from ..modelfile import render_modelfile
from ..pipeline import Conversion, allocate, check_imatrix, convert, load_recipe, plan_file
from ..recipe import check_recipe, save_recipe, to_json
from ..writer import check_output, replacing, write_atomically
from .allocation_options import ALL_STRATEGIES, AlphaOptions, BudgetOptions
from .launch import NO_OLLAMA, container_commands, ordinary_commands
from .options import EncodingOptions, OutputOptions, SourceOptions, grouped
from .show import show_recipe

NAME = "convert"


@grouped
def command(
    checkpoint: SourceOptions,
    budget: BudgetOptions,
    alphas: AlphaOptions,
    machine: EncodingOptions,
    shown: OutputOptions,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="GGUF file to write. (default: SOURCE-NAME-alphaq-BUDGET.gguf here)"),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe to follow instead of allocating.", rich_help_panel="Budget and allocation"),
    ] = None,
    save_recipe_to: Annotated[
        Path | None, typer.Option("--save-recipe", help="Also write the recipe (JSON).", rich_help_panel="Output")
    ] = None,
    modelfile: Annotated[
        bool,
        typer.Option("--modelfile", help="Also write an Ollama Modelfile next to the GGUF.", rich_help_panel="Output"),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Allocate and show the result, write nothing.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Turn an MoE checkpoint into a mixed-precision GGUF that llama.cpp and Ollama run."""
    console = shown.console()
    if recipe is not None and budget.given:
        raise UsageError("--recipe already holds the allocation", "leave out the options of the budget")
    settings = budget.settings(alphas.settings())
    given = load_recipe(recipe) if recipe is not None else None
    encoder = machine.open_encoder()
    if settings.strategy == ALL_STRATEGIES:
        raise UsageError(
            "--strategy all compares strategies", "run it with `alphaq-gguf allocate`, and convert with one"
        )
    if modelfile and settings.granularity != "stack":
        raise UsageError(f"--modelfile: {NO_OLLAMA}", "leave it out, or take --granularity stack")
    source = checkpoint.open(console)
    name = budget.label or (recipe.stem if recipe else "")
    out = output or Path(f"{_stem(source.name)}-alphaq-{name}.gguf")
    modelfile_path = out.with_name(out.stem + ".Modelfile")
    for path in (out, save_recipe_to, modelfile_path if modelfile else None):
        if path is not None and not dry_run:
            inputs = [path for path in (recipe, budget.alphas, budget.calibration, budget.imatrix) if path]
            check_output(path, force=shown.force, inputs=[*source.files, *inputs])
    if given is not None:
        check_recipe(given, source, str(recipe))
        imatrix = read_imatrix(source, budget.imatrix, console)
        check_imatrix(given, imatrix, str(recipe))
        check_encoder(given, encoder, str(recipe))
        plan = plan_file(source, given, imatrix)
        if modelfile and plan.containers:
            raise UsageError(
                f"--modelfile: {recipe}: {NO_OLLAMA}", "leave it out, or allocate with --granularity stack"
            )
        given.result["file_bytes"] = plan.size
        chosen = given
    else:
        chosen = allocate(source, settings, alphas_file=budget.alphas, reporter=console, **machine.measuring())
        imatrix = None if budget.imatrix is None else open_importance(budget.imatrix, source)
    show_recipe(console, chosen)
    answer: dict[str, Any] = {"output": None, "recipe": to_json(chosen)}
    if not dry_run:
        done = convert(
            source,
            chosen,
            out,
            imatrix=imatrix,
            encoder=encoder,
            force=shown.force,
            threads=machine.n_threads,
            reporter=console,
        )
        if done.resumed_bytes:
            console.note(f"Continued an interrupted run at {format_count(done.resumed_bytes, 'bytes')}")
        if save_recipe_to is not None:
            with replacing(save_recipe_to) as temporary:
                save_recipe(chosen, temporary)
        if modelfile:
            text, remark = render_modelfile(out)
            write_atomically(modelfile_path, text)
            if remark:
                console.note(remark)
        commands = _next_commands(done, modelfile_path if modelfile else None)
        size = format_count(done.size, "bytes")
        console.result(f"Wrote {out}: {size}, {done.expert_bpw:.4g} bits per expert weight")
        console.result("Try it:")
        for line in commands:
            console.result(f"  {line}")
        if done.containers:
            console.note(NO_OLLAMA)
        answer |= {"output": str(out), "size_bytes": done.size, "commands": commands}
    console.json(answer)


def _stem(name: str) -> str:
    return re.sub(r"[-_.]?(f32|f16|bf16)?\.gguf$", "", name, flags=re.IGNORECASE) or "model"


def _next_commands(done: Conversion, modelfile: Path | None) -> list[str]:
    """How to run the file: with this tool, llama.cpp and, unless experts have types of their own, Ollama."""
    out = done.path
    if done.containers:
        return container_commands(out, read_header(out).get(OPTIONS_KEY))
    script = shlex.quote(str(modelfile or out.with_suffix(".Modelfile")))
    write = "" if modelfile else f"echo FROM ./{shlex.quote(out.name)} > {script} && "
    name = out.stem.lower()
    return [*ordinary_commands(out), f"{write}ollama create {name} -f {script} && ollama run {name}"]
