"""OLMoE: public configurations, and what llama.cpp cannot run of the family."""

from __future__ import annotations

import re
from typing import Any

import pytest
from public_models import metadata, public_shapes

from alphaq_gguf.arch import FAMILIES, Config
from alphaq_gguf.errors import SourceError

OLMOE_1B_7B: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}
FAMILY = FAMILIES["olmoe"]


def test_every_tensor_of_1b_7b_has_its_place():
    config, shapes = Config(OLMOE_1B_7B, "config.json"), public_shapes(OLMOE_1B_7B)
    FAMILY.check(config)
    plans = FAMILY.plan_tensors(config, shapes)
    assert {part.tensor for plan in plans for part in plan.parts} == shapes.keys()
    found = {plan.name: plan.shape for plan in plans}
    assert {name.removeprefix("blk.15."): found[name] for name in found if name.startswith("blk.15.")} == {
        "attn_norm.weight": (2048,),
        "attn_q.weight": (2048, 2048),
        "attn_k.weight": (2048, 2048),
        "attn_v.weight": (2048, 2048),
        # Over the whole width: not head by head.
        "attn_q_norm.weight": (2048,),
        "attn_k_norm.weight": (2048,),
        "attn_output.weight": (2048, 2048),
        "ffn_norm.weight": (2048,),
        "ffn_gate_inp.weight": (64, 2048),
        "ffn_gate_exps.weight": (64, 1024, 2048),
        "ffn_up_exps.weight": (64, 1024, 2048),
        "ffn_down_exps.weight": (64, 2048, 1024),
    }
    assert {name for name in found if not name.startswith("blk.")} == {
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
    }


def test_the_metadata_of_1b_7b_is_that_of_its_public_gguf_files():
    assert metadata(FAMILY, OLMOE_1B_7B) == {
        "block_count": 16,
        "context_length": 4096,
        "embedding_length": 2048,
        "feed_forward_length": 1024,
        "attention.head_count": 16,
        "attention.head_count_kv": 16,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-05,
        "expert_count": 64,
        "expert_used_count": 8,
    }


REFUSED = {
    "normalised weights": ({"norm_topk_prob": True}, "norm_topk_prob = True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "clipping": ({"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    "biases": ({"attention_bias": True}, "attention_bias = True"),
    "grouped heads": ({"num_key_value_heads": 4}, "num_key_value_heads = 4"),
    "wide heads": ({"head_dim": 256}, "head_dim = 256"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(SourceError, match=re.escape(message)):
        FAMILY.check(Config({**OLMOE_1B_7B, **changes}, "config.json"))
