"""Zero-shot tasks by EleutherAI's lm-evaluation-harness, which is kept quiet meanwhile."""

from __future__ import annotations

import io
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compare.data import TaskScore
from ..errors import AlphaQError
from ..evaluate.metrics import Estimate
from ..reporter import Reporter

if TYPE_CHECKING:
    from ..evaluate.llama import LlamaModel
    from ..evaluate.torch_model import TorchModel

# The six of the AlphaQ paper.
TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq")

# Those of the harness' own command line.
_RANDOM_SEED, _OTHER_SEED = 0, 1234


def run_tasks(
    model: LlamaModel | TorchModel,
    names: Sequence[str],
    *,
    limit: int | None,
    task_dir: Path | None,
    file: str,
    engine: str,
    reporter: Reporter,
) -> tuple[TaskScore, ...]:
    """Score `model` on the first `limit` examples of each task, the harness' or one of the YAML files in `task_dir`.

    The score is `acc_norm` where a task has it, else `acc`, else its first metric that is a mean. `file` and `engine`
    are what the scores call the model; a LlamaModel must give all logits. AlphaQError as `check_tasks` says, where
    fewer than two examples are left, and for requests that the model's context cannot hold.
    """
    with _quiet_harness():
        from .language_model import HarnessModel
        from .scoring import open_scorer

        tasks = _load(names, task_dir)
        scorer = open_scorer(model)
        scores = []
        for name, task in tasks.items():
            metric = _find_metric(name, task)
            n = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
            if n < 2:
                raise AlphaQError(f"task {name}: expected at least 2 examples, found {n}", "allow more of them")
            lm = HarnessModel(scorer, f"{name}, {file} in {engine}", reporter)
            scores.append(TaskScore(file, engine, name, metric, _evaluate(lm, name, task, metric, n), n))
        return tuple(scores)


def check_tasks(names: Sequence[str], task_dir: Path | None) -> None:
    """Load the tasks' data sets, which fills the cache; AlphaQError for a harness, task or data set that is missing."""
    with _quiet_harness():
        _load(names, task_dir)


def _load(names: Sequence[str], task_dir: Path | None) -> dict[str, Any]:
    """The harness' tasks by name, several where a name stands for a group."""
    import torch

    if task_dir is not None and not task_dir.is_dir():
        raise AlphaQError(f"{task_dir} is no directory", "give one with the YAML files of tasks")
    manager = _list_tasks(task_dir, False)
    if not set(names) <= set(manager.all_tasks):
        manager = _list_tasks(task_dir, True)
    random.seed(_RANDOM_SEED)
    np.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)
    tasks: dict[str, Any] = {}
    for name in names:
        if name not in manager.task_index:
            places = "lm-evaluation-harness" if task_dir is None else f"lm-evaluation-harness or {task_dir}"
            raise AlphaQError(
                f"task {name}: no such task in {places}",
                f"the paper's six are {', '.join(TASKS)}; --task-dir DIR adds those of DIR's YAML files",
            )
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # of any kind, raised by one of many libraries over data or a task's file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            dataset = (manager.task_index[name].cfg or {}).get("dataset_path")
            raise AlphaQError(
                f"task {name}: its data set {dataset} cannot be loaded: {reason}",
                "connect to the Hugging Face Hub once, what it sends is kept; or check the task's own files",
            ) from None
    for name, task in tasks.items():
        _find_metric(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_OTHER_SEED)
    return tasks


@cache
def _list_tasks(task_dir: Path | None, with_defaults: bool) -> Any:
    """The tasks of a directory; the harness takes seconds to list its own thousands with them."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_dir, include_defaults=with_defaults)


def _find_metric(name: str, task: Any) -> str:
    from lm_eval.api.metrics import mean

    shares = [metric for metric, aggregate in task.aggregation().items() if aggregate is mean]
    if not shares:
        raise AlphaQError(
            f"task {name}: measures {', '.join(task.aggregation())}, expected a share such as acc", "leave it out"
        )
    return next((metric for metric in ("acc_norm", "acc") if metric in shares), shares[0])


def _evaluate(lm: Any, name: str, task: Any, metric: str, n: int) -> Estimate:
    """What `metric` says of the first `n` examples."""
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.evaluator import evaluate

    # For a mean's standard error the harness resamples nothing, but would for metrics that are not asked for.
    found: Any = evaluate(lm=lm, task_dict={"tasks": {name: task}}, limit=n, bootstrap_iters=0)
    samples = found["samples"][name]
    # A task may read answers in several ways.
    first = samples[0]["filter"]
    values = [sample[metric] for sample in samples if sample["filter"] == first]
    return Estimate(float(found["results"][name][f"{metric},{first}"]), float(mean_stderr(values)))


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Importing and running the harness prints, logs and warns of nothing; AlphaQError when it is not installed."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                import_module("lm_eval.evaluator")
            except ImportError as error:
                raise AlphaQError(
                    f"zero-shot tasks need lm-evaluation-harness: {error}", "pip install 'alphaq-gguf[eval]'"
                ) from None
            with _without_bars():
                yield
    finally:
        logging.disable(disabled)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Neither the harness nor its libraries have one switch for their progress bars."""
    from tqdm import tqdm

    make = tqdm.__init__

    def make_disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = make_disabled
    try:
        yield
    finally:
        tqdm.__init__ = make
