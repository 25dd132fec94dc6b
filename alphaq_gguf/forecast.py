"""What a checkpoint can become, told from its config and tensor headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .budget import size_range
from .checkpoint import ExpertStack
from .memory import MemoryNeed
from .qtypes import K_TYPES, QType, bpw, candidates, fits
from .strategies import Problem

GIB = 1 << 30
MEMORY_SIZES = tuple(gib * GIB for gib in (8, 12, 16, 24, 32, 48, 64, 128))


@dataclass(frozen=True)
class StackGroup:
    """Stacks of the same shape in consecutive layers, and the types their rows can take, smallest first."""

    first_layer: int
    last_layer: int
    projs: tuple[str, ...]
    n_experts: int
    n_rows: int
    n_cols: int
    types: tuple[QType, ...]

    @property
    def remark(self) -> str:
        """What the row length forces; empty when every K-quant fits."""
        if fits(QType.Q4_K, self.n_cols):
            return ""
        lost = f"rows of {self.n_cols} are no multiple of 256: no {K_TYPES[0].name} to {K_TYPES[-2].name}"
        return f"{lost}, at least {self.types[0].name} ({bpw(self.types[0]):g} bits)"


@dataclass(frozen=True)
class MemoryFit:
    """What fits into `memory` bytes: a file of `file_bytes` at `bpw` bits per expert weight, or nothing (None)."""

    memory: int
    file_bytes: int | None
    bpw: float | None


@dataclass(frozen=True)
class Forecast:
    """The feasible range of one source. Sizes in bytes; `need` is beside the file, at context `n_ctx`.

    `other_bytes` is all of the file that is not experts; part of it is an estimate where `is_estimate`.
    """

    architecture: str
    n_layers: int
    n_weights: int
    n_expert_weights: int
    groups: tuple[StackGroup, ...]
    least_bpw: float
    most_bpw: float
    least_bytes: int
    most_bytes: int
    other_bytes: int
    is_estimate: bool
    n_ctx: int
    need: MemoryNeed
    fits: tuple[MemoryFit, ...]


def group_stacks(stacks: Sequence[ExpertStack], types: tuple[QType, ...] | None) -> tuple[StackGroup, ...]:
    """Stacks of equal shape together, in order of layers."""
    layers: dict[tuple[int, int, int], dict[int, list[str]]] = {}
    for stack in stacks:
        of_shape = layers.setdefault((stack.n_experts, stack.n_rows, stack.n_cols), {})
        of_shape.setdefault(stack.bid, []).append(stack.proj)
    groups = []
    for shape, projs_of in layers.items():
        runs: list[tuple[int, int, tuple[str, ...]]] = []
        for layer, projs in sorted(projs_of.items()):
            if runs and runs[-1][1:] == (layer - 1, tuple(projs)):
                runs[-1] = (runs[-1][0], layer, tuple(projs))
            else:
                runs.append((layer, layer, tuple(projs)))
        groups += [StackGroup(*run, *shape, candidates(shape[2], types)) for run in runs]
    return tuple(sorted(groups, key=lambda group: (group.first_layer, group.projs)))


def fit_memory(problem: Problem, other_bytes: int, need: MemoryNeed, sizes: Sequence[int]) -> tuple[MemoryFit, ...]:
    """For each size of memory the largest budget whose file, KV cache and buffers fit into it."""
    least, most = size_range(problem)
    n_weights = sum(unit.n_weights for unit in problem.units)
    found = []
    for memory in sizes:
        room = min(memory - need.beside_weights - other_bytes, most)
        if room < least:
            found.append(MemoryFit(memory, None, None))
        else:
            found.append(MemoryFit(memory, other_bytes + room, room * 8 / n_weights))
    return tuple(found)
