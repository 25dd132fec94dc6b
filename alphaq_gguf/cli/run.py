"""`alphaq-gguf run`: let a converted file talk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..console import Console
from ..describe import describe_file
from ..evaluate.llama import LlamaModel

NAME = "run"


def command(
    file: Annotated[Path, typer.Argument(help="GGUF file.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What to say.", show_default=False)],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; do not apply the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    ctx: Annotated[int, typer.Option(min=16, help="Context length in tokens.")] = 2048,
    gpu_layers: Annotated[int, typer.Option(help="Layers on the GPU, -1 for all.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. (default: all cores)")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the text.")] = False,
) -> None:
    """Generate text from a GGUF with llama.cpp (through llama-cpp-python)."""
    console = Console(quiet=quiet)
    describe_file(file)
    with LlamaModel(
        file, n_ctx=ctx, threads=threads or os.cpu_count(), all_logits=False, gpu_layers=gpu_layers, seed=seed
    ) as model:
        chat = model.has_chat_template and not raw
        if not chat and not raw:
            console.note("The file has no chat template: continuing the prompt as text")
        for piece in model.generate(prompt, max_tokens=max_tokens, temperature=temperature, chat=chat, system=system):
            console.text(piece)
    console.text("\n")
