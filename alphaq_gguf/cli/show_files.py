"""How judged files look on the terminal, in 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..calibration.own_text import OWN
from ..compare.data import Comparison, Evaluation
from ..console import Console
from ..report.summary import verdict

_NAME_WIDTH = 23
_BEST = "*"
_OWN = "text that it wrote itself"


def show_files(console: Console, comparison: Comparison) -> None:
    """A table of each engine, best values marked, what engines disagree on, and the verdict."""
    text = comparison.text
    reference = comparison.reference
    names = ", ".join(_OWN if name == OWN else name for name in text.names)
    console.result(
        f"Reference {reference.name}: PPL {reference.perplexity.value:.4f} +- "
        f"{reference.perplexity.standard_error:.4f} over {text.n_scored:,} tokens of {names} "
        f"({text.n_windows} windows of {text.n_ctx})"
    )
    for engine, device in dict.fromkeys((e.engine, e.device) for e in comparison.evaluations):
        rows = [e for e in comparison.evaluations if (e.engine, e.device) == (engine, device)]
        _show_engine(console, comparison, f"{engine} on {device}", rows)
    for cross in comparison.cross:
        console.result(
            f"{cross.file}: on the same bytes {cross.engine} and {cross.other} differ by a KLD of {cross.kld.value:.2g}"
        )
    for task in comparison.tasks:
        console.result(
            f"{task.file} in {task.engine}: {task.task} {task.metric} {100 * task.score.value:.1f} +- "
            f"{100 * task.score.standard_error:.1f} % of {task.n}"
        )
    show_conclusion(console, comparison)


def show_conclusion(console: Console, comparison: Comparison) -> None:
    """The notes, each once, and the verdict."""
    for line in dict.fromkeys([*comparison.notes, *(note for e in comparison.evaluations for note in e.notes)]):
        console.note(line)
    console.result(verdict(comparison))


def _show_engine(console: Console, comparison: Comparison, title: str, rows: Sequence[Evaluation]) -> None:
    sizes = {candidate.name: candidate.n_bytes for candidate in comparison.candidates}
    columns = ["file", "MiB", "bpw", "PPL", "KLD", "top-1", "routers", "tok/s"]
    cells = [
        [
            shorten(e.file, _NAME_WIDTH),
            mebibytes(sizes[e.file]),
            f"{comparison.candidate(e.file).bpw:.2f}",
            f"{e.perplexity.value:.3f}",
            f"{e.divergence.kld.value:.5f}",
            f"{100 * e.divergence.top1.value:.1f}%",
            f"{100 * sum(e.routers.values()) / len(e.routers):.1f}%" if e.routers else "-",
            "-" if e.speed is None else _rate(e.speed.decode.median),
        ]
        for e in rows
    ]
    _mark(cells, 1, [sizes[e.file] for e in rows], min)
    _mark(cells, 4, [e.divergence.kld.value for e in rows], min)
    _mark(cells, 5, [e.divergence.top1.value for e in rows], max)
    _mark(cells, 7, [e.speed.decode.median if e.speed else None for e in rows], max)
    console.table(f"{title} ({_BEST} best)" if len(rows) > 1 else title, columns, cells)


def mebibytes(n_bytes: int) -> str:
    """A size in MiB, to four digits."""
    return f"{n_bytes / 2**20:#.4g}".rstrip(".")


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _mark(
    cells: list[list[str]], column: int, values: Sequence[float | None], best: Callable[[list[float]], float]
) -> None:
    """Mark the cells of the best values, unless all are equal."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return
    for row, value in zip(cells, values, strict=True):
        row[column] += _BEST if value == best(known) else " "


def shorten(name: str, width: int) -> str:
    """A name with its middle left out where it is too long: both ends tell files apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"
