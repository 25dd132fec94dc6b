"""OLMoE: OLMoE-1B-7B (llama.cpp architecture olmoe)."""

from __future__ import annotations

from gguf import GGUFWriter

from .base import Config, Family, Planner, Shapes, TensorPlan, TokenizerRules, add_common_metadata, refuse_variants


class Olmoe(Family):
    model_type = "olmoe"
    gguf_arch = "olmoe"
    tokenizer = TokenizerRules(preferred=("olmo",))

    def check(self, config: Config) -> None:
        hidden, heads = config.need("hidden_size"), config.need("num_attention_heads")
        refused = {
            "norm_topk_prob": config.get("norm_topk_prob", False) is True,
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "clip_qkv": config.get("clip_qkv") is not None,
            "attention_bias": config.get("attention_bias", False) is True,
            "num_key_value_heads": (config.get("num_key_value_heads") or heads) != heads,
            "head_dim": (config.get("head_dim") or hidden // heads) * heads != hidden,
        }
        refuse_variants(config, self.gguf_arch, refused)

    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        n_embd = config.need("hidden_size")
        n_experts, n_ff = config.n_experts, config.need("intermediate_size")
        plan = Planner(shapes, config.where)
        plan.add_ends(config, tied_output=False)
        for bid in range(config.need("num_hidden_layers")):
            hf, out = f"model.layers.{bid}", f"blk.{bid}"
            plan.add(f"{out}.attn_norm.weight", f"{hf}.input_layernorm.weight", shape=(n_embd,))
            plan.add_attention(bid, config, wide_norms=True)
            plan.add(f"{out}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", shape=(n_embd,))
            plan.add(f"{out}.ffn_gate_inp.weight", f"{hf}.mlp.gate.weight", shape=(n_experts, n_embd))
            plan.add_experts(bid, f"{hf}.mlp.experts", n_experts, n_ff, n_embd)
        return plan.plans

    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        add_common_metadata(config, writer)
