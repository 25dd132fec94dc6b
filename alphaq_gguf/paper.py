"""AlphaQ's own allocation of nominal bits, from a table of published alphas instead of weights."""

from __future__ import annotations

import csv
import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from .allocate import Solution, solve_budget
from .errors import AlphaQError, BudgetError, SourceError, UsageError
from .measurements import Alpha
from .strategies.alphaq import choose_gamma, sensitivities

COLUMNS = ("name", "layer", "module_type", "alpha", "variance")
SIZE_COLUMNS = ("n_weights", "elements")
"""Either holds the number of a matrix' weights."""
DEFAULT_LEVELS = (2, 3, 4, 5, 6, 7, 8)
LEAST_ALPHA, LEAST_VARIANCE = 1e-8, 1e-12


@dataclass(frozen=True)
class TableMatrix:
    """A row of the table. `n_weights` is None where matrices count equally."""

    name: str
    layer: str
    module_type: str
    alpha: float
    variance: float
    n_weights: int | None = None


@dataclass(frozen=True)
class PaperSettings:
    """`bits` is the largest mean; `gamma` None is the rule 1 / std(ln alpha); `exact` proves the optimum."""

    bits: float
    levels: tuple[int, ...] = DEFAULT_LEVELS
    gamma: float | None = None
    exact: bool = False


@dataclass(frozen=True)
class PaperAllocation:
    """`bits` and `sensitivity` [matrices], the exponent used, and the solver's cost, bound and gap."""

    bits: np.ndarray
    sensitivity: np.ndarray
    gamma: float
    solution: Solution


def read_table(path: Path, *, weighted: bool = False) -> list[TableMatrix]:
    """The matrices of a CSV with the columns `COLUMNS`; with `weighted` one of `SIZE_COLUMNS` too.

    Other columns are ignored. SourceError names the line and the column of the first bad value;
    UsageError when `weighted` lacks its column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path}: not a CSV file: {error}") from None
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise SourceError(f"{path}: no column {', '.join(missing)}", f"expected the columns {', '.join(COLUMNS)}")
    size_column = next((column for column in SIZE_COLUMNS if column in header), None) if weighted else None
    if weighted and size_column is None:
        raise UsageError(f"--weighted: {path} has no column {' or '.join(SIZE_COLUMNS)}", "leave --weighted out")
    if not rows:
        raise SourceError(f"{path}: the table has no rows")
    lines: dict[str, int] = {}
    matrices = []
    for line, row in rows:
        where = f"{path}, line {line}"
        if None in row:
            raise SourceError(f"{where}: more values than columns", "quote values that contain commas")
        name = row["name"]
        if not name:
            raise SourceError(f"{where}, column name: empty")
        if name in lines:
            raise SourceError(f"{where}, column name: {name} is already on line {lines[name]}")
        lines[name] = line
        alpha, variance = (_number(row[column], f"{where}, column {column}") for column in ("alpha", "variance"))
        if variance < 0:
            raise SourceError(f"{where}, column variance: expected no negative number, found {variance:g}")
        n_weights = None
        if size_column is not None:
            size = _number(row[size_column], f"{where}, column {size_column}")
            if size < 1 or not size.is_integer():
                raise SourceError(f"{where}, column {size_column}: expected a positive whole number, found {size:g}")
            n_weights = int(size)
        matrices.append(TableMatrix(name, row["layer"] or "", row["module_type"] or "", alpha, variance, n_weights))
    return matrices


def _number(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SourceError(f"{where}: expected a finite number, found {text or 'nothing'}")
    return value


def allocate_table(matrices: list[TableMatrix], settings: PaperSettings) -> PaperAllocation:
    """Least sum of s v 2^(-2 b) over matrices, one level b each, with mean bits <= `settings.bits` (arXiv 2606.04980).

    s = (median alpha / max(alpha, 1e-8))^gamma and v = max(variance, 1e-12). Both the sum and the mean count
    matrices equally, or by `n_weights` where they have it. BudgetError names the feasible range.
    """
    levels = np.array(settings.levels)
    if not levels.min() <= settings.bits <= levels.max():
        raise BudgetError(
            f"{settings.bits:g} mean bits are impossible: feasible are {levels.min()} to {levels.max()}",
            "ask for another --bits or other --levels",
        )
    alphas = {
        (m.name, 0, m.module_type): Alpha(max(m.alpha, LEAST_ALPHA), m.variance, 0, 0, "table", "") for m in matrices
    }
    gamma = choose_gamma(alphas) if settings.gamma is None else settings.gamma
    sensitivity = np.array(list(sensitivities(alphas, gamma).values()))
    variance = np.maximum([m.variance for m in matrices], LEAST_VARIANCE)
    weight = np.array([1 if m.n_weights is None else m.n_weights for m in matrices])
    with np.errstate(over="ignore"):
        cost = (sensitivity * variance * weight)[:, None] * 4.0**-levels
    if not np.isfinite(cost).all():
        raise AlphaQError(f"the sensitivities overflow with gamma {gamma:g}", "use a smaller --gamma")
    # The decimal that was asked for, not its binary neighbour: 2.3 bits of ten matrices are 23.
    budget = math.floor(Fraction(str(settings.bits)) * int(weight.sum()))
    solution = solve_budget(cost, weight[:, None] * levels, budget, exact=settings.exact)
    return PaperAllocation(levels[solution.choice], sensitivity, gamma, solution)


def mean_bits(matrices: list[TableMatrix], bits: np.ndarray) -> float:
    """Mean of `bits` as the budget counts it."""
    return float(np.average(bits, weights=[m.n_weights or 1 for m in matrices]))


def histogram(bits: np.ndarray) -> dict[int, int]:
    """Level -> number of matrices, ascending."""
    return {int(level): count for level, count in sorted(Counter(bits.tolist()).items())}
