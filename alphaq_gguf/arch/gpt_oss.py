"""gpt-oss: gpt-oss-20b, gpt-oss-120b (llama.cpp architecture gpt-oss)."""

from __future__ import annotations

from gguf import GGUFWriter

from .base import Config, Family, Part, Planner, Shapes, TensorPlan, Transform, add_common_metadata, refuse_variants


class GptOss(Family):
    model_type = "gpt_oss"
    gguf_arch = "gpt-oss"

    def check(self, config: Config) -> None:
        n_layers = config.need("num_hidden_layers")
        alternating = ["full_attention" if bid % 2 else "sliding_attention" for bid in range(n_layers)]
        refused = {
            "attention_bias": config.get("attention_bias", True) is not True,
            "swiglu_alpha": config.get("swiglu_alpha", 1.702) != 1.702,
            "swiglu_limit": config.get("swiglu_limit", 7.0) != 7.0,
            "sliding_window": not config.get("sliding_window", 128),
            "layer_types": (config.get("layer_types") or alternating) != alternating,
        }
        refuse_variants(config, self.gguf_arch, refused)

    def plan_tensors(self, config: Config, shapes: Shapes) -> list[TensorPlan]:
        n_embd = config.need("hidden_size")
        heads = config.need("num_attention_heads")
        config.need("head_dim")  # no model of this family shares its width out evenly
        plan = Planner(shapes, config.where)
        plan.add_ends(config, tied_output=False)
        for bid in range(config.need("num_hidden_layers")):
            hf, out = f"model.layers.{bid}", f"blk.{bid}"
            plan.add(f"{out}.attn_norm.weight", f"{hf}.input_layernorm.weight", shape=(n_embd,))
            plan.add_attention(bid, config)
            plan.add(f"{out}.attn_sinks.weight", f"{hf}.self_attn.sinks", shape=(heads,))
            plan.add(f"{out}.post_attention_norm.weight", f"{hf}.post_attention_layernorm.weight", shape=(n_embd,))
            plan.add(f"{out}.ffn_gate_inp.weight", f"{hf}.mlp.router.weight", shape=(config.n_experts, n_embd))
            plan.add(f"{out}.ffn_gate_inp.bias", f"{hf}.mlp.router.bias", shape=(config.n_experts,))
            _add_experts(plan, bid, config.n_experts, config.need("intermediate_size"), n_embd)
        return plan.plans

    def remarks(self, config: Config) -> list[str]:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type")) == "yarn" and not rope.get("truncate", True):
            return ["llama.cpp rounds the bounds of YaRN's ramp, which this model does not (truncate = False)"]
        return []

    def add_metadata(self, config: Config, writer: GGUFWriter) -> None:
        add_common_metadata(config, writer)
        writer.add_sliding_window(config.get("sliding_window", 128))
        writer.add_expert_feed_forward_length(config.need("intermediate_size"))


def _add_experts(plan: Planner, bid: int, n_experts: int, n_ff: int, n_embd: int) -> None:
    """The expert stacks of a layer and their biases; gate and up take turns.

    MXFP4 tensors, `*_blocks`, are matrices as GGUF has them; those of other checkpoints are transposed.
    """
    experts, out = f"model.layers.{bid}.mlp.experts", f"blk.{bid}"
    mxfp4 = f"{experts}.gate_up_proj_blocks" in plan.shapes
    suffix = "_blocks" if mxfp4 else ""
    gate_up, down = f"{experts}.gate_up_proj{suffix}", f"{experts}.down_proj{suffix}"
    plan.expect(gate_up, (n_experts, 2 * n_ff, n_embd) if mxfp4 else (n_experts, n_embd, 2 * n_ff))
    plan.expect(down, (n_experts, n_embd, n_ff) if mxfp4 else (n_experts, n_ff, n_embd))

    def add_stack(proj: str, shape: tuple[int, int], tensor: str, transform: Transform | None) -> None:
        parts = [Part(tensor, expert=xid, transform=transform) for xid in range(n_experts)]
        plan.add_stack(bid, proj, (n_experts, *shape), parts)

    def add_half(proj: str, first: int) -> None:
        pick = (lambda weight: weight[first::2]) if mxfp4 else (lambda weight: weight[:, first::2].T)
        add_stack(proj, (n_ff, n_embd), gate_up, pick)
        plan.add(
            f"{out}.ffn_{proj}_exps.bias",
            f"{experts}.gate_up_proj_bias",
            shape=(n_experts, n_ff),
            stored=(n_experts, 2 * n_ff),
            transform=lambda bias: bias[:, first::2],
        )

    add_half("gate", 0)
    add_half("up", 1)
    add_stack("down", (n_embd, n_ff), down, None if mxfp4 else lambda weight: weight.T)
    plan.add(f"{out}.ffn_down_exps.bias", f"{experts}.down_proj_bias", shape=(n_experts, n_embd))
