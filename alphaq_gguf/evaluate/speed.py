"""How fast an engine reads and writes tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..reporter import Reporter
from .llama import LlamaModel

if TYPE_CHECKING:
    from .torch_model import TorchModel

# What is read before tokens are written.
_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Rate:
    """Tokens per second over `n_runs` runs of `n_tokens` each."""

    median: float
    least: float
    most: float
    n_runs: int
    n_tokens: int


@dataclass(frozen=True)
class Speed:
    """`prefill` reads a prompt, `decode` writes one token after another; `setting` says how, in words."""

    prefill: Rate
    decode: Rate
    threads: int
    setting: str


def time_llama(
    path: Path,
    threads: int,
    gpu_layers: int,
    repack: bool,
    n_prefill: int,
    n_decode: int,
    n_runs: int,
    reporter: Reporter,
) -> Speed:
    """How fast llama.cpp is as llama-cli sets it up, its weights repacked for the processor only with `repack`.

    `n_prefill` random tokens are read as one prompt, with logits of the last one alone; `n_decode` are written one by
    one after a short prompt. Some processors crash on repacked weights: call it in a process of its own.
    """
    import llama_cpp

    context = max(n_prefill, _PROMPT_TOKENS + n_decode)
    opened = LlamaModel(path, n_ctx=context, threads=threads, all_logits=False, gpu_layers=gpu_layers, repack=repack)
    with opened as model, reporter.task(f"Timing {path.name}", n_runs, "runs") as advance:

        def begin(tokens: Sequence[int]) -> None:
            model.run(tokens)
            llama_cpp.llama_synchronize(model.llm.ctx)

        def step(token: int) -> None:
            model.llm.eval([token])
            llama_cpp.llama_synchronize(model.llm.ctx)

        rates = _time(begin, step, model.llm.n_vocab(), n_prefill, n_decode, n_runs, advance)
    layers = f", {'all' if gpu_layers < 0 else gpu_layers} layers on the GPU" if gpu_layers else ""
    weights = "weights repacked for the processor" if repack else "weights as stored"
    return Speed(*rates, threads, f"flash attention, {weights}{layers}")


def time_torch(
    model: TorchModel, threads: int, n_prefill: int, n_decode: int, n_runs: int, advance: Callable[[int], None]
) -> tuple[Speed, str | None]:
    """How fast PyTorch is at the same as `time_llama`, and what is worth telling of it; on a GPU with a CUDA graph."""
    import torch
    from alphaq_kernels import why_no_triton

    from .decoding import Decoder

    device = model.device
    with model.within_memory():
        decoder = Decoder(model.model, max(n_prefill, _PROMPT_TOKENS + n_decode))

        def wait() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        def begin(tokens: Sequence[int]) -> None:
            decoder.prefill(tokens)
            wait()

        def step(token: int) -> None:
            decoder.step(torch.tensor([[token]], device=device))
            wait()

        rates = _time(begin, step, model.n_vocab, n_prefill, n_decode, n_runs, advance)
    experts = "plain PyTorch operations" if why_no_triton(device) else "Triton kernels"
    graph = ", CUDA graph" if device.type == "cuda" and decoder.note is None else ""
    dtype = str(model.model.dtype).removeprefix("torch.")
    return Speed(*rates, threads, f"{dtype}, {experts}{graph}"), decoder.note


def _time(
    begin: Callable[[Sequence[int]], None],
    step: Callable[[int], None],
    n_vocab: int,
    n_prefill: int,
    n_decode: int,
    n_runs: int,
    advance: Callable[[int], None],
) -> tuple[Rate, Rate]:
    """Rates of reading by `begin`, which starts a sequence, and of writing by `step`; both return when it is done.

    A first run warms up and does not count; `advance` is told of the others.
    """
    tokens = np.random.default_rng(0).integers(n_vocab, size=n_prefill + _PROMPT_TOKENS + n_decode).tolist()
    prompt, written = tokens[n_prefill : n_prefill + _PROMPT_TOKENS], tokens[n_prefill + _PROMPT_TOKENS :]

    def read() -> float:
        start = time.perf_counter()
        begin(tokens[:n_prefill])
        return time.perf_counter() - start

    def write() -> float:
        begin(prompt)
        start = time.perf_counter()
        for token in written:
            step(token)
        return time.perf_counter() - start

    read()
    write()
    taken = []
    for _ in range(n_runs):
        taken.append((read(), write()))
        advance(1)
    reading, writing = zip(*taken, strict=True)
    return _rate(n_prefill, reading), _rate(n_decode, writing)


def _rate(n_tokens: int, seconds: Sequence[float]) -> Rate:
    rates = [n_tokens / taken for taken in seconds]
    return Rate(statistics.median(rates), min(rates), max(rates), len(rates), n_tokens)
