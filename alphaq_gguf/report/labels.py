"""Labels beside points, where they cover neither points nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .canvas import GRID, INK, MUTED, on_canvas

# Places to try, in points from the marker: direction, then distance.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (6, 13, 22, 34)
# Half the box around a marker that stays free.
_MARKER = 5
_STEP = 4


def label_points(ax: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], lines: Sequence[Any]) -> None:
    """Write `texts` beside `points` of `ax`, away from `lines`; one that finds no free place is left out."""
    renderer = on_canvas(ax.figure)
    scale = renderer.points_to_pixels(1)
    places = ax.transData.transform(points)
    taken = [_box(x, y, _MARKER * scale, _MARKER * scale) for x, y in places]
    crossed = np.concatenate([np.zeros((0, 2)), *(_along(line, _STEP * scale) for line in lines)])
    frame = ax.get_window_extent(renderer)
    # Points with the fewest neighbours can wait.
    crowd = np.array([np.sort(np.hypot(*(places - place).T))[:3].sum() for place in places])
    for i in np.argsort(crowd, kind="stable"):
        note = ax.annotate(texts[i], points[i], (0, 0), textcoords="offset points", fontsize=8.5, color=INK)
        note.set_gid(f"label-{i}")
        note.set_in_layout(False)
        extent = note.get_window_extent(renderer)
        best = None
        for distance in _DISTANCES:
            for dx, dy in _DIRECTIONS:
                reach = distance * scale * (1 if 0 in (dx, dy) else 0.75)
                x = places[i][0] + dx * (reach + extent.width / 2)
                y = places[i][1] + dy * (reach + extent.height / 2)
                box = _box(x, y, extent.width / 2 + scale, extent.height / 2)
                inside = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1
                if not inside or any(_overlap(box, other) for other in taken):
                    continue
                cost = _count(box, crossed) * 10 + distance
                if best is None or cost < best[0]:
                    best = (cost, distance, box)
        if best is None:
            note.remove()
            continue
        _, distance, box = best
        taken.append(box)
        note.set(ha="center", va="center")
        middle = ((box[0] + box[2]) / 2 - places[i][0], (box[1] + box[3]) / 2 - places[i][1])
        note.xyann = (middle[0] / scale, middle[1] / scale)
        if distance > _DISTANCES[0]:
            near = (np.clip(places[i][0], box[0], box[2]), np.clip(places[i][1], box[1], box[3]))
            ends = ax.transData.inverted().transform([places[i], near])
            ax.plot(*ends.T, color=MUTED if distance > _DISTANCES[1] else GRID, linewidth=0.7, zorder=1)


def _box(x: float, y: float, half_width: float, half_height: float) -> tuple[float, float, float, float]:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _count(box: Sequence[float], points: np.ndarray) -> int:
    x, y = points.T
    return int(((x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])).sum())


def _along(line: Any, step: float) -> np.ndarray:
    """Points along a drawn line, `step` pixels apart."""
    corners = line.get_transform().transform(np.column_stack(line.get_data()))
    pieces = [np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / step))) for a, b in pairwise(corners)]
    return np.concatenate([np.zeros((0, 2)), *pieces])
