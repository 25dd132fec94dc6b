"""ERNIE-4.5: ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B (llama.cpp architecture ernie4_5-moe)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter

from .base import Config, Family, Planner, Shapes, TensorPlan, TokenizerRules, add_common_metadata, refuse_variants


class Ernie45Moe(Family):
    model_type = "ernie4_5_moe"
    gguf_arch = "ernie4_5-moe"
    tokenizer = TokenizerRules(space_prefix=True)
    defaults: Mapping[str, Any] = {
        "moe_k": 6,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 2,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }

    def ignores(self, config: Config, tensor: str) -> bool:
        # llama.cpp runs no draft layers of this family.
        return tensor.startswith("model.mtp_") or super().ignores(config, tensor)

    def check(self, config: Config) -> None:
        config = config.with_defaults(self.defaults)
        refused = {
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "use_bias": bool(config.get("use_bias")),
            "moe_layer_interval": config["moe_layer_interval"] != 1,
            "moe_layer_end_index": config["moe_layer_end_index"] not in (-1, config.need("num_hidden_layers") - 1),
        }
        refuse_variants(config, self.gguf_arch, refused)

    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        config = config.with_defaults(self.defaults)
        n_embd = config.need("hidden_size")
        n_experts, n_ff = config.n_experts, config.need("moe_intermediate_size")
        plan = Planner(shapes, config.where)
        plan.add_ends(config)
        for bid in range(config.need("num_hidden_layers")):
            hf, out = f"model.layers.{bid}", f"blk.{bid}"
            plan.add(f"{out}.attn_norm.weight", f"{hf}.input_layernorm.weight", shape=(n_embd,))
            plan.add_attention(bid, config)
            plan.add(f"{out}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", shape=(n_embd,))
            if bid < config["moe_layer_start_index"]:
                plan.add_mlp(bid, f"{hf}.mlp", config.need("intermediate_size"), n_embd)
                continue
            plan.add(f"{out}.ffn_gate_inp.weight", f"{hf}.mlp.gate.weight", shape=(n_experts, n_embd))
            _add_correction_bias(plan, bid, n_experts)
            plan.add_experts(bid, f"{hf}.mlp.experts", n_experts, n_ff, n_embd)
            if n_shared := config["moe_num_shared_experts"]:
                plan.add_mlp(bid, f"{hf}.mlp.shared_experts", n_shared * n_ff, n_embd, "_shexp")
        return plan.plans

    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        config = config.with_defaults(self.defaults)
        add_common_metadata(Config({**config, "num_experts_per_tok": config["moe_k"]}, config.where), writer)
        n_ff, n_shared = config.need("moe_intermediate_size"), config["moe_num_shared_experts"]
        writer.add_expert_feed_forward_length(n_ff)
        writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
        writer.add_leading_dense_block_count(config["moe_layer_start_index"])
        writer.add_expert_shared_count(n_shared)
        if n_shared:
            writer.add_expert_shared_feed_forward_length(n_shared * n_ff)


def _add_correction_bias(plan: Planner, bid: int, n_experts: int) -> None:
    """The bias by which experts are chosen; transformers holds it in the router in memory, beside it in files."""
    mlp, name = f"model.layers.{bid}.mlp", "moe_statics.e_score_correction_bias"
    tensor = f"{mlp}.gate.{name}" if f"{mlp}.gate.{name}" in plan.shapes else f"{mlp}.{name}"
    plan.add(f"blk.{bid}.exp_probs_b.bias", tensor, shape=(1, n_experts))
