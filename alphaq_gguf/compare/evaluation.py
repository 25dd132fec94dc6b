"""One file in one engine: every window run, its figures recorded, so that an interrupted run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AlphaQError
from ..evaluate.base_file import BaseFile, BaseWriter
from ..evaluate.engines import Engine, LlamaEngine, TorchEngine
from ..evaluate.metrics import TOKEN, Divergence, Estimate, compress, scored, summarize, token_stats
from ..evaluate.routes_file import RoutesFile
from ..evaluate.speed import Speed
from ..reporter import Reporter

if TYPE_CHECKING:
    from ..evaluate.blocks import Blocks


@dataclass(frozen=True, eq=False)
class Job:
    """What a process of its own needs to evaluate `path`, a GGUF or a recipe, in `engine`, one of ENGINES.

    `windows` int64 [n, n_ctx] begin as the model wants them to, `base` holds the reference's log-probabilities of them
    and `routes` the experts it chose. `against` are another engine's log-probabilities; this one's are put in `keep`.
    `model` is the directory of a Hugging Face checkpoint with the config, and for recipes the weights, of the model,
    `imatrix` what a recipe was allocated with. `records` collects what is known so far.
    """

    path: Path
    engine: str
    device: str
    threads: int
    gpu_layers: int
    exact: bool
    windows: np.ndarray
    base: Path
    records: Path
    routes: Path | None = None
    against: Path | None = None
    keep: Path | None = None
    model: Path | None = None
    imatrix: Path | None = None
    speed_runs: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0


@dataclass(frozen=True)
class Found:
    """What came of a job; `cross` is the divergence from the other engine, `peak_bytes` what running alone takes."""

    engine: str
    device: str
    perplexity: Estimate
    divergence: Divergence
    cross: Divergence | None
    routers: dict[int, float]
    load_s: float
    speed: Speed | None
    peak_bytes: int | None
    device_bytes: int | None
    notes: tuple[str, ...]


def run_job(job: Job, reporter: Reporter) -> Found:
    """Evaluate a file. AlphaQError for what cannot run it, and for another vocabulary than the reference's."""
    base, routes = BaseFile(job.base), None if job.routes is None else RoutesFile(job.routes)
    against = None if job.against is None else BaseFile(job.against)
    with _open_engine(job, reporter) as engine:
        if engine.n_vocab != base.n_vocab:
            raise AlphaQError(
                f"{job.path}: has {engine.n_vocab} tokens in its vocabulary, the reference {base.n_vocab}",
                "give the reference that the file was made from",
            )
        records = _run_windows(job, engine, base, against, routes, reporter)
        speed = None
        if job.speed_runs:
            n_prefill = min(job.prefill_tokens, base.n_ctx)
            with reporter.task(f"Timing {job.path.name} in {engine.name}", job.speed_runs, "runs") as advance:
                speed = engine.time_speed(n_prefill, job.decode_tokens, job.speed_runs, advance)
        perplexity, _, divergence = summarize(records["stats"].reshape(-1))
        agreed = records["agreed"].sum(axis=0) / job.windows.size
        least = records["agreed"].min(axis=0).tolist()
        return Found(
            engine.name,
            engine.device,
            perplexity,
            divergence,
            None if against is None else summarize(records["cross"].reshape(-1))[2],
            {bid: float(agreed[i]) for i, bid in enumerate(routes.layers if routes else ()) if least[i] >= 0},
            engine.load_s,
            speed,
            engine.peak_bytes,
            engine.device_bytes,
            tuple(engine.notes),
        )


