"""`alphaq-gguf serve`: a converted file behind an OpenAI-compatible API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from ..describe import describe_file
from ..evaluate.server import bind, serve
from ..plugin import prepare

NAME = "serve"


def command(
    file: Annotated[Path, typer.Argument(help="GGUF file.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    ctx: Annotated[int, typer.Option(min=16, help="Context length in tokens.")] = 2048,
    gpu_layers: Annotated[int, typer.Option(help="Layers on the GPU, -1 for all.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. (default: all cores)", show_default=False)
    ] = None,
    repack: Annotated[
        bool,
        typer.Option(
            "--repack",
            help="Rearrange weights for the processor: faster, in memory of their own, and some virtual machines "
            "crash on it.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not tell of requests.")] = False,
) -> None:
    """Serve a GGUF with llama-cpp-python's OpenAI-compatible server, until Ctrl-C.

    Files with a type per expert are run with the plug-in, compiled on first use.
    """
    console = Console(quiet=quiet)
    describe_file(file)
    # It would replace all settings made here.
    os.environ.pop("CONFIG_FILE", None)
    with bind(host, port) as listening:
        prepare(file, console)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listening.getsockname()[1]}/v1"
        serve(
            file,
            listening,
            lambda: console.text(f"Serving {file.name} at {url}\n"),
            n_ctx=ctx,
            threads=threads or os.cpu_count() or 1,
            gpu_layers=gpu_layers,
            repack=repack,
            log_level="warning" if quiet else "info",
        )
