"""Zero-shot tasks of one file in one engine, in a process of its own."""

from __future__ import annotations

from ..gguf_file import read_header
from ..reporter import Reporter
from .data import TaskScore
from .evaluation import Job, open_blocks
from .settings import ENGINE_OF, TaskSettings

# Longer than nearly all examples; a longer cache takes memory for nothing.
_MOST_CTX = 2048

_NAMES = {option: engine for engine, option in ENGINE_OF.items()}


def run_task_job(job: Job, settings: TaskSettings, name: str, reporter: Reporter) -> tuple[TaskScore, ...]:
    """Scores of the file that is called `name`; AlphaQError as `run_tasks` says."""
    from ..tasks import run_tasks

    if job.engine == "llama":
        from ..evaluate.llama import LlamaModel

        header = read_header(job.path)
        n_ctx = settings.n_ctx or _usual_ctx(header.get(f"{header.get('general.architecture')}.context_length"))
        model = LlamaModel(job.path, n_ctx=n_ctx, threads=job.threads, exact=job.exact, gpu_layers=job.gpu_layers)
    else:
        from ..evaluate.torch_model import TorchModel

        blocks = open_blocks(job, reporter)
        n_ctx = settings.n_ctx or _usual_ctx(blocks.config.get("max_position_embeddings"))
        model = TorchModel(blocks, device=job.device, n_ctx=n_ctx, threads=job.threads)
    with model:
        return run_tasks(
            model,
            settings.names,
            limit=settings.limit,
            task_dir=settings.task_dir,
            file=name,
            engine=_NAMES[job.engine],
            reporter=reporter,
        )


def _usual_ctx(trained: int | None) -> int:
    """Tokens of context, for a model trained for so many."""
    return min(trained or _MOST_CTX, _MOST_CTX)
