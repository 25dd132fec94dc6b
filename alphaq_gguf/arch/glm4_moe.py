"""GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7 (llama.cpp architecture glm4moe)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import ExpertGatingFuncType, GGUFWriter

from .base import Config, Family, Planner, Shapes, TensorPlan, TokenizerRules, add_common_metadata, refuse_variants
from .deepseek_v2 import add_router_metadata
from .deepseek_v3 import refused_groups


class Glm4Moe(Family):
    model_type = "glm4_moe"
    gguf_arch = "glm4moe"
    tokenizer = TokenizerRules(
        special={"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"},
        preferred=("glm4",),
    )
    defaults: Mapping[str, Any] = {
        "first_k_dense_replace": 1,
        "n_group": 1,
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
    }

    def check(self, config: Config) -> None:
        config = config.with_defaults(self.defaults)
        refused = {
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "n_shared_experts": not config.get("n_shared_experts"),
            **refused_groups(config),
        }
        refuse_variants(config, self.gguf_arch, refused)

    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        config = config.with_defaults(self.defaults)
        n_embd, n_vocab, n_layers = (config.need(key) for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
        n_experts, n_ff = config.n_experts, config.need("moe_intermediate_size")
        plan = Planner(shapes, config.where)
        plan.add_ends(config)
        for bid in range(n_layers + (config.get("num_nextn_predict_layers") or 0)):
            hf, out = f"model.layers.{bid}", f"blk.{bid}"
            if bid >= n_layers:
                # transformers counts draft layers, but saves none.
                if f"{hf}.eh_proj.weight" not in shapes:
                    continue
                _add_draft_inputs(plan, bid, n_embd, n_vocab)
            plan.add(f"{out}.attn_norm.weight", f"{hf}.input_layernorm.weight", shape=(n_embd,))
            plan.add_attention(bid, config)
            plan.add(f"{out}.post_attention_norm.weight", f"{hf}.post_attention_layernorm.weight", shape=(n_embd,))
            if bid < config["first_k_dense_replace"]:
                plan.add_mlp(bid, f"{hf}.mlp", config.need("intermediate_size"), n_embd)
                continue
            plan.add(f"{out}.ffn_gate_inp.weight", f"{hf}.mlp.gate.weight", shape=(n_experts, n_embd))
            plan.add(f"{out}.exp_probs_b.bias", f"{hf}.mlp.gate.e_score_correction_bias", shape=(n_experts,))
            plan.add_experts(bid, f"{hf}.mlp.experts", n_experts, n_ff, n_embd)
            plan.add_mlp(bid, f"{hf}.mlp.shared_experts", config.need("n_shared_experts") * n_ff, n_embd, "_shexp")
        return plan.plans

    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        config = config.with_defaults(self.defaults)
        n_draft = config.get("num_nextn_predict_layers")
        n_layers = config.need("num_hidden_layers") + (n_draft or 0)
        add_common_metadata(Config({**config, "num_hidden_layers": n_layers}, config.where), writer)
        if n_draft is not None:
            writer.add_nextn_predict_layers(n_draft)
        rope = config.get("rope_parameters") or {}
        rotated = rope.get("partial_rotary_factor", config["partial_rotary_factor"])
        writer.add_rope_dimension_count(int(config.head_dim * rotated))
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        add_router_metadata(config, writer, ExpertGatingFuncType.SIGMOID)


def _add_draft_inputs(plan: Planner, bid: int, n_embd: int, n_vocab: int) -> None:
    """What a draft layer, which predicts one token further, has beside an ordinary layer's tensors."""
    hf, out = f"model.layers.{bid}", f"blk.{bid}.nextn"
    plan.add(f"{out}.eh_proj.weight", f"{hf}.eh_proj.weight", shape=(n_embd, 2 * n_embd))
    plan.add(f"{out}.enorm.weight", f"{hf}.enorm.weight", shape=(n_embd,))
    plan.add(f"{out}.hnorm.weight", f"{hf}.hnorm.weight", shape=(n_embd,))
    plan.add_optional(f"{out}.embed_tokens.weight", f"{hf}.embed_tokens.weight", shape=(n_vocab, n_embd))
    plan.add_optional(f"{out}.shared_head_head.weight", f"{hf}.shared_head.head.weight", shape=(n_vocab, n_embd))
    plan.add_optional(f"{out}.shared_head_norm.weight", f"{hf}.shared_head.norm.weight", shape=(n_embd,))
