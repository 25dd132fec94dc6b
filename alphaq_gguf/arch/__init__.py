"""Model families, one file each; a new family is a new file and a line here."""

from __future__ import annotations

from .base import Config, Family, Part, TensorPlan
from .qwen2_moe import Qwen2Moe
from .qwen3_moe import Qwen3Moe

__all__ = ["FAMILIES", "Config", "Family", "Part", "TensorPlan"]

_FAMILIES: tuple[Family, ...] = (Qwen2Moe(), Qwen3Moe())

FAMILIES: dict[str, Family] = {name: family for family in _FAMILIES for name in (family.model_type, *family.aliases)}
