"""What evaluates a file: llama.cpp, or PyTorch with or without the Triton kernels."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..errors import AlphaQError
from ..reporter import Silent
from .isolated import ProcessDiedError, run_isolated
from .llama import LlamaModel
from .speed import Speed, time_llama, time_torch
from .watch import Tensor, Watch, weights_name

if TYPE_CHECKING:
    import torch

    from .blocks import Blocks

# The last product of a layer's experts, whose third operand is the experts chosen.
_LAST_STACK = re.compile(r"blk\.(\d+)\.ffn_down_exps\.weight$")


class Engine(ABC):
    """A file, opened to be evaluated; best in a process of its own, whose memory then counts for it alone.

    `name` is "llama.cpp", "pytorch", or "triton" for PyTorch with the Triton kernels. `load_s` is the wall time that
    opening took, libraries imported already. `notes` are worth telling beside the results, and grow with them.
    """

    name: str
    device: str
    n_vocab: int
    load_s: float
    label: str
    peak_bytes: int | None = None
    """Resident bytes of a process that did nothing but run the file as its users do, once speed was timed in one."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None: ...

    @property
    def device_bytes(self) -> int | None:
        """The most memory that was in use on the GPU so far; None where that cannot be told."""
        return None

    def run(self, tokens: Sequence[int]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Logits after every token of one sequence, float32 [n, n_vocab], and the experts chosen, by layer [n, top_k].

        Layers whose experts cannot be seen are left out. AlphaQError when logits are NaN or infinite.
        """
        logits, chosen = self._run(tokens)
        if not np.isfinite(logits).all():
            raise AlphaQError(
                f"{self.label}: {self.name} computes NaN or infinite logits",
                "see whether the file generates sensible text: alphaq-gguf run",
            )
        return logits, chosen

    @abstractmethod
    def _run(self, tokens: Sequence[int]) -> tuple[np.ndarray, dict[int, np.ndarray]]: ...

    @abstractmethod
    def time_speed(self, n_prefill: int, n_decode: int, n_runs: int, advance: Callable[[int], None]) -> Speed | None:
        """Tokens per second, nothing watched; None, with a note, where figures would mean nothing.

        `advance` is told of each of the `n_runs` runs.
        """


class LlamaEngine(Engine):
    """A GGUF in llama.cpp.

    Logits are what llama-perplexity computes with `--no-repack`, or, if they are to be `exact`, with `-fa off -ctk f32
    -ctv f32` besides: no flash attention, and a KV cache that rounds nothing. Speed is timed as llama-cli runs the
    file, in a process of its own.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, *, n_ctx: int, threads: int, gpu_layers: int = 0, exact: bool = False) -> None:
        import llama_cpp

        super().__init__()
        self.label = str(path)
        self._path, self._n_ctx, self._threads, self._gpu_layers = path, n_ctx, threads, gpu_layers
        self._exact = exact
        self._seen: dict[int, list[np.ndarray]] = {}
        self._watch: Watch | None = None
        try:
            self._watch = Watch(_is_last_product, self._take)
        except AlphaQError as error:
            self.notes.append(f"no router agreement: {error.message}")
        on_gpu = gpu_layers != 0 and llama_cpp.llama_supports_gpu_offload()
        if gpu_layers and not on_gpu:
            self.notes.append("this build of llama-cpp-python has no GPU: all layers run on the CPU")
        self.device = "gpu" if on_gpu else "cpu"
        start = time.perf_counter()
        self._model: LlamaModel | None = self._open()
        self.load_s = time.perf_counter() - start
        self.n_vocab = self._model.llm.n_vocab()

    def _open(self) -> LlamaModel:
        return LlamaModel(
            self._path,
            n_ctx=self._n_ctx,
            threads=self._threads,
            exact=self._exact,
            gpu_layers=self._gpu_layers,
            watch=self._watch,
        )

    def close(self) -> None:
        if self._model is not None:
            self._model.llm.close()
            self._model = None

    def _take(self, product: Tensor) -> None:
        match = _LAST_STACK.match(weights_name(product))
        assert match
        # [tokens, top_k] of one batch.
        self._seen.setdefault(int(match[1]), []).append(product.sources[2].array()[0, 0])

    def _run(self, tokens: Sequence[int]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        self._model = self._model or self._open()
        self._seen.clear()
        logits = self._model.logits(tokens)
        chosen = {bid: np.concatenate(batches) for bid, batches in sorted(self._seen.items())}
        return logits, {bid: experts for bid, experts in chosen.items() if len(experts) == len(tokens)}

    def time_speed(self, n_prefill: int, n_decode: int, n_runs: int, advance: Callable[[int], None]) -> Speed | None:
        # What is timed has the memory to itself; the next sequence loads the file again.
        self.close()
        amounts = n_prefill, n_decode, n_runs
        reasons = []
        for repack in (True, False):
            given = self._path, self._threads, self._gpu_layers, repack, *amounts
            try:
                speed, self.peak_bytes = run_isolated(
                    time_llama, *given, label=self.label, reporter=_Advancing(advance)
                )
            except ProcessDiedError as error:
                reasons.append(error.reason)
                continue
            if reasons:
                self.notes.append(
                    f"llama.cpp {reasons[0]} with weights repacked for this processor, its default: "
                    "timed with weights as stored"
                )
            return speed
        self.notes.append(f"no speed: llama.cpp {reasons[-1]} when it ran the file as llama-cli does")
        return None


def _is_last_product(tensor: Tensor) -> bool:
    return tensor.op == "MUL_MAT_ID" and _LAST_STACK.match(weights_name(tensor)) is not None


class _Advancing(Silent):
    """Hands on how far the one task is."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        yield self._advance


class TorchEngine(Engine):
    """GGUF blocks, of a file or of a recipe, in PyTorch: with the Triton kernels where `device` can run them.

    `dtype` is that of `TorchModel`. PyTorch uses `threads` threads from then on, in the whole process.
    """

    def __init__(
        self, blocks: Blocks, *, n_ctx: int, device: str = "cpu", dtype: torch.dtype | None = None, threads: int = 1
    ) -> None:
        import torch
        from alphaq_kernels import why_no_triton

        from .torch_model import TorchModel

        # Where it is missing, loading says so.
        with suppress(ImportError):
            from transformers import AutoModelForCausalLM  # noqa: F401
        super().__init__()
        torch.set_num_threads(threads)
        self.label, self.device, self._threads = blocks.label, device, threads
        self._why_no_triton = why_no_triton(device)
        self.name = "pytorch" if self._why_no_triton else "triton"
        # The GPU itself is started before the clock is.
        torch.empty(1, device=device)
        start = time.perf_counter()
        self._model: Any = TorchModel(blocks, device=device, dtype=dtype, n_ctx=n_ctx, threads=threads)
        if self._on_cuda:
            torch.cuda.synchronize(device)
        self.load_s = time.perf_counter() - start
        self.n_vocab = self._model.n_vocab

    @property
    def _on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def close(self) -> None:
        self._model = None

    @property
    def device_bytes(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated(self.device) if self._on_cuda else None

    def _run(self, tokens: Sequence[int]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        with self._model.watching_experts() as chosen:
            logits = self._model.logits(tokens)
        return logits, {bid: experts.cpu().numpy() for bid, experts in chosen.items()}

    def time_speed(self, n_prefill: int, n_decode: int, n_runs: int, advance: Callable[[int], None]) -> Speed | None:
        if self._why_no_triton:
            self.notes.append(f"plain PyTorch operations decode the experts, slowly: {self._why_no_triton}")
        elif _is_interpreted():
            self.notes.append("no speed: Triton's interpreter ran its kernels")
            return None
        speed, note = time_torch(self._model, self._threads, n_prefill, n_decode, n_runs, advance)
        self.notes += [note] if note else []
        return speed


def _is_interpreted() -> bool:
    """Whether Triton interprets its kernels in Python instead of compiling them."""
    from alphaq_kernels.moe_decode.triton_kernels import INTERPRETED

    return INTERPRETED
