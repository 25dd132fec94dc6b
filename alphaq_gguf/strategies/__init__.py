"""Allocation strategies, one file each; `STRATEGIES` is the registry, which other packages can add to."""

from __future__ import annotations

from importlib.metadata import entry_points

from .alphaq import AlphaQ
from .base import NEEDS, Allocation, Problem, Strategy, Unit
from .inverse_alpha import InverseAlpha
from .moqa import MoQa
from .mse import MeanSquaredError
from .pmq import PMQ
from .random import Random
from .router_norm import RouterNorm
from .self_usage import SelfUsage
from .sim_routing import SimRouting
from .uniform import Uniform

__all__ = ["BROKEN", "ENTRY_POINTS", "STRATEGIES", "Allocation", "Problem", "Strategy", "Unit"]

ENTRY_POINTS = "alphaq_gguf.strategies"
"""The entry point group whose objects are strategies, as instances or classes."""

STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        AlphaQ(),
        SimRouting(),
        SelfUsage(),
        RouterNorm(),
        MoQa(),
        PMQ(),
        MeanSquaredError(),
        Uniform(),
        Random(),
        InverseAlpha(),
    )
}

BROKEN: dict[str, str] = {}
"""Entry points that are no usable strategy, and why."""


def add_entry_points() -> None:
    """Add what installed packages offer. A broken one is noted in BROKEN, and a known name never replaced."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            found = point.load()
            strategy = found() if isinstance(found, type) else found
            unknown = set(strategy.needs) - set(NEEDS)
            texts = (strategy.name, strategy.summary, strategy.source)
            if unknown or not all(isinstance(text, str) for text in texts) or not callable(strategy.allocate):
                raise TypeError(f"not a strategy: needs {sorted(strategy.needs)}, known are {sorted(NEEDS)}")
            if STRATEGIES.setdefault(strategy.name, strategy) is not strategy:
                raise ValueError(f"the name {strategy.name!r} is taken")
        except Exception as error:  # whatever a foreign package raises must not take the tool down
            BROKEN[point.name] = f"{type(error).__name__}: {error}"


add_entry_points()
