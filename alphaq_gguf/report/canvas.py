"""From a matplotlib figure to SVG that follows its page's colours, to SVG for itself, and to PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import AlphaQError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Light and dark by role. The light ones are what is drawn; inside the page each becomes the variable of its name, so
# no two may be equal. Series can be told apart by readers who do not see all colours, and have markers besides.
PALETTE = {
    "surface": ("#fefefe", "#16191d"),
    "ink": ("#1b1f24", "#e4e7eb"),
    "muted": ("#59616b", "#a4adb8"),
    "grid": ("#dcdfe4", "#343a42"),
    "series-1": ("#0b66a8", "#5ab0ec"),
    "series-2": ("#22a124", "#b0fdc5"),
    "series-3": ("#ca74a4", "#f9c8ff"),
    "series-4": ("#724600", "#956807"),
    "series-5": ("#8a76de", "#747bbd"),
    "series-6": ("#451627", "#cf4580"),
    "series-7": ("#384453", "#bbbbbb"),
    "series-8": ("#936561", "#bb8f60"),
}
SERIES = [light for name, (light, _) in PALETTE.items() if name.startswith("series-")]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
SURFACE, INK, MUTED, GRID = (PALETTE[name][0] for name in ("surface", "ink", "muted", "grid"))
# The darker the more bits; the same in light and dark pages, with the ink that can be read on each.
BITS = {
    1: ("#fff9d9", "#1a1a1a"),
    2: ("#fdf0b0", "#1a1a1a"),
    3: ("#c9e6b3", "#1a1a1a"),
    4: ("#83cdba", "#1a1a1a"),
    5: ("#45aec4", "#1a1a1a"),
    6: ("#2b78b1", "#ffffff"),
    8: ("#2a4596", "#ffffff"),
    16: ("#2d1e5e", "#ffffff"),
    32: ("#1d1030", "#ffffff"),
}
COLOUR_MAP = "viridis"
WIDTH = 8.0

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": SURFACE,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "figure.facecolor": SURFACE,
    "figure.constrained_layout.h_pad": 0.06,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.markersize": 6,
    "image.composite_image": False,
    "image.cmap": COLOUR_MAP,
    "svg.fonttype": "none",
    "path.simplify": False,
}


@dataclass(frozen=True)
class Drawing:
    """A figure for the page (`inline`), and to keep beside it."""

    inline: str
    svg: str
    png: bytes


def require_matplotlib() -> None:
    """AlphaQError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise AlphaQError(
            "the report needs matplotlib, which is not installed", "pip install 'alphaq-gguf[report]'"
        ) from None


@contextmanager
def style(name: str) -> Iterator[None]:
    """The report's look for what is drawn inside. AlphaQError where matplotlib is missing."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Names of files may hold any letter. In SVG the browser finds a font for it.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        yield


def render(figure: Figure, name: str, label: str) -> Drawing:
    """The figure in all forms; every id begins with `name`, and `label` is read out in its place."""
    vector, raster = io.StringIO(), io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(vector, format="svg", metadata=nothing)
    # Laid out once is enough; with hundreds of labels it takes longer than drawing.
    figure.set_layout_engine("none")
    figure.savefig(raster, format="png", dpi=160, metadata={"Software": None})
    svg = _prefixed(vector.getvalue(), name)
    return Drawing(_inline(svg, label), svg, raster.getvalue())


def _prefixed(svg: str, name: str) -> str:
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)


def _inline(svg: str, label: str) -> str:
    """The svg element alone, in the page's colours."""
    from xml.sax.saxutils import quoteattr

    body = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', body)
    assert box
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label={quoteattr(label)}>'
    body = head + body[body.index(">") + 1 :]
    for role, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{role})")
    return body


def on_canvas(figure: Figure) -> Any:
    """Lay `figure` out as PNG would, so that places on it can be measured; the renderer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    return canvas.get_renderer()
