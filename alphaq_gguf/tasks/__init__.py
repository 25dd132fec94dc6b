"""Zero-shot tasks: EleutherAI's lm-evaluation-harness over a GGUF in llama.cpp or in PyTorch."""

from .run import TASKS, check_tasks, run_tasks

__all__ = ["TASKS", "check_tasks", "run_tasks"]
