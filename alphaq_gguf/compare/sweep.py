"""Strategies and llama.cpp's presets at many sizes: each file made, judged, and let go."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..alone import alone
from ..checkpoint import Source
from ..encode import Encoder, find_encoder
from ..errors import AlphaQError, BudgetError, ConnectionLostError, OutputError
from ..reporter import Reporter, Silent
from ..strategies import STRATEGIES
from ..writer import check_output
from .candidates import describe_candidate
from .data import Comparison, from_plain
from .run import Judge, Judged, alphas_of, assemble, versions
from .sweep_files import Maker, Row, SweepSettings, plan_rows

_SCHEMA = 1


def sweep(
    source: Source,
    judge: Judge,
    settings: SweepSettings,
    *,
    command: str,
    cache_dir: Path,
    keep: Path | None = None,
    force: bool = False,
    encoder: Encoder | None = None,
    device: str = "cpu",
    threads: int = 1,
    reporter: Reporter | None = None,
) -> Comparison:
    """Make every file that `settings` ask for and judge it; `command` is what does so again.

    Figures stay in `cache_dir`: what is known is neither made nor judged again. Files are deleted when they are judged,
    or stay in the directory `keep`. What cannot be made, as for an infeasible budget, is one of the comparison's
    failures. UsageError for settings that make no sense, OutputError when a file is in the way in `keep`, AlphaQError
    when nothing could be judged.
    """
    settings.check(source)
    rows = plan_rows(settings)
    reporter = _Once(reporter or Silent())
    encoder = encoder or find_encoder()
    judged: dict[str, Judged] = {}
    failures: dict[str, str] = {}
    home = _home(source, cache_dir)
    with ExitStack() as stack:
        stack.enter_context(alone(home, reporter))
        if keep is not None:
            check_kept(source, settings, keep, cache_dir=cache_dir, force=force)
        known = _Known(home, again=judge.settings.again)
        making = source, settings.allocation, encoder, device, threads, cache_dir, home, reporter
        maker = stack.enter_context(Maker(*making))
        for i, row in enumerate(rows):
            reporter.note(f"{row.name} ({i + 1} of {len(rows)})")
            try:
                row = _sized(row, judged)
                judged[row.name] = _finish(row, maker, judge, known, home, keep, force)
            except (OutputError, ConnectionLostError):
                # The next file would fare no better, and the same command goes on from here.
                raise
            except AlphaQError as error:
                # What helps with a budget is an option of another command.
                hint = "" if isinstance(error, BudgetError) else error.hint
                failures[row.name] = " -> ".join(filter(None, [error.message, hint]))
                reporter.warn(f"{row.name}: {failures[row.name]}")
    if not judged:
        raise AlphaQError(f"nothing could be judged: {next(iter(failures.values()))}")
    alphas = ()
    if any(row.allocation and row.name in judged and "alphas" in STRATEGIES[row.origin].needs for row in rows):
        alphas = alphas_of(source, cache_dir=cache_dir, device=device, threads=threads, reporter=reporter)
    return assemble(list(judged.values()), judge, command=command, alphas=alphas, failures=failures)


def _sized(row: Row, judged: dict[str, Judged]) -> Row:
    """The row with the size it is to have."""
    if row.allocation is None or not row.size_of:
        return row
    if row.size_of not in judged:
        raise AlphaQError(f"its size is that of {row.size_of}, which there is none of")
    return replace(row, allocation=replace(row.allocation, size_bytes=judged[row.size_of].candidate.n_bytes))


def _finish(row: Row, maker: Maker, judge: Judge, known: _Known, home: Path, keep: Path | None, force: bool) -> Judged:
    """The figures of a file, from an earlier run or by making and judging it now."""
    key = _digest([_SCHEMA, row.name, maker.identity(row), _identity(judge)])
    found = known.get(key)
    kept = None if keep is None else keep / row.file_name
    if found is not None and (kept is None or _fingerprint(kept) == found.candidate.fingerprint):
        return found
    # A file of an earlier run that is judged on something else now is made again.
    if kept is not None and _fingerprint(kept) not in known.fingerprints:
        check_output(kept, force=force, inputs=maker.source.files)
    # A directory of its own, on the file system where the file may stay: what an interrupted run left in it is whole.
    directory = (keep or home) / f"sweep-{key}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / row.file_name
    try:
        if not path.exists():
            maker.make(row, path)
        judged = found or _as_asked(judge.judge(path, row.name, row.origin), row)
    except AlphaQError:
        shutil.rmtree(directory)
        raise
    known.add(key, judged)
    if kept is not None:
        path.replace(kept)
    shutil.rmtree(directory)
    return judged


def _as_asked(judged: Judged, row: Row) -> Judged:
    """With the granularity asked for, which a file does not show where experts of each stack got the same type."""
    if row.allocation is None:
        return judged
    return replace(judged, candidate=replace(judged.candidate, granularity=row.allocation.granularity))


def check_kept(source: Source, settings: SweepSettings, keep: Path, *, cache_dir: Path, force: bool) -> None:
    """OutputError before the long work: for a `keep` that is no directory, or a file in it that would be replaced."""
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{keep}: cannot be made: {error.strerror}", "choose another directory") from None
    ours = _Known(_home(source, cache_dir)).fingerprints
    for path in (keep / row.file_name for row in plan_rows(settings)):
        if _fingerprint(path) not in ours:
            check_output(path, force=force, inputs=source.files)


def _home(source: Source, cache_dir: Path) -> Path:
    """Where sweeps of `source` keep what is theirs, one of them at a time."""
    return cache_dir / f"sweep-{source.fingerprint[:24]}"


def _fingerprint(path: Path) -> str | None:
    """As in the candidate that the file is; None where there is no such file."""
    try:
        return describe_candidate(path).fingerprint
    except AlphaQError:
        return None


class _Known:
    """Figures of earlier runs by key, a JSON object a line in the directory `home`.

    `again` leaves them aside, and adds to them still. `fingerprints` are those of all files that sweeps made.
    """

    def __init__(self, home: Path, *, again: bool = False) -> None:
        self._path = home / "judged.jsonl"
        self._judged: dict[str, Judged] = {}
        self.fingerprints: set[str] = set()
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []:
            try:
                entry = json.loads(line)
                judged = from_plain(Judged, entry["judged"])
                self.fingerprints.add(judged.candidate.fingerprint)
                # Where an engine failed, the judge knows whether that is final.
                if not (again or judged.failures):
                    self._judged[entry["key"]] = judged
            except (json.JSONDecodeError, KeyError, TypeError):
                # Cut short when a run was killed, or of a version that kept something else.
                continue

    def get(self, key: str) -> Judged | None:
        return self._judged.get(key)

    def add(self, key: str, judged: Judged) -> None:
        if self._judged.get(key) == judged:
            return
        self._judged[key] = judged
        self.fingerprints.add(judged.candidate.fingerprint)
        with self._path.open("a", encoding="utf-8") as file:
            # The break comes first, so that a line cut short spoils no other.
            file.write("\n" + json.dumps({"key": key, "judged": asdict(judged)}))


class _Once:
    """A reporter that warns of each thing once: what is wrong with a model is found again with each of its files."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._said: set[str] = set()

    def task(self, label: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        return self._reporter.task(label, total, unit)

    def note(self, message: str) -> None:
        self._reporter.note(message)

    def warn(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._reporter.warn(message)


def _identity(judge: Judge) -> Any:
    """All that figures depend on besides the file."""
    settings = {**asdict(judge.settings), "again": None, "engines": judge.engines}
    reference = asdict(judge.reference.info), asdict(judge.reference.text)
    return [settings, reference, judge.device, platform.node(), versions()]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]