def open_blocks(job: Job, reporter: Reporter) -> Blocks:
    """The blocks of a GGUF, or those that a recipe makes of its checkpoint. AlphaQError when that one is not given."""
    # Late, because torch would count as memory that llama.cpp takes.
    from ..allocation import read_imatrix
    from ..checkpoint import open_source
    from ..checkpoint.gguf import GGUFSource
    from ..checkpoint.huggingface import HuggingFaceSource
    from ..evaluate.blocks import FileBlocks, RecipeBlocks
    from ..recipe import load_recipe

    if job.path.suffix != ".json":
        # The file's own config goes with its metadata; the reference's is for files that carry none.
        own = GGUFSource(job.path, allow_requantize=True).model_config
        return FileBlocks(job.path, job.model if own is None else None)
    source = None if job.model is None else open_source(job.model)
    if not isinstance(source, HuggingFaceSource):
        raise AlphaQError(
            f"{job.path}: a recipe runs from the Hugging Face checkpoint it was made for",
            "give its directory as --reference",
        )
    imatrix = read_imatrix(source, job.imatrix, reporter)
    return RecipeBlocks(source, load_recipe(job.path), imatrix, job.threads, job.device)


def _open_engine(job: Job, reporter: Reporter) -> Engine:
    n_ctx = job.windows.shape[1]
    if job.engine == "llama":
        return LlamaEngine(job.path, n_ctx=n_ctx, threads=job.threads, gpu_layers=job.gpu_layers, exact=job.exact)
    return TorchEngine(open_blocks(job, reporter), n_ctx=n_ctx, device=job.device, threads=job.threads)


def _run_windows(
    job: Job,
    engine: Engine,
    base: BaseFile,
    against: BaseFile | None,
    routes: RoutesFile | None,
    reporter: Reporter,
) -> np.ndarray:
    """A record of each window: figures of its tokens, and how many tokens each layer's router agreed on."""
    part = scored(base.n_ctx)
    n_scored = part.stop - part.start
    layers = () if routes is None else routes.layers
    record = np.dtype(
        [
            ("stats", TOKEN, (n_scored,)),
            ("cross", TOKEN, (n_scored if against else 0,)),
            ("agreed", np.int32, (len(layers),)),
        ]
    )
    with _Kept(job) as kept, job.records.open("ab") as file:
        n_done = min(file.tell() // record.itemsize, kept.n_done)
        # A record that was cut short goes, and one whose log-probabilities were not kept.
        file.truncate(n_done * record.itemsize)
        task = reporter.task(f"{job.path.name} in {engine.name}", len(job.windows), "windows")
        with task as advance:
            advance(n_done)
            for i in range(n_done, len(job.windows)):
                window = job.windows[i]
                logits, chosen = engine.run(window.tolist())
                targets = window[part.start + 1 : part.stop + 1]
                found: Any = np.zeros(1, record)
                found["stats"] = token_stats(logits[part], base.rows(i), targets)
                if against is not None:
                    found["cross"] = token_stats(logits[part], against.rows(i), targets)
                if routes is not None:
                    expected = routes.read(i)
                    found["agreed"] = [_count_equal(chosen.get(bid), expected[bid]) for bid in layers]
                kept.take(i, logits[part])
                file.write(found.tobytes())
                file.flush()
                advance(1)
    return np.fromfile(job.records, record)


class _Kept:
    """Log-probabilities kept for the next engine, if there is one."""

    def __init__(self, job: Job) -> None:
        self._writer: BaseWriter | None = None
        self.n_done = len(job.windows)
        if job.keep is not None and not job.keep.exists():
            self._writer = BaseWriter(job.keep, job.windows, BaseFile(job.base).n_vocab)

    def __enter__(self) -> _Kept:
        if self._writer is not None:
            self._writer.__enter__()
            self.n_done = self._writer.n_done
        return self

    def __exit__(self, *details: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*details)  # type: ignore[arg-type]

    def take(self, i: int, logits: np.ndarray) -> None:
        """Keep the window unless an interrupted run has."""
        if self._writer is not None and i >= self.n_done:
            self._writer.append(compress(logits))


def _count_equal(chosen: np.ndarray | None, expected: np.ndarray) -> int:
    """Tokens whose experts [n, top_k] are the same in both, in whatever order; -1 where they were not seen."""
    if chosen is None:
        return -1
    if chosen.shape != expected.shape:
        # A file that sends tokens to another number of experts.
        return 0
    return int((np.sort(chosen, axis=1) == np.sort(expected, axis=1)).all(axis=1).sum())
