"""DeepSeek-V2: V2, V2-Lite, Coder-V2 (llama.cpp architecture deepseek2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gguf import ExpertGatingFuncType, GGUFWriter

from ..errors import SourceError
from .base import Config, Family, Planner, Shapes, TensorPlan, Transform, add_common_metadata, refuse_variants

_GROUPED = "group_limited_greedy"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class DeepseekV2(Family):
    """Multi-head latent attention and shared experts. DeepSeek-V3 differs in its router alone."""

    model_type = "deepseek_v2"
    gguf_arch = "deepseek2"
    defaults: Mapping[str, Any] = {
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    }
    """What transformers' model does where config.json says nothing."""

    def ignores(self, config: Config, tensor: str) -> bool:
        # Draft layers come after the last layer; llama.cpp's converter leaves them out too.
        layer = _LAYER.match(tensor)
        is_draft = layer is not None and int(layer[1]) >= config.need("num_hidden_layers")
        return is_draft or super().ignores(config, tensor)

    def check(self, config: Config) -> None:
        config = config.with_defaults(self.defaults)
        heads = config.need("num_attention_heads")
        refused = {
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(config.get("attention_bias")),
            "mlp_bias": bool(config.get("mlp_bias")),
            "num_key_value_heads": (config.get("num_key_value_heads") or heads) != heads,
            "moe_layer_freq": config.get("moe_layer_freq", 1) != 1,
            "n_shared_experts": not config.get("n_shared_experts"),
            **self.refused_routing(config),
        }
        refuse_variants(config, self.gguf_arch, refused)
        _check_query_rank(config)
        _check_rope(config)

    def refused_routing(self, config: Config) -> dict[str, bool]:
        """Fields of the router -> whether llama.cpp cannot honour their value."""
        return {
            "scoring_func": config["scoring_func"] != "softmax",
            "topk_method": config["topk_method"] not in ("greedy", _GROUPED),
            "n_group": config["topk_method"] != _GROUPED and (config.get("n_group") or 1) > 1,
            "norm_topk_prob": bool(config["norm_topk_prob"]),
        }

    def remarks(self, config: Config) -> list[str]:
        if config.get("topk_method") == _GROUPED:
            return ["llama.cpp ranks groups of experts by the sum of their best two, this model by the best one"]
        return []

    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        config = config.with_defaults(self.defaults)
        n_embd = config.need("hidden_size")
        n_experts, n_ff = config.n_experts, config.need("moe_intermediate_size")
        plan = Planner(shapes, config.where)
        plan.add_ends(config)
        for bid in range(config.need("num_hidden_layers")):
            hf, out = f"model.layers.{bid}", f"blk.{bid}"
            plan.add(f"{out}.attn_norm.weight", f"{hf}.input_layernorm.weight", shape=(n_embd,))
            _add_latent_attention(plan, config, bid, n_embd)
            plan.add(f"{out}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", shape=(n_embd,))
            if bid < config["first_k_dense_replace"]:
                plan.add_mlp(bid, f"{hf}.mlp", config.need("intermediate_size"), n_embd)
                continue
            plan.add(f"{out}.ffn_gate_inp.weight", f"{hf}.mlp.gate.weight", shape=(n_experts, n_embd))
            if config["scoring_func"] == "sigmoid":
                plan.add(f"{out}.exp_probs_b.bias", f"{hf}.mlp.gate.e_score_correction_bias", shape=(n_experts,))
            plan.add_experts(bid, f"{hf}.mlp.experts", n_experts, n_ff, n_embd)
            plan.add_mlp(bid, f"{hf}.mlp.shared_experts", config.need("n_shared_experts") * n_ff, n_embd, "_shexp")
        return plan.plans

    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        config = config.with_defaults(self.defaults)
        rank, rope_dim = config.need("kv_lora_rank"), config.need("qk_rope_head_dim")
        # llama.cpp runs latent attention as if all heads shared one key and value, which are the latents.
        add_common_metadata(Config({**config, "num_key_value_heads": 1, "head_dim": None}, config.where), writer)
        writer.add_key_length(rank + rope_dim)
        writer.add_value_length(rank)
        writer.add_key_length_mla(config.need("qk_nope_head_dim") + rope_dim)
        writer.add_value_length_mla(config.need("v_head_dim"))
        writer.add_kv_lora_rank(rank)
        if config.get("q_lora_rank") is not None:
            writer.add_q_lora_rank(config["q_lora_rank"])
        writer.add_rope_dimension_count(rope_dim)
        mscale = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("mscale_all_dim")
        if mscale is not None:
            # llama.cpp divides by 0.1 again.
            writer.add_rope_scaling_yarn_log_mul(0.1 * mscale)
        writer.add_vocab_size(config.need("vocab_size"))
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        add_router_metadata(config, writer, ExpertGatingFuncType[config["scoring_func"].upper()])


