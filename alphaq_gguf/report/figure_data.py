"""What figures plot, as plain numbers with the words beside them: files against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..compare.data import Candidate, Comparison
from ..evaluate.metrics import HISTOGRAM_EDGES
from .ranking import chosen, kld_of, pareto, router_agreement
from .tables import numbers_of
from .wording import ENGINES, byte_unit, count, in_bytes, listed, number, percent, quoted, shortened

# Lines and points on them that can be told apart in one plot; more become rows of a map.
_MOST_LINES, _MOST_MARKS = 6, 160
# Points that find room for names; more are called by their numbers.
_MOST_NAMES = 8
_LABEL_WIDTH = 24
_PRESETS, _OTHERS = "llama.cpp presets", "other files"
_GIVEN_TYPES = {"expert-shared": "whole expert"}


@dataclass(frozen=True)
class FigureData:
    """A figure called `name`, drawn by the function `kind` of figures.py from `data`; `finding` says what it shows."""

    name: str
    kind: str
    title: str
    finding: str
    caption: str
    data: dict[str, Any]


def labels_of(comparison: Comparison) -> dict[str, str]:
    """A label for each file: its number and name."""
    return {name: f"{i}  {shortened(name, _LABEL_WIDTH)}" for name, i in numbers_of(comparison).items()}


def series_of(candidate: Candidate) -> str:
    """The group of files that one belongs to: a strategy and what has a type, llama.cpp's presets, or others."""
    if candidate.origin.startswith("preset "):
        return _PRESETS
    if candidate.origin and candidate.granularity != "stack":
        return f"{candidate.origin}, per {_GIVEN_TYPES.get(candidate.granularity, candidate.granularity)}"
    return candidate.origin or _OTHERS


def per_file(
    name: str, title: str, finding: str, caption: str, axes: dict[str, Any], rows: list[dict[str, Any]]
) -> FigureData:
    """Values of a few files as lines, of many as a map with a row for each."""
    data = {**axes, "rows": rows}
    if len(rows) <= _MOST_LINES and len(rows) * len(axes.get("x", ())) <= _MOST_MARKS:
        return FigureData(name, "lines", title, finding, caption, data)
    return FigureData(name, "map_of_files", title, finding, f"{caption} A row per file.", data)


def size_kld(comparison: Comparison) -> list[FigureData]:
    """Size of the file, and bits per expert weight, against the mean KLD."""
    kld, front, number_of = kld_of(comparison), pareto(comparison), numbers_of(comparison)
    if not kld:
        return []
    engine_of = {name: evaluation.engine for name, evaluation in chosen(comparison).items()}
    usual = min(engine_of.values(), key=list(ENGINES).index)
    points = []
    for name, mean in kld.items():
        candidate = comparison.candidate(name)
        preset = candidate.origin.removeprefix("preset ") if series_of(candidate) == _PRESETS else ""
        points.append(
            {
                "id": str(number_of[name]),
                "label": (preset or shortened(name, _LABEL_WIDTH)) if len(kld) <= _MOST_NAMES else str(number_of[name]),
                "series": series_of(candidate),
                "colour_of": _PRESETS if preset else candidate.origin,
                "y": mean.value,
                "error": mean.standard_error,
                "hollow": engine_of[name] != usual,
                "front": name in front,
            }
        )
    caption = f"Mean KLD from the reference in {ENGINES[usual]}, on a logarithmic scale; bars are one standard error."
    if len(front) > 1:
        caption += " The broad pale line joins the files that no other beats in both size and KLD."
    if len(kld) > _MOST_NAMES:
        caption += " Numbers are those of the table; where points crowd, some are left out."
    if any(len(stack.experts) > 1 for name in kld for stack in comparison.candidate(name).stacks):
        caption += " Files in which experts of a stack have different types run in llama.cpp with the plug-in only."
    if any(point["hollow"] for point in points):
        caption += f" Hollow points are files judged in other engines than {ENGINES[usual]} only."
    if any(point["y"] <= 0 for point in points):
        caption += " Points on the lower edge have a mean KLD of 0 or below, within rounding of the stored reference."
    told = [
        f"{quoted(name)} with {in_bytes(comparison.candidate(name).n_bytes)} and KLD {number(kld[name].value)}"
        for name in front
    ]
    finding = f"Of {count(len(kld), 'file')}, beaten by none in both size and KLD: {listed(told, 6)}."
    if len(kld) == 1:
        finding = f"{told[0]}."
    unit, scale = byte_unit(max(comparison.candidate(name).n_bytes for name in kld))
    panels = [("size-kld", "Size against KLD", f"file size, {unit}", lambda c: c.n_bytes / scale)]
    if len({comparison.candidate(name).expert_bpw for name in kld}) > 1:
        title = "Bits per expert weight against KLD"
        panels.append(("bpw-kld", title, "stored bits per expert weight", lambda c: c.expert_bpw))
    figures = []
    for figure, title, x_label, x_of in panels:
        placed = [point | {"x": x_of(comparison.candidate(name))} for name, point in zip(kld, points, strict=True)]
        axes = {"x_label": x_label, "y_label": "mean KLD, nats per token"}
        data = {**axes, "points": placed, "joined": _joined(comparison, list(kld))}
        figures.append(FigureData(figure, "size_kld", title, finding, caption, data))
    return figures


