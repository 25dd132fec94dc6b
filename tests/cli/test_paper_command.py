"""`paper`: what it prints and writes follows from the table, and bad tables are refused in one line."""

from __future__ import annotations

import csv
import itertools
import json
import statistics
from pathlib import Path

import pytest

ALPHAS = (3.1, 4.2, 5.3, 3.9, 4.8, 6.1)
VARIANCES = (2e-4, 3.1e-4, 1.3e-4, 7e-4, 5.3e-4, 4.1e-4)
HEADER = "name,layer,module_type,alpha,variance"
ROWS = [
    f"model.layers.{i // 3}.mlp.experts.0.{kind}_proj,{i // 3},{kind}_proj,{alpha},{variance}"
    for i, (kind, alpha, variance) in enumerate(
        zip(["gate", "up", "down"] * 2, ALPHAS, VARIANCES, strict=True),
    )
]


def write_table(path: Path, rows: list[str] = ROWS, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "alphas.csv")


def best_bits(levels: tuple[int, ...], most: int, gamma: float) -> tuple[float, tuple[int, ...]]:
    """Least cost over all combinations whose bits sum to at most `most`, straight from the formula."""
    median = statistics.median(ALPHAS)
    factors = [(median / alpha) ** gamma * variance for alpha, variance in zip(ALPHAS, VARIANCES, strict=True)]
    return min(
        (sum(f * 4.0**-b for f, b in zip(factors, bits, strict=True)), bits)
        for bits in itertools.product(levels, repeat=len(factors))
        if sum(bits) <= most
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("flags", [[], ["--exact"]])
def test_the_files_hold_the_optimal_allocation(table: Path, tmp_path: Path, cli, flags: list[str]) -> None:
    least, bits = best_bits((2, 3, 4), 17, 12)
    arguments = ("paper", table, "--bits", 2.9, "--levels", "2,3,4", "--gamma", 12, *flags)
    code, out, err = cli(*arguments, "-o", tmp_path / "bits.csv")
    assert (code, err) == (0, "")
    assert "optimal" in out
    rows = read_csv(tmp_path / "bits.csv")
    assert list(rows[0]) == ["name", "layer", "module_type", "alpha", "variance", "sensitivity", "bits"]
    assert [",".join(list(row.values())[:3]) for row in rows] == [",".join(row.split(",")[:3]) for row in ROWS]
    assert [float(row["alpha"]) for row in rows] == list(ALPHAS)
    assert [float(row["variance"]) for row in rows] == list(VARIANCES)
    assert tuple(int(row["bits"]) for row in rows) == bits
    median = statistics.median(ALPHAS)
    assert [float(row["sensitivity"]) for row in rows] == pytest.approx([(median / a) ** 12 for a in ALPHAS])
    code, out, err = cli(*arguments, "-o", tmp_path / "bits.json", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data == json.loads((tmp_path / "bits.json").read_text())
    assert tuple(matrix["bits"] for matrix in data["matrices"]) == bits
    result = data["result"]
    assert result["objective"] == pytest.approx(least, rel=1e-12)
    assert result["lower_bound"] <= least
    assert result["gap"] < 1e-8
    assert result["mean_bits"] == pytest.approx(sum(bits) / 6)
    assert result["histogram"] == {str(level): bits.count(level) for level in sorted(set(bits))}
    assert result["module_types"]["down_proj"] == {
        str(level): [bits[2], bits[5]].count(level) for level in sorted({bits[2], bits[5]})
    }
    assert data["settings"]["exact"] == bool(flags)


def test_the_table_on_the_terminal_counts_matrices_by_type_and_level(table: Path, cli) -> None:
    _, bits = best_bits((2, 4, 8), 24, 1)
    code, out, _ = cli("paper", table, "--bits", 4, "--levels", "8,2,4", "--gamma", 1)
    assert code == 0
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert lines["all"][:3] == [str(bits.count(level)) for level in (2, 4, 8)]
    assert lines["gate_proj"][:3] == [str([bits[0], bits[3]].count(level)) for level in (2, 4, 8)]
    assert lines["gamma"] == ["1"]


def test_other_columns_their_order_and_a_byte_order_mark_do_not_matter(table: Path, tmp_path: Path, cli) -> None:
    _, plain, _ = cli("paper", table, "--bits", 3, "--json")
    fields = [row.split(",") for row in ROWS]
    mixed = [f'{v},"a, b",{a},{kind},{name},,{layer}' for name, layer, kind, a, v in fields]
    other = write_table(tmp_path / "other.csv", mixed, "\ufeffvariance,note,alpha,module_type,name,,layer")
    code, out, err = cli("paper", other, "--bits", 3, "--json")
    assert (code, err) == (0, "")
    assert {**json.loads(out), "table": str(table)} == json.loads(plain)


@pytest.mark.parametrize("column", ["n_weights", "elements"])
def test_weighted_counts_matrices_by_their_weights(tmp_path: Path, cli, column: str) -> None:
    # Of equal matrices the one that takes six of ten parts of the budget goes without.
    rows = [f"m{i},0,up,4,1e-3,{size}" for i, size in enumerate((600, 100, 100, 100, 100))]
    table = write_table(tmp_path / "alphas.csv", rows, f"{HEADER},{column}")

    def bits(*flags: str) -> tuple[list[int], float]:
        code, out, err = cli("paper", table, "--bits", 3, "--levels", "2,4", "--json", *flags)
        assert code == 0, err
        data = json.loads(out)
        return [m["bits"] for m in data["matrices"]], data["result"]["mean_bits"]

    assert bits("--weighted") == ([2, 4, 4, 4, 4], 2.8)
    assert sorted(bits()[0]) == [2, 2, 2, 4, 4]


def test_alphas_that_are_no_exponents_are_counted_with_a_warning(tmp_path: Path, cli) -> None:
    table = write_table(tmp_path / "alphas.csv", [*ROWS, "failed,9,up_proj,-1,1e-4"])
    code, _, err = cli("paper", table, "--bits", 3, "--gamma", 1)
    assert code == 0
    assert err == "warning: 1 of 7 alphas are below 1e-08 and count as that\n"


def changed(row: int, column: int, value: str) -> list[str]:
    """The rows of the table with one value replaced."""
    rows = [text.split(",") for text in ROWS]
    rows[row][column] = value
    return [",".join(fields) for fields in rows]


def refused(cli, tmp_path: Path, *arguments: object, code: int = 1) -> str:
    """Run a command that must fail and write nothing; returns its one line of stderr."""
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found, out, err = cli("paper", *arguments)
    assert (found, out) == (code, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    return err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        *[
            (changed(2, 3, value), f"line 4, column alpha: expected a finite number, found {value or 'nothing'}")
            for value in ("high", "nan", "inf", "")
        ],
        (changed(1, 4, "x"), "line 3, column variance: expected a finite number, found x"),
        (changed(1, 4, "-1e-9"), "line 3, column variance: expected no negative number, found -1e-09"),
        (
            changed(5, 0, ROWS[1].split(",")[0]),
            "line 7, column name: model.layers.0.mlp.experts.0.up_proj is already on",
        ),
        (changed(0, 0, ""), "line 2, column name: empty"),
        (changed(0, 4, "1e-4,7"), "line 2: more values than columns"),
        ([*ROWS, "short,3"], "line 8, column alpha: expected a finite number, found nothing"),
        ([], "the table has no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, cli, rows: list[str], words: str) -> None:
    table = write_table(tmp_path / "alphas.csv", rows)
    assert words in refused(cli, tmp_path, table, "--bits", 3, "-o", tmp_path / "bits.csv")


@pytest.mark.parametrize("column", HEADER.split(","))
def test_a_missing_column_is_named(tmp_path: Path, cli, column: str) -> None:
    table = write_table(tmp_path / "alphas.csv", header=HEADER.replace(column, "other"))
    assert f"no column {column} ->" in refused(cli, tmp_path, table, "--bits", 3, "-o", tmp_path / "bits.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no column name, layer, module_type, alpha, variance"),
        (b"GGUF\xff\xfe\x00", "not a CSV file"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, cli, content: bytes | None, words: str) -> None:
    table = tmp_path / "alphas.csv"
    if content is not None:
        table.write_bytes(content)
    assert words in refused(cli, tmp_path, table, "--bits", 3)


@pytest.mark.parametrize("value", ["0", "-4", "1.5", "many", ""])
def test_bad_numbers_of_weights_are_named_when_they_count(tmp_path: Path, cli, value: str) -> None:
    table = write_table(tmp_path / "alphas.csv", [f"{row},8" for row in ROWS[:-1]] + [f"{ROWS[-1]},{value}"])
    table.write_text(table.read_text().replace(HEADER, f"{HEADER},n_weights"))
    assert "line 7, column n_weights: expected" in refused(cli, tmp_path, table, "--bits", 3, "--weighted")
    assert cli("paper", table, "--bits", 3)[0] == 0


@pytest.mark.parametrize("bits", ["1.9", "8.01", "0", "-2", "nan", "inf"])
def test_impossible_bits_name_the_feasible_range(table: Path, tmp_path: Path, cli, bits: str) -> None:
    line = refused(cli, tmp_path, table, f"--bits={bits}", "-o", tmp_path / "bits.csv")
    assert "feasible are 2 to 8" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *[
            ([f"--levels={levels}"], f"--levels '{levels}'")
            for levels in ("", "2,", "two", "2.5,3", "0,2", "3,3", "2,99")
        ],
        (["--gamma", "-1"], "--gamma -1"),
        (["--gamma", "nan"], "--gamma nan"),
        (["--weighted"], "no column n_weights or elements"),
        (["-o", "bits.txt"], ".csv or .json"),
    ],
)
def test_options_that_make_no_sense(table: Path, tmp_path: Path, cli, arguments: list[str], words: str) -> None:
    assert words in refused(cli, tmp_path, table, "--bits", 3, *arguments, code=2)


def test_bits_are_required(table: Path, tmp_path: Path, cli) -> None:
    assert "--bits" in refused(cli, tmp_path, table, code=2)


def test_existing_files_are_replaced_only_by_force_and_the_table_never(table: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "bits.csv"
    out.write_text("precious")
    assert "bits.csv exists" in refused(cli, tmp_path, table, "--bits", 3, "-o", out)
    assert "is the source" in refused(cli, tmp_path, table, "--bits", 3, "-o", table, "--force")
    assert cli("paper", table, "--bits", 3, "-o", out, "--force")[0] == 0
    assert len(read_csv(out)) == len(ROWS)
