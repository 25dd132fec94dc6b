"""Allocation strategies, one file each; `STRATEGIES` is the registry."""

from __future__ import annotations

from .alphaq import AlphaQ
from .base import Allocation, Problem, Strategy, Unit
from .inverse_alpha import InverseAlpha
from .mse import MeanSquaredError
from .random import Random
from .uniform import Uniform

__all__ = ["STRATEGIES", "Allocation", "Problem", "Strategy", "Unit"]

STRATEGIES: dict[str, Strategy] = {
    s.name: s for s in (AlphaQ(), MeanSquaredError(), Uniform(), Random(), InverseAlpha())
}
