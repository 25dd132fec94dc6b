"""Qwen3-Next: Qwen3-Next-80B-A3B (llama.cpp architecture qwen3next)."""

from __future__ import annotations

import torch
from gguf import GGUFWriter

from .base import Config, Family, Planner, Shapes, TensorPlan, Transform, add_common_metadata, refuse_variants

# Where plan_tensors notes for add_metadata how many draft layers the checkpoint has; its config.json never says.
_DRAFT_LAYERS = "mtp_num_hidden_layers"


class Qwen3Next(Family):
    model_type = "qwen3_next"
    gguf_arch = "qwen3next"

    def check(self, config: Config) -> None:
        n_key_heads, n_value_heads = config.need("linear_num_key_heads"), config.need("linear_num_value_heads")
        refused = {
            "attention_bias": bool(config.get("attention_bias")),
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "norm_topk_prob": config.get("norm_topk_prob", True) is not True,
            "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1,
            "mlp_only_layers": bool(config.get("mlp_only_layers")),
            "linear_value_head_dim": config.need("linear_value_head_dim") != config.need("linear_key_head_dim"),
            "linear_num_value_heads": n_value_heads % n_key_heads != 0,
            # Linear attention normalises queries and keys with this epsilon in llama.cpp, with 1e-6 in transformers.
            "rms_norm_eps": config.need("rms_norm_eps") != 1e-6,
        }
        refuse_variants(config, self.gguf_arch, refused)

    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        n_embd, n_vocab = config.need("hidden_size"), config.need("vocab_size")
        plan = Planner(shapes, config.where)
        layers = [(f"model.layers.{bid}", kind) for bid, kind in enumerate(_layer_types(config))]
        config[_DRAFT_LAYERS] = int(any(name.startswith("mtp.") for name in shapes))
        if config[_DRAFT_LAYERS]:
            layers.append(("mtp.layers.0", "full_attention"))
        plan.add("token_embd.weight", "model.embed_tokens.weight", shape=(n_vocab, n_embd))
        for bid, (hf, kind) in enumerate(layers):
            _add_norm(plan, f"blk.{bid}.attn_norm.weight", f"{hf}.input_layernorm.weight", n_embd)
            if kind == "linear_attention":
                _add_linear_attention(plan, bid, f"{hf}.linear_attn", config)
            else:
                _add_attention(plan, bid, f"{hf}.self_attn", config)
            _add_norm(plan, f"blk.{bid}.post_attention_norm.weight", f"{hf}.post_attention_layernorm.weight", n_embd)
            _add_feed_forward(plan, bid, f"{hf}.mlp", config)
        if config[_DRAFT_LAYERS]:
            out = f"blk.{len(layers) - 1}.nextn"
            plan.add(f"{out}.eh_proj.weight", "mtp.fc.weight", shape=(n_embd, 2 * n_embd))
            _add_norm(plan, f"{out}.enorm.weight", "mtp.pre_fc_norm_embedding.weight", n_embd)
            _add_norm(plan, f"{out}.hnorm.weight", "mtp.pre_fc_norm_hidden.weight", n_embd)
            _add_norm(plan, f"{out}.shared_head_norm.weight", "mtp.norm.weight", n_embd)
        _add_norm(plan, "output_norm.weight", "model.norm.weight", n_embd)
        if not config.get("tie_word_embeddings", False):
            plan.add("output.weight", "lm_head.weight", shape=(n_vocab, n_embd))
        return plan.plans

    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        n_layers, n_draft = config.need("num_hidden_layers"), config.get(_DRAFT_LAYERS, 0)
        add_common_metadata(Config({**config, "num_hidden_layers": n_layers + n_draft}, config.where), writer)
        if n_draft:
            writer.add_nextn_predict_layers(n_draft)
        writer.add_expert_feed_forward_length(config.need("moe_intermediate_size"))
        writer.add_expert_shared_feed_forward_length(config.need("shared_expert_intermediate_size"))
        n_value_heads = config.need("linear_num_value_heads")
        writer.add_ssm_conv_kernel(config.need("linear_conv_kernel_dim"))
        writer.add_ssm_state_size(config.need("linear_key_head_dim"))
        writer.add_ssm_group_count(config.need("linear_num_key_heads"))
        writer.add_ssm_time_step_rank(n_value_heads)
        writer.add_ssm_inner_size(config.need("linear_value_head_dim") * n_value_heads)
        writer.add_full_attention_interval(config.get("full_attention_interval", 4))
        if config.get("layer_types"):
            recurrent = [kind == "linear_attention" for kind in _layer_types(config)] + [False] * n_draft
            writer.add_array(f"{self.gguf_arch}.attention.recurrent_layers", recurrent)
        rotary = (config.get("rope_parameters") or {}).get("partial_rotary_factor")
        rotary = rotary or config.get("partial_rotary_factor", 0.25)
        writer.add_rope_dimension_count(int(config.need("head_dim") * rotary))


