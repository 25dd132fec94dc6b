"""Granite MoE: Granite-3.1-1B-A400M, Granite-3.1-3B-A800M, with or without shared experts (llama.cpp's granitemoe)."""

from __future__ import annotations

from gguf import GGUFWriter

from .base import (
    Config,
    Family,
    Part,
    Planner,
    Shapes,
    TensorPlan,
    TokenizerRules,
    add_common_metadata,
    refuse_variants,
)

_MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")

# A layer's router, its experts' gate and up projections in one, and their down projections.
_SAVED_NAMES = ("router.layer.weight", "input_linear.weight", "output_linear.weight")
_NAMES_IN_MEMORY = ("router.weight", "experts.gate_up_proj", "experts.down_proj")


class GraniteMoe(Family):
    model_type = "granitemoe"
    aliases = ("granitemoeshared",)
    gguf_arch = "granitemoe"
    tokenizer = TokenizerRules(space_prefix=True)

    def check(self, config: Config) -> None:
        hidden, heads = config.need("hidden_size"), config.need("num_attention_heads")
        refused = {
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "head_dim": (config.get("head_dim") or hidden // heads) * heads != hidden,
            # llama.cpp takes a scale of zero for one that is not set.
            **{key: config.get(key) == 0 for key in _MULTIPLIERS},
        }
        refuse_variants(config, self.gguf_arch, refused)

    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        n_embd = config.need("hidden_size")
        n_experts, n_ff = config.n_experts, config.need("intermediate_size")
        n_shared = config.get("shared_intermediate_size") or 0
        plan = Planner(shapes, config.where)
        plan.add_ends(config)
        for bid in range(config.need("num_hidden_layers")):
            hf, out = f"model.layers.{bid}", f"blk.{bid}"
            shared, names = f"{hf}.shared_mlp", _SAVED_NAMES
            if f"{hf}.block_sparse_moe.router.weight" in shapes:
                names = _NAMES_IN_MEMORY
            router, gate_up, down = (f"{hf}.block_sparse_moe.{name}" for name in names)
            plan.add(f"{out}.attn_norm.weight", f"{hf}.input_layernorm.weight", shape=(n_embd,))
            plan.add_attention(bid, config, interleaved_rope=True)
            plan.add(f"{out}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", shape=(n_embd,))
            plan.add(f"{out}.ffn_gate_inp.weight", router, shape=(n_experts, n_embd))
            plan.expect(gate_up, (n_experts, 2 * n_ff, n_embd))
            for proj, first in (("gate", 0), ("up", n_ff)):
                parts = [Part(gate_up, expert=xid, rows=(first, first + n_ff)) for xid in range(n_experts)]
                plan.add_stack(bid, proj, (n_experts, n_ff, n_embd), parts)
            plan.add(f"{out}.ffn_down_exps.weight", down, shape=(n_experts, n_embd, n_ff))
            if n_shared:
                for proj, first in (("gate", 0), ("up", n_shared)):
                    plan.add_rows(
                        f"{out}.ffn_{proj}_shexp.weight",
                        f"{shared}.input_linear.weight",
                        rows=(first, first + n_shared),
                        stored=(2 * n_shared, n_embd),
                    )
                plan.add(f"{out}.ffn_down_shexp.weight", f"{shared}.output_linear.weight", shape=(n_embd, n_shared))
        return plan.plans

    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        add_common_metadata(config, writer)
        writer.add_vocab_size(config.need("vocab_size"))
        writer.add_rope_dimension_count(config.need("hidden_size") // config.need("num_attention_heads"))
        adds = (
            writer.add_attention_scale,
            writer.add_embedding_scale,
            writer.add_residual_scale,
            writer.add_logit_scale,
        )
        for key, add in zip(_MULTIPLIERS, adds, strict=True):
            add(config.get(key, 1.0))
        if config.get("shared_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
