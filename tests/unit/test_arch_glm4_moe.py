"""GLM-4.5: public configurations, its draft layer, and what llama.cpp cannot run of the family."""

from __future__ import annotations

import re
from typing import Any

import pytest
from public_models import metadata, public_shapes

from alphaq_gguf.arch import FAMILIES, Config
from alphaq_gguf.errors import SourceError

GLM_4_5_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
# GLM-4.5, where it differs.
GLM_4_5: dict[str, Any] = {
    **GLM_4_5_AIR,
    "first_k_dense_replace": 3,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_hidden_layers": 92,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
FAMILY = FAMILIES["glm4_moe"]


def check(values: dict[str, Any]) -> None:
    FAMILY.check(Config(values, "config.json"))


def draft_shapes(values: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The public checkpoints' layer behind the last one."""
    n_layers, width, n_vocab = (values[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    last, draft = f"model.layers.{n_layers - 1}.", f"model.layers.{n_layers}."
    copied = {draft + name.removeprefix(last): shape for name, shape in shapes.items() if name.startswith(last)}
    return {
        **copied,
        f"{draft}eh_proj.weight": (width, 2 * width),
        f"{draft}enorm.weight": (width,),
        f"{draft}hnorm.weight": (width,),
        f"{draft}embed_tokens.weight": (n_vocab, width),
        f"{draft}shared_head.head.weight": (n_vocab, width),
        f"{draft}shared_head.norm.weight": (width,),
    }


@pytest.mark.parametrize("values", [GLM_4_5_AIR, GLM_4_5], ids=["GLM-4.5-Air", "GLM-4.5"])
def test_every_tensor_has_its_place(values: dict[str, Any]):
    check(values)
    shapes = public_shapes(values)
    shapes |= draft_shapes(values, shapes)
    plans = FAMILY.plan_tensors(Config(values, "config.json"), shapes)
    assert {part.tensor for plan in plans for part in plan.parts} == shapes.keys()


def test_the_names_of_a_dense_layer_a_sparse_one_and_the_draft():
    shapes = public_shapes(GLM_4_5_AIR)
    shapes |= draft_shapes(GLM_4_5_AIR, shapes)
    found = {plan.name: plan.shape for plan in FAMILY.plan_tensors(Config(GLM_4_5_AIR, "config.json"), shapes)}

    def layer(bid: int) -> dict[str, tuple[int, ...]]:
        return {name.removeprefix(f"blk.{bid}."): found[name] for name in found if name.startswith(f"blk.{bid}.")}

    attention = {
        "attn_norm.weight": (4096,),
        "attn_q.weight": (12288, 4096),
        "attn_q.bias": (12288,),
        "attn_k.weight": (1024, 4096),
        "attn_k.bias": (1024,),
        "attn_v.weight": (1024, 4096),
        "attn_v.bias": (1024,),
        "attn_output.weight": (4096, 12288),
        "post_attention_norm.weight": (4096,),
    }
    sparse = {
        **attention,
        "ffn_gate_inp.weight": (128, 4096),
        "exp_probs_b.bias": (128,),
        "ffn_gate_exps.weight": (128, 1408, 4096),
        "ffn_up_exps.weight": (128, 1408, 4096),
        "ffn_down_exps.weight": (128, 4096, 1408),
        "ffn_gate_shexp.weight": (1408, 4096),
        "ffn_up_shexp.weight": (1408, 4096),
        "ffn_down_shexp.weight": (4096, 1408),
    }
    dense = {"ffn_gate.weight": (10944, 4096), "ffn_up.weight": (10944, 4096), "ffn_down.weight": (4096, 10944)}
    assert layer(0) == {**attention, **dense}
    assert layer(45) == sparse
    assert layer(46) == {
        **sparse,
        "nextn.eh_proj.weight": (4096, 8192),
        "nextn.enorm.weight": (4096,),
        "nextn.hnorm.weight": (4096,),
        "nextn.embed_tokens.weight": (151552, 4096),
        "nextn.shared_head_head.weight": (151552, 4096),
        "nextn.shared_head_norm.weight": (4096,),
    }


def test_the_metadata_of_air():
    assert metadata(FAMILY, GLM_4_5_AIR) == {
        "block_count": 47,
        "nextn_predict_layers": 1,
        "context_length": 131072,
        "embedding_length": 4096,
        "feed_forward_length": 10944,
        "attention.head_count": 96,
        "attention.head_count_kv": 8,
        "attention.layer_norm_rms_epsilon": 1e-05,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "rope.dimension_count": 64,
        "rope.freq_base": 1000000,
        "leading_dense_block_count": 1,
        "expert_count": 128,
        "expert_used_count": 8,
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.0,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 1408,
    }


@pytest.mark.parametrize(
    ("changes", "n_rotated"),
    [
        ({"partial_rotary_factor": None, "head_dim": None, "num_attention_heads": 32}, 64),
        ({"partial_rotary_factor": 0.25}, 32),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.75}}, 96),
    ],
    ids=["half by default", "old spelling", "new spelling"],
)
def test_the_rotated_part_of_a_head(changes: dict[str, Any], n_rotated: int):
    values = {key: value for key, value in {**GLM_4_5_AIR, **changes}.items() if value is not None}
    assert metadata(FAMILY, values)["rope.dimension_count"] == n_rotated


REFUSED = {
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "no shared experts": ({"n_shared_experts": 0}, "n_shared_experts = 0"),
    "unequal groups": ({"n_group": 3}, "n_group = 3"),
    "all groups": ({"n_group": 4, "topk_group": 4}, "topk_group = 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(SourceError, match=re.escape(message)):
        check({**GLM_4_5_AIR, **changes})
