"""DeepSeek-V3: V3, V3.1, R1, Moonlight and others of their shape (llama.cpp architecture deepseek2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Config
from .deepseek_v2 import DeepseekV2


class DeepseekV3(DeepseekV2):
    model_type = "deepseek_v3"
    aliases = ("kimi_k2",)
    defaults: Mapping[str, Any] = {
        "first_k_dense_replace": 3,
        "n_group": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
    }

    def refused_routing(self, config: Config) -> dict[str, bool]:
        return {
            "scoring_func": config["scoring_func"] != "sigmoid",
            "topk_method": config["topk_method"] != "noaux_tc",
            "rope_interleave": config.get("rope_interleave", True) is False,
            **refused_groups(config),
        }


def refused_groups(config: Config) -> dict[str, bool]:
    """n_group and topk_group -> whether llama.cpp cannot choose experts from the best of such groups."""
    n_group, used = config.need("n_group"), config.need("topk_group")
    unequal = config.n_experts % n_group != 0 or n_group >= config.n_experts
    return {"n_group": unequal, "topk_group": n_group > 1 and not 0 < used < n_group}
