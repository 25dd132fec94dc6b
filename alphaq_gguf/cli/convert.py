"""`alphaq-gguf convert`: the main job, from checkpoint to GGUF."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint import open_source
from ..console import Console, format_count
from ..errors import UsageError
from ..modelfile import render_modelfile
from ..pipeline import allocate, convert, load_recipe, plan_file
from ..recipe import check_recipe, save_recipe, to_json
from ..writer import check_output, check_space, replacing, write_atomically
from . import options as o
from .show import show_recipe

NAME = "convert"


def command(
    source: o.Source,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="GGUF file to write. (default: SOURCE-NAME-alphaq-BUDGET.gguf here)"),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe to follow instead of allocating.", rich_help_panel="Budget and allocation"),
    ] = None,
    bpw: o.Bpw = None,
    size: o.Size = None,
    strategy: o.Strategy = o.StrategyName.alphaq,
    gamma: o.Gamma = None,
    alpha_reference: o.Reference = o.ReferenceName.all,
    types: o.Types = None,
    tensor_type: o.TensorType = None,
    distortion: o.Distortion = o.DistortionName.measured,
    distortion_rows: o.DistortionRows = "auto",
    spectrum: o.Spectrum = o.SpectrumName.farms,
    estimator: o.Estimator = o.EstimatorName.hill,
    tiles: o.Tiles = "auto",
    seed: o.Seed = 0,
    alphas: o.AlphasFile = None,
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
    device: o.Device = "cpu",
    threads: o.Threads = None,
    cache_dir: o.CacheDir = None,
    pre_tokenizer: o.PreTokenizer = None,
    allow_requantize: o.AllowRequantize = False,
    force: o.Force = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Turn an MoE checkpoint into a mixed-precision GGUF that llama.cpp and Ollama run."""
    console = Console(quiet=quiet, as_json=json)
    if recipe is not None and any((bpw, size, types, tensor_type, alphas)):
        raise UsageError(
            "--recipe already holds the allocation", "leave out --bpw, --size, --types, --tensor-type and --alphas"
        )
    settings = o.allocation_settings(
        bpw=bpw,
        size=size,
        strategy=strategy,
        gamma=gamma,
        reference=alpha_reference,
        types=types,
        tensor_type=tensor_type,
        distortion=distortion,
        distortion_rows=distortion_rows,
        alphas=o.alpha_settings(spectrum, estimator, tiles, seed),
    )
    n_threads = o.threads_or_all(threads)
    given = load_recipe(recipe) if recipe is not None else None
    opened = open_source(source, allow_requantize=allow_requantize, pre_tokenizer=pre_tokenizer)
    budget = f"{bpw:g}bpw" if bpw is not None else size or (recipe.stem if recipe else "")
    out = output or Path(f"{_stem(source)}-alphaq-{budget}.gguf")
    modelfile_path = out.with_name(out.stem + ".Modelfile")
    for path in (out, save_recipe_to, modelfile_path if modelfile else None):
        if path is not None and not dry_run:
            check_output(path, force=force, inputs=[*opened.files, *([recipe] if recipe else [])])
    if given is not None:
        check_recipe(given, opened, str(recipe))
        given.result["file_bytes"] = plan_file(opened, given).size
        chosen = given
    else:
        chosen = allocate(
            opened,
            settings,
            cache_dir=o.cache_or_default(cache_dir),
            alphas_file=alphas,
            device=o.check_device(device),
            threads=n_threads,
            reporter=console,
        )
    show_recipe(console, chosen)
    answer: dict[str, Any] = {"output": None, "recipe": to_json(chosen)}
    if not dry_run:
        check_space(out, chosen.result["file_bytes"])
        done = convert(opened, chosen, out, force=force, threads=n_threads, reporter=console)
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
        commands = _next_commands(out, modelfile_path if modelfile else None)
        console.result(
            f"Wrote {out}: {format_count(done.size, 'bytes')}, {chosen.expert_bpw:.4g} bits per expert weight"
        )
        console.result("Try it:")
        for line in commands:
            console.result(f"  {line}")
        answer |= {"output": str(out), "size_bytes": done.size, "commands": commands}
    console.json(answer)


def _stem(source: Path) -> str:
    name = source.resolve().name
    return re.sub(r"[-_.]?(f32|f16|bf16)?\.gguf$", "", name, flags=re.IGNORECASE) or "model"


def _next_commands(out: Path, modelfile: Path | None) -> list[str]:
    """How to run the file: with this tool, llama.cpp and Ollama."""
    name, file = out.stem.lower(), shlex.quote(str(out))
    script = shlex.quote(str(modelfile or out.with_suffix(".Modelfile")))
    write = "" if modelfile else f"echo FROM ./{shlex.quote(out.name)} > {script} && "
    return [
        f'alphaq-gguf run {file} "Hello"',
        f'llama-cli -m {file} -p "Hello"',
        f"llama-server -m {file}",
        f"{write}ollama create {name} -f {script} && ollama run {name}",
    ]
