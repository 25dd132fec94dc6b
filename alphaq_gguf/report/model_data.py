"""What figures plot of the model's experts: their alphas, the bits they got, and what sharing a type costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compare.data import Candidate, Comparison
from ..qtypes import NOMINAL_BITS, QType, bpw
from .figure_data import FigureData, labels_of, per_file, times
from .tables import numbers_of
from .wording import listed, number, percent, quoted

_QUARTILES = {"least": 0, "q1": 25, "median": 50, "q3": 75, "most": 100}


def alphas(comparison: Comparison) -> list[FigureData]:
    """Alphas by layer and projection, as distributions and one by one."""
    boxes, maps, told = [], [], []
    for proj in dict.fromkeys(entry.proj for entry in comparison.alphas):
        entries = sorted((e for e in comparison.alphas if e.proj == proj), key=lambda e: e.layer)
        known = {e.layer: [a for a in e.alphas if a is not None] for e in entries}
        every = [alpha for values in known.values() for alpha in values]
        if not every:
            continue
        panel = []
        for layer, values in known.items():
            if values:
                found = np.percentile(values, list(_QUARTILES.values())).tolist()
                panel.append({"id": f"{proj}-{layer}", "layer": layer, **dict(zip(_QUARTILES, found, strict=True))})
        boxes.append({"label": proj, "boxes": panel})
        width = max(len(e.alphas) for e in entries)
        values = [[*e.alphas, *[None] * (width - len(e.alphas))] for e in entries]
        maps.append({"id": proj, "label": proj, "layers": [e.layer for e in entries], "values": values})
        told.append(f"{proj} {number(float(np.median(every)))} ({number(min(every))} to {number(max(every))})")
    if not boxes:
        return []
    finding = f"Median alpha and range by projection: {listed(told)}."
    by_layer = (
        "PL_Alpha_Hill of the experts of each layer: boxes from quartile to quartile, a line at the median, whiskers "
        "to the extremes. A smaller alpha is a heavier tail."
    )
    one_by_one = (
        "Alpha of each expert in each layer. AlphaQ takes a small alpha, a heavy tail, for a mark of training and "
        "gives it more bits."
    )
    return [
        FigureData("alphas", "boxes", "Alpha by layer", finding, by_layer, {"panels": boxes, "y_label": "alpha"}),
        FigureData(
            "alpha-map",
            "maps",
            "Alpha by expert and layer",
            finding,
            one_by_one,
            {"maps": maps, "value_label": "alpha"},
        ),
    ]


def bits(comparison: Comparison) -> list[FigureData]:
    """Where each file's bits went: a map of layers and projections per file."""
    return [_bits(candidate, i) for i, candidate in enumerate(comparison.candidates, 1) if candidate.stacks]


def _bits(candidate: Candidate, i: int) -> FigureData:
    cells: list[dict[str, Any]] = []
    spent: dict[str, list[tuple[float, int]]] = {}
    types: dict[int, set[str]] = {}
    for stack in candidate.stacks:
        n_experts = sum(stack.experts.values())
        shares: dict[int, float] = {}
        for name in sorted(stack.experts, key=nominal_bits):
            n_bits = nominal_bits(name)
            types.setdefault(n_bits, set()).add(name)
            shares[n_bits] = shares.get(n_bits, 0) + stack.experts[name] / n_experts
            spent.setdefault(stack.proj, []).append((bpw(QType[name]), stack.experts[name]))
        place = {"row": stack.proj, "column": stack.layer}
        cells.append({"id": f"{stack.proj}-{stack.layer}", **place, "parts": list(shares.items())})
    means = {proj: sum(b * n for b, n in pairs) / sum(n for _, n in pairs) for proj, pairs in spent.items()}
    told = [f"{proj} {number(mean)}" for proj, mean in means.items()]
    finding = f"Mean stored bits per weight: {listed(told)}."
    caption = "Nominal bits of each stack of experts; stored bits include the scales."
    if any(len(cell["parts"]) > 1 for cell in cells):
        caption += (
            " Where experts of a stack have different types, the cell is divided from bottom to top by their shares."
        )
    data = {
        "rows": list(means),
        "columns": sorted({stack.layer for stack in candidate.stacks}),
        "cells": cells,
        "types": {n_bits: sorted(types[n_bits]) for n_bits in sorted(types)},
        "means": means,
    }
    return FigureData(f"bits-{i}", "bits", f"{i} {candidate.name}", finding, caption, data)


def nominal_bits(name: str) -> int:
    """The bits that a type called `name` rounds a weight to, scales left out."""
    return NOMINAL_BITS.get(QType[name], int(bpw(QType[name])))


def stacking(comparison: Comparison) -> list[FigureData]:
    """What it costs that the experts of a stack share a type, in predicted error."""
    labels, number_of = labels_of(comparison), numbers_of(comparison)
    known = {c.name: c.stacking for c in comparison.candidates if c.stacking and c.stacking["per_expert"] > 0}
    if not known:
        return []
    rows = [
        {
            "id": str(number_of[name]),
            "label": labels[name],
            "stack": found["per_stack"] / found["per_expert"],
            "uniform": times(found["uniform"], 1 / found["per_expert"]),
        }
        for name, found in known.items()
    ]
    worst = max(known, key=lambda name: known[name]["per_stack"] / known[name]["per_expert"])
    most = percent(known[worst]["per_stack"] / known[worst]["per_expert"] - 1)
    finding = f"One type per stack adds at most {most} to the predicted error of a type per expert ({quoted(worst)})."
    caption = "Predicted error at equal bytes, as a multiple of that of the best allocation with one type per expert."
    layers = sorted({int(layer) for found in known.values() for layer in found["layers"]})
    by_layer = [
        {
            "id": str(number_of[name]),
            "label": labels[name],
            "y": [_added(found["layers"].get(str(layer))) for layer in layers],
        }
        for name, found in known.items()
    ]
    in_layers = (
        "Predicted error that one type per stack adds to that of one per expert, at the bytes a layer was given."
    )
    axes = {"x": layers, "x_label": "layer", "y_label": "added error, %"}
    title = "Predicted error with a type per expert, per stack, and for all"
    return [
        FigureData("stacking", "dots", title, finding, caption, {"rows": rows}),
        per_file("stacking-layers", "Stacking loss by layer", finding, in_layers, axes, by_layer),
    ]


def _added(found: dict[str, float] | None) -> float | None:
    return (found["per_stack"] / found["per_expert"] - 1) * 100 if found and found["per_expert"] > 0 else None
