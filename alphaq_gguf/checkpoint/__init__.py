"""Checkpoints, whatever their layout, as one shape: GGUF tensor names, rows of weights, expert stacks."""

from __future__ import annotations

from pathlib import Path

from ..errors import SourceError
from .base import ExpertMatrix, ExpertStack, Source
from .gguf import GGUFSource
from .huggingface import HuggingFaceSource

__all__ = ["ExpertMatrix", "ExpertStack", "Source", "open_source"]


def open_source(path: Path, *, allow_requantize: bool = False, pre_tokenizer: str | None = None) -> Source:
    """Open a Hugging Face directory or a GGUF file; SourceError says why it cannot be one.

    `allow_requantize` admits GGUF files whose experts are already quantised; `pre_tokenizer` names
    llama.cpp's pre-tokenizer for a Hugging Face tokenizer whose regex is unknown.
    """
    if not path.exists():
        raise SourceError(f"{path} does not exist", "give a checkpoint directory or a .gguf file")
    if path.is_dir():
        return HuggingFaceSource(path, pre_tokenizer=pre_tokenizer)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise SourceError(
            f"{path} is a pickle checkpoint, which can run code when opened", "convert it to safetensors first"
        )
    if path.suffix == ".safetensors":
        raise SourceError(f"{path} is a single weight file", f"give its directory: {path.parent}")
    return GGUFSource(path, allow_requantize=allow_requantize)