def _joined(comparison: Comparison, names: list[str]) -> list[str]:
    """Groups whose files differ in budget only: a strategy at several of them, in bits per weight or in bytes."""
    budgets: dict[str, set[float]] = {}
    for candidate in map(comparison.candidate, names):
        if series_of(candidate) not in (_PRESETS, _OTHERS):
            budgets.setdefault(series_of(candidate), set()).add(candidate.budget_bpw or candidate.n_bytes)
    return [series for series, found in budgets.items() if len(found) > 1]


def routers(comparison: Comparison) -> list[FigureData]:
    """How often routers choose the reference's experts, by layer."""
    labels, number_of = labels_of(comparison), numbers_of(comparison)
    recorded = {name: evaluation.routers for name, evaluation in chosen(comparison).items() if evaluation.routers}
    if not recorded:
        return []
    layers = sorted({layer for shares in recorded.values() for layer in shares})
    rows = [
        {"id": str(number_of[name]), "label": labels[name], "y": [times(shares.get(layer), 100) for layer in layers]}
        for name, shares in recorded.items()
    ]
    found = {name: agreement for name, shares in recorded.items() if (agreement := router_agreement(shares))}
    order = sorted(found, key=lambda name: -found[name][0])
    told = [
        f"{percent(found[n][0])} of tokens in {quoted(n)}, least in layer {found[n][1]}"
        for n in dict.fromkeys((order[0], order[-1]))
    ]
    finding = f"Routers choose the reference's experts, on average over layers, for {listed(told)}."
    caption = "Share of tokens for which a layer's router chooses the same set of experts as in the reference."
    axes = {"x": layers, "x_label": "layer", "y_label": "same experts, % of tokens"}
    return [per_file("routers", "Router agreement", finding, caption, axes, rows)]


def histogram(comparison: Comparison) -> list[FigureData]:
    """Tokens by their KLD."""
    labels, number_of = labels_of(comparison), numbers_of(comparison)
    judged = {name: evaluation.divergence for name, evaluation in chosen(comparison).items()}
    if not judged:
        return []
    rows = []
    for name, divergence in judged.items():
        total = max(1, sum(divergence.histogram))
        shares = [n / total * 100 for n in divergence.histogram]
        rows.append({"id": str(number_of[name]), "label": labels[name], "y": shares})
    order = sorted(judged, key=lambda name: judged[name].kld_median)
    told = [f"{number(judged[n].kld_median)} with {quoted(n)}" for n in dict.fromkeys((order[0], order[-1]))]
    finding = f"Distribution of the KLD over tokens; its median is {listed(told)}."
    caption = "Share of tokens by their KLD, in bins of a quarter of a power of ten; the outermost bins are open."
    axes = {"edges": list(HISTOGRAM_EDGES), "x_label": "KLD of a token, nats", "y_label": "% of tokens"}
    return [per_file("histogram", "KLD of single tokens", finding, caption, axes, rows)]


def times(value: float | None, factor: float) -> float | None:
    """The product, None of None."""
    return None if value is None else value * factor
