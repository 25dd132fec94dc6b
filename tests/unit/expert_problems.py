"""Problems of small models of chosen shapes, with random signals of every kind."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from alphaq_gguf.budget import AllocationSettings, make_problem, make_units
from alphaq_gguf.calibration import Calibration, LayerUsage
from alphaq_gguf.calibration.data import WHOLE
from alphaq_gguf.checkpoint import ExpertStack
from alphaq_gguf.measurements import Alpha, Distortion, key_of
from alphaq_gguf.qtypes import EXPERT_TYPES, QType, bpw
from alphaq_gguf.strategies import Allocation, Problem

SETTINGS = AllocationSettings(bpw=1.0)


def stack(bid: int, proj: str, n_experts: int, n_cols: int = 256, n_rows: int = 4) -> ExpertStack:
    return ExpertStack(f"blk.{bid}.ffn_{proj}_exps.weight", bid, proj, n_experts, n_rows, n_cols)


def model(n_experts: tuple[int, ...], down_cols: int = 256) -> list[ExpertStack]:
    """A layer for each number of experts, with gate, up and down."""
    return [
        stack(bid, proj, n, down_cols if proj == "down" else 256)
        for bid, n in enumerate(n_experts)
        for proj in ("gate", "up", "down")
    ]


def pose(
    stacks: list[ExpertStack],
    share: float = 0.5,
    granularity: str = "expert",
    types: tuple[QType, ...] | None = None,
    fixed: dict[str, QType] | None = None,
) -> Problem:
    """A problem without signals, and a share of the range of sizes to spend."""
    problem = make_problem(make_units(stacks, fixed or {}, types, granularity), SETTINGS, 1)
    low = int(np.where(problem.allowed, problem.size, 10**12).min(axis=1).sum())
    return replace(problem, budget=low + int(share * (int(problem.size.max(axis=1).sum()) - low)))


def with_signals(problem: Problem, seed: int = 0) -> Problem:
    """All that strategies ask for, at random; errors fall with the bits of a type."""
    rng = np.random.default_rng(seed)
    matrices = sorted({m for unit in problem.units for m in unit.matrices}, key=key_of)
    experts = sorted({(m.bid, m.xid) for m in matrices})
    return replace(
        problem,
        alphas={
            key_of(m): Alpha(float(rng.uniform(3, 6)), float(rng.uniform(1, 2)), 10, 128, "farms", "") for m in matrices
        },
        distortions={
            (key_of(m), q): Distortion(float(rng.uniform(0.8, 1.2) * 4.0 ** -bpw(q)), 0.0)
            for m in matrices
            for q in EXPERT_TYPES
        },
        masses={place: float(rng.exponential()) for place in experts},
        router_norms={place: float(rng.uniform(1, 2)) for place in experts},
        row_variances={key_of(m): float(rng.uniform(1, 9)) for m in matrices},
        calibration=calibrate(problem, rng),
    )


def calibrate(problem: Problem, rng: np.random.Generator, n_datasets: int = 2) -> Calibration:
    """Usage by random texts of 1000 tokens, and errors of the output that grow with it."""
    n_experts = {m.bid: 0 for unit in problem.units for m in unit.matrices}
    for unit in problem.units:
        for m in unit.matrices:
            n_experts[m.bid] = max(n_experts[m.bid], m.xid + 1)
    layers, errors = {}, {}
    for bid, n in sorted(n_experts.items()):
        tokens = np.ceil(rng.lognormal(3, 1, (n_datasets, n)))
        scores, significance = tokens * rng.uniform(0.1, 0.5, tokens.shape), tokens * rng.lognormal(0, 1, tokens.shape)
        layers[bid] = LayerUsage(tokens=tokens, scores=scores, significance=significance)
        projs = sorted({m.proj for unit in problem.units for m in unit.matrices if m.bid == bid})
        for xid in range(n):
            for proj in (*projs, WHOLE):
                scale = tokens[:, xid].sum() * rng.uniform(0.5, 2)
                errors |= {(bid, xid, proj, q): float(scale * 4.0 ** -bpw(q)) for q in EXPERT_TYPES}
    datasets = tuple(f"text {i}" for i in range(n_datasets))
    return Calibration("some texts", datasets, (1000,) * n_datasets, layers, errors)


def spent(problem: Problem, found: Allocation) -> int:
    return int(problem.size[np.arange(len(found.choice)), found.choice].sum())


def types_of(problem: Problem, found: Allocation) -> dict[tuple[int, int], dict[str, QType]]:
    """(layer, expert) -> projection -> type."""
    types: dict[tuple[int, int], dict[str, QType]] = defaultdict(dict)
    for unit, t in zip(problem.units, found.choice, strict=True):
        assert unit.xid is not None
        types[unit.bid, unit.xid][unit.proj] = problem.qtypes[t]
    return types
