"""The report's tables: formatted cells, the best of each column marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..compare.data import Candidate, Comparison, Evaluation
from ..evaluate.speed import Rate
from .ranking import pareto, router_agreement
from .wording import ENGINES, estimate, in_bytes, number, percent

_NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A heading; `hint` is what it means, in a few words. `is_text` where its cells are words."""

    title: str
    hint: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Cell:
    """A formatted figure; `best` of its column, or a heading of its row."""

    text: str
    best: bool = False
    heading: bool = False
    on_front: bool = False
    is_long: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings."""

    name: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class _Measure:
    """A column of figures: what is compared, how it is shown, and whether "low" or "high" is better."""

    title: str
    hint: str
    value: Callable[[Candidate, Evaluation], float | None]
    show: Callable[[Candidate, Evaluation], str]
    better: str = ""


def _rate(rate: Rate) -> str:
    return f"{number(rate.median)} ({number(rate.least)} to {number(rate.most)})"


def _routers(index: int) -> Callable[[Candidate, Evaluation], Any]:
    def find(_candidate: Candidate, evaluation: Evaluation) -> float | None:
        agreement = router_agreement(evaluation.routers)
        return None if agreement is None else agreement[index]

    return find


def _worst_layer(_candidate: Candidate, evaluation: Evaluation) -> str:
    _, layer, share = router_agreement(evaluation.routers) or (0, 0, 0)
    return f"{percent(share)} (layer {layer})"


_KLD = _Measure(
    "Mean KLD",
    "nats per token",
    lambda c, e: e.divergence.kld.value,
    lambda c, e: estimate(e.divergence.kld),
    "low",
)
_QUALITY = (
    _Measure("Size", "of the whole file", lambda c, e: c.n_bytes, lambda c, e: in_bytes(c.n_bytes), "low"),
    _Measure("bpw", "stored bits per weight of the file", lambda c, e: c.bpw, lambda c, e: number(c.bpw)),
    _Measure("Expert bpw", "of the experts", lambda c, e: c.expert_bpw, lambda c, e: number(c.expert_bpw)),
    _Measure("PPL", "perplexity", lambda c, e: e.perplexity.value, lambda c, e: estimate(e.perplexity), "low"),
    _Measure(
        "Median",
        "of the KLD",
        lambda c, e: e.divergence.kld_median,
        lambda c, e: number(e.divergence.kld_median),
        "low",
    ),
    _Measure(
        "99.9 %",
        "of tokens' KLD is below",
        lambda c, e: e.divergence.kld_p999,
        lambda c, e: number(e.divergence.kld_p999),
        "low",
    ),
    _Measure("Max", "KLD", lambda c, e: e.divergence.kld_max, lambda c, e: number(e.divergence.kld_max), "low"),
    _Measure(
        "Top-1, %",
        "same likeliest token",
        lambda c, e: e.divergence.top1.value,
        lambda c, e: estimate(e.divergence.top1, 100),
        "high",
    ),
    _Measure(
        "RMS Δp, %",
        "of the true token",
        lambda c, e: e.divergence.rms_dp.value,
        lambda c, e: estimate(e.divergence.rms_dp, 100),
        "low",
    ),
    _Measure("Routers", "same experts, mean of layers", _routers(0), lambda c, e: percent(_routers(0)(c, e)), "high"),
    _Measure("Worst layer", "same experts", _routers(2), _worst_layer, "high"),
)
_COST = (
    _Measure(
        "Decode",
        "tokens/s, median (range)",
        lambda c, e: e.speed and e.speed.decode.median,
        lambda c, e: _rate(e.speed.decode) if e.speed else "",
        "high",
    ),
    _Measure(
        "Prefill",
        "tokens/s, median (range)",
        lambda c, e: e.speed and e.speed.prefill.median,
        lambda c, e: _rate(e.speed.prefill) if e.speed else "",
        "high",
    ),
    _Measure("Peak memory", "resident", lambda c, e: e.peak_bytes, lambda c, e: in_bytes(e.peak_bytes or 0), "low"),
    _Measure(
        "Device memory", "on the GPU", lambda c, e: e.device_bytes, lambda c, e: in_bytes(e.device_bytes or 0), "low"
    ),
    _Measure("Load", "seconds", lambda c, e: e.load_s, lambda c, e: number(e.load_s), "low"),
)


def quality_table(comparison: Comparison) -> Table:
    """Size and nearness to the reference, a row per file and engine."""
    caption = "Size, and nearness to the reference, of each file in each engine"
    table = _measured("quality", caption, comparison, (_KLD, *_QUALITY))
    # Beside the name, where a narrow screen shows it.
    table.columns.insert(2, table.columns.pop(3))
    for cells in table.rows:
        cells.insert(2, cells.pop(3))
    return table


def cost_table(comparison: Comparison) -> Table:
    """Speed, memory and notes, a row per file and engine."""
    table = _measured("cost", "Speed and memory of each file in each engine", comparison, _COST)
    rows = ordered(comparison)
    if any(evaluation.notes or evaluation.speed for _, evaluation in rows):
        table.columns.append(Column("Notes", is_text=True))
        for cells, (_, evaluation) in zip(table.rows, rows, strict=True):
            setting = (evaluation.speed.setting,) if evaluation.speed and evaluation.speed.setting else ()
            cells.append(Cell("; ".join((*setting, *evaluation.notes)), is_long=True))
    return table


def ordered(comparison: Comparison) -> list[tuple[Candidate, Evaluation]]:
    """All evaluations by file and engine."""
    engines = list(ENGINES)
    return [
        (candidate, evaluation)
        for candidate in comparison.candidates
        for evaluation in sorted(
            (e for e in comparison.evaluations if e.file == candidate.name), key=lambda e: engines.index(e.engine)
        )
    ]


def numbers_of(comparison: Comparison) -> dict[str, int]:
    """The number by which tables and figures call a file, from 1."""
    return {candidate.name: i for i, candidate in enumerate(comparison.candidates, 1)}


def _measured(name: str, caption: str, comparison: Comparison, measures: Sequence[_Measure]) -> Table:
    pairs, number_of, front = ordered(comparison), numbers_of(comparison), pareto(comparison)
    rows = [
        [
            Cell(str(number_of[candidate.name])),
            Cell(candidate.name, heading=True, on_front=candidate.name in front),
            Cell(f"{ENGINES[evaluation.engine]}, {evaluation.device}"),
        ]
        for candidate, evaluation in pairs
    ]
    columns = [Column(title, is_text=True) for title in ("#", "File", "Engine")]
    for measure in measures:
        values = [measure.value(*pair) for pair in pairs]
        if all(value is None for value in values):
            continue
        columns.append(Column(measure.title, measure.hint))
        best = _best(values, measure.better)
        for cells, pair, value in zip(rows, pairs, values, strict=True):
            cells.append(Cell(_NONE) if value is None else Cell(measure.show(*pair), best=value == best))
    return Table(name, caption, columns, rows)


def _best(values: Sequence[float | None], better: str) -> float | None:
    """The best value, None where all are the same or nobody can say."""
    known = {value for value in values if value is not None and math.isfinite(value)}
    if not better or len(known) < 2:
        return None
    return min(known) if better == "low" else max(known)


def engines_table(comparison: Comparison) -> Table | None:
    """How far engines are apart on the same bytes."""
    if not comparison.cross:
        return None
    number_of = numbers_of(comparison)
    rows = [
        [
            Cell(str(number_of.get(cross.file, _NONE))),
            Cell(cross.file, heading=True),
            Cell(f"{ENGINES[cross.other]} ‖ {ENGINES[cross.engine]}"),
            Cell(estimate(cross.kld)),
            Cell(estimate(cross.top1, 100)),
        ]
        for cross in comparison.cross
    ]
    columns = [Column(title, is_text=True) for title in ("#", "File", "Engines")]
    columns += [Column("Mean KLD"), Column("Top-1, %")]
    caption = (
        "Mean KLD of the second engine from the first on the same file, and how often their likeliest tokens agree"
    )
    return Table("engines", caption, columns, rows)


def tasks_table(comparison: Comparison) -> Table | None:
    """Zero-shot scores, a column per task."""
    tasks = list(dict.fromkeys((t.task, t.metric, t.n) for t in comparison.tasks))
    if not tasks:
        return None
    number_of = numbers_of(comparison)
    scores = {(t.file, t.engine, (t.task, t.metric, t.n)): t.score for t in comparison.tasks}
    places = list(dict.fromkeys((t.file, t.engine) for t in comparison.tasks))
    rows = [
        [Cell(str(number_of.get(file, _NONE))), Cell(file, heading=True), Cell(ENGINES.get(engine, engine))]
        for file, engine in places
    ]
    columns = [Column(title, is_text=True) for title in ("#", "File", "Engine")]
    for task in tasks:
        columns.append(Column(task[0], f"{task[1]}, %, n = {task[2]:,}"))
        found = [scores.get((*place, task)) for place in places]
        best = _best([score.value if score else None for score in found], "high")
        for cells, score in zip(rows, found, strict=True):
            cells.append(Cell(estimate(score, 100), best=score.value == best) if score else Cell(_NONE))
    return Table("tasks", "Zero-shot scores with their standard errors", columns, rows)
