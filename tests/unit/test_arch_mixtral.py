"""Mixtral: public configurations, and what llama.cpp cannot run of the family."""

from __future__ import annotations

import re
from typing import Any

import pytest
from public_models import metadata, public_shapes

from alphaq_gguf.arch import FAMILIES, Config
from alphaq_gguf.errors import SourceError

MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
FAMILY = FAMILIES["mixtral"]


def test_every_tensor_of_8x7b_has_its_place():
    config = Config(MIXTRAL_8X7B, "config.json")
    FAMILY.check(config)
    names = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    pattern = re.compile("|".join(map(re.escape, names)))
    shapes = {pattern.sub(lambda m: names[m[0]], name): s for name, s in public_shapes(MIXTRAL_8X7B).items()}
    assert shapes["model.layers.31.block_sparse_moe.experts.7.w2.weight"] == (4096, 14336)
    plans = FAMILY.plan_tensors(config, shapes)
    assert {part.tensor for plan in plans for part in plan.parts} == shapes.keys()
    found = {plan.name: plan.shape for plan in plans}
    assert {name.removeprefix("blk.31."): found[name] for name in found if name.startswith("blk.31.")} == {
        "attn_norm.weight": (4096,),
        "attn_q.weight": (4096, 4096),
        "attn_k.weight": (1024, 4096),
        "attn_v.weight": (1024, 4096),
        "attn_output.weight": (4096, 4096),
        "ffn_norm.weight": (4096,),
        "ffn_gate_inp.weight": (8, 4096),
        "ffn_gate_exps.weight": (8, 14336, 4096),
        "ffn_up_exps.weight": (8, 14336, 4096),
        "ffn_down_exps.weight": (8, 4096, 14336),
    }
    assert {name for name in found if not name.startswith("blk.")} == {
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
    }


def test_the_metadata_of_8x7b_is_that_of_its_public_gguf_files():
    assert metadata(FAMILY, MIXTRAL_8X7B) == {
        "vocab_size": 32000,
        "context_length": 32768,
        "embedding_length": 4096,
        "block_count": 32,
        "feed_forward_length": 14336,
        "rope.dimension_count": 128,
        "attention.head_count": 32,
        "attention.head_count_kv": 8,
        "rope.freq_base": 1000000.0,
        "attention.layer_norm_rms_epsilon": 1e-05,
        "expert_count": 8,
        "expert_used_count": 2,
    }


def test_a_window_as_long_as_the_context_is_none():
    # Merges of Mistral models keep its field.
    FAMILY.check(Config({**MIXTRAL_8X7B, "sliding_window": 32768}, "config.json"))


REFUSED = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "window": ({"sliding_window": 4096}, "sliding_window = 4096"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(SourceError, match=re.escape(message)):
        FAMILY.check(Config({**MIXTRAL_8X7B, **changes}, "config.json"))
