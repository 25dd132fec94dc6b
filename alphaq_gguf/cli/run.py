"""`alphaq-gguf run`: let a converted file talk."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..allocation import read_imatrix
from ..checkpoint import open_source
from ..console import Console
from ..describe import describe_file
from ..errors import UsageError
from ..evaluate.llama import LlamaModel
from ..plugin import prepare
from ..recipe import load_recipe

if TYPE_CHECKING:
    from ..evaluate.blocks import Blocks
    from ..evaluate.torch_model import TorchModel

NAME = "run"


class EngineName(StrEnum):
    LLAMA = "llama"
    TORCH = "torch"


class DtypeName(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def command(
    file: Annotated[Path, typer.Argument(help="GGUF file, or a recipe with `--engine torch`.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What to say.", show_default=False)],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; do not apply the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    ctx: Annotated[int, typer.Option(min=16, help="Context length in tokens.")] = 2048,
    engine: Annotated[EngineName, typer.Option(help="What runs the file.")] = EngineName.LLAMA,
    gpu_layers: Annotated[int, typer.Option(help="Layers on the GPU, -1 for all; with `--engine llama`.")] = 0,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, ...; with `--engine torch`. (default: cuda where there is one)", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(
            help="What all but experts is computed in; with `--engine torch`. (default: float32 on the CPU, "
            "else bfloat16)",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Hugging Face directory with the config.json, for files that carry none, or with the whole "
            "checkpoint, for recipes; with `--engine torch`.",
            show_default=False,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="Importance matrix that a recipe was allocated with; with `--engine torch`.", show_default=False
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. (default: all cores)")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the text.")] = False,
) -> None:
    """Generate text from a GGUF, with llama.cpp (through llama-cpp-python) or with PyTorch."""
    console = Console(quiet=quiet)
    n_threads = threads or os.cpu_count() or 1
    strange = {"--device": device, "--dtype": dtype, "--model": model, "--imatrix": imatrix}
    if engine is EngineName.TORCH:
        strange = {"--gpu-layers": gpu_layers or None}
    for option, value in strange.items():
        if value is not None:
            raise UsageError(f"{option} has no meaning with --engine {engine}", f"leave out {option}")
    if engine is EngineName.TORCH:
        opened = _open_torch(console, file, model, imatrix, device, dtype, ctx, n_threads, seed)
    else:
        describe_file(file)
        prepare(file, console)
        opened = LlamaModel(file, n_ctx=ctx, threads=n_threads, all_logits=False, gpu_layers=gpu_layers, seed=seed)
    with opened as talker:
        chat = talker.has_chat_template and not raw
        if not chat and not raw:
            console.note("The file has no chat template: continuing the prompt as text")
        for piece in talker.generate(prompt, max_tokens=max_tokens, temperature=temperature, chat=chat, system=system):
            console.text(piece)
    console.text("\n")


def _open_torch(
    console: Console,
    file: Path,
    model: Path | None,
    imatrix: Path | None,
    device: str | None,
    dtype: DtypeName | None,
    ctx: int,
    threads: int,
    seed: int,
) -> TorchModel:
    import torch
    from alphaq_kernels import why_no_triton

    from ..evaluate.torch_model import TorchModel

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {device}: not available: {str(error).splitlines()[0]}", "--device cpu") from None
    blocks = _open_blocks(console, file, model, imatrix, device, threads)
    if why := why_no_triton(device):
        console.note(f"Plain PyTorch operations decode the experts, slowly: {why}")
    torch.set_num_threads(threads)
    return TorchModel(
        blocks,
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype),
        n_ctx=ctx,
        threads=threads,
        seed=seed,
        note=console.note,
    )


def _open_blocks(
    console: Console, file: Path, model: Path | None, imatrix: Path | None, device: str, threads: int
) -> Blocks:
    """The blocks of a GGUF, or those a recipe makes of the checkpoint `model`."""
    from ..checkpoint.huggingface import HuggingFaceSource
    from ..evaluate.blocks import FileBlocks, RecipeBlocks

    if file.suffix != ".json":
        if imatrix is not None:
            raise UsageError("--imatrix belongs to a recipe: the blocks of a file are rounded already")
        describe_file(file)
        return FileBlocks(file, model)
    recipe = load_recipe(file)
    if model is None:
        raise UsageError(f"{file} is a recipe: the checkpoint it was made for is needed", "--model DIR")
    source = open_source(model)
    if not isinstance(source, HuggingFaceSource):
        raise UsageError(f"--model {model}: expected a Hugging Face directory")
    return RecipeBlocks(source, recipe, read_imatrix(source, imatrix, console), threads, device)
