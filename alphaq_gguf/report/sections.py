"""The report's figures under their headings, and why one has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..compare.data import Comparison, Evaluation
from ..evaluate.speed import Rate
from . import figure_data, model_data
from .figure_data import FigureData, labels_of
from .tables import numbers_of, ordered
from .wording import ENGINES, byte_unit, number, quoted

Measured = tuple[float, float | None, float | None]
"""A value with the least and the most of its runs."""


@dataclass(frozen=True)
class Section:
    """Figures under a heading; `missing` says why there are none."""

    name: str
    title: str
    figures: list[FigureData]
    missing: str


def sections(comparison: Comparison) -> list[Section]:
    """All figures, in the report's order."""
    return [
        Section("size", "Size against KLD", figure_data.size_kld(comparison), "No file has a KLD."),
        Section(
            "routers",
            "Do routers still choose the same experts?",
            figure_data.routers(comparison),
            "Which experts were chosen was not recorded, in the reference or in the files.",
        ),
        Section("tokens", "Which tokens change", figure_data.histogram(comparison), "No file has a KLD."),
        Section("speed", "Speed", speed(comparison), "Speed was not measured."),
        Section("memory", "Memory", memory(comparison), "Memory was not measured."),
        Section(
            "alphas",
            "Tails of the experts' spectra",
            model_data.alphas(comparison),
            "The experts' alphas were not measured: that takes the checkpoint the files were made from.",
        ),
        Section("bits", "Where the bits went", model_data.bits(comparison), "No file's experts' types are known."),
        Section(
            "stacking",
            "What one type per stack costs",
            model_data.stacking(comparison),
            "No file holds a recipe that predicts it.",
        ),
    ]


def speed(comparison: Comparison) -> list[FigureData]:
    """Tokens per second, for what was timed."""

    def spread(rate: Rate) -> Measured:
        return rate.median, rate.least, rate.most

    panels: list[tuple[str, str, str, Callable[[Evaluation], Measured | None]]] = [
        ("decode", "decode, tokens/s", "Fastest decode", lambda e: spread(e.speed.decode) if e.speed else None),
        ("prefill", "prefill, tokens/s", "fastest prefill", lambda e: spread(e.speed.prefill) if e.speed else None),
    ]
    caption = "Median of the runs; thin lines reach from the slowest to the fastest."
    return _bars(comparison, "speed", "Tokens per second", caption, panels)


def memory(comparison: Comparison) -> list[FigureData]:
    """Memory that engines took, where it is known."""
    known = [n for e in comparison.evaluations for n in (e.peak_bytes, e.device_bytes) if n is not None]
    unit, scale = byte_unit(max(known, default=1))
    panels: list[tuple[str, str, str, Callable[[Evaluation], Measured | None]]] = [
        ("peak", f"peak resident, {unit}", "Highest peak", lambda e: _of_bytes(e.peak_bytes, scale)),
        ("device", f"on the GPU, {unit}", "most on the GPU", lambda e: _of_bytes(e.device_bytes, scale)),
    ]
    # llama.cpp is timed in a process of its own, which has the memory to itself.
    timed = {bool(e.speed) and e.engine == "llama.cpp" for e in comparison.evaluations if e.peak_bytes is not None}
    if timed == {True}:
        process = "Peak of a process that only ran the file, to time it"
    elif True in timed:
        process = (
            "Peak, in llama.cpp where speed was measured, of a process that only ran the file, to time it; else of the "
            "process that judged the file"
        )
    else:
        process = "Peak of the process that judged the file"
    caption = f"{process}. Of a file mapped into memory, the pages that it touched."
    return _bars(comparison, "memory", "Peak memory", caption, panels)


def _of_bytes(n_bytes: int | None, scale: int) -> Measured | None:
    return None if n_bytes is None else (n_bytes / scale, None, None)


def _bars(
    comparison: Comparison,
    name: str,
    title: str,
    caption: str,
    panels: Sequence[tuple[str, str, str, Callable[[Evaluation], Measured | None]]],
) -> list[FigureData]:
    """A bar per evaluation, panels without any left out."""
    labels, number_of = labels_of(comparison), numbers_of(comparison)
    drawn, told = [], []
    for key, label, phrase, measure in panels:
        found = [(c.name, e.engine, value) for c, e in ordered(comparison) if (value := measure(e)) is not None]
        if not found:
            continue
        bars = [
            {
                "id": f"{key}-{number_of[file]}-{engine}",
                "label": labels[file],
                "series": ENGINES[engine],
                **dict(zip(("value", "least", "most"), value, strict=True)),
            }
            for file, engine, value in found
        ]
        drawn.append({"label": label, "bars": bars})
        file, engine, value = max(found, key=lambda f: f[2][0])
        told.append(f"{phrase}: {number(value[0])} {label.rsplit(', ', 1)[1]} ({quoted(file)} in {ENGINES[engine]})")
    return [FigureData(name, "bars", title, f"{'; '.join(told)}.", caption, {"panels": drawn})] if drawn else []
