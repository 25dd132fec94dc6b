"""How files are judged: engines, device, speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ENGINE_OF = {"llama.cpp": "llama", "pytorch": "torch", "triton": "triton"}
"""What results call an engine: what options call it."""

ENGINES = tuple(ENGINE_OF.values())
"""llama.cpp, PyTorch on the CPU, and PyTorch with the Triton kernels on a GPU."""


@dataclass(frozen=True)
class JudgeSettings:
    """What judges files.

    `engines` None: llama.cpp, and Triton where `device`, PyTorch's, is a GPU, else PyTorch. Speed is the median of
    `speed_runs` (0: not measured) that read `prefill_tokens` and write `decode_tokens`. llama.cpp computes logits as it
    does by default, or `exact` ones (see LlamaModel). `again` leaves aside what an earlier run found.
    """

    engines: tuple[str, ...] | None = None
    device: str = "cpu"
    threads: int = 1
    gpu_layers: int = 0
    exact: bool = False
    speed_runs: int = 5
    prefill_tokens: int = 512
    decode_tokens: int = 64
    again: bool = False


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks: names known to lm-evaluation-harness, or defined in `task_dir`; `limit` examples of each, or all.

    `n_ctx` None: what the model was trained for, 2048 at most.
    """

    names: tuple[str, ...]
    limit: int | None = None
    task_dir: Path | None = None
    n_ctx: int | None = None
