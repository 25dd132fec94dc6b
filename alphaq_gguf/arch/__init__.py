"""Model families, one file each; a new family is a new file and a line here."""

from __future__ import annotations

from .base import Config, Family, Part, TensorPlan
from .deepseek_v2 import DeepseekV2
from .deepseek_v3 import DeepseekV3
from .ernie4_5_moe import Ernie45Moe
from .glm4_moe import Glm4Moe
from .gpt_oss import GptOss
from .granitemoe import GraniteMoe
from .llama4 import Llama4
from .mixtral import Mixtral
from .olmoe import Olmoe
from .qwen2_moe import Qwen2Moe
from .qwen3_moe import Qwen3Moe
from .qwen3_next import Qwen3Next

__all__ = ["FAMILIES", "UNFIT", "Config", "Family", "Part", "TensorPlan"]

_FAMILIES: tuple[Family, ...] = (
    DeepseekV2(),
    DeepseekV3(),
    Ernie45Moe(),
    Glm4Moe(),
    GptOss(),
    GraniteMoe(),
    Llama4(),
    Mixtral(),
    Olmoe(),
    Qwen2Moe(),
    Qwen3Moe(),
    Qwen3Next(),
)

FAMILIES: dict[str, Family] = {name: family for family in _FAMILIES for name in (family.model_type, *family.aliases)}

UNFIT = {
    "phimoe": "llama.cpp computes another model: RMS norms in place of layer norms, softmax in place of sparsemixer",
}
"""Families that llama.cpp has, but whose logits differ from transformers' whatever the file holds."""
