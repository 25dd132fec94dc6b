"""Measurement files: what is reused, what survives a kill, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.ledger import Ledger, format_value, read_ledger, render_ledger

HEADER = {"measured": "alphas", "seed": 0, "max_tiles": None}
COLUMNS = ("name", "value")


def fill(path: Path, n_rows: int, *, complete: bool, start: int = 0, header=HEADER) -> Ledger:
    """Append rows r<start>... and close, as a run that ended (or was stopped) there."""
    ledger = Ledger(path, header, COLUMNS)
    for i in range(start, start + n_rows):
        ledger.append({"name": f"r{i}", "value": i / 3})
    ledger.close(complete=complete)
    return ledger


def names(ledger: Ledger) -> list[str]:
    return [row["name"] for row in ledger.rows]


def test_a_complete_ledger_is_one_comment_line_and_plain_csv(tmp_path):
    path = tmp_path / "a.csv"
    fill(path, 3, complete=True)
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(first.removeprefix("# ")) == HEADER
    assert [float(row["value"]) for row in csv.DictReader(rest)] == [0.0, 1 / 3, 2 / 3]
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_rows_are_on_disk_before_the_ledger_is_closed(tmp_path):
    ledger = Ledger(tmp_path / "a.csv", HEADER, COLUMNS)
    ledger.append({"name": "first", "value": 1.5})
    ledger.append({"name": "second", "value": None})
    header, rows = read_ledger(ledger.partial)
    assert header == HEADER
    assert rows == [{"name": "first", "value": "1.5"}, {"name": "second", "value": ""}]
    assert not ledger.path.exists()
    ledger.close(complete=False)


def test_an_unfinished_ledger_is_resumed_and_takes_its_name_when_complete(tmp_path):
    path = tmp_path / "sub" / "a.csv"
    assert not fill(path, 2, complete=False).complete
    assert not path.exists()
    resumed = Ledger(path, HEADER, COLUMNS)
    assert names(resumed) == ["r0", "r1"]
    assert not resumed.complete
    resumed.append({"name": "r2", "value": 0.5})
    resumed.close(complete=True)
    assert resumed.complete
    assert not resumed.partial.exists()
    assert [row["name"] for row in read_ledger(path)[1]] == ["r0", "r1", "r2"]


def test_a_ledger_stopped_after_its_last_row_is_completed_without_measuring(tmp_path):
    path = tmp_path / "a.csv"
    fill(path, 2, complete=False)
    Ledger(path, HEADER, COLUMNS).close(complete=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"extra": True}, {"max_tiles": 256}])
@pytest.mark.parametrize("complete", [True, False])
def test_another_header_reuses_nothing(tmp_path, change, complete):
    path = tmp_path / "a.csv"
    fill(path, 2, complete=complete)
    other = Ledger(path, {**HEADER, **change}, COLUMNS)
    assert other.rows == []
    assert not other.complete


def test_a_line_cut_short_is_measured_again(tmp_path):
    path = tmp_path / "a.csv"
    fill(path, 3, complete=False)
    partial = path.with_name("a.csv.partial")
    whole = partial.read_bytes()
    last_line = whole.rindex(b"r2")
    for length in range(last_line, len(whole)):
        partial.write_bytes(whole[:length])
        assert names(Ledger(path, HEADER, COLUMNS)) == ["r0", "r1"]
    partial.write_bytes(whole[: last_line + 4])
    fill(path, 1, complete=True, start=2)
    assert [row["name"] for row in read_ledger(path)[1]] == ["r0", "r1", "r2"]


def test_a_partial_file_cut_anywhere_never_stops_the_next_run(tmp_path):
    path = tmp_path / "a.csv"
    fill(path, 2, complete=False)
    partial = path.with_name("a.csv.partial")
    whole = partial.read_bytes()
    for length in range(len(whole)):
        partial.write_bytes(whole[:length])
        found = names(Ledger(path, HEADER, COLUMNS))
        assert found == ["r0", "r1"][: len(found)]


def test_an_extension_of_a_complete_ledger_survives_interruption(tmp_path):
    path = tmp_path / "a.csv"
    fill(path, 2, complete=True)
    fill(path, 3, complete=False, start=2)
    resumed = Ledger(path, HEADER, COLUMNS)
    assert names(resumed) == ["r0", "r1", "r2", "r3", "r4"]
    resumed.close(complete=True)
    assert len(read_ledger(path)[1]) == 5


def test_a_poorer_unfinished_file_never_replaces_a_complete_one(tmp_path):
    path = tmp_path / "a.csv"
    fill(path, 1, complete=False)
    one_row = path.with_name("a.csv.partial").read_text()
    fill(path, 2, complete=True, start=1)
    path.with_name("a.csv.partial").write_text(one_row)
    ledger = Ledger(path, HEADER, COLUMNS)
    assert names(ledger) == ["r0", "r1", "r2"]
    ledger.close(complete=True)
    assert len(read_ledger(path)[1]) == 3


def test_an_untouched_ledger_writes_nothing(tmp_path):
    Ledger(tmp_path / "none" / "a.csv", HEADER, COLUMNS).close(complete=True)
    assert list(tmp_path.iterdir()) == []


def test_a_complete_ledger_is_reused_without_writing(tmp_path):
    path = tmp_path / "a.csv"
    fill(path, 2, complete=True)
    before = path.stat().st_mtime_ns
    ledger = Ledger(path, HEADER, COLUMNS)
    assert ledger.complete
    assert names(ledger) == ["r0", "r1"]
    ledger.close(complete=True)
    assert path.stat().st_mtime_ns == before


@given(st.floats(allow_nan=False))
def test_floats_keep_full_precision(value):
    assert float(format_value(value)) == value


def test_none_is_the_empty_string_and_other_values_print_as_usual():
    assert [format_value(v) for v in (None, 3, "text", True)] == ["", "3", "text", "True"]


@given(
    st.lists(
        st.fixed_dictionaries(
            {"name": st.text(st.characters(codec="utf-8", exclude_characters="\r\0")), "value": st.text("0123.e-")}
        ),
        max_size=5,
    )
)
def test_any_text_survives_a_round_trip(rows):
    text = render_ledger(HEADER, COLUMNS, rows)
    first, _, rest = text.partition("\n")
    assert json.loads(first[2:]) == HEADER
    assert list(csv.DictReader(io.StringIO(rest, newline=""))) == rows


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"stack,expert\nx,0\n", id="no-header"),
        pytest.param(b"# {broken\n", id="bad-json"),
        pytest.param(b"# 5\nname,value\n", id="header-no-object"),
        pytest.param(b"\xff\xfe\x00binary", id="binary"),
        pytest.param(b"# {}\nname,value\n" + b"x" * 200_000 + b",1\n", id="endless-field"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(AlphaQError, match=r"bad\.csv: not a measurement file"):
        read_ledger(path)


def test_a_missing_ledger_is_refused_by_name(tmp_path):
    with pytest.raises(AlphaQError, match=r"gone\.csv: cannot be read"):
        read_ledger(tmp_path / "gone.csv")


def test_rows_with_too_few_or_too_many_fields_are_dropped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("# {}\nname,value\na,1\nb\nc,3,4\nd,5\n")
    assert [row["name"] for row in read_ledger(path)[1]] == ["a", "d"]
