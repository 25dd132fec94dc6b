"""Any MoE that llama.cpp's converter knows becomes a mixed-precision file by way of its float GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_tokenizer
from gguf import GGUFReader
from oracles import convert_with_llama_cpp

from alphaq_gguf.evaluate.llama import LlamaModel, log_softmax

COMMON = {
    "vocab_size": 400,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 390, 64)]


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=None))


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    extra = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 64}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **extra, norm_topk_prob=True))


def olmoe():
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeForCausalLM(OlmoeConfig(**{**COMMON, "num_key_value_heads": 4}, num_experts=4, num_experts_per_tok=2))


def granite_moe():
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    # transformers' default attention multiplier of 1 makes attention of random weights all but discontinuous.
    extra = {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.125}
    return GraniteMoeForCausalLM(GraniteMoeConfig(**COMMON, **extra))


@pytest.mark.parametrize("build", [mixtral, qwen3_moe, olmoe, granite_moe])
def test_float_gguf_of_another_family(build: Callable, tmp_path: Path, cli) -> None:
    import torch

    torch.manual_seed(0)
    model = build().eval()
    source = tmp_path / "model"
    model.save_pretrained(source)
    write_tokenizer(source)
    reference = tmp_path / "f32.gguf"
    convert_with_llama_cpp(source, reference)
    with LlamaModel(reference, n_ctx=64, threads=1) as exact:
        expected = log_softmax(exact.logits(TOKENS).astype(np.float64))
    before = {t.name: t for t in GGUFReader(reference).tensors}
    divergence = {}
    for bpw in (2.7, 6.0):
        out = tmp_path / f"{bpw}.gguf"
        code, _, err = cli("convert", reference, "-o", out, "--bpw", bpw)
        assert code == 0, err
        after = {t.name: t for t in GGUFReader(out).tensors}
        assert before.keys() == after.keys()
        stacks = [t for name, t in after.items() if "_exps.weight" in name]
        assert len(stacks) == 6
        assert sum(t.n_bytes for t in stacks) * 8 / sum(t.n_elements for t in stacks) <= bpw
        with LlamaModel(out, n_ctx=64, threads=1) as mixed:
            found = log_softmax(mixed.logits(TOKENS).astype(np.float64))
        divergence[bpw] = float((np.exp(expected) * (expected - found)).sum(axis=1).mean())
    assert 0 < divergence[6.0] < divergence[2.7] / 10
