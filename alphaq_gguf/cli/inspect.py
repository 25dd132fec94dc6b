"""`alphaq-gguf inspect`: what is inside a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console import Console, format_count
from ..describe import describe_file
from ..qtypes import QType
from .show import type_grid

NAME = "inspect"


def command(
    file: Annotated[Path, typer.Argument(help="GGUF file.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show a GGUF's types per layer and projection, bits per weight and sizes, and the recipe if it is ours."""
    console = Console(as_json=json)
    info = describe_file(file)
    console.result(f"{info['name'] or file.name}: {info['architecture']}, {format_count(info['size_bytes'], 'bytes')}")
    if info["experts"]:
        columns, rows = type_grid((s["layer"], s["proj"], QType[s["qtype"]]) for s in info["stacks"])
        console.table("Types of the expert stacks", columns, rows)
    console.table(
        "Tensors",
        ["type", "tensors", "weights", "size", "share"],
        [
            [
                name,
                str(group["tensors"]),
                format_count(group["weights"], "weights"),
                format_count(group["bytes"], "bytes"),
                f"{100 * group['bytes'] / info['tensor_bytes']:.1f} %",
            ]
            for name, group in info["types"].items()
        ],
    )
    if info["experts"]:
        e = info["experts"]
        console.result(
            f"Experts: {e['count']} per layer, {format_count(e['weights'], 'weights')} at {e['bpw']:.4g} bits, "
            f"{format_count(e['bytes'], 'bytes')}"
        )
    console.result(f"Whole model: {info['bpw']:.4g} bits per weight")
    if info["alphaq"]:
        for key, value in info["alphaq"].items():
            console.result(f"alphaq.{key}: {value:.4g}" if isinstance(value, float) else f"alphaq.{key}: {value}")
    console.json(info)
