"""Llama 4's language model: Scout, Maverick (llama.cpp architecture llama4)."""

from __future__ import annotations

import math

import torch
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

# What llama.cpp's implementation takes for granted: the window of chunked attention and of temperature
# tuning, every fourth layer without rotary embedding, and which model has no norm of queries and keys.
_WINDOW = 8192
_NO_ROPE_INTERVAL = 4
_EXPERTS_WITHOUT_QK_NORM = 128


class Llama4(Family):
    model_type = "llama4_text"
    aliases = ("llama4",)
    gguf_arch = "llama4"
    tokenizer = TokenizerRules(preferred=("llama4",))

    def ignores(self, config: Config, tensor: str) -> bool:
        return tensor.startswith(("vision_model.", "multi_modal_projector.")) or super().ignores(config, tensor)

    def check(self, config: Config) -> None:
        n_layers = config.need("num_hidden_layers")
        with_rope = [int((bid + 1) % _NO_ROPE_INTERVAL != 0) for bid in range(n_layers)]
        kinds = ["chunked_attention" if rope else "full_attention" for rope in with_rope]
        interval = config.get("no_rope_layer_interval", _NO_ROPE_INTERVAL)
        refused = {
            # llama.cpp aborts when no layer uses the temperatures it computes.
            "num_hidden_layers": n_layers < _NO_ROPE_INTERVAL,
            "attention_bias": bool(config.get("attention_bias")),
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "use_qk_norm": config.get("use_qk_norm", True) is not (config.n_experts != _EXPERTS_WITHOUT_QK_NORM),
            "attention_chunk_size": config.get("attention_chunk_size", _WINDOW) != _WINDOW,
            "attn_temperature_tuning": not config.get("attn_temperature_tuning", True),
            "floor_scale": config.get("floor_scale", _WINDOW) != _WINDOW,
            "attn_scale": config.get("attn_scale", 0.1) != 0.1,
            "no_rope_layers": (config.get("no_rope_layers") or with_rope) != with_rope,
            "no_rope_layer_interval": not config.get("no_rope_layers") and interval != _NO_ROPE_INTERVAL,
            "layer_types": (config.get("layer_types") or kinds) != kinds,
            "moe_layers": config.get("moe_layers") not in (None, list(_moe_layers(config))),
        }
        refuse_variants(config, self.gguf_arch, refused)

    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        n_embd, n_vocab = config.need("hidden_size"), config.need("vocab_size")
        heads, head_dim = config.need("num_attention_heads"), config.need("head_dim")
        n_kv = (config.get("num_key_value_heads") or heads) * head_dim
        n_experts, n_ff = config.n_experts, config.need("intermediate_size")
        # Checkpoints with a vision tower hold the language model one level down.
        root = "language_model." if "language_model.model.norm.weight" in shapes else ""
        plan = Planner(shapes, config.where)
        plan.add("token_embd.weight", f"{root}model.embed_tokens.weight", shape=(n_vocab, n_embd))
        for bid in range(config.need("num_hidden_layers")):
            hf, out = f"{root}model.layers.{bid}", f"blk.{bid}"
            plan.add(f"{out}.attn_norm.weight", f"{hf}.input_layernorm.weight", shape=(n_embd,))
            for proj, n_out in (("q", heads * head_dim), ("k", n_kv), ("v", n_kv)):
                plan.add(f"{out}.attn_{proj}.weight", f"{hf}.self_attn.{proj}_proj.weight", shape=(n_out, n_embd))
            plan.add(f"{out}.attn_output.weight", f"{hf}.self_attn.o_proj.weight", shape=(n_embd, heads * head_dim))
            plan.add(f"{out}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", shape=(n_embd,))
            if bid not in _moe_layers(config):
                plan.add_mlp(bid, f"{hf}.feed_forward", config.need("intermediate_size_mlp"), n_embd)
                continue
            plan.add(f"{out}.ffn_gate_inp.weight", f"{hf}.feed_forward.router.weight", shape=(n_experts, n_embd))
            _add_experts(plan, bid, f"{hf}.feed_forward.experts", n_experts, n_ff, n_embd)
            plan.add_mlp(bid, f"{hf}.feed_forward.shared_expert", n_ff, n_embd, "_shexp")
        norm = f"{root}model.norm.weight"
        plan.add("output_norm.weight", norm, shape=(n_embd,))
        if not config.get("tie_word_embeddings", False):
            plan.add("output.weight", f"{root}lm_head.weight", shape=(n_vocab, n_embd))
        if _scales_like_llama3(config):
            plan.add_constant("rope_freqs.weight", _rope_factors(config, head_dim), norm)
        return plan.plans

    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        values = {**config, "intermediate_size": config.need("intermediate_size_mlp")}
        if _scales_like_llama3(config):
            values["rope_parameters"] = {"rope_theta": _rope(config).need("rope_theta")}
        add_common_metadata(Config(values, config.where), writer)
        writer.add_vocab_size(config.need("vocab_size"))
        writer.add_rope_dimension_count(config.need("head_dim"))
        writer.add_interleave_moe_layer_step(config.get("interleave_moe_layer_step", 1))
        writer.add_expert_feed_forward_length(config.need("intermediate_size"))


def _moe_layers(config: Config) -> range:
    step = config.get("interleave_moe_layer_step", 1)
    return range(step - 1, config.need("num_hidden_layers"), step)


def _add_experts(plan: Planner, bid: int, experts: str, n_experts: int, n_ff: int, n_embd: int) -> None:
    """The expert stacks of a layer; the checkpoint's matrices are transposed, gate and up side by side."""
    gate_up, down = f"{experts}.gate_up_proj", f"{experts}.down_proj"
    plan.expect(gate_up, (n_experts, n_embd, 2 * n_ff))
    plan.expect(down, (n_experts, n_ff, n_embd))
    stacks = {
        "gate": ((n_ff, n_embd), gate_up, lambda weight: weight[:, :n_ff].T),
        "up": ((n_ff, n_embd), gate_up, lambda weight: weight[:, n_ff:].T),
        "down": ((n_embd, n_ff), down, lambda weight: weight.T),
    }
    for proj, (shape, tensor, transform) in stacks.items():
        parts = [Part(tensor, expert=xid, transform=transform) for xid in range(n_experts)]
        plan.add_stack(bid, proj, (n_experts, *shape), parts)


def _rope(config: Config) -> Config:
    values = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return Config({"rope_theta": config.get("rope_theta"), **values}, config.where)


def _scales_like_llama3(config: Config) -> bool:
    return _rope(config).get("rope_type", _rope(config).get("type")) == "llama3"


def _rope_factors(config: Config, head_dim: int) -> torch.Tensor:
    """What llama.cpp divides each rotary frequency by: 1 for short wavelengths, `factor` for long ones."""
    rope = _rope(config)
    factor, low, high = rope.need("factor"), rope.need("low_freq_factor"), rope.need("high_freq_factor")
    n_ctx = rope.need("original_max_position_embeddings")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = 2 * math.pi / (1.0 / rope.need("rope_theta") ** exponents)
    # Scout has low == high: no wavelength lies between, and what this divides by zero is not taken.
    smooth = (n_ctx / wavelengths - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors = factors.where(wavelengths >= n_ctx / high, torch.ones(()))
    return factors.where(wavelengths <= n_ctx / low, torch.full((), float(factor)))
