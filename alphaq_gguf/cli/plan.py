"""`alphaq-gguf plan`: what a checkpoint can become, before anything large is read or downloaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ..checkpoint import open_source
from ..console import Console, format_count
from ..forecast import GIB, Forecast
from ..pipeline import AllocationSettings, forecast
from .options import CONTEXT_HELP, parse_types

NAME = "plan"


def command(
    source: Annotated[
        str, typer.Argument(help="Checkpoint directory, GGUF file, or OWNER/NAME on the Hub.", show_default=False)
    ],
    ctx: Annotated[int, typer.Option(min=1, help=CONTEXT_HELP.capitalize())] = 8192,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a repository on the Hub.", show_default=False)
    ] = None,
    types: Annotated[
        str | None, typer.Option(help="Types allowed for expert stacks, comma-separated.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show the expert layout, the feasible sizes, and what fits your memory; reads config and headers only."""
    console = Console(as_json=json)
    opened = open_source(source, revision=revision, headers_only=True, allow_requantize=True, reporter=console)
    for remark in opened.remarks:
        console.warn(remark)
    found = forecast(opened, AllocationSettings(types=parse_types(types)), ctx)
    share = 100 * found.n_expert_weights / found.n_weights
    console.result(
        f"{opened.label}: {found.architecture}, {found.n_layers} layers, {format_count(found.n_weights, 'weights')}, "
        f"{share:.1f} % of them in experts"
    )
    console.table(
        "Expert stacks",
        ["layers", "projections", "experts", "rows x cols", "types"],
        [
            [
                str(g.first_layer) if g.first_layer == g.last_layer else f"{g.first_layer}-{g.last_layer}",
                "+".join(g.projs),
                str(g.n_experts),
                f"{g.n_rows} x {g.n_cols}",
                " ".join(q.name for q in g.types),
            ]
            for g in found.groups
        ],
    )
    for remark in dict.fromkeys(f"{'+'.join(g.projs)}: {g.remark}" for g in found.groups if g.remark):
        console.result(remark)
    console.result(f"Bits per expert weight: {found.least_bpw:.4g} to {found.most_bpw:.4g}")
    about = "about " if found.is_estimate else ""
    console.result(
        f"File: {about}{format_count(found.least_bytes, 'bytes')} to {format_count(found.most_bytes, 'bytes')}, "
        f"{format_count(found.other_bytes, 'bytes')} of it not experts"
    )
    need = found.need
    console.result(
        f"Beside the file, at context {ctx}: KV cache {format_count(need.kv_cache, 'bytes')}, "
        f"compute buffers {format_count(need.compute, 'bytes')}, runtime {format_count(need.fixed, 'bytes')}"
    )
    console.table(
        f"What fits into memory at context {ctx}",
        ["memory", "file", "bits per expert weight", "option"],
        _fit_rows(found, ctx),
    )
    console.json(_plain(opened.label, found))


def _fit_rows(found: Forecast, ctx: int) -> list[list[str]]:
    rows = []
    for fit in found.fits:
        size = f"{fit.memory // GIB} GiB"
        if fit.file_bytes is None or fit.bpw is None:
            lacking = found.least_bytes + found.need.beside_weights - fit.memory
            rows.append([size, f"lacks {format_count(lacking, 'bytes')}", "-", "-"])
        else:
            full = " (the largest types)" if fit.bpw >= found.most_bpw else ""
            option = f"--fit {fit.memory // GIB}GiB --ctx {ctx}"
            rows.append([size, format_count(fit.file_bytes, "bytes"), f"{fit.bpw:.4g}{full}", option])
    return rows


def _plain(label: str, found: Forecast) -> dict[str, object]:
    """The forecast as JSON: types by name."""
    data = asdict(found)
    for group in data["groups"]:
        group["types"] = [q.name for q in group["types"]]
    return {"source": label, **data}
