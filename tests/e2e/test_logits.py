"""Converted models compute what transformers computes: logits of the same tokens, everything in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import LAYOUTS, LITE, build_moe

from alphaq_gguf.evaluate.llama import LlamaModel

# Share of the logit range that f32 arithmetic in another order costs (measured: 5e-6).
BOUND = 2e-5
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 390, 48)]

VARIANTS = {
    **LAYOUTS,
    "DeepseekV3 lite": {"family": "DeepseekV3", **LITE, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5},
    "Glm4Moe without draft layer": {
        "family": "Glm4Moe",
        "draft": False,
        "num_experts": 8,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
    "Ernie4_5_Moe without dense layers": {"family": "Ernie4_5_Moe", "moe_layer_start_index": 0},
    "Olmoe tied, with another epsilon": {"family": "Olmoe", "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "GptOss tied, in bfloat16": {"family": "GptOss", "tie_word_embeddings": True, "dtype": "bfloat16"},
    "Qwen3Next without draft layer": {"family": "Qwen3Next", "draft": False},
    "Qwen3Moe tied": {"family": "Qwen3Moe", "tie_word_embeddings": True},
    "Qwen3Moe with wide heads": {"family": "Qwen3Moe", "head_dim": 128},
    "sharded": {"shards": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "tied embeddings": {"tie_word_embeddings": True},
    "fused and tied": {"fused": True, "tie_word_embeddings": True},
    "no attention bias": {"qkv_bias": False},
    "odd expert width": {"moe_intermediate_size": 352, "shared_expert_intermediate_size": 160},
    "linear rope scaling": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "yarn rope scaling": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 128,
        }
    },
}


def reference_logits(directory: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("layout", VARIANTS)
def test_f32_gguf_gives_the_logits_of_transformers(layout: str, tmp_path: Path, cli) -> None:
    source = build_moe(tmp_path / "model", **VARIANTS[layout])
    out = tmp_path / "out.gguf"
    code, _, err = cli("convert", source, "-o", out, "--bpw", 32, "--tensor-type", r"\.weight$=F32")
    assert code == 0, err
    expected = reference_logits(source)
    with LlamaModel(out, n_ctx=64, threads=1, exact=True) as model:
        found = model.logits(TOKENS)
    spread = expected.max() - expected.min()
    assert spread > 1, "logits too small for the comparison to mean anything"
    assert np.abs(found - expected).max() / spread < BOUND


def test_gguf_source_gives_the_same_bytes_as_the_checkpoint_it_came_from(tiny: Path, tmp_path: Path, cli) -> None:
    from gguf import GGUFReader

    float_file, direct, via = tmp_path / "f32.gguf", tmp_path / "direct.gguf", tmp_path / "via.gguf"
    assert cli("convert", tiny, "-o", float_file, "--bpw", 32, "--tensor-type", r"\.weight$=F32")[0] == 0
    assert cli("convert", tiny, "-o", direct, "--bpw", 3.6)[0] == 0
    code, _, err = cli("convert", float_file, "-o", via, "--bpw", 3.6)
    assert code == 0, err
    tensors = {t.name: t for t in GGUFReader(direct).tensors}
    others = {t.name: t for t in GGUFReader(via).tensors}
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.tensor_type == others[name].tensor_type, name
        assert tensor.data.tobytes() == others[name].data.tobytes(), name
