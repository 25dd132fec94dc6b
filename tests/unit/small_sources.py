"""Small real checkpoints for unit tests: float32 GGUF files with expert stacks, written by the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from alphaq_gguf.checkpoint import Source, open_source


def stack_name(proj: str, bid: int = 0) -> str:
    return f"blk.{bid}.ffn_{proj}_exps.weight"


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray], *, architecture: str = "testmoe", **texts: str) -> Path:
    """A GGUF file with `tensors` (float32, torch order); `texts` become string metadata, `__` standing for a dot."""
    writer = GGUFWriter(path, architecture)
    for key, value in texts.items():
        writer.add_string(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_source(path: Path, tensors: Mapping[str, np.ndarray]) -> Source:
    """Write `tensors` and open the file as our own source."""
    return open_source(write_gguf(path, tensors))


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def expert_tensors(n_experts: int = 2, n_ff: int = 256, n_embd: int = 256, seed: int = 0) -> dict[str, np.ndarray]:
    """The three stacks of one layer, experts of visibly different scale, and a router."""
    rng = np.random.default_rng(seed)
    scales = np.linspace(0.5, 2, n_experts)[:, None, None]
    shapes = {"gate": (n_ff, n_embd), "up": (n_ff, n_embd), "down": (n_embd, n_ff)}
    stacks = {
        stack_name(proj): (rng.standard_normal((n_experts, *shape)) * scales).astype(np.float32)
        for proj, shape in shapes.items()
    }
    return {**stacks, "blk.0.ffn_gate_inp.weight": rng.standard_normal((n_experts, n_embd)).astype(np.float32)}
