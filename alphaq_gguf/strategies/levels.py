"""Levels of nominal bits, for strategies that sort experts into classes: their types, bytes, and which to mix."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ..qtypes import NOMINAL_BITS, block_size
from .base import Problem


def available_bits(problem: Problem) -> list[int]:
    """The nominal bits of all types that some unit may take, ascending."""
    return sorted({NOMINAL_BITS[problem.qtypes[t]] for t in np.flatnonzero(problem.allowed.any(axis=0))})


def choose_levels(bits: Sequence[int], average: float | Fraction) -> Sequence[int]:
    """The levels to mix: the one nearest the average and its neighbours if equally spaced, else the two around it."""
    nearest = min(range(len(bits)), key=lambda i: abs(bits[i] - average))
    three = bits[max(nearest - 1, 0) : nearest + 2]
    if len(three) == 3 and three[1] - three[0] == three[2] - three[1]:
        return three
    below = max(i for i, b in enumerate(bits) if b <= average)
    return bits[below : below + 2]


def level_columns(problem: Problem, bits: Sequence[int]) -> np.ndarray:
    """The column of each unit's type at each level, int [units, levels]."""
    known: dict[tuple[bytes, bytes], list[int]] = {}
    rows = []
    for u in range(len(problem.units)):
        # Experts of one stack share their row of the table, and there may be tens of thousands of them.
        key = problem.allowed[u].tobytes(), problem.size[u].tobytes()
        if key not in known:
            known[key] = [_column_at(problem, u, b) for b in bits]
        rows.append(known[key])
    return np.array(rows)


def level_sizes(problem: Problem, columns: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Bytes of groups of units at each level, int64 [groups, levels]."""
    size = np.take_along_axis(problem.size, columns, axis=1)
    return np.array([size[units].sum(axis=0) for units in groups])


def choice_at(columns: np.ndarray, groups: Sequence[Sequence[int]], levels: np.ndarray) -> np.ndarray:
    """The choice [units] that gives all units of a group the group's level."""
    choice = np.zeros(len(columns), dtype=np.int64)
    for units, level in zip(groups, levels, strict=True):
        choice[units] = columns[units, level]
    return choice


def _column_at(problem: Problem, u: int, bits: int) -> int:
    """The column of the type with these nominal bits, else of the next larger one, else of the largest.

    Among equal bits the smallest, then a K-quant, then IQ4_NL.
    """

    def preference(t: int) -> tuple[bool, int, int, int, int]:
        qtype = problem.qtypes[t]
        nominal = NOMINAL_BITS[qtype]
        return nominal < bits, abs(nominal - bits), int(problem.size[u, t]), -block_size(qtype), -qtype.value

    return min((int(t) for t in np.flatnonzero(problem.allowed[u])), key=preference)
