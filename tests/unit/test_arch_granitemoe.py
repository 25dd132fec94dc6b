"""Granite MoE: public configurations, and what llama.cpp cannot run of the family."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from public_models import metadata

from alphaq_gguf.arch import FAMILIES, Config
from alphaq_gguf.errors import SourceError

GRANITE_1B_A400M: dict[str, Any] = {
    "architectures": ["GraniteMoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "logits_scaling": 6.0,
    "max_position_embeddings": 4096,
    "model_type": "granitemoe",
    "num_attention_heads": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": True,
    "vocab_size": 49155,
}
FAMILY = FAMILIES["granitemoe"]


def saved_shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors: as the model holds them, under the names of the published files."""
    names = {
        "experts.gate_up_proj": "input_linear.weight",
        "experts.down_proj": "output_linear.weight",
        "router.weight": "router.layer.weight",
    }
    model_class = getattr(transformers, values["architectures"][0])
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(values))
    pattern = re.compile("|".join(map(re.escape, names)))
    tied = {"lm_head.weight"} if values["tie_word_embeddings"] else set()
    return {
        pattern.sub(lambda m: names[m[0]], name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


@pytest.mark.parametrize("shared", [0, 256])
def test_every_tensor_of_1b_a400m_has_its_place(shared: int):
    values = GRANITE_1B_A400M
    if shared:
        values = {**values, "architectures": ["GraniteMoeSharedForCausalLM"], "shared_intermediate_size": shared}
    config, shapes = Config(values, "config.json"), saved_shapes(values)
    FAMILY.check(config)
    assert shapes["model.layers.23.block_sparse_moe.input_linear.weight"] == (32, 1024, 1024)
    plans = FAMILY.plan_tensors(config, shapes)
    assert {part.tensor for plan in plans for part in plan.parts} == shapes.keys()
    found = {plan.name: plan.shape for plan in plans}
    shared_experts = {
        "ffn_gate_shexp.weight": (shared, 1024),
        "ffn_up_shexp.weight": (shared, 1024),
        "ffn_down_shexp.weight": (1024, shared),
    }
    assert {name.removeprefix("blk.23."): found[name] for name in found if name.startswith("blk.23.")} == {
        "attn_norm.weight": (1024,),
        "attn_q.weight": (1024, 1024),
        "attn_k.weight": (512, 1024),
        "attn_v.weight": (512, 1024),
        "attn_output.weight": (1024, 1024),
        "ffn_norm.weight": (1024,),
        "ffn_gate_inp.weight": (32, 1024),
        "ffn_gate_exps.weight": (32, 512, 1024),
        "ffn_up_exps.weight": (32, 512, 1024),
        "ffn_down_exps.weight": (32, 1024, 512),
        **(shared_experts if shared else {}),
    }
    assert {name for name in found if not name.startswith("blk.")} == {"token_embd.weight", "output_norm.weight"}


def test_the_metadata_of_1b_a400m_is_that_of_its_public_gguf_files():
    expected = {
        "vocab_size": 49155,
        "block_count": 24,
        "context_length": 4096,
        "embedding_length": 1024,
        "feed_forward_length": 512,
        "attention.head_count": 16,
        "attention.head_count_kv": 8,
        "rope.freq_base": 10000,
        "rope.dimension_count": 64,
        "attention.layer_norm_rms_epsilon": 1e-06,
        "expert_count": 32,
        "expert_used_count": 8,
        "attention.scale": 0.015625,
        "embedding_scale": 12.0,
        "residual_scale": 0.22,
        "logit_scale": 6.0,
    }
    assert metadata(FAMILY, GRANITE_1B_A400M) == expected
    shared = metadata(FAMILY, {**GRANITE_1B_A400M, "shared_intermediate_size": 256})
    assert shared == {**expected, "expert_shared_feed_forward_length": 256}


REFUSED = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "wide heads": ({"head_dim": 128}, "head_dim = 128"),
    "no attention": ({"attention_multiplier": 0.0}, "attention_multiplier = 0.0"),
    "no embedding": ({"embedding_multiplier": 0}, "embedding_multiplier = 0"),
    "no residual": ({"residual_multiplier": 0.0}, "residual_multiplier = 0.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(SourceError, match=re.escape(message)):
        FAMILY.check(Config({**GRANITE_1B_A400M, **changes}, "config.json"))
