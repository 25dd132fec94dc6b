"""`alphaq-gguf alphas`: measure PL_Alpha_Hill of every expert matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint import open_source
from ..console import Console, format_count
from ..ledger import format_value, render_ledger
from ..measure import ALPHA_COLUMNS, alphas_header_text
from ..pipeline import measure_source
from ..spread import spread_by, spread_of
from ..writer import check_output, write_atomically
from . import options as o

NAME = "alphas"


def command(
    source: o.Source,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV file to write; `--alphas` of other commands reads it.")
    ] = None,
    spectrum: o.Spectrum = o.SpectrumName.farms,
    estimator: o.Estimator = o.EstimatorName.hill,
    tiles: o.Tiles = "auto",
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    threads: o.Threads = None,
    cache_dir: o.CacheDir = None,
    pre_tokenizer: o.PreTokenizer = None,
    allow_requantize: o.AllowRequantize = False,
    force: o.Force = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Measure how heavy-tailed each expert's weight spectrum is (PL_Alpha_Hill; smaller = heavier tail)."""
    console = Console(quiet=quiet, as_json=json)
    settings = o.alpha_settings(spectrum, estimator, tiles, seed)
    opened = open_source(source, allow_requantize=allow_requantize, pre_tokenizer=pre_tokenizer)
    if output is not None:
        check_output(output, force=force, inputs=opened.files)
    n_threads = o.threads_or_all(threads)
    found = measure_source(
        opened,
        settings,
        cache_dir=o.cache_or_default(cache_dir),
        device=o.check_device(device),
        threads=n_threads,
        reporter=console,
    )
    layer_of = {stack.name: stack.bid for stack in opened.stacks}
    matrices = [m for stack in opened.stacks for m in stack.matrices]
    rows = []
    for m in matrices:
        alpha = found.alphas[m.stack, m.xid, m.proj]
        values = (m.stack, m.bid, m.xid, m.proj, m.n_rows, m.n_cols, alpha.alpha, alpha.variance)
        values += (alpha.k, alpha.n, alpha.spectrum, alpha.problem)
        rows.append({c: format_value(v) for c, v in zip(ALPHA_COLUMNS, values, strict=True)})
    if output is not None:
        write_atomically(output, render_ledger(found.alpha_header, ALPHA_COLUMNS, rows))
    spreads = spread_by(found.alphas, layer_of)
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
            f"{overall.count} matrices ({format_count(sum(s.n_weights for s in opened.stacks), 'weights')}): "
            f"alpha {overall.low:.3f} to {overall.high:.3f}, std(ln alpha) {overall.log_std:.4f}"
        )
    if output is not None:
        console.result(f"Wrote {output}")
    console.json({"settings": found.alpha_header, "alphas": rows, "output": str(output) if output else None})
