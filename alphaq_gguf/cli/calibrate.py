"""`alphaq-gguf calibrate`: see how text uses a model's experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..calibration import Calibration
from ..calibration.own_text import OWN, OWN_TOKENS
from ..calibration.run import CalibrationSettings, calibrate
from ..console import Console
from .options import CheckpointOptions, MachineOptions, OutputOptions, grouped, parse_types

NAME = "calibrate"
_MEASURED = "What is measured"


@grouped
def command(
    checkpoint: CheckpointOptions,
    machine: MachineOptions,
    shown: OutputOptions,
    text: Annotated[
        list[str],
        typer.Option(
            help=f"Text file (UTF-8), a dataset of its own; repeatable. `{OWN}`: text that the model writes itself.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. (default: SOURCE-NAME-calibration.gguf here)"),
    ] = None,
    ctx: Annotated[int, typer.Option(min=16, help="Tokens in a window.", rich_help_panel=_MEASURED)] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Tokens of each text at most. (default: all; of the model's own {OWN_TOKENS})",
            rich_help_panel=_MEASURED,
            show_default=False,
        ),
    ] = None,
    sample: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens on which the error of each type in the output of a layer is measured, which pmq needs; 0 "
            "leaves it out, and with it most of the time.",
            rich_help_panel=_MEASURED,
        ),
    ] = 4096,
    types: Annotated[
        str | None,
        typer.Option(
            help="Types whose error is measured, comma-separated. (default: all that fit)",
            rich_help_panel=_MEASURED,
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Windows that go through a layer at once.", rich_help_panel="Machine")
    ] = 8,
    gpu_layers: Annotated[
        int, typer.Option(help="Layers of a GGUF on the GPU, -1 for all.", rich_help_panel="Machine")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of every sample.", rich_help_panel=_MEASURED)] = 0,
) -> None:
    """Record how text uses the experts, for `--calibration` and `--imatrix` of convert and allocate.

    A checkpoint runs in PyTorch, one layer in memory at a time; a GGUF, quantised or not, in llama.cpp. The file
    is also an importance matrix for llama-quantize.
    """
    console = shown.console()
    source = checkpoint.open(console)
    settings = CalibrationSettings(ctx, max_tokens, sample, parse_types(types), batch, seed)
    texts = [entry if entry == OWN else Path(entry) for entry in text]
    out = output or Path(f"{source.name.removesuffix('.gguf')}-calibration.gguf")
    found = calibrate(
        source, texts, settings, out, force=shown.force, gpu_layers=gpu_layers, reporter=console, **machine.measuring()
    )
    _show(console, found)
    console.result(f"Wrote {out}")
    console.json(
        {
            "output": str(out),
            "datasets": dict(zip(found.datasets, found.n_tokens, strict=True)),
            "frequency": {bid: found.frequency(bid).tolist() for bid in found.layers},
        }
    )


def _show(console: Console, found: Calibration) -> None:
    """How unevenly the experts of each layer are used."""
    rows = []
    for bid in found.layers:
        share = found.frequency(bid)
        ranked = np.sort(share)[::-1]
        half = int(np.searchsorted(ranked.cumsum(), ranked.sum() / 2)) + 1
        rows.append([str(bid), f"{100 * ranked[0]:.3g} %", f"{100 * ranked[-1]:.3g} %", f"{half} of {len(share)}"])
    tokens = ", ".join(f"{name} {count}" for name, count in zip(found.datasets, found.n_tokens, strict=True))
    console.table("Experts by tokens routed", ["layer", "most", "least", "experts with half of all"], rows)
    console.result(f"Tokens: {tokens}")
