"""The only printer: progress bars, notes and errors on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_BAR = 20
# Bar, percentage, rate, elapsed time and ETA with what is between them.
_BESIDE_LABEL = _BAR + 42
_LEAST_LABEL = 16


def format_count(value: float, unit: str) -> str:
    """`1.5 GiB`, `12.3 M weights`, `7 windows`: a number people can read."""
    if unit == "bytes":
        step, names = 1024.0, ("B", "KiB", "MiB", "GiB", "TiB")
    elif unit == "weights":
        step, names = 1000.0, (unit, f"k {unit}", f"M {unit}", f"G {unit}", f"T {unit}")
    else:
        return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
    power = 0
    while abs(value) >= step and power < len(names) - 1:
        value, power = value / step, power + 1
    return f"{value:.0f} {names[0]}" if power == 0 else f"{value:.2f} {names[power]}"


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(
            "" if speed is None else f"{format_count(speed, task.fields['unit'])}/s", style="progress.data.speed"
        )


class Console:
    """Implements Reporter for the terminal. `quiet` keeps errors and warnings only; `as_json` leaves stdout to JSON."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self._err = RichConsole(stderr=True, soft_wrap=True, highlight=False)
        self._out = RichConsole(soft_wrap=True, highlight=False)

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A progress bar with rate and ETA; one line at start and end where stderr is no terminal."""
        if self.quiet:
            yield lambda amount: None
            return
        if not self._err.is_terminal:
            self.note(f"{label}: {format_count(total, unit)}")
            yield lambda amount: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR),
            TaskProgressColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        # Beside the bar and the numbers, a label of a line's rest.
        room = max(_LEAST_LABEL, self._err.width - _BESIDE_LABEL)
        shown = label if len(label) <= room else f"{label[: room - 1]}…"
        with Progress(*columns, console=self._err) as bar:
            task = bar.add_task(escape(shown), total=total, unit=unit)
            yield lambda amount: bar.advance(task, amount)

    def note(self, message: str) -> None:
        if not self.quiet:
            self._err.print(escape(message))

    def warn(self, message: str) -> None:
        self._err.print(f"[yellow]warning:[/yellow] {escape(message)}")

    def error(self, message: str, hint: str = "") -> None:
        """One line: what is wrong, then what to do."""
        line = " ".join(message.split()) + (f" -> {' '.join(hint.split())}" if hint else "")
        self._err.print(f"[bold red]error:[/bold red] {escape(line)}")

    def result(self, text: str) -> None:
        """A line of the command's result on stdout."""
        if not self.as_json and not self.quiet:
            self._out.print(escape(text))

    def text(self, piece: str) -> None:
        """Raw text on stdout as it arrives, for generation."""
        sys.stdout.write(piece)
        sys.stdout.flush()

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table on stdout; columns after the first are right-aligned."""
        if self.as_json or self.quiet:
            return
        table = Table(title=escape(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(escape(column), justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        self._out.print(table)

    def json(self, data: Any) -> None:
        """The machine-readable result, when asked for."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, indent=2) + "\n")
