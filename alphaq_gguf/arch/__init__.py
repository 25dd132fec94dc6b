"""Model families, one file each; a new family is a new file and a line here."""

from __future__ import annotations

from .base import Config, Family, Part, TensorPlan
from .qwen2_moe import Qwen2Moe
from .qwen3_moe import Qwen3Moe

__all__ = ["FAMILIES", "Config", "Family", "Part", "TensorPlan"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Qwen2Moe(), Qwen3Moe())}
