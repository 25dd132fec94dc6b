"""`alphaq-gguf inspect`: what is inside a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import Console, format_count
from ..describe import describe_file
from .launch import NO_OLLAMA, container_commands
from .show import type_grid

NAME = "inspect"
_CONTAINER = "container."


def command(
    file: Annotated[Path, typer.Argument(help="GGUF file.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show a GGUF's types per layer and projection, bits per weight and sizes, and the recipe if it is ours."""
    console = Console(as_json=json)
    info = describe_file(file)
    console.result(f"{info['name'] or file.name}: {info['architecture']}, {format_count(info['size_bytes'], 'bytes')}")
    if info["experts"]:
        columns, rows = type_grid(
            (s["layer"], s["proj"], s["qtype"] if len(s["types"]) == 1 else "by expert") for s in info["stacks"]
        )
        console.table("Types of the expert stacks", columns, rows)
        _show_containers(console, info)
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
            + (f", of them {format_count(e['unused_bytes'], 'bytes')} unused" if e["unused_bytes"] else "")
        )
    console.result(f"Whole model: {info['bpw']:.4g} bits per weight")
    for key, value in info["alphaq"].items():
        if not key.startswith(_CONTAINER):
            console.result(f"alphaq.{key}: {value:.4g}" if isinstance(value, float) else f"alphaq.{key}: {value}")
    commands = _commands(file, info)
    if commands:
        console.result("It runs with the ggml plug-in of alphaq-gguf:")
        for line in commands:
            console.result(f"  {line}")
        console.result(NO_OLLAMA)
    console.json(info | {"commands": commands})


def _show_containers(console: Console, info: dict[str, Any]) -> None:
    """A row a stack whose experts have types of their own."""
    rows = [
        [
            f"{s['layer']} {s['proj']}",
            ", ".join(f"{name} x{count}" for name, count in s["types"].items()),
            s["qtype"],
            format_count(s["unused_bytes"], "bytes"),
        ]
        for s in info["stacks"]
        if len(s["types"]) > 1
    ]
    if rows:
        console.table("Stacks whose experts have types of their own", ["stack", "experts", "stored in", "unused"], rows)


def _commands(file: Path, info: dict[str, Any]) -> list[str]:
    """How to run a file with containers; none for an ordinary one."""
    options = info["alphaq"].get(f"{_CONTAINER}options")
    return [] if options is None else container_commands(file, str(options))