def _layer_types(config: Config) -> list[str]:
    n_layers, interval = config.need("num_hidden_layers"), config.get("full_attention_interval", 4)
    spaced = ["linear_attention" if (bid + 1) % interval else "full_attention" for bid in range(n_layers)]
    return config.get("layer_types") or spaced


def _add_norm(plan: Planner, gguf_name: str, tensor: str, width: int) -> None:
    """A norm whose stored weight is its difference from 1."""
    plan.add_computed(
        gguf_name, tensor, shape=(width,), transform=lambda weight: weight + 1, inverse=lambda weight: weight - 1
    )


def _add_attention(plan: Planner, bid: int, hf: str, config: Config) -> None:
    """Full attention; each query head comes with its output gate."""
    n_embd, head_dim, heads = config.need("hidden_size"), config.need("head_dim"), config.need("num_attention_heads")
    n_kv = config.need("num_key_value_heads") * head_dim
    for proj, n_out in (("q", 2 * heads * head_dim), ("k", n_kv), ("v", n_kv)):
        plan.add(f"blk.{bid}.attn_{proj}.weight", f"{hf}.{proj}_proj.weight", shape=(n_out, n_embd))
    for proj in ("q", "k"):
        _add_norm(plan, f"blk.{bid}.attn_{proj}_norm.weight", f"{hf}.{proj}_norm.weight", head_dim)
    plan.add(f"blk.{bid}.attn_output.weight", f"{hf}.o_proj.weight", shape=(n_embd, heads * head_dim))


def _add_linear_attention(plan: Planner, bid: int, hf: str, config: Config) -> None:
    """A gated delta net. llama.cpp wants one projection for all q, k and v and one for z, head by head in each."""
    n_embd, out = config.need("hidden_size"), f"blk.{bid}"
    n_key_heads, n_value_heads = config.need("linear_num_key_heads"), config.need("linear_num_value_heads")
    head_dim = config.need("linear_key_head_dim")
    n_keys, n_values = n_key_heads * head_dim, n_value_heads * head_dim
    sizes = [head_dim, head_dim, n_values // n_key_heads, n_values // n_key_heads]
    for name, n_rows, kept in (("attn_qkv", 2 * n_keys + n_values, slice(0, 3)), ("attn_gate", n_values, slice(3, 4))):
        plan.add(
            f"{out}.{name}.weight",
            f"{hf}.in_proj_qkvz.weight",
            shape=(n_rows, n_embd),
            stored=(2 * n_keys + 2 * n_values, n_embd),
            transform=_ungroup(n_key_heads, sizes, kept),
        )
    plan.add(f"{out}.ssm_ba.weight", f"{hf}.in_proj_ba.weight", shape=(2 * n_value_heads, n_embd))
    conv = (2 * n_keys + n_values, config.need("linear_conv_kernel_dim"))
    plan.add(
        f"{out}.ssm_conv1d.weight",
        f"{hf}.conv1d.weight",
        shape=conv,
        stored=(conv[0], 1, conv[1]),
        transform=lambda weight: weight.squeeze(1),
    )
    plan.add(f"{out}.ssm_dt.bias", f"{hf}.dt_bias", shape=(n_value_heads,))
    plan.add_computed(
        f"{out}.ssm_a",
        f"{hf}.A_log",
        shape=(n_value_heads,),
        transform=lambda weight: -weight.exp(),
        inverse=lambda decay: (-decay).log(),
    )
    plan.add(f"{out}.ssm_norm.weight", f"{hf}.norm.weight", shape=(head_dim,))
    plan.add(f"{out}.ssm_out.weight", f"{hf}.out_proj.weight", shape=(n_embd, n_values))


def _ungroup(n_groups: int, sizes: list[int], kept: slice) -> Transform:
    """From rows [q, k, v, z] group by group to all rows of the `kept` kinds, kind by kind."""

    def transform(weight: torch.Tensor) -> torch.Tensor:
        kinds = weight.reshape(n_groups, sum(sizes), -1).split(sizes, dim=1)
        return torch.cat([rows.reshape(-1, weight.shape[-1]) for rows in kinds[kept]])

    return transform


def _add_feed_forward(plan: Planner, bid: int, hf: str, config: Config) -> None:
    n_embd, n_experts, out = config.need("hidden_size"), config.n_experts, f"blk.{bid}"
    plan.add(f"{out}.ffn_gate_inp.weight", f"{hf}.gate.weight", shape=(n_experts, n_embd))
    plan.add_experts(bid, f"{hf}.experts", n_experts, config.need("moe_intermediate_size"), n_embd)
    plan.add(f"{out}.ffn_gate_inp_shexp.weight", f"{hf}.shared_expert_gate.weight", shape=(1, n_embd))
    n_shared = config.need("shared_expert_intermediate_size")
    plan.add_mlp(bid, f"{hf}.shared_expert", n_shared, n_embd, "_shexp")
