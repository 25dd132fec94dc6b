"""Files judged one after another: each in every engine, in processes of their own, against one reference."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ..allocation import TOOL
from ..alone import alone
from ..checkpoint import Source
from ..checkpoint.huggingface import HuggingFaceSource
from ..errors import AlphaQError, UsageError
from ..evaluate.isolated import ProcessDiedError, run_isolated
from ..evaluate.metrics import Divergence
from ..measurements import AlphaSettings
from ..pipeline import measure_source
from ..plugin import prepare
from ..reporter import Reporter, Silent
from ..writer import check_space, write_atomically
from .candidates import describe_candidate
from .data import Candidate, Comparison, CrossEngine, Evaluation, ProjectionAlphas, TaskScore, from_plain
from .evaluation import Found, Job, run_job
from .reference import Reference
from .settings import ENGINE_OF, JudgeSettings, TaskSettings
from .task_run import run_task_job
from .texts import check_vocabularies

_PACKAGES = ("llama-cpp-python", "torch", "transformers", "triton", "gguf", "numpy")
_SCHEMA = 1


@dataclass(frozen=True)
class Judged:
    """What became of one file; `failures` says by engine why there is no figure."""

    candidate: Candidate
    evaluations: tuple[Evaluation, ...]
    cross: tuple[CrossEngine, ...]
    failures: dict[str, str]
    day: str


class Judge:
    """Holds files against `reference`, the logits of `source` (None: they come from a file made elsewhere).

    What is known of a file stays in `cache_dir`: of an interrupted run the finished windows, and of a finished one the
    figures. UsageError for engines that are none or that this machine lacks.
    """

    def __init__(
        self,
        reference: Reference,
        source: Source | None,
        settings: JudgeSettings,
        *,
        cache_dir: Path,
        imatrix: Path | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.reference = reference
        self.source = source
        self.settings = settings
        self.imatrix = imatrix
        self.reporter = reporter or Silent()
        self._cache_dir = cache_dir
        self.device = settings.device
        self.notes: list[str] = []
        self._died = False
        self.engines = self._choose_engines(settings.engines)

    def _choose_engines(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        why_not = _why_no_triton(self.device)
        if asked is None:
            if why_not:
                self.notes.append(f"No figures of the Triton kernels: {why_not}")
            return ("llama", "torch" if why_not else "triton")
        if "triton" in asked and why_not:
            raise UsageError(f"--engine triton: {why_not}", "--engine llama,torch")
        return tuple(dict.fromkeys(asked))

    def judge(self, path: Path, name: str | None = None, origin: str | None = None) -> Judged:
        """Evaluate a GGUF, or a recipe with a type per expert, which runs in PyTorch alone.

        An engine that cannot run the file is a failure of its own. AlphaQError for a file that is neither, for one
        with another vocabulary, and when no engine runs it.
        """
        candidate = describe_candidate(path, self.source)
        candidate = replace(
            candidate, name=name or candidate.name, origin=candidate.origin if origin is None else origin
        )
        engines = self.engines
        if path.suffix == ".json":
            engines = tuple(engine for engine in engines if engine != "llama") or ("torch",)
            if self.settings.engines == ("llama",):
                self.reporter.note(f"{candidate.name}: a type per expert runs in PyTorch alone")
        windows = self._windows_for(path)
        work_dir = self._cache_dir / f"judged-{self._key(candidate, engines)}"
        with alone(work_dir, self.reporter):
            return self._judge_in(work_dir, path, candidate, engines, windows)

    def _judge_in(
        self, work_dir: Path, path: Path, candidate: Candidate, engines: Sequence[str], windows: np.ndarray
    ) -> Judged:
        """The figures that `work_dir` has of a file, or new ones, which stay there."""
        known = work_dir / "judged.json"
        if known.is_file() and not self.settings.again:
            judged = from_plain(Judged, json.loads(known.read_text(encoding="utf-8")))
            self.reporter.note(f"{candidate.name}: figures of {judged.day}; --again measures anew")
            for engine, reason in judged.failures.items():
                self.reporter.warn(f"{candidate.name} in {engine}, on {judged.day}: {reason}")
            return replace(judged, candidate=candidate, **_rename(judged, candidate.name))
        if self.settings.again:
            shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(parents=True, exist_ok=True)
        judged = self._run_engines(path, candidate, engines, windows, work_dir)
        if not judged.evaluations:
            shutil.rmtree(work_dir)
            reasons = list(dict.fromkeys(judged.failures.values()))
            raise AlphaQError("; ".join(reasons))
        if self._died:
            # What killed an engine's process may be gone next time, when the others go on from their records.
            return judged
        write_atomically(known, json.dumps(asdict(judged)))
        for intermediate in work_dir.iterdir():
            if intermediate != known:
                intermediate.unlink()
        return judged

    def run_tasks(self, judged: Judged, path: Path, tasks: TaskSettings) -> list[TaskScore]:
        """Scores of a file in every engine that ran it; AlphaQError when a task is unknown or cannot be loaded."""
        scores: list[TaskScore] = []
        candidate = judged.candidate
        for engine in (ENGINE_OF[evaluation.engine] for evaluation in judged.evaluations):
            known = self._cache_dir / f"tasks-{self._key(candidate, [engine], repr(tasks))}.json"
            if self.settings.again or not known.is_file():
                job = self._make_job(path, engine, self.reference.windows, self._cache_dir)
                label = f"Tasks of {path.name} in {engine}"
                found, _ = run_isolated(run_task_job, job, tasks, candidate.name, label=label, reporter=self.reporter)
                write_atomically(known, json.dumps([asdict(score) for score in found]))
            found = from_plain(tuple[TaskScore, ...], json.loads(known.read_text(encoding="utf-8")))
            scores += [replace(score, file=candidate.name) for score in found]
        return scores

    def _run_engines(
        self, path: Path, candidate: Candidate, engines: Sequence[str], windows: np.ndarray, work_dir: Path
    ) -> Judged:
        evaluations: list[Evaluation] = []
        cross: list[CrossEngine] = []
        failures: dict[str, str] = {}
        self._died = False
        keep: Path | None = None
        for engine in engines:
            first = evaluations[0] if evaluations else None
            # What an interrupted run left belongs to this engine, held against that one.
            job = self._make_job(path, engine, windows, work_dir)
            if first is not None:
                records = work_dir / f"{engine}-against-{first.engine}.records"
                job = replace(job, records=records, against=keep)
            elif len(engines) > 1:
                keep = work_dir / f"{engine}.kld"
                if not keep.exists():
                    check_space(keep, self.reference.base.path.stat().st_size)
                job = replace(job, keep=keep)
            try:
                if engine == "llama":
                    prepare(path, self.reporter)
                evaluation, other = self._evaluate(job, candidate.name)
            except AlphaQError as error:
                self._died |= isinstance(error, ProcessDiedError)
                failures[engine] = " ".join(filter(None, [error.message, error.hint and f"-> {error.hint}"]))
                self.reporter.warn(f"no figures of {candidate.name} in {engine}: {failures[engine]}")
                continue
            evaluations.append(evaluation)
            if first is not None and other is not None:
                cross.append(CrossEngine(candidate.name, evaluation.engine, first.engine, other.kld, other.top1))
        today = date.today().isoformat()
        return Judged(candidate, tuple(evaluations), tuple(cross), failures, today)

    def _evaluate(self, job: Job, name: str) -> tuple[Evaluation, Divergence | None]:
        """A file in one engine, and its divergence from the other, which an interrupted run may know already."""
        known = job.records.with_suffix(".json")
        if not known.is_file():
            label = f"{job.path.name} in {job.engine}"
            found, peak_bytes = run_isolated(run_job, job, label=label, reporter=self.reporter)
            peak_bytes = found.peak_bytes or peak_bytes
            write_atomically(known, json.dumps(asdict(replace(found, peak_bytes=peak_bytes))))
        found = from_plain(Found, json.loads(known.read_text(encoding="utf-8")))
        figures = {key: value for key, value in vars(found).items() if key != "cross"}
        return Evaluation(file=name, **figures), found.cross

    def _make_job(self, path: Path, engine: str, windows: np.ndarray, work_dir: Path) -> Job:
        routes = self.reference.routes
        is_directory = isinstance(self.source, HuggingFaceSource)
        return Job(
            path=path,
            engine=engine,
            device=self.device if engine == "triton" else "cpu",
            threads=self.settings.threads,
            gpu_layers=self.settings.gpu_layers,
            exact=self.settings.exact,
            windows=windows,
            base=self.reference.base.path,
            records=work_dir / f"{engine}.records",
            routes=None if routes is None else routes.path,
            model=self.source.path if is_directory and self.source is not None else None,
            imatrix=self.imatrix,
            speed_runs=self.settings.speed_runs,
            prefill_tokens=self.settings.prefill_tokens,
            decode_tokens=self.settings.decode_tokens,
        )

    def _windows_for(self, path: Path) -> np.ndarray:
        """The reference's windows as the file wants them; AlphaQError when its vocabulary is another."""
        windows = self.reference.windows
        if path.suffix == ".json":
            return windows
        if self.source is not None:
            check_vocabularies(self.source, path)
            return windows
        from ..evaluate.llama import LlamaVocabulary

        with LlamaVocabulary(path) as vocabulary:
            if vocabulary.bos is not None:
                # llama-perplexity keeps the text's own tokens in its files, and begins every window with this one.
                windows = windows.copy()
                windows[:, 0] = vocabulary.bos
        return windows

    def _key(self, candidate: Candidate, engines: Sequence[str], *more: str) -> str:
        settings = {k: v for k, v in asdict(self.settings).items() if k not in ("again", "engines")}
        reference = asdict(self.reference.info), asdict(self.reference.text)
        place = platform.node(), self.device, versions()
        values = [_SCHEMA, candidate.fingerprint, engines, settings, reference, place, *more]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]


