"""`alphaq-gguf allocate`: choose a type for every expert stack and save the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint import open_source
from ..console import Console
from ..errors import UsageError
from ..pipeline import allocate
from ..recipe import save_recipe, tensor_type_lines, to_json
from ..writer import check_output, replacing, write_atomically
from . import options as o
from .show import show_recipe

NAME = "allocate"


def command(
    source: o.Source,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Recipe file (JSON) to write.")] = None,
    tensor_type_file: Annotated[
        Path | None, typer.Option(help="Also write what `llama-quantize --tensor-type-file` reads.")
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
    device: o.Device = "cpu",
    threads: o.Threads = None,
    cache_dir: o.CacheDir = None,
    pre_tokenizer: o.PreTokenizer = None,
    allow_requantize: o.AllowRequantize = False,
    force: o.Force = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Spend a bit budget over the expert stacks and save the choice as a recipe for `convert --recipe`."""
    console = Console(quiet=quiet, as_json=json)
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
    opened = open_source(source, allow_requantize=allow_requantize, pre_tokenizer=pre_tokenizer)
    outputs = [path for path in (output, tensor_type_file) if path is not None]
    if len(outputs) == 2 and outputs[0].resolve() == outputs[1].resolve():
        raise UsageError(f"--output and --tensor-type-file are the same file: {output}")
    for path in outputs:
        check_output(path, force=force, inputs=opened.files)
    recipe = allocate(
        opened,
        settings,
        cache_dir=o.cache_or_default(cache_dir),
        alphas_file=alphas,
        device=o.check_device(device),
        threads=o.threads_or_all(threads),
        reporter=console,
    )
    if output is not None:
        with replacing(output) as temporary:
            save_recipe(recipe, temporary)
    if tensor_type_file is not None:
        write_atomically(tensor_type_file, tensor_type_lines(recipe))
    show_recipe(console, recipe)
    for path in outputs:
        console.result(f"Wrote {path}")
    console.json(to_json(recipe))
