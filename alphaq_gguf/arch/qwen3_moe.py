"""Qwen3-MoE: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder (llama.cpp architecture qwen3moe)."""

from __future__ import annotations

from gguf import GGUFWriter

from .base import Config, Family, Planner, Shapes, TensorPlan, add_common_metadata, refuse_variants


class Qwen3Moe(Family):
    model_type = "qwen3_moe"
    gguf_arch = "qwen3moe"

    def check(self, config: Config) -> None:
        refused = {
            "norm_topk_prob": config.get("norm_topk_prob", False) is not True,
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1,
            "mlp_only_layers": bool(config.get("mlp_only_layers")),
            "use_sliding_window": bool(config.get("use_sliding_window")),
        }
        refuse_variants(config, self.gguf_arch, refused)

    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        n_embd = config.need("hidden_size")
        n_experts, n_ff = config.n_experts, config.need("moe_intermediate_size")
        plan = Planner(shapes, config.where)
        plan.add_ends(config)
        for bid in range(config.need("num_hidden_layers")):
            hf, out = f"model.layers.{bid}", f"blk.{bid}"
            plan.add(f"{out}.attn_norm.weight", f"{hf}.input_layernorm.weight", shape=(n_embd,))
            plan.add_attention(bid, config)
            plan.add(f"{out}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", shape=(n_embd,))
            plan.add(f"{out}.ffn_gate_inp.weight", f"{hf}.mlp.gate.weight", shape=(n_experts, n_embd))
            plan.add_experts(bid, f"{hf}.mlp.experts", n_experts, n_ff, n_embd)
        return plan.plans

    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        add_common_metadata(config, writer)
        writer.add_expert_feed_forward_length(config.need("moe_intermediate_size"))