def compare(
    paths: Sequence[Path],
    judge: Judge,
    *,
    command: str,
    alphas: tuple[ProjectionAlphas, ...] = (),
    tasks: TaskSettings | None = None,
) -> Comparison:
    """All files at `paths` judged, and their scores in `tasks`; `command` is what makes the comparison again.

    A file that cannot be judged is a failure; AlphaQError when none can.
    """
    names = distinct_names(paths)
    judged: list[Judged] = []
    scores: list[TaskScore] = []
    failures: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        try:
            judged.append(judge.judge(path, name))
            if tasks is not None:
                scores += judge.run_tasks(judged[-1], path, tasks)
        except AlphaQError as error:
            if len(paths) == 1:
                raise
            failures[name] = str(error)
            judge.reporter.warn(f"{name}: {error}")
    if not judged:
        raise AlphaQError("no file could be judged", "see the warnings above")
    return assemble(judged, judge, command=command, alphas=alphas, tasks=scores, failures=failures)


def assemble(
    judged: Sequence[Judged],
    judge: Judge,
    *,
    command: str,
    alphas: tuple[ProjectionAlphas, ...] = (),
    tasks: Sequence[TaskScore] = (),
    failures: dict[str, str] | None = None,
) -> Comparison:
    """The comparison of files that are judged."""
    reasons = dict(failures or {})
    for one in judged:
        reasons |= {f"{one.candidate.name} in {engine}": reason for engine, reason in one.failures.items()}
    return Comparison(
        command=command,
        date=date.today().isoformat(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        versions=versions(),
        reference=judge.reference.info,
        text=judge.reference.text,
        candidates=tuple(one.candidate for one in judged),
        evaluations=tuple(evaluation for one in judged for evaluation in one.evaluations),
        cross=tuple(cross for one in judged for cross in one.cross),
        alphas=alphas,
        tasks=tuple(tasks),
        failures=reasons or None,
        notes=tuple(judge.notes),
    )


def alphas_of(
    source: Source, *, cache_dir: Path, device: str = "cpu", threads: int = 1, reporter: Reporter | None = None
) -> tuple[ProjectionAlphas, ...]:
    """PL_Alpha_Hill of every expert of `source`, measured unless `cache_dir` has them."""
    found = measure_source(
        source, AlphaSettings(), cache_dir=cache_dir, device=device, threads=threads, reporter=reporter
    )
    places: dict[tuple[int, str], list[float | None]] = {}
    for stack in source.stacks:
        for matrix in stack.matrices:
            alpha = found.alphas[matrix.stack, matrix.xid, matrix.proj].alpha
            places.setdefault((stack.bid, matrix.proj), []).append(alpha)
    return tuple(ProjectionAlphas(bid, proj, tuple(values)) for (bid, proj), values in places.items())


def about_context(source: Source, n_ctx: int) -> str | None:
    """A word on windows that are longer than what the model was trained for."""
    trained = next((f.value for f in source.fields if f.key == f"{source.architecture}.context_length"), None)
    if trained is None or n_ctx <= trained:
        return None
    return f"windows of {n_ctx} tokens are longer than the {trained} that {source.name} was trained for"


def check_files(paths: Sequence[Path], source: Source) -> None:
    """What is wrong with files shows before the reference runs: AlphaQError when none can be held against `source`."""
    distinct_names(paths)
    problems: list[AlphaQError] = []
    for path in paths:
        try:
            describe_candidate(path, source)
            if path.suffix != ".json":
                check_vocabularies(source, path)
        except AlphaQError as error:
            problems.append(error)
    if len(problems) == len(paths):
        raise problems[0]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """File names, with as many directories before them as tell them apart. AlphaQError for a file named twice."""
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UsageError(f"{paths[i]} is named twice", "give each file once")
    names = []
    for path in resolved:
        depth = 1
        while sum(other.parts[-depth:] == path.parts[-depth:] for other in resolved) > 1:
            depth += 1
        names.append("/".join(path.parts[-depth:]))
    return names


def _rename(judged: Judged, name: str) -> dict[str, tuple[Evaluation, ...] | tuple[CrossEngine, ...]]:
    """Its figures under the name that the file has now."""
    return {
        "evaluations": tuple(replace(evaluation, file=name) for evaluation in judged.evaluations),
        "cross": tuple(replace(cross, file=name) for cross in judged.cross),
    }


def _why_no_triton(device: str) -> str:
    """Why the Triton kernels give no figure on `device`; empty where they run."""
    from alphaq_kernels import why_no_triton

    return "PyTorch runs on the CPU" if device == "cpu" else why_no_triton(device)


def versions() -> dict[str, str]:
    """Of this package and of those that compute."""
    name, _, number = TOOL.partition(" ")
    found = {name: number}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
