"""gpt-oss: the public configuration, both layouts of its experts, and what llama.cpp cannot run of the family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import GPT_OSS_YARN, build_moe
from public_models import held_shapes, metadata

from alphaq_gguf.arch import FAMILIES, Config
from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.errors import SourceError
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.qtypes import QType
from alphaq_gguf.tensor_types import choose_types

GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
FAMILY = FAMILIES["gpt_oss"]


def mxfp4(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The public files' layout: matrices of experts as blocks, not transposed."""
    packed = re.compile(r".*\.(gate_up|down)_proj$")
    return {
        f"{name}_blocks" if packed.match(name) else name: (s[0], s[2], s[1]) if packed.match(name) else s
        for name, s in shapes.items()
    }


@pytest.mark.parametrize("layout", [mxfp4, dict])
def test_every_tensor_of_20b_has_its_place(layout):
    config = Config(GPT_OSS_20B, "config.json")
    FAMILY.check(config)
    shapes = layout(held_shapes(GPT_OSS_20B))
    plans = FAMILY.plan_tensors(config, shapes)
    assert {part.tensor for plan in plans for part in plan.parts} == shapes.keys()
    found = {plan.name: plan.shape for plan in plans}
    assert {name.removeprefix("blk.23."): found[name] for name in found if name.startswith("blk.23.")} == {
        "attn_norm.weight": (2880,),
        "attn_q.weight": (4096, 2880),
        "attn_q.bias": (4096,),
        "attn_k.weight": (512, 2880),
        "attn_k.bias": (512,),
        "attn_v.weight": (512, 2880),
        "attn_v.bias": (512,),
        "attn_output.weight": (2880, 4096),
        "attn_output.bias": (2880,),
        "attn_sinks.weight": (64,),
        "post_attention_norm.weight": (2880,),
        "ffn_gate_inp.weight": (32, 2880),
        "ffn_gate_inp.bias": (32,),
        "ffn_gate_exps.weight": (32, 2880, 2880),
        "ffn_gate_exps.bias": (32, 2880),
        "ffn_up_exps.weight": (32, 2880, 2880),
        "ffn_up_exps.bias": (32, 2880),
        "ffn_down_exps.weight": (32, 2880, 2880),
        "ffn_down_exps.bias": (32, 2880),
    }
    assert {name for name in found if not name.startswith("blk.")} == {
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
    }


def test_the_metadata_of_20b_is_that_of_its_public_gguf_files():
    assert metadata(FAMILY, GPT_OSS_20B) == {
        "block_count": 24,
        "context_length": 131072,
        "embedding_length": 2880,
        "feed_forward_length": 2880,
        "expert_feed_forward_length": 2880,
        "expert_count": 32,
        "expert_used_count": 4,
        "attention.head_count": 64,
        "attention.head_count_kv": 8,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.layer_norm_rms_epsilon": 1e-05,
        "attention.sliding_window": 128,
        "rope.freq_base": 150000,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }


def test_biases_of_experts_are_no_stacks_and_stay_float(tmp_path: Path):
    source = open_source(build_moe(tmp_path / "model", "GptOss", dtype="bfloat16"))
    stacks = {f"blk.{bid}.ffn_{proj}_exps" for bid in (0, 1) for proj in ("gate", "up", "down")}
    assert {stack.name for stack in source.stacks} == {f"{stack}.weight" for stack in stacks}
    types, _ = choose_types(source, [(".*", QType.Q8_0)])
    assert {types[f"{stack}.bias"] for stack in stacks} == {QType.F32}


REFUSED = {
    "no biases": ({"attention_bias": False}, "attention_bias = False"),
    "another gain": ({"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    "another clamp": ({"swiglu_limit": 10.0}, "swiglu_limit = 10.0"),
    "no window": ({"sliding_window": None}, "sliding_window = None"),
    "all layers alike": ({"layer_types": ["full_attention"] * 24}, "layer_types = ['full_attention', "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(case: str):
    changes, message = REFUSED[case]
    with pytest.raises(SourceError, match=re.escape(message)):
        FAMILY.check(Config({**GPT_OSS_20B, **changes}, "config.json"))


def test_that_llama_cpp_rounds_the_bounds_of_yarn_is_the_known_difference(tmp_path: Path, cli):
    from transformers import AutoModelForCausalLM

    # Nothing of `truncate` reaches the file, as in OpenAI's own checkpoints and llama.cpp's converter.
    source = build_moe(tmp_path / "model", "GptOss", rope_parameters={**GPT_OSS_YARN, "truncate": False})
    out = tmp_path / "out.gguf"
    assert cli("convert", source, "-o", out, "--bpw", 32, "--tensor-type", r"\.weight$=F32")[0] == 0
    tokens = list(range(3, 51))
    with LlamaModel(out, n_ctx=64, threads=1, exact=True) as model:
        found = model.logits(tokens)
    errors = {}
    for truncate in (True, False):
        config = json.loads((source / "config.json").read_text())
        config["rope_parameters"]["truncate"] = truncate
        (source / "config.json").write_text(json.dumps(config))
        reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = reference(torch.tensor([tokens])).logits[0].numpy()
        errors[truncate] = np.abs(found - expected).max() / (expected.max() - expected.min())
    assert errors[True] < 2e-5
    assert errors[False] > 1e-3
