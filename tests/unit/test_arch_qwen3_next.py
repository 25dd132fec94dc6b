"""Qwen3-Next: the public configuration, its draft layer, and what llama.cpp cannot run of the family."""

from __future__ import annotations

import re
from typing import Any

import pytest
from public_models import metadata, public_shapes

from alphaq_gguf.arch import FAMILIES, Config
from alphaq_gguf.errors import SourceError

QWEN3_NEXT_80B: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
FAMILY = FAMILIES["qwen3_next"]
METADATA = {
    "block_count": 48,
    "context_length": 262144,
    "embedding_length": 2048,
    "feed_forward_length": 5120,
    "expert_feed_forward_length": 512,
    "expert_shared_feed_forward_length": 512,
    "expert_count": 512,
    "expert_used_count": 10,
    "attention.head_count": 16,
    "attention.head_count_kv": 2,
    "attention.key_length": 256,
    "attention.value_length": 256,
    "attention.layer_norm_rms_epsilon": 1e-06,
    "full_attention_interval": 4,
    "rope.dimension_count": 64,
    "rope.freq_base": 10000000,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
    "ssm.time_step_rank": 32,
    "ssm.inner_size": 4096,
}


def with_draft(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The public checkpoint's tensors that transformers leaves out."""
    last = "model.layers.47."
    copied = {f"mtp.layers.0.{name.removeprefix(last)}": s for name, s in shapes.items() if name.startswith(last)}
    norms = dict.fromkeys(("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.norm.weight"))
    return {**shapes, **copied, **dict.fromkeys(norms, (2048,)), "mtp.fc.weight": (2048, 4096)}


def test_every_tensor_of_80b_has_its_place():
    config = Config(QWEN3_NEXT_80B, "config.json")
    FAMILY.check(config)
    shapes = with_draft(public_shapes(QWEN3_NEXT_80B))
    assert shapes["mtp.layers.0.mlp.experts.511.down_proj.weight"] == (2048, 512)
    plans = FAMILY.plan_tensors(config, shapes)
    assert {part.tensor for plan in plans for part in plan.parts} == shapes.keys()
    found = {plan.name: plan.shape for plan in plans}

    def layer(bid: int) -> dict[str, tuple[int, ...]]:
        return {name.removeprefix(f"blk.{bid}."): found[name] for name in found if name.startswith(f"blk.{bid}.")}

    common = {
        "attn_norm.weight": (2048,),
        "post_attention_norm.weight": (2048,),
        "ffn_gate_inp.weight": (512, 2048),
        "ffn_gate_exps.weight": (512, 512, 2048),
        "ffn_up_exps.weight": (512, 512, 2048),
        "ffn_down_exps.weight": (512, 2048, 512),
        "ffn_gate_inp_shexp.weight": (1, 2048),
        "ffn_gate_shexp.weight": (512, 2048),
        "ffn_up_shexp.weight": (512, 2048),
        "ffn_down_shexp.weight": (2048, 512),
    }
    full = {
        **common,
        "attn_q.weight": (8192, 2048),
        "attn_k.weight": (512, 2048),
        "attn_v.weight": (512, 2048),
        "attn_q_norm.weight": (256,),
        "attn_k_norm.weight": (256,),
        "attn_output.weight": (2048, 4096),
    }
    assert layer(46) == {
        **common,
        "attn_qkv.weight": (8192, 2048),
        "attn_gate.weight": (4096, 2048),
        "ssm_ba.weight": (64, 2048),
        "ssm_conv1d.weight": (8192, 4),
        "ssm_dt.bias": (32,),
        "ssm_a": (32,),
        "ssm_norm.weight": (128,),
        "ssm_out.weight": (2048, 4096),
    }
    assert layer(47) == full
    assert layer(48) == {
        **full,
        "nextn.eh_proj.weight": (2048, 4096),
        "nextn.enorm.weight": (2048,),
        "nextn.hnorm.weight": (2048,),
        "nextn.shared_head_norm.weight": (2048,),
    }
    assert {name for name in found if not name.startswith("blk.")} == {
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
    }
    # What transformers leaves out, config.json does not tell of either.
    assert metadata(FAMILY, config) == {**METADATA, "block_count": 49, "nextn_predict_layers": 1}


def test_the_metadata_of_80b_without_its_draft_layer():
    assert metadata(FAMILY, QWEN3_NEXT_80B) == METADATA


def test_layers_in_an_order_of_their_own_are_listed():
    kinds = ["full_attention", *["linear_attention"] * 47]
    found = metadata(FAMILY, {**QWEN3_NEXT_80B, "layer_types": kinds})
    assert found == {**METADATA, "attention.recurrent_layers": [False] + [True] * 47}


REFUSED = {
    "biases": ({"attention_bias": True}, "attention_bias = True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "router weights as they are": ({"norm_topk_prob": False}, "norm_topk_prob = False"),
    "dense layers between": ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    "dense layers": ({"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
    "wide values": ({"linear_value_head_dim": 256}, "linear_value_head_dim = 256"),
    "a third of a key head": ({"linear_num_value_heads": 24}, "linear_num_value_heads = 24"),
    "another epsilon": ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(SourceError, match=re.escape(message)):
        FAMILY.check(Config({**QWEN3_NEXT_80B, **changes}, "config.json"))
