"""Legends and ticks of the report's figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def legend(figure: Figure, entries: list[tuple[Any, str]]) -> None:
    """Above the axes, left. Labels are set afterwards: matplotlib hides those that begin with an underscore."""
    handles = [entry for entry, _ in entries]
    widest = max(len(name) for _, name in entries)
    columns = max(1, min(len(entries), 90 // (widest + 6)))
    drawn = figure.legend(
        handles, [name.replace("_", "-") for _, name in entries], loc="outside upper left", ncols=columns
    )
    for text, (_, name) in zip(drawn.get_texts(), entries, strict=True):
        text.set_text(name)


def plain_log(axis: Any, low: float, high: float) -> None:
    """Ticks that are read without a superscript, and enough of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = np.log10(high / low)
    factors = tuple(range(1, 10)) if decades < 0.7 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=factors, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))


def power(value: float) -> str:
    """`0.01`, `1e-6`."""
    return f"{value:g}" if 1e-4 < value < 1e5 else f"1e{round(np.log10(value))}"


def whole_ticks(axis: Any) -> None:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(12, integer=True))


def every(n: int, most: int) -> range:
    """Places of at most `most` of `n` ticks, evenly."""
    return range(0, n, -(-n // most))


def bare(ax: Axes) -> None:
    """Nothing but labels around a map."""
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
