"""A file evaluated in an engine: interrupted anywhere it goes on, and finds what it would have found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.compare.evaluation import Found, Job, run_job
from alphaq_gguf.compare.reference import make_reference
from alphaq_gguf.compare.run import Judge, Judged
from alphaq_gguf.compare.settings import JudgeSettings
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.evaluate.base_file import BaseFile, BaseWriter
from alphaq_gguf.evaluate.metrics import compress
from alphaq_gguf.evaluate.routes_file import RoutesFile, RoutesWriter
from alphaq_gguf.reporter import Silent

pytestmark = pytest.mark.usefixtures("one_torch_thread")
N_CTX, N_WINDOWS = 48, 5


class Interrupting(Silent):
    """Breaks off in the place of the window numbered `after`, and counts those that were run."""

    def __init__(self, after: int | None = None) -> None:
        self.after = after
        self.n_run = 0
        self.n_resumed = 0

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        calls = iter(range(1 << 30))

        def advance(amount: int) -> None:
            if next(calls) == 0:
                self.n_resumed = amount
                return
            self.n_run += amount
            if self.n_run == self.after:
                raise KeyboardInterrupt

        yield advance


@pytest.fixture(scope="module")
def job(trained: Path, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Job:
    from alphaq_gguf.cli import main

    directory = tmp_path_factory.mktemp("evaluation")
    path = directory / "q3.gguf"
    words = ("convert", trained, "-o", path, "-q", "--cache-dir", cache_dir, "--bpw", 32, "--tensor-type", "_exps=Q3_K")
    assert main([str(w) for w in words]) == 0
    reference = make_reference(
        open_source(trained), [trained / "heldout.txt"], n_ctx=N_CTX, max_windows=N_WINDOWS, cache_dir=directory
    )
    assert reference.routes is not None
    return Job(
        path,
        "llama",
        "cpu",
        1,
        0,
        True,
        reference.windows,
        reference.base.path,
        directory / "unused",
        routes=reference.routes.path,
    )


def run(job: Job, directory: Path, *interruptions: int) -> Found:
    """Run a job that is interrupted after so many windows, again and again, and then left alone."""
    job = replace(job, records=directory / f"{job.engine}.records")
    done = 0
    for after in interruptions:
        reporter = Interrupting(after)
        with pytest.raises(KeyboardInterrupt):
            run_job(job, reporter)
        assert reporter.n_resumed == done
        done += after
    reporter = Interrupting()
    found = run_job(job, reporter)
    assert (reporter.n_resumed, reporter.n_run) == (done, N_WINDOWS - done)
    return found


def same(one: Found, other: Found) -> bool:
    return replace(one, load_s=0.0) == replace(other, load_s=0.0)


@pytest.mark.parametrize("interruptions", [(1,), (2, 2), (1, 1, 3)])
def test_an_interrupted_evaluation_goes_on(interruptions: tuple[int, ...], job: Job, tmp_path: Path) -> None:
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole = run(replace(job, keep=tmp_path / "whole" / "kept"), tmp_path / "whole")
    resumed = run(replace(job, keep=tmp_path / "resumed" / "kept"), tmp_path / "resumed", *interruptions)
    assert same(whole, resumed)
    assert (tmp_path / "whole" / "kept").read_bytes() == (tmp_path / "resumed" / "kept").read_bytes()


def test_records_and_kept_logits_that_were_cut_short_fit_again(job: Job, tmp_path: Path) -> None:
    whole = run(job, tmp_path)
    (tmp_path / "llama.records").unlink()
    keep, records = tmp_path / "kept", tmp_path / "llama.records"
    interrupted = replace(job, keep=keep, records=records)
    with pytest.raises(KeyboardInterrupt):
        run_job(interrupted, Interrupting(3))
    size = records.stat().st_size // 3
    # Killed while the third record was written, its logits being there already.
    with records.open("r+b") as file:
        file.truncate(size * 2 + 7)
    reporter = Interrupting()
    assert same(run_job(interrupted, reporter), whole)
    assert (reporter.n_resumed, reporter.n_run) == (2, N_WINDOWS - 2)
    assert BaseFile(keep).n_windows == N_WINDOWS


def test_the_second_engine_is_held_against_the_first(job: Job, tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    run(replace(job, keep=keep), tmp_path)
    (tmp_path / "again").mkdir()
    against_itself = run(replace(job, against=keep), tmp_path / "again")
    assert against_itself.cross is not None
    assert abs(against_itself.cross.kld.value) < 1e-5
    assert against_itself.cross.top1.value == 1
    other = run(replace(job, engine="torch", against=keep), tmp_path)
    assert other.cross is not None
    assert 1e-5 < other.cross.kld.value < 5e-3
    assert other.engine == "pytorch"


def test_routers_agree_with_themselves(job: Job, trained: Path, tmp_path: Path) -> None:
    reference = make_reference(
        open_source(job.path, allow_requantize=True),
        [trained / "heldout.txt"],
        n_ctx=N_CTX,
        max_windows=N_WINDOWS,
        cache_dir=tmp_path,
        exact=True,
    )
    assert reference.routes is not None
    own = replace(job, windows=reference.windows, base=reference.base.path, routes=reference.routes.path)
    assert run(own, tmp_path).routers == {0: 1.0, 1: 1.0}


def test_a_reference_of_another_size_is_refused(job: Job, tmp_path: Path) -> None:
    base = tmp_path / "odd.kld"
    with BaseWriter(base, job.windows, 1001) as writer:
        for _ in job.windows:
            writer.append(compress(np.zeros((N_CTX - 1 - N_CTX // 2, 1001), np.float32)))
    with pytest.raises(AlphaQError, match="tokens in its vocabulary, the reference 1001"):
        run_job(replace(job, base=base, routes=None, records=tmp_path / "r"), Silent())


class Stopping(Silent):
    """Breaks off when `after` windows are done in all engines together."""

    def __init__(self, after: int | None = None) -> None:
        self.left = after

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(amount: int) -> None:
            if self.left is not None:
                self.left -= amount
                if self.left <= 0:
                    raise KeyboardInterrupt

        yield advance


def test_interrupting_the_judge_keeps_what_is_known(job: Job, trained: Path, tmp_path: Path) -> None:
    source = open_source(trained)
    reference = make_reference(
        source, [trained / "heldout.txt"], n_ctx=N_CTX, max_windows=N_WINDOWS, cache_dir=job.path.parent
    )

    def judge(reporter: Stopping) -> Judged:
        settings = JudgeSettings(engines=("llama", "torch"), threads=1, speed_runs=0)
        return Judge(reference, source, settings, cache_dir=tmp_path, reporter=reporter).judge(job.path)

    whole = judge(Stopping())
    assert {e.engine for e in whole.evaluations} == {"llama.cpp", "pytorch"}
    (directory,) = tmp_path.glob("judged-*")
    assert [path.name for path in directory.iterdir()] == ["judged.json"]
    (directory / "judged.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        judge(Stopping(N_WINDOWS + 2))
    assert BaseFile(directory / "llama.kld").n_windows == N_WINDOWS
    again = judge(Stopping())
    assert [e.divergence for e in again.evaluations] == [e.divergence for e in whole.evaluations]
    assert [c.kld for c in again.cross] == [c.kld for c in whole.cross]


def test_another_number_of_experts_is_no_agreement(job: Job, tmp_path: Path) -> None:
    reference = RoutesFile(job.routes)  # type: ignore[arg-type]
    layers = {bid: chosen.shape[1] + 1 for bid, chosen in reference.read(0).items()}
    path = tmp_path / "routes.npy"
    writer = RoutesWriter(path, N_WINDOWS, N_CTX, layers)
    for i in range(N_WINDOWS):
        writer.put(i, {bid: np.concatenate([c, c[:, :1]], axis=1) for bid, c in reference.read(i).items()})
    writer.flush()
    assert run(replace(job, routes=path), tmp_path).routers == {0: 0.0, 1: 0.0}


def test_records_of_one_engine_are_not_taken_for_those_against_another(job: Job, trained: Path, tmp_path: Path) -> None:
    source = open_source(trained)
    reference = make_reference(
        source, [trained / "heldout.txt"], n_ctx=N_CTX, max_windows=N_WINDOWS, cache_dir=job.path.parent
    )

    def judge(*engines: str, reporter: Stopping) -> Judged:
        settings = JudgeSettings(engines=engines, threads=1, speed_runs=0)
        return Judge(reference, source, settings, cache_dir=tmp_path, reporter=reporter).judge(job.path)

    with pytest.raises(KeyboardInterrupt):
        judge("torch", "llama", reporter=Stopping(2))
    found = judge("llama", "torch", reporter=Stopping())
    alone = judge("torch", reporter=Stopping())
    assert found.evaluations[1].divergence == alone.evaluations[0].divergence
    assert [(c.engine, c.other) for c in found.cross] == [("pytorch", "llama.cpp")]
