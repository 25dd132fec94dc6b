"""Draws figures from plain numbers: one function for each kind of figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import bare, every, legend, plain_log, power, whole_ticks
from .canvas import BITS, GRID, INK, MARKERS, MUTED, SERIES, SURFACE, WIDTH, Drawing, render, style
from .figure_data import FigureData
from .labels import label_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Cells narrower than this many inches carry no digit.
_LEGIBLE = 0.11
_ROW = 0.24
# Of series that share a colour.
_LINES = ("-", "--", ":")


def draw(figure: FigureData) -> Drawing:
    """`figure` as SVG and PNG; its title, finding and caption are the page's to show."""
    with style(figure.name):
        return render(_KINDS[figure.kind](figure.data), figure.name, f"{figure.title}. {figure.finding}")


def _new(height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, squeeze=False, **options)


def size_kld(data: dict[str, Any]) -> Figure:
    """Points with error bars on a logarithmic axis, strategies joined, the Pareto front underlaid.

    Series of one strategy share its colour.
    """
    from matplotlib.lines import Line2D

    points = data["points"]
    figure, axes = _new(4.6)
    ax = axes[0, 0]
    positive = [point["y"] for point in points if point["y"] > 0] or [1e-6]
    xs = [point["x"] for point in points]
    margin = 0.08 * (max(xs) - min(xs)) or 0.1 * max(xs)
    top = max(max(positive), *(point["y"] + point["error"] for point in points))
    low, high = min(positive) / 1.6, top * 1.6
    ax.set(yscale="log", xlim=(min(xs) - margin, max(xs) + margin), ylim=(low, high))
    ax.set(xlabel=data["x_label"], ylabel=data["y_label"])
    plain_log(ax.yaxis, low, high)
    heights = {point["id"]: max(point["y"], low) for point in points}
    front = sorted((p for p in points if p["front"]), key=lambda p: p["x"])
    lines = []
    if len(front) > 1:
        on_front = [heights[p["id"]] for p in front]
        lines += ax.plot([p["x"] for p in front], on_front, color=GRID, linewidth=5, gid="front", zorder=1.2)
    entries = []
    colours = list(dict.fromkeys(point["colour_of"] for point in points))
    alike: Counter[str] = Counter()
    for i, series in enumerate(dict.fromkeys(point["series"] for point in points)):
        mine = sorted((p for p in points if p["series"] == series), key=lambda p: p["x"])
        k = colours.index(mine[0]["colour_of"])
        nth = alike[mine[0]["colour_of"]]
        alike[mine[0]["colour_of"]] += 1
        colour, marker = SERIES[k % len(SERIES)], MARKERS[(k + k // len(SERIES) + 3 * nth) % len(MARKERS)]
        if series in data["joined"]:
            ys = [heights[p["id"]] for p in mine]
            look = {"color": colour, "linestyle": _LINES[nth % len(_LINES)], "alpha": 0.75}
            lines += ax.plot([p["x"] for p in mine], ys, gid=f"line-{i}", zorder=1.8, **look)
        for p in mine:
            x, y, error = p["x"], heights[p["id"]], p["error"]
            ax.plot([x, x], [max(p["y"] - error, low), max(p["y"] + error, low)], color=colour, gid=f"error-{p['id']}")
            face = SURFACE if p["hollow"] else colour
            look = {"color": colour, "markerfacecolor": face, "markeredgewidth": 1.4, "clip_on": False}
            ax.plot([x], [y], marker, gid=f"point-{p['id']}", zorder=3, **look)
        entries.append((Line2D([], [], linestyle="", marker=marker, color=colour), series))
    if len(entries) > 1:
        legend(figure, entries)
    label_points(ax, [(p["x"], heights[p["id"]]) for p in points], [p["label"] for p in points], lines)
    return figure


def lines(data: dict[str, Any]) -> Figure:
    """A line per file over layers, or steps over the bins of a histogram."""
    figure, axes = _new(3.6)
    ax, entries = axes[0, 0], []
    for i, row in enumerate(data["rows"]):
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        gid = f"series-{row['id']}"
        if "edges" in data:
            drawn = ax.stairs(row["y"], 10.0 ** np.array(data["edges"]), color=colour, linewidth=1.5, gid=gid)
        else:
            ys = [np.nan if y is None else y for y in row["y"]]
            (drawn,) = ax.plot(data["x"], ys, marker=marker, color=colour, markersize=4, gid=gid, clip_on=False)
        entries.append((drawn, row["label"]))
    ax.set(xlabel=data["x_label"], ylabel=data["y_label"])
    if "edges" in data:
        ax.set(xscale="log", xlim=_filled(data), ylim=(0, None))
        plain_log(ax.xaxis, *_filled(data))
    else:
        ax.set_xlim(min(data["x"]) - 0.5, max(data["x"]) + 0.5)
        whole_ticks(ax.xaxis)
    legend(figure, entries)
    return figure


def map_of_files(data: dict[str, Any]) -> Figure:
    """A row of colours per file."""
    rows = data["rows"]
    figure, axes = _new(1.0 + 0.2 * len(rows))
    ax = axes[0, 0]
    values = np.array([[np.nan if y is None else y for y in row["y"]] for row in rows])
    if "edges" in data:
        first, last = (int(np.searchsorted(data["edges"], np.log10(x))) for x in _filled(data))
        values = values[:, first:last]
        # Edges of bins, at whole powers of ten.
        ticks = range(0, last - first + 1, 4)
        ax.set_xticks([i - 0.5 for i in ticks], [power(10 ** data["edges"][first + i]) for i in ticks])
    else:
        ticks = every(len(data["x"]), 24)
        ax.set_xticks(ticks, [str(data["x"][i]) for i in ticks])
    image = ax.imshow(values, aspect="auto", interpolation="none", gid="map")
    ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
    ax.set(xlabel=data["x_label"])
    bare(ax)
    figure.colorbar(image, ax=ax, label=data["y_label"], fraction=0.04, pad=0.01).outline.set_visible(False)
    return figure


def bars(data: dict[str, Any]) -> Figure:
    """Bars with ranges, a panel per quantity."""
    from matplotlib.lines import Line2D

    panels = data["panels"]
    heights = [len(panel["bars"]) for panel in panels]
    figure, axes = _new(0.75 * len(panels) + _ROW * sum(heights), len(panels), height_ratios=[n + 1.5 for n in heights])
    series = list(dict.fromkeys(bar["series"] for panel in panels for bar in panel["bars"]))
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        for y, bar in enumerate(panel["bars"]):
            colour = SERIES[series.index(bar["series"])]
            ax.barh(y, bar["value"], 0.62, color=colour, gid=f"bar-{bar['id']}")
            if bar["least"] is not None:
                span = [bar["least"], bar["most"]]
                ax.plot(span, [y, y], color=SURFACE, linewidth=3.6)
                ax.plot(span, [y, y], color=INK, linewidth=1.4, gid=f"range-{bar['id']}")
        ax.set_yticks(range(len(panel["bars"])), [bar["label"] for bar in panel["bars"]])
        ax.set(xlabel=panel["label"], xlim=(0, None), ylim=(len(panel["bars"]) - 0.4, -0.6))
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
    if len(series) > 1:
        legend(figure, [(Line2D([], [], color=SERIES[i], linewidth=6), name) for i, name in enumerate(series)])
    return figure


def boxes(data: dict[str, Any]) -> Figure:
    """Quartiles and extremes per layer, a panel per projection."""
    panels = data["panels"]
    figure, axes = _new(1.75 * len(panels) + 0.3, len(panels), sharex=True)
    width = min(0.6, 0.06 * max(len(panel["boxes"]) for panel in panels))
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        for box in panel["boxes"]:
            x = box["layer"]
            ax.plot(
                [x, x], [box["least"], box["most"]], color=MUTED, linewidth=0.9, zorder=0.9, gid=f"whisker-{box['id']}"
            )
            ax.bar(x, box["q3"] - box["q1"], width, box["q1"], color=SERIES[0], gid=f"box-{box['id']}")
            median = [box["median"]] * 2
            ax.plot([x - width / 2, x + width / 2], median, color=SURFACE, linewidth=1.6, gid=f"median-{box['id']}")
        ax.set(title=panel["label"], ylabel=data["y_label"])
        ax.grid(False, axis="x")
        whole_ticks(ax.xaxis)
    layers = [box["layer"] for panel in panels for box in panel["boxes"]]
    axes[-1, 0].set(xlabel="layer", xlim=(min(layers) - 0.7, max(layers) + 0.7))
    return figure


def maps(data: dict[str, Any]) -> Figure:
    """A map of experts and layers per projection, one scale for all."""
    panels = data["maps"]
    heights = [max(0.9, min(4.0, 0.09 * len(panel["layers"]))) for panel in panels]
    figure, axes = _new(sum(heights) + 0.45 * len(panels) + 0.5, len(panels), height_ratios=heights)
    values = [np.array(panel["values"], dtype=float) for panel in panels]
    image, (least, most) = None, (f([f(v[np.isfinite(v)]) for v in values if np.isfinite(v).any()]) for f in (min, max))
    for ax, panel, grid in zip(axes[:, 0], panels, values, strict=True):
        image = ax.imshow(grid, aspect="auto", interpolation="none", vmin=least, vmax=most, gid=f"map-{panel['id']}")
        ticks = every(len(panel["layers"]), 8)
        ax.set_yticks(ticks, [str(panel["layers"][i]) for i in ticks])
        ax.set(title=panel["label"], ylabel="layer")
        whole_ticks(ax.xaxis)
        bare(ax)
    axes[-1, 0].set_xlabel("expert")
    assert image
    bar = figure.colorbar(image, ax=list(axes[:, 0]), label=data["value_label"], fraction=0.04, pad=0.01)
    bar.outline.set_visible(False)
    return figure


def bits(data: dict[str, Any]) -> Figure:
    """A cell per stack in the colour of its bits, divided where its experts have several types."""
    from matplotlib.patches import Patch, Rectangle

    rows, columns = data["rows"], data["columns"]
    is_split = any(len(cell["parts"]) > 1 for cell in data["cells"])
    figure, axes = _new(0.95 + (0.6 if is_split else 0.27) * len(rows))
    ax = axes[0, 0]
    width = (WIDTH - 1.9) / len(columns)
    for cell in data["cells"]:
        x, y = columns.index(cell["column"]), rows.index(cell["row"])
        bottom = y + 0.47
        for n_bits, share in cell["parts"]:
            look = {"facecolor": BITS[_known(n_bits)][0], "in_layout": False}
            edges = {"edgecolor": SURFACE, "linewidth": 0 if is_split else 0.6}
            place = (x - 0.46, bottom), 0.92, -0.94 * share
            ax.add_patch(Rectangle(*place, gid=f"cell-{cell['id']}-{n_bits}", **look, **edges))
            bottom -= 0.94 * share
        if len(cell["parts"]) == 1 and width > _LEGIBLE:
            n_bits = cell["parts"][0][0]
            look = {"color": BITS[_known(n_bits)][1], "fontsize": 8, "ha": "center", "va": "center_baseline"}
            ax.text(x, y, str(n_bits), in_layout=False, **look)
    for row, mean in data["means"].items():
        ax.text(len(columns) - 0.3, rows.index(row), f"{mean:.2f} bpw", color=INK, fontsize=8.5, va="center")
    ticks = every(len(columns), 24)
    ax.set_xticks(ticks, [str(columns[i]) for i in ticks])
    ax.set_yticks(range(len(rows)), rows)
    # One layer makes no cell as wide as the page.
    ax.set(xlim=(-0.5, max(len(columns), 6) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    ax.set_xlabel("layer", loc="left")
    bare(ax)
    names = [(n, f"{n} bits: {', '.join(types)}") for n, types in data["types"].items()]
    legend(figure, [(Patch(facecolor=BITS[_known(int(n))][0], edgecolor=GRID), name) for n, name in names])
    return figure


def dots(data: dict[str, Any]) -> Figure:
    """A row per file: the error of one type per stack and of one type for all, where 1 is a type per expert."""
    rows = data["rows"]
    figure, axes = _new(1.1 + _ROW * len(rows))
    ax = axes[0, 0]
    entries = {}
    ax.axvline(1, color=MUTED, linewidth=1, zorder=1)
    for y, row in enumerate(rows):
        ends = [1, *(row[key] for key in ("stack", "uniform") if row[key] is not None)]
        ax.plot([min(ends), max(ends)], [y, y], color=GRID, linewidth=2, zorder=1.5)
        for i, (key, name) in enumerate((("stack", "one type per stack"), ("uniform", "one type for all"))):
            if row[key] is not None:
                look = {"color": SERIES[i], "gid": f"{key}-{row['id']}", "clip_on": False, "zorder": 3}
                (entries[name],) = ax.plot([row[key]], [y], MARKERS[i], **look)
    ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
    ax.set(xlabel="predicted error, one type per expert = 1", ylim=(len(rows) - 0.4, -0.6))
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    legend(figure, [(entry, name) for name, entry in entries.items()])
    return figure


_KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    kind.__name__: kind for kind in (size_kld, lines, map_of_files, bars, boxes, maps, bits, dots)
}


def _filled(data: dict[str, Any]) -> tuple[float, float]:
    """The range of KLD that has tokens, in whole powers of ten."""
    used = [i for i in range(len(data["edges"]) - 1) if any(row["y"][i] for row in data["rows"])] or [0]
    return 10.0 ** np.floor(data["edges"][used[0]]), 10.0 ** np.ceil(data["edges"][used[-1] + 1])


def _known(n_bits: int) -> int:
    """The nearest number of bits that has a colour."""
    return min(BITS, key=lambda known: abs(known - n_bits))
