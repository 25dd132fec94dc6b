"""Writes a comparison as one HTML file, with its data and figures beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..compare.data import Comparison, save_comparison
from ..errors import OutputError, UsageError
from ..writer import check_output, partial_path, write_atomically
from .canvas import PALETTE, Drawing, require_matplotlib
from .figure_data import FigureData
from .figures import draw
from .ranking import with_short_names
from .sections import Section, sections
from .summary import summarise, verdict
from .tables import cost_table, engines_table, quality_table, tasks_table
from .wording import ENGINES, count, estimate

# Figures of a section that are seen at once; the rest unfolds.
_MOST_OPEN = 4
_REFERENCE_ENGINES = {**ENGINES, "file": "a program that stored its probabilities in a file"}


@dataclass(frozen=True)
class _Drawn:
    data: FigureData
    svg: Markup


def write_report(path: Path, comparison: Comparison, *, force: bool = False) -> list[Path]:
    """Write OUT.html, OUT.json and OUT-figures/ with every figure as SVG and PNG; the paths of all three.

    OutputError when one of them exists, unless `force`; AlphaQError where matplotlib is missing.
    """
    data, folder = check_report(path, force=force)
    parts = sections(with_short_names(comparison))
    drawings = {figure.name: draw(figure) for section in parts for figure in section.figures}
    page = _page(comparison, parts, drawings, data.name, folder.name)
    _write_figures(folder, drawings)
    save_comparison(data, comparison)
    write_atomically(path, page)
    return [path, data, folder]


def check_report(path: Path, *, force: bool = False) -> tuple[Path, Path]:
    """Where the data and the figures of the report at `path` go; what `write_report` refuses of names."""
    if path.suffix != ".html":
        raise UsageError(f"{path}: a report's name ends in .html", f"name it {path.with_suffix('.html').name}")
    require_matplotlib()
    data, folder = path.with_suffix(".json"), path.with_name(f"{path.stem}-figures")
    for out in (path, data):
        check_output(out, force=force)
    _check_folder(folder, force=force)
    return data, folder


def _page(
    comparison: Comparison, parts: Sequence[Section], drawings: dict[str, Drawing], json_name: str, folder: str
) -> str:
    loader = PackageLoader(__package__ or "", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    shown = [
        {
            "name": section.name,
            "title": section.title,
            "missing": section.missing,
            "n_open": len(section.figures) if len(section.figures) <= _MOST_OPEN + 1 else _MOST_OPEN,
            "figures": [_Drawn(figure, Markup(drawings[figure.name].inline)) for figure in section.figures],
        }
        for section in parts
    ]
    last = (
        ("engines", "Engines"),
        ("tasks", "Tasks"),
        ("notes", "Notes"),
        ("reference", "Reference and text"),
        ("reproduce", "Make it again"),
        ("reading", "How to read the KLD"),
    )
    contents = [("summary", "Summary"), ("table", "All figures"), *((s["name"], s["title"]) for s in shown), *last]
    reference, text = comparison.reference, comparison.text
    own = "text that the reference wrote itself"
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        css=Markup(environment.get_template("report.css").render(palette=PALETTE)),
        n_files=count(len(comparison.candidates), "file"),
        verdict=verdict(comparison),
        findings=summarise(with_short_names(comparison)),
        quality=quality_table(comparison),
        cost=cost_table(comparison),
        sections=shown,
        contents=contents,
        engines=engines_table(comparison),
        tasks=tasks_table(comparison),
        texts=[own if text.is_own and name == "self" else name for name in text.names],
        reference_engine=_REFERENCE_ENGINES.get(reference.engine, reference.engine),
        reference_perplexity=estimate(reference.perplexity),
        json_name=json_name,
        folder=folder,
    )


def _check_folder(folder: Path, *, force: bool) -> None:
    if not folder.exists():
        return
    if not force:
        raise OutputError(f"{folder} exists", "choose another name or pass --force to replace it")
    if not folder.is_dir() or any(inside.suffix not in (".svg", ".png") for inside in folder.iterdir()):
        raise OutputError(f"{folder} holds more than a report's figures", "choose another name or remove it yourself")


def _write_figures(folder: Path, drawings: dict[str, Drawing]) -> None:
    """The folder appears when it is whole."""
    temporary = partial_path(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, drawing in drawings.items():
            (temporary / f"{name}.svg").write_text(drawing.svg, encoding="utf-8")
            (temporary / f"{name}.png").write_bytes(drawing.png)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
