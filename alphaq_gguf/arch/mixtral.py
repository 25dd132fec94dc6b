"""Mixtral: Mixtral-8x7B, Mixtral-8x22B and merges of their shape (llama.cpp architecture llama)."""

from __future__ import annotations

from gguf import GGUFWriter

from .base import Config, Family, Planner, Shapes, TensorPlan, TokenizerRules, add_common_metadata, refuse_variants


class Mixtral(Family):
    model_type = "mixtral"
    gguf_arch = "llama"
    tokenizer = TokenizerRules(space_prefix=True)

    def check(self, config: Config) -> None:
        window = config.get("sliding_window")
        refused = {
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "sliding_window": window is not None and window < config.need("max_position_embeddings"),
        }
        refuse_variants(config, self.gguf_arch, refused)

    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        n_embd = config.need("hidden_size")
        n_experts, n_ff = config.n_experts, config.need("intermediate_size")
        plan = Planner(shapes, config.where)
        plan.add_ends(config)
        for bid in range(config.need("num_hidden_layers")):
            hf, out = f"model.layers.{bid}", f"blk.{bid}"
            # transformers calls the block `mlp` in memory and `block_sparse_moe` in files.
            moe = f"{hf}.mlp" if f"{hf}.mlp.gate.weight" in shapes else f"{hf}.block_sparse_moe"
            plan.add(f"{out}.attn_norm.weight", f"{hf}.input_layernorm.weight", shape=(n_embd,))
            plan.add_attention(bid, config, interleaved_rope=True)
            plan.add(f"{out}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", shape=(n_embd,))
            plan.add(f"{out}.ffn_gate_inp.weight", f"{moe}.gate.weight", shape=(n_experts, n_embd))
            plan.add_experts(bid, f"{moe}.experts", n_experts, n_ff, n_embd, names=("w1", "w3", "w2"))
        return plan.plans

    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        add_common_metadata(config, writer)
        writer.add_vocab_size(config.need("vocab_size"))
        writer.add_rope_dimension_count(config.head_dim)
