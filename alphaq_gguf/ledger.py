"""An append-only CSV of measurements that survives interruption and is reused only for the same question.

First line: `# ` and a JSON object that says what was measured on what; then a CSV header and rows.
While measuring, the rows go to `FILE.partial`; when complete it is renamed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .errors import AlphaQError

Row = dict[str, str]
T = TypeVar("T")


class Ledger:
    """Measurements of one kind; `rows` holds what earlier runs with the same `header` already measured."""

    def __init__(self, path: Path, header: dict[str, Any], columns: tuple[str, ...]) -> None:
        self.path = path
        self.header = header
        self.columns = columns
        self.partial = path.with_name(path.name + ".partial")
        self.rows: list[Row] = []
        self.complete = False
        for candidate in (path, self.partial):
            if candidate.is_file():
                try:
                    found_header, rows = read_ledger(candidate)
                except AlphaQError:
                    continue
                # An unfinished extension of a complete file holds more rows than the file itself.
                if found_header == header and len(rows) > len(self.rows):
                    self.rows = rows
                    self.complete = candidate is path
        self._file: io.TextIOWrapper | None = None

    def parsed(self, parse: Callable[[Row], T]) -> list[T]:
        """Every row through `parse`; rows it cannot read are dropped, to be measured again."""
        good, values = [], []
        for row in self.rows:
            try:
                values.append(parse(row))
                good.append(row)
            except (KeyError, ValueError):
                self.complete = False
        self.rows = good
        return values

    def append(self, row: dict[str, Any]) -> Row:
        """Add a row and hand it to the operating system, so that a killed process loses nothing; returns its text."""
        text = {column: format_value(row[column]) for column in self.columns}
        self.rows.append(text)
        self.complete = False
        if self._file is None:
            # Rewritten from what was read, so that a line cut short by a kill disappears; by way of
            # another name, so that a kill right here loses nothing either.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.partial.with_name(self.partial.name + ".new")
            fresh.write_text(render_ledger(self.header, self.columns, self.rows), encoding="utf-8", newline="")
            fresh.replace(self.partial)
            self._file = self.partial.open("a", encoding="utf-8", newline="")
        else:
            csv.DictWriter(self._file, self.columns, lineterminator="\n").writerow(text)
        self._file.flush()
        return text

    def close(self, *, complete: bool) -> None:
        """Close the file; a complete ledger takes its final name."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if complete and not self.complete and self.partial.exists():
            self.partial.replace(self.path)
            self.complete = True


def format_value(value: Any) -> str:
    """Floats in full precision, None as the empty string."""
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def render_ledger(header: dict[str, Any], columns: tuple[str, ...], rows: list[Row]) -> str:
    """The text of a ledger file."""
    out = io.StringIO()
    out.write("# " + json.dumps(header, sort_keys=True) + "\n")
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_ledger(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and whole rows of a ledger file; AlphaQError when it is not one."""
    try:
        text = path.read_text(encoding="utf-8")
        first, _, rest = text.partition("\n")
        if not first.startswith("# "):
            raise ValueError("no header line")
        header = json.loads(first[2:])
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
        # A line without its newline was cut short when the process died.
        rest = rest[: rest.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(rest))
        rows = [row for row in reader if None not in row.values() and None not in row]
    except OSError as error:
        raise AlphaQError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise AlphaQError(
            f"{path}: not a measurement file: {error}", "measure again with `alphaq-gguf alphas`"
        ) from None
    return header, rows
