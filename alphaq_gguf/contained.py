"""A budget of stored bytes for experts with types of their own: each stack plain or in a container, solved over stacks.

A stack can have as many sizes as there are GGUF types. For each of them the best choice of its experts' types is found
first; the sizes of all stacks then share the budget. Both are the solver of allocate.py, and so is the certificate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .allocate import Solution, solve_budget
from .container import ALIGNMENT, container_bytes, container_types, header_bytes, lay_out, stack_type
from .errors import BudgetError
from .gguf_file import align
from .qtypes import QType, row_bytes


@dataclass(frozen=True)
class Stored:
    """How a file stores a stack: the tensor's bytes, those of them that are experts, and whether in a container."""

    n_bytes: int
    n_payload_bytes: int
    is_container: bool


@dataclass(frozen=True)
class Option:
    """One size of a stack: its tensor's bytes, the best known type of each expert there, and what that costs.

    `choice` [experts] indexes the types; no choice that is stored in as many bytes costs less than `lower_bound`.
    """

    n_bytes: int
    choice: np.ndarray
    cost: float
    lower_bound: float


def store(shape: tuple[int, int, int], types: Sequence[QType]) -> Stored:
    """How a stack [experts, rows, columns] with these types is stored. ValueError when no GGUF type can hold it."""
    qtype, container = stack_type(shape, types)
    n_bytes = container_bytes(qtype, shape)
    return Stored(n_bytes, n_bytes if container is None else container.n_payload_bytes, container is not None)


def stack_options(shape: tuple[int, int, int], qtypes: Sequence[QType], cost: np.ndarray) -> list[Option]:
    """The sizes of a stack that are worth their bytes, by rising size and falling cost.

    `cost` float [experts, types], inf in the columns of types that the stack cannot have.
    """
    columns = np.flatnonzero(np.isfinite(cost[0]))
    cost, types = cost[:, columns], [qtypes[int(t)] for t in columns]
    found = []
    for t, qtype in enumerate(types):
        total = float(cost[:, t].sum())
        found.append(Option(container_bytes(qtype, shape), np.full(len(cost), t), total, total))
    size = np.tile([shape[1] * row_bytes(qtype, shape[2]) for qtype in types], (len(cost), 1))
    least = float(cost.min(axis=1).sum())
    sizes = {container_bytes(qtype, shape) for qtype in container_types(shape[2])} if len(types) > 1 else ()
    for n_bytes in sorted(sizes):
        option = _fill(shape, types, cost, size, n_bytes)
        if option is not None:
            found.append(option)
            # Every expert has its best type: more bytes would help none.
            if option.cost <= least:
                break
    return [replace(option, choice=columns[option.choice]) for option in _worth(found)]


def solve_stacks(
    stacks: Sequence[tuple[tuple[int, int, int], Sequence[int]]],
    qtypes: Sequence[QType],
    cost: np.ndarray,
    budget: int,
    alignment: int = 1,
) -> Solution:
    """Choose a type for each expert: least summed `cost` with the stored bytes of all stacks within `budget`.

    `stacks` are shapes, each with the rows of `cost` [units, types] that are its experts; every stack's bytes are
    aligned. Costs no more than the best choice of one type per stack. BudgetError when nothing fits.
    """
    options = [stack_options(shape, qtypes, cost[rows]) for shape, rows in stacks]
    table = (len(options), max(map(len, options), default=0))
    costs, bounds, plain = np.full(table, np.inf), np.full(table, np.inf), np.full(table, np.inf)
    size = np.zeros(table, dtype=np.int64)
    for s, found in enumerate(options):
        for o, option in enumerate(found):
            costs[s, o], bounds[s, o], size[s, o] = option.cost, option.lower_bound, align(option.n_bytes, alignment)
            if (option.choice == option.choice[0]).all():
                plain[s, o] = option.cost
    best = solve_budget(costs, size, budget)
    bound = best.lower_bound
    if not np.array_equal(costs, bounds):
        bound = min(solve_budget(bounds, size, budget).lower_bound, bound)
    if best.method != "exact":
        # A search that was given up may have missed what one over fewer options finds.
        best = min(best, solve_budget(plain, size, budget), key=lambda solution: solution.cost)
    choice = np.zeros(len(cost), dtype=np.int64)
    for (_, rows), found, o in zip(stacks, options, best.choice, strict=True):
        choice[rows] = found[o].choice
    bound = min(bound, best.cost)
    return Solution(choice, best.cost, best.size, bound, "exact" if bound == best.cost else "bounded")


def _fill(
    shape: tuple[int, int, int], types: Sequence[QType], cost: np.ndarray, size: np.ndarray, n_bytes: int
) -> Option | None:
    """The best choice of `types` that a container of `n_bytes` holds; None when it does not hold the smallest."""
    room = n_bytes - align(header_bytes(shape[0]), ALIGNMENT)
    bound = None
    while True:
        try:
            found = solve_budget(cost, size, room)
        except BudgetError:
            break
        bound = found.lower_bound if bound is None else bound
        chosen = [types[t] for t in found.choice]
        if lay_out(shape, chosen).payload_end <= n_bytes:
            return Option(store(shape, chosen).n_bytes, found.choice, found.cost, bound)
        # Gaps between types are no part of the sum. Where they matter, the next smaller sum is looked at.
        room = found.size - 1
    if bound is None:
        return None
    # What may have been passed over is in the bound.
    smallest = int(size[0].argmin())
    total = float(cost[:, smallest].sum())
    return Option(container_bytes(types[smallest], shape), np.full(len(cost), smallest), total, min(bound, total))


def _worth(options: Sequence[Option]) -> list[Option]:
    """Those that cost less than all smaller ones; the bound of one that is left out passes to the one that beats it."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.n_bytes, option.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
        elif option.lower_bound < kept[-1].lower_bound:
            kept[-1] = replace(kept[-1], lower_bound=option.lower_bound)
    return kept
