"""DeepSeek-V2: public configurations, and what llama.cpp cannot run of the family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import build_moe
from public_models import metadata, public_shapes

from alphaq_gguf.arch import FAMILIES, Config
from alphaq_gguf.errors import SourceError
from alphaq_gguf.evaluate.llama import LlamaModel

DEEPSEEK_V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
# DeepSeek-V2 with 236 billion weights, where it differs.
DEEPSEEK_V2: dict[str, Any] = {
    **DEEPSEEK_V2_LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "rope_scaling": {**DEEPSEEK_V2_LITE["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
FAMILY = FAMILIES["deepseek_v2"]


def rope(**changes: object) -> dict[str, Any]:
    return {"rope_scaling": {**DEEPSEEK_V2_LITE["rope_scaling"], **changes}}


def check(values: dict[str, Any]) -> None:
    FAMILY.check(Config(values, "config.json"))


def test_every_tensor_of_v2_lite_has_its_place():
    check(DEEPSEEK_V2_LITE)
    shapes = public_shapes(DEEPSEEK_V2_LITE)
    plans = FAMILY.plan_tensors(Config(DEEPSEEK_V2_LITE, "config.json"), shapes)
    assert {part.tensor for plan in plans for part in plan.parts} == shapes.keys()
    attention = {
        "attn_norm.weight": (2048,),
        "attn_q.weight": (16 * 192, 2048),
        "attn_kv_a_mqa.weight": (576, 2048),
        "attn_kv_a_norm.weight": (512,),
        "attn_k_b.weight": (16, 512, 128),
        "attn_v_b.weight": (16, 128, 512),
        "attn_output.weight": (2048, 2048),
        "ffn_norm.weight": (2048,),
    }
    found = {plan.name: plan.shape for plan in plans}
    assert {name.removeprefix("blk.0."): found[name] for name in found if name.startswith("blk.0.")} == {
        **attention,
        "ffn_gate.weight": (10944, 2048),
        "ffn_up.weight": (10944, 2048),
        "ffn_down.weight": (2048, 10944),
    }
    assert {name.removeprefix("blk.26."): found[name] for name in found if name.startswith("blk.26.")} == {
        **attention,
        "ffn_gate_inp.weight": (64, 2048),
        "ffn_gate_exps.weight": (64, 1408, 2048),
        "ffn_up_exps.weight": (64, 1408, 2048),
        "ffn_down_exps.weight": (64, 2048, 1408),
        "ffn_gate_shexp.weight": (2816, 2048),
        "ffn_up_shexp.weight": (2816, 2048),
        "ffn_down_shexp.weight": (2048, 2816),
    }
    assert {name for name in found if not name.startswith("blk.")} == {
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
    }


def test_the_metadata_of_v2_lite():
    assert metadata(FAMILY, DEEPSEEK_V2_LITE) == {
        "block_count": 27,
        "context_length": 163840,
        "embedding_length": 2048,
        "feed_forward_length": 10944,
        "attention.head_count": 16,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-06,
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
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.0707),
        "vocab_size": 102400,
        "leading_dense_block_count": 1,
        "expert_count": 64,
        "expert_used_count": 6,
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "expert_gating_func": 1,
        "expert_weights_scale": 1.0,
        "expert_shared_count": 2,
        "expert_feed_forward_length": 1408,
    }


def test_a_low_query_rank_is_written_down():
    low_rank = {**DEEPSEEK_V2, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
    check(low_rank)
    found = metadata(FAMILY, low_rank)
    assert found["attention.q_lora_rank"] == 1536
    assert found["expert_weights_scale"] == 16.0


def test_key_and_value_projections_keep_every_weight():
    shapes = public_shapes(DEEPSEEK_V2_LITE)
    plans = {plan.name: plan for plan in FAMILY.plan_tensors(Config(DEEPSEEK_V2_LITE, "config.json"), shapes)}
    weight = torch.arange(16 * 256 * 512, dtype=torch.bfloat16).reshape(16 * 256, 512)
    (keys,), (values,) = (plans[f"blk.3.attn_{half}_b.weight"].parts for half in "kv")
    assert keys.transform is not None
    assert values.transform is not None
    latent, nope, head = torch.randn(512), slice(5 * 256, 5 * 256 + 128), 5
    expanded = weight.float() @ latent
    torch.testing.assert_close(keys.transform(weight)[head].float().T @ latent, expanded[nope])
    torch.testing.assert_close(values.transform(weight)[head].float() @ latent, expanded[nope.stop : nope.stop + 128])


REFUSED = {
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "attention_bias": ({"attention_bias": True}, "attention_bias = True"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias = True"),
    "grouped heads": ({"num_key_value_heads": 4}, "num_key_value_heads = 4"),
    "sparse layers": ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    "no shared experts": ({"n_shared_experts": None}, "n_shared_experts = None"),
    "sigmoid": ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
    "groups": ({"n_group": 8}, "n_group = 8"),
    "normalised": ({"norm_topk_prob": True}, "norm_topk_prob = True"),
    "low rank where llama.cpp expects none": ({"q_lora_rank": 1536}, "q_lora_rank = 1536"),
    "no low rank where llama.cpp expects one": ({"num_hidden_layers": 28}, "q_lora_rank = None"),
    "linear rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type = 'linear'"),
    "no mscale": (rope(mscale=None, mscale_all_dim=None), "rope_scaling.mscale_all_dim = None"),
    "two mscales": (rope(mscale=1.0), "rope_scaling.mscale = 1.0"),
    "beta_fast": (rope(beta_fast=1.0), "rope_scaling.beta_fast = 1.0"),
    "beta_slow": (rope(beta_slow=2), "rope_scaling.beta_slow = 2"),
    "attention_factor": (rope(attention_factor=1.3), "rope_scaling.attention_factor = 1.3"),
    "as transformers writes it": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "rope_scaling": None},
        "rope_parameters.rope_type = 'dynamic'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(SourceError, match=re.escape(message)):
        check({**DEEPSEEK_V2_LITE, **changes})


def test_that_llama_cpp_ranks_groups_otherwise_is_the_known_difference(tmp_path: Path, cli):
    from transformers import AutoModelForCausalLM

    check(DEEPSEEK_V2)
    assert metadata(FAMILY, DEEPSEEK_V2)["expert_group_count"] == 8
    assert metadata(FAMILY, DEEPSEEK_V2)["expert_group_used_count"] == 3
    assert FAMILY.remarks(Config(DEEPSEEK_V2_LITE, "config.json")) == []
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    source = build_moe(tmp_path / "model", "DeepseekV2", **groups)
    out, tokens = tmp_path / "out.gguf", list(range(3, 51))
    code, _, err = cli("convert", source, "-o", out, "--bpw", 32, "--tensor-type", r"\.weight$=F32")
    assert code == 0
    assert "llama.cpp ranks groups of experts by the sum of their best two" in err
    assert "llama.cpp ranks groups of experts" in cli("plan", source)[2]
    with LlamaModel(out, n_ctx=64, threads=1, exact=True) as model:
        found = model.logits(tokens)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(torch.tensor([tokens])).logits[0].numpy()
    errors = np.abs(found - expected).max(axis=1) / (expected.max() - expected.min())
    # Tokens whose groups rank alike either way agree, up to the first that does not.
    assert errors[0] < 2e-5
    assert 1e-4 < errors.max() < 0.5
