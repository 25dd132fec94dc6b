"""How text uses a model's experts: measured by running it, or read from files that others measured."""

from .data import Calibration, LayerUsage, Moments

__all__ = ["Calibration", "LayerUsage", "Moments"]
