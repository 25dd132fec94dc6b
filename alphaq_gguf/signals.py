"""All that a strategy can ask to know of a model, measured or read, in the form of a Problem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from .budget import AllocationSettings, wanted_types
from .calibration import Calibration
from .calibration.imatrix import ImportanceMatrix
from .calibration.own_text import OWN
from .calibration.store import load_calibration
from .checkpoint import Source
from .checkpoint.shards import LocalShard
from .encode import Encoder
from .errors import SourceError, UsageError
from .measure import measure
from .measurements import Measurements
from .reporter import Reporter
from .routing import read_routers, simulate
from .strategies import Problem, Strategy

CALIBRATED = frozenset({"usage", "significance", "block_errors"})
"""Needs that a calibration file answers."""
MASSES_OF = {"routing": "count", "self_usage": OWN}
"""Needs by which every cost of a strategy is multiplied, and with what."""


def measure_signals(
    source: Source,
    settings: AllocationSettings,
    needs: frozenset[str],
    problem: Problem,
    *,
    cache_dir: Path,
    alphas_file: Path | None,
    calibration: Calibration | None,
    imatrix: ImportanceMatrix | None,
    encoder: Encoder | None,
    device: str,
    threads: int,
    reporter: Reporter,
) -> tuple[Problem, Measurements]:
    """`problem` with all that strategies with these needs must know of the model, except for the masses of experts.

    Errors are those of rounding by `encoder`, libggml's unless given, as `imatrix` weighs it.
    """
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
        imatrix=imatrix,
        encoder=encoder,
        device=device,
        threads=threads,
        reporter=reporter,
    )
    known = replace(
        problem,
        alphas=measured.alphas,
        distortions=measured.distortions,
        calibration=calibration,
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
    own = MASSES_OF.keys() & strategy.needs
    simulated = settings.routing_mass in (None, "count", "gate2")
    if settings.routing_mass is not None and own and not ("routing" in own and simulated):
        raise UsageError(
            f"--routing-mass {settings.routing_mass}: {strategy.name} has masses of its own", "use --strategy mse"
        )
    if settings.initial_router is not None and "router" not in strategy.needs:
        raise UsageError(f"--initial-router: {strategy.name} looks at no router norms", "use --strategy router-norm")
    if not asked:
        return strategy.needs
    return strategy.needs | ({"routing"} if simulated else {"usage"})


def mass_of(strategy: Strategy, settings: AllocationSettings) -> str | None:
    """What a strategy's costs are multiplied by under these settings: one of ROUTING_MASSES, OWN, or None."""
    if settings.routing_mass not in (None, "none"):
        return settings.routing_mass
    return next((mass for need, mass in MASSES_OF.items() if need in strategy.needs), None)


def measure_masses(
    source: Source,
    mass: str,
    settings: AllocationSettings,
    calibration: Calibration | None,
    *,
    cache_dir: Path,
    threads: int,
    reporter: Reporter,
) -> dict[tuple[int, int], float]:
    """(layer, expert) -> how much it is used: by random vectors, by a text, or by text the model writes itself.

    The model writes only where its own text is no part of the calibration.
    """
    if mass in ("count", "gate2"):
        return simulate_routing(source, mass, settings.alphas.seed, reporter)
    usage = calibration
    if mass == OWN:
        if calibration is not None and OWN in calibration.datasets:
            usage = calibration.of(OWN)
        else:
            from .calibration.run import own_usage

            usage = own_usage(
                source, cache_dir=cache_dir, threads=threads, seed=settings.alphas.seed, reporter=reporter
            )
    assert usage is not None
    layers = {stack.bid for stack in source.stacks}
    found = {bid: usage.squared_gate(bid) if mass == "true-gate2" else usage.frequency(bid) for bid in layers}
    return {(bid, xid): float(value) for bid, values in found.items() for xid, value in enumerate(values)}


def read_calibration(
    source: Source, settings: AllocationSettings, needs: frozenset[str], reporter: Reporter
) -> Calibration | None:
    """How text uses the experts, from the file the user gave; None where these needs can do without.

    UsageError when they cannot and no file was given.
    """
    if not needs & CALIBRATED and (settings.calibration is None or "self_usage" not in needs):
        return None
    path = settings.calibration or settings.imatrix
    if path is None:
        raise UsageError(
            "how text uses the experts is not known", "give --calibration FILE, made by `alphaq-gguf calibrate`"
        )
    found = load_calibration(path, source)
    for remark in found.remarks:
        reporter.warn(remark)
    return found


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