def add_router_metadata(config: Config, writer: GGUFWriter, gating: ExpertGatingFuncType) -> None:
    """Expert sizes and how experts are chosen and weighted."""
    writer.add_expert_feed_forward_length(config.need("moe_intermediate_size"))
    writer.add_expert_shared_count(config.need("n_shared_experts"))
    writer.add_expert_gating_func(gating)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config["norm_topk_prob"]:
        writer.add_expert_weights_norm(True)
    if config.get("n_group") is not None:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config.need("topk_group"))


def _check_query_rank(config: Config) -> None:
    """llama.cpp goes by the number of layers to tell whether queries pass through a low rank."""
    n_layers, rank = config.need("num_hidden_layers"), config.get("q_lora_rank")
    full = n_layers in (26, 27) or (n_layers == 48 and config.need("vocab_size") == 128256)
    if full != (rank is None):
        expected = "null" if full else "a number"
        raise SourceError(
            f"{config.where}: q_lora_rank = {rank!r}: llama.cpp's deepseek2 expects {expected} with {n_layers} layers"
        )


def _check_rope(config: Config) -> None:
    """Of YaRN, llama.cpp's deepseek2 reads the factor, the original context and mscale_all_dim alone."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(field) or {}
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.get(key, "default")
    refused = {key: kind not in ("default", "yarn")}
    if kind == "yarn":
        refused |= {
            "mscale_all_dim": not rope.get("mscale_all_dim"),
            "mscale": rope.get("mscale") != rope.get("mscale_all_dim"),
            "beta_fast": (rope.get("beta_fast") or 32) != 32,
            "beta_slow": (rope.get("beta_slow") or 1) != 1,
            "attention_factor": (rope.get("attention_factor") or 1) != 1,
        }
    flat = Config({f"{field}.{key}": value for key, value in rope.items()}, config.where)
    refuse_variants(flat, "deepseek2", {f"{field}.{key}": value for key, value in refused.items()})


def _add_latent_attention(plan: Planner, config: Config, bid: int, n_embd: int) -> None:
    """Multi-head latent attention, whose key and value up-projections llama.cpp keeps apart, keys transposed."""
    hf, out = f"model.layers.{bid}.self_attn", f"blk.{bid}"
    heads, rank = config.need("num_attention_heads"), config.need("kv_lora_rank")
    nope, rope, value = (config.need(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    n_q, q_rank = heads * (nope + rope), config.get("q_lora_rank")
    if q_rank is None:
        plan.add(f"{out}.attn_q.weight", f"{hf}.q_proj.weight", shape=(n_q, n_embd))
    else:
        plan.add(f"{out}.attn_q_a.weight", f"{hf}.q_a_proj.weight", shape=(q_rank, n_embd))
        plan.add(f"{out}.attn_q_a_norm.weight", f"{hf}.q_a_layernorm.weight", shape=(q_rank,))
        plan.add(f"{out}.attn_q_b.weight", f"{hf}.q_b_proj.weight", shape=(n_q, q_rank))
    plan.add(f"{out}.attn_kv_a_mqa.weight", f"{hf}.kv_a_proj_with_mqa.weight", shape=(rank + rope, n_embd))
    plan.add(f"{out}.attn_kv_a_norm.weight", f"{hf}.kv_a_layernorm.weight", shape=(rank,))

    def add_half(name: str, shape: tuple[int, ...], pick: Transform) -> None:
        plan.add(
            f"{out}.{name}.weight",
            f"{hf}.kv_b_proj.weight",
            shape=shape,
            stored=(heads * (nope + value), rank),
            transform=lambda weight: pick(weight.view(heads, nope + value, rank)),
        )

    add_half("attn_k_b", (heads, rank, nope), lambda weight: weight[:, :nope].transpose(1, 2))
    add_half("attn_v_b", (heads, value, rank), lambda weight: weight[:, nope:])
    plan.add(f"{out}.attn_output.weight", f"{hf}.o_proj.weight", shape=(n_embd, heads * value))
