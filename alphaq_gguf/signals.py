"""All that a strategy can ask to know of a model, measured or read, in the form of a Problem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from .budget import AllocationSettings, wanted_types
from .checkpoint import Source
from .checkpoint.shards import LocalShard
from .errors import SourceError, UsageError
from .measure import measure
from .measurements import Measurements
from .reporter import Reporter
from .routing import read_routers, simulate
from .strategies import Problem, Strategy


def measure_signals(
    source: Source,
    settings: AllocationSettings,
    needs: frozenset[str],
    problem: Problem,
    *,
    cache_dir: Path,
    alphas_file: Path | None,
    device: str,
    threads: int,
    reporter: Reporter,
) -> tuple[Problem, Measurements]:
    """`problem` with all that strategies with these needs must know of the model."""
    analytic = problem.analytic and "distortions" in needs
    needs_alphas = "alphas" in needs or analytic
    measured = measure(
        source,
        alphas=settings.alphas if needs_alphas else None,
        distortion=settings.distortion if "distortions" in needs and not analytic else None,
        qtypes=wanted_types(problem.units),
        row_variances="row_variances" in needs,
        cache_dir=cache_dir,
        given_alphas=alphas_file if needs_alphas else None,
        device=device,
        threads=threads,
        reporter=reporter,
    )
    masses = {}
    if "routing" in needs:
        masses = simulate_routing(source, settings.routing_mass or "count", settings.alphas.seed, reporter)
    known = replace(
        problem,
        alphas=measured.alphas,
        distortions=measured.distortions,
        masses=masses,
        router_norms=router_norms(source, settings.initial_router) if "router" in needs else {},
        row_variances=measured.row_variances,
    )
    return known, measured


def needs_of(strategy: Strategy, settings: AllocationSettings) -> frozenset[str]:
    """What a strategy needs under these settings; UsageError for an option it has no use for."""
    if settings.granularity == "stack" and getattr(strategy, "experts_only", False):
        raise UsageError(
            f"{strategy.name} orders the experts of a layer, but a stack has one type for all of them",
            "use --granularity expert or expert-shared",
        )
    asked = settings.routing_mass not in (None, "none")
    if asked and "distortions" not in strategy.needs:
        raise UsageError(
            f"--routing-mass {settings.routing_mass}: {strategy.name} weighs no encoding errors",
            "choose a strategy that does, such as mse or alphaq",
        )
    if settings.routing_mass == "none" and "routing" in strategy.needs:
        raise UsageError(f"--routing-mass none: {strategy.name} is nothing else", "use --strategy mse")
    if settings.initial_router is not None and "router" not in strategy.needs:
        raise UsageError(f"--initial-router: {strategy.name} looks at no router norms", "use --strategy router-norm")
    return strategy.needs | ({"routing"} if asked else set())


def simulate_routing(source: Source, kind: str, seed: int, reporter: Reporter) -> dict[tuple[int, int], float]:
    """(layer, expert) -> how much random vectors use it: their share ("count") or its mean squared gate weight."""
    routers = read_routers(source)
    masses: dict[tuple[int, int], float] = {}
    with reporter.task("Simulating routing", len(routers), "layers") as advance:
        for bid, router in routers.items():
            found = simulate(router, seed=seed + bid)
            values = found.count if kind == "count" else found.gate2
            masses |= {(bid, xid): float(value) for xid, value in enumerate(values)}
            advance(1)
    return masses


def router_norms(source: Source, initial: Path | None) -> dict[tuple[int, int], float]:
    """(layer, expert) -> l2 norm of its router row, less that of its row in the file of `initial` routers.

    SourceError when `initial` lacks a layer's router or has one of another shape.
    """
    norms: dict[tuple[int, int], float] = {}
    for bid, router in read_routers(source).items():
        found = np.linalg.norm(router.weights.astype(np.float64), axis=1)
        if initial is not None:
            found -= np.linalg.norm(_read_initial(initial, bid, router.weights.shape), axis=1)
        norms |= {(bid, xid): float(norm) for xid, norm in enumerate(found)}
    return norms


def _read_initial(path: Path, bid: int, shape: tuple[int, ...]) -> np.ndarray:
    """The router that a layer started its training with, float64 of `shape`."""
    name = f"blk.{bid}.ffn_gate_inp.weight"
    shard = LocalShard(path)
    if name not in shard.tensors:
        raise SourceError(f"{path}: no tensor {name}", "give a safetensors file with the router of each layer so named")
    found = shard.tensors[name][1]
    if found != shape:
        raise SourceError(f"{path}: {name} has shape {list(found)}, the model's router {list(shape)}")
    return shard.read(name, None, 0, shape[0]).double().numpy()
