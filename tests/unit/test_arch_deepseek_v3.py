"""DeepSeek-V3: public configurations, and what llama.cpp cannot run of the family."""

from __future__ import annotations

import re
from typing import Any

import pytest
from public_models import metadata, public_shapes

from alphaq_gguf.arch import FAMILIES, Config
from alphaq_gguf.errors import SourceError

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
# Moonlight-16B-A3B, where it differs.
MOONLIGHT: dict[str, Any] = {
    **DEEPSEEK_V3,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
# Kimi-K2-Instruct, where it differs.
KIMI_K2: dict[str, Any] = {
    **DEEPSEEK_V3,
    "first_k_dense_replace": 1,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "beta_fast": 1.0, "factor": 32.0},
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
FAMILY = FAMILIES["deepseek_v3"]


def check(values: dict[str, Any]) -> None:
    FAMILIES[values["model_type"]].check(Config(values, "config.json"))


@pytest.mark.parametrize("values", [DEEPSEEK_V3, MOONLIGHT], ids=["DeepSeek-V3", "Moonlight"])
def test_every_tensor_has_its_place(values: dict[str, Any]):
    check(values)
    shapes = public_shapes(values)
    plans = FAMILY.plan_tensors(Config(values, "config.json"), shapes)
    assert {part.tensor for plan in plans for part in plan.parts} == shapes.keys()
    found = {plan.name: plan.shape for plan in plans}
    assert found["blk.3.exp_probs_b.bias"] == (values["n_routed_experts"],)
    assert ("blk.0.attn_q_a.weight" in found) == (values is DEEPSEEK_V3)
    assert ("blk.0.attn_q.weight" in found) == (values is MOONLIGHT)
    assert ("blk.2.ffn_gate.weight" in found) == (values is DEEPSEEK_V3)


def test_the_metadata_of_v3():
    assert metadata(FAMILY, DEEPSEEK_V3) == {
        "block_count": 61,
        "context_length": 163840,
        "embedding_length": 7168,
        "feed_forward_length": 18432,
        "attention.head_count": 128,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-06,
        "attention.q_lora_rank": 1536,
        "attention.kv_lora_rank": 512,
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "rope.dimension_count": 64,
        "rope.freq_base": 10000,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_beta_fast": 32,
        "rope.scaling.yarn_beta_slow": 1,
        "rope.scaling.yarn_log_multiplier": 0.1,
        "vocab_size": 129280,
        "leading_dense_block_count": 3,
        "expert_count": 256,
        "expert_used_count": 8,
        "expert_group_count": 8,
        "expert_group_used_count": 4,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 2048,
    }


def test_a_router_that_transformers_does_not_describe_is_described_all_the_same():
    silent = ("scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group")
    values = {key: value for key, value in DEEPSEEK_V3.items() if key not in silent}
    check(values)
    assert metadata(FAMILY, values) == metadata(FAMILY, DEEPSEEK_V3)


def test_the_draft_layer_is_left_out():
    config = Config(DEEPSEEK_V3, "config.json")
    assert FAMILY.ignores(config, "model.layers.61.eh_proj.weight")
    assert FAMILY.ignores(config, "model.layers.61.mlp.experts.0.up_proj.weight")
    assert not FAMILY.ignores(config, "model.layers.60.mlp.experts.0.up_proj.weight")
    assert not FAMILY.ignores(config, "model.norm.weight")


def test_a_missing_correction_bias_is_not_passed_over():
    shapes = public_shapes(MOONLIGHT)
    del shapes["model.layers.7.mlp.gate.e_score_correction_bias"]
    with pytest.raises(SourceError, match=r"model\.layers\.7\.mlp\.gate\.e_score_correction_bias is missing"):
        FAMILY.plan_tensors(Config(MOONLIGHT, "config.json"), shapes)


def test_kimi_k2_is_of_the_family():
    check({**KIMI_K2, "rope_scaling": {**KIMI_K2["rope_scaling"], "beta_fast": 32.0}})


REFUSED = {
    "softmax": ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    "another way to choose": ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
    "halves rotated": ({"rope_interleave": False}, "rope_interleave = False"),
    "unequal groups": ({"n_group": 7}, "n_group = 7"),
    "a group per expert": ({"n_group": 256}, "n_group = 256"),
    "all groups": ({"topk_group": 8}, "topk_group = 8"),
    "no group": ({"topk_group": 0}, "topk_group = 0"),
    "YaRN of Kimi-K2": (KIMI_K2, "rope_scaling.beta_fast = 1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(SourceError, match=re.escape(message)):
        check({**DEEPSEEK_V3, **changes})
