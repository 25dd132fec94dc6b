"""Llama 4: public configurations, checkpoints with a vision tower, and what llama.cpp cannot run of the family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import build_moe
from public_models import held_shapes, metadata
from safetensors.torch import load_file, save_file

from alphaq_gguf.arch import FAMILIES, Config
from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.errors import SourceError

SCOUT_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
# Maverick, where it differs; later files spell out which layers are which.
MAVERICK_TEXT: dict[str, Any] = {
    **SCOUT_TEXT,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "interleave_moe_layer_step": 2,
    "layer_types": [*["chunked_attention"] * 3, "full_attention"] * 12,
    "max_position_embeddings": 1048576,
    "moe_layers": list(range(1, 48, 2)),
    "no_rope_layers": [1, 1, 1, 0] * 12,
    "num_local_experts": 128,
    "rope_scaling": None,
    "use_qk_norm": False,
}
FAMILY = FAMILIES["llama4_text"]
ATTENTION = {
    "attn_norm.weight": (5120,),
    "attn_q.weight": (5120, 5120),
    "attn_k.weight": (1024, 5120),
    "attn_v.weight": (1024, 5120),
    "attn_output.weight": (5120, 5120),
    "ffn_norm.weight": (5120,),
}
DENSE = {"ffn_gate.weight": (16384, 5120), "ffn_up.weight": (16384, 5120), "ffn_down.weight": (5120, 16384)}


def sparse(n_experts: int) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_inp.weight": (n_experts, 5120),
        "ffn_gate_exps.weight": (n_experts, 8192, 5120),
        "ffn_up_exps.weight": (n_experts, 8192, 5120),
        "ffn_down_exps.weight": (n_experts, 5120, 8192),
        "ffn_gate_shexp.weight": (8192, 5120),
        "ffn_up_shexp.weight": (8192, 5120),
        "ffn_down_shexp.weight": (5120, 8192),
    }


@pytest.mark.parametrize(("text", "first_layer"), [(SCOUT_TEXT, sparse(16)), (MAVERICK_TEXT, DENSE)])
def test_every_tensor_has_its_place_but_those_that_see(text: dict[str, Any], first_layer: dict[str, tuple[int, ...]]):
    config = Config(text, "config.json")
    FAMILY.check(config)
    vision = {"num_hidden_layers": 1}
    shapes = held_shapes(
        {"architectures": ["Llama4ForConditionalGeneration"], "text_config": text, "vision_config": vision}
    )
    plans = FAMILY.plan_tensors(config, shapes)
    used = {part.tensor for plan in plans for part in plan.parts}
    assert {name for name in shapes if not FAMILY.ignores(config, name)} == used
    assert {name.split(".")[0] for name in shapes} == {"language_model", "vision_model", "multi_modal_projector"}
    found = {plan.name: plan.shape for plan in plans}
    for bid, expected in ((0, first_layer), (47, sparse(text["num_local_experts"]))):
        layer = {name.removeprefix(f"blk.{bid}."): found[name] for name in found if name.startswith(f"blk.{bid}.")}
        assert layer == {**ATTENTION, **expected}
    assert found.get("rope_freqs.weight") == (None if text["rope_scaling"] is None else (64,))


def test_the_metadata_of_scout():
    assert metadata(FAMILY, SCOUT_TEXT) == {
        "vocab_size": 202048,
        "block_count": 48,
        "context_length": 10485760,
        "embedding_length": 5120,
        "feed_forward_length": 16384,
        "expert_feed_forward_length": 8192,
        "expert_count": 16,
        "expert_used_count": 1,
        "interleave_moe_layer_step": 1,
        "attention.head_count": 40,
        "attention.head_count_kv": 8,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-05,
        "rope.dimension_count": 128,
        "rope.freq_base": 500000.0,
    }


def test_long_waves_are_stretched_and_short_ones_are_not():
    shapes = held_shapes({**SCOUT_TEXT, "num_hidden_layers": 1, "architectures": ["Llama4ForCausalLM"]})
    plans = FAMILY.plan_tensors(Config({**SCOUT_TEXT, "num_hidden_layers": 1}, "config.json"), shapes)
    (part,) = next(plan for plan in plans if plan.name == "rope_freqs.weight").parts
    assert part.transform is not None
    # The wave of pair i is 2 pi 500000^(i / 64) tokens long: 6695 for i = 34, 8219 for the next one; 8192 divide them.
    assert part.transform(torch.ones(5120)).tolist() == [1.0] * 35 + [16.0] * 29


def test_a_model_that_sees_holds_the_same_language_model(tmp_path: Path):
    plain = build_moe(tmp_path / "plain", "Llama4")
    seeing = tmp_path / "seeing"
    seeing.mkdir()
    tensors = {f"language_model.{name}": t for name, t in load_file(plain / "model.safetensors").items()}
    tensors |= {"vision_model.class_embedding": torch.ones(8), "multi_modal_projector.linear_1.weight": torch.ones(8)}
    save_file(tensors, seeing / "model.safetensors")
    text = json.loads((plain / "config.json").read_text())
    config = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 8}}
    (seeing / "config.json").write_text(json.dumps(config))
    expected, found = open_source(plain), open_source(seeing)
    assert found.tensors == expected.tensors
    assert found.fingerprint == expected.fingerprint


REFUSED = {
    "only layers with rope": ({"num_hidden_layers": 3}, "num_hidden_layers = 3"),
    "biases": ({"attention_bias": True}, "attention_bias = True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "no norms": ({"use_qk_norm": False}, "use_qk_norm = False"),
    "chunks": ({"attention_chunk_size": 4096}, "attention_chunk_size = 4096"),
    "one temperature": ({"attn_temperature_tuning": False}, "attn_temperature_tuning = False"),
    "temperature's steps": ({"floor_scale": 4096}, "floor_scale = 4096"),
    "temperature's height": ({"attn_scale": 0.2}, "attn_scale = 0.2"),
    "rope everywhere": ({"no_rope_layers": [1] * 48}, "no_rope_layers = [1, 1, 1, 1, "),
    "rope's interval": ({"no_rope_layer_interval": 8}, "no_rope_layer_interval = 8"),
    "no chunks": ({"layer_types": ["full_attention"] * 48}, "layer_types = ['full_attention', "),
    "odd sparse layers": ({"moe_layers": [0, 1]}, "moe_layers = [0, 1]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(SourceError, match=re.escape(message)):
        FAMILY.check(Config({**SCOUT_TEXT, **changes}, "config.json"))


def test_norms_of_queries_and_keys_are_refused_where_llama_cpp_would_leave_them_out():
    with pytest.raises(SourceError, match="use_qk_norm = True"):
        FAMILY.check(Config({**MAVERICK_TEXT, "use_qk_norm": True}, "config.json"))
