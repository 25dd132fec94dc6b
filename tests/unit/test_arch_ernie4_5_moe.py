"""ERNIE-4.5: public configurations, and what llama.cpp cannot run of the family."""

from __future__ import annotations

import re
from typing import Any

import pytest
from public_models import metadata, public_shapes

from alphaq_gguf.arch import FAMILIES, Config
from alphaq_gguf.errors import SourceError

ERNIE_21B: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5_moe",
    "moe_capacity": [64, 64, 64],
    "moe_gate": "topk",
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_use_aux_free": True,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000,
    "tie_word_embeddings": True,
    "use_bias": False,
    "vocab_size": 103424,
}
FAMILY = FAMILIES["ernie4_5_moe"]


def check(values: dict[str, Any]) -> None:
    FAMILY.check(Config(values, "config.json"))


def test_every_tensor_has_its_place_but_those_of_draft_layers():
    check(ERNIE_21B)
    # Public checkpoints keep the bias beside the router, transformers within; the tied output is in neither.
    shapes = {name.replace(".gate.moe_statics.", ".moe_statics."): s for name, s in public_shapes(ERNIE_21B).items()}
    del shapes["lm_head.weight"]
    config = Config(ERNIE_21B, "config.json")
    plans = FAMILY.plan_tensors(config, shapes)
    assert {part.tensor for plan in plans for part in plan.parts} == shapes.keys()
    found = {plan.name: plan.shape for plan in plans}
    assert found["blk.0.ffn_up.weight"] == (12288, 2560)
    assert found["blk.1.exp_probs_b.bias"] == (1, 64)
    assert found["blk.27.ffn_down_shexp.weight"] == (2560, 3072)
    assert "output.weight" not in found
    draft = ["mtp_block.0.mlp.up_proj", "mtp_emb_norm.0", "mtp_hidden_norm.0", "mtp_linear_proj.0"]
    assert all(FAMILY.ignores(config, f"model.{name}.weight") for name in draft)
    assert not any(FAMILY.ignores(config, name) for name in shapes)


EXPECTED = {
    "block_count": 28,
    "context_length": 131072,
    "embedding_length": 2560,
    "feed_forward_length": 12288,
    "attention.head_count": 20,
    "attention.head_count_kv": 4,
    "attention.layer_norm_rms_epsilon": 1e-05,
    "rope.freq_base": 500000,
    "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 1,
    "expert_count": 64,
    "expert_used_count": 6,
    "expert_shared_count": 2,
    "expert_feed_forward_length": 1536,
    "expert_shared_feed_forward_length": 3072,
}


def test_the_metadata():
    assert metadata(FAMILY, ERNIE_21B) == EXPECTED


def test_what_a_configuration_leaves_out_is_as_in_transformers():
    silent = {"moe_k", "moe_layer_end_index", "moe_layer_interval", "moe_layer_start_index", "moe_num_shared_experts"}
    silent |= {"rope_theta", "tie_word_embeddings"}
    values = {key: value for key, value in ERNIE_21B.items() if key not in silent}
    check(values)
    assert metadata(FAMILY, values) == EXPECTED


def test_the_shared_experts_width_does_not_depend_on_the_attention_heads():
    # llama.cpp's converter divides the dense width by the number of key-value heads, which fits this model alone.
    assert metadata(FAMILY, {**ERNIE_21B, "num_key_value_heads": 2})["expert_shared_feed_forward_length"] == 3072
    assert "expert_shared_feed_forward_length" not in metadata(FAMILY, {**ERNIE_21B, "moe_num_shared_experts": 0})


REFUSED = {
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "biases": ({"use_bias": True}, "use_bias = True"),
    "alternating layers": ({"moe_layer_interval": 2}, "moe_layer_interval = 2"),
    "dense layers at the end": ({"moe_layer_end_index": 20}, "moe_layer_end_index = 20"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(SourceError, match=re.escape(message)):
        check({**ERNIE_21B, **changes})
