"""A plan for the largest public models needs little of them: their config and the headers of their shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, _File

REPO = "deepseek-ai/DeepSeek-V3"
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
N_SHARDS = 163
WIDTHS = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def tensors() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of the public checkpoint's tensors."""

    def fp8(name: str, rows: int, cols: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        yield f"{name}.weight", "F8_E4M3", (rows, cols)
        yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-cols // 128))

    def mlp(name: str, width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        yield from fp8(f"{name}.gate_proj", width, 7168)
        yield from fp8(f"{name}.up_proj", width, 7168)
        yield from fp8(f"{name}.down_proj", 7168, width)

    yield "model.embed_tokens.weight", "BF16", (129280, 7168)
    yield "lm_head.weight", "BF16", (129280, 7168)
    yield "model.norm.weight", "BF16", (7168,)
    for layer in range(62):
        root = f"model.layers.{layer}"
        yield f"{root}.input_layernorm.weight", "BF16", (7168,)
        yield f"{root}.post_attention_layernorm.weight", "BF16", (7168,)
        yield f"{root}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
        yield f"{root}.self_attn.kv_a_layernorm.weight", "BF16", (512,)
        yield from fp8(f"{root}.self_attn.q_a_proj", 1536, 7168)
        yield from fp8(f"{root}.self_attn.q_b_proj", 24576, 1536)
        yield from fp8(f"{root}.self_attn.kv_a_proj_with_mqa", 576, 7168)
        yield from fp8(f"{root}.self_attn.kv_b_proj", 32768, 512)
        yield from fp8(f"{root}.self_attn.o_proj", 7168, 16384)
        if layer < 3:
            yield from mlp(f"{root}.mlp", 18432)
            continue
        yield f"{root}.mlp.gate.weight", "BF16", (256, 7168)
        yield f"{root}.mlp.gate.e_score_correction_bias", "F32", (256,)
        yield from mlp(f"{root}.mlp.shared_experts", 2048)
        for expert in range(256):
            yield from mlp(f"{root}.mlp.experts.{expert}", 2048)
        if layer == 61:
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{root}.{norm}.weight", "BF16", (7168,)
            yield f"{root}.eh_proj.weight", "BF16", (7168, 14336)
            yield f"{root}.embed_tokens.weight", "BF16", (129280, 7168)
            yield f"{root}.shared_head.head.weight", "BF16", (129280, 7168)


class HeaderOnly:
    """A safetensors file of which nothing but the header exists; the rest is zeros."""

    def __init__(self, entries: list[tuple[str, str, tuple[int, ...]]]) -> None:
        header, offset = {}, 0
        for name, dtype, shape in entries:
            n_bytes = WIDTHS[dtype]
            for length in shape:
                n_bytes *= length
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
            offset += n_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        self.head = len(text).to_bytes(8, "little") + text
        self.size = len(self.head) + offset

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        return self.head[start:stop].ljust(stop - start, b"\0")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    # The index alone is 9 MB in the real repository.
    (tmp_path / "model" / "model.safetensors.index.json").write_bytes(b" " * 9_000_000)
    (tmp_path / "model" / "tokenizer.json").write_bytes(b" " * 7_000_000)
    with HubServer() as server:
        server.add_repo(REPO, tmp_path / "model")
        repo = server.repos[REPO]
        files = dict(repo.commits[repo.branches["main"]])
        everything = list(tensors())
        assert len(everything) == 91991
        for number in range(N_SHARDS):
            first, last = (len(everything) * i // N_SHARDS for i in (number, number + 1))
            data = HeaderOnly(everything[first:last])
            file = _File(data, True)  # type: ignore[arg-type]
            file.__dict__["sha256"] = hashlib.sha256(data.head).hexdigest()
            files[f"model-{number + 1:05d}-of-{N_SHARDS:06d}.safetensors"] = file
        server._commit(repo, "main", files)
        server.patch(monkeypatch, tmp_path / "cache", timeout_s=20)
        yield server


def test_a_plan_of_deepseek_v3_fetches_under_15_mb(server: HubServer, cli) -> None:
    code, out, err = cli("plan", REPO, "--ctx", 32768, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert sum(request.sent for request in server.requests) < 15_000_000
    # 671 billion weights without the draft layer, as the model card counts them.
    assert found["n_weights"] == pytest.approx(671.0e9, rel=1e-3)
    experts = 58 * 256 * 3 * 2048 * 7168
    assert found["n_expert_weights"] == experts
    assert (found["least_bpw"], found["most_bpw"]) == (2.625, 8.5)
    assert found["most_bytes"] - found["least_bytes"] == pytest.approx(experts * (8.5 - 2.625) / 8, abs=1e6)
    # The cached latent of 512 and the rotated key of 64, two bytes each, for every layer and token.
    assert found["need"]["kv_cache"] == 61 * (512 + 64) * 2 * 32768
    assert found["fits"][-1]["bpw"] is None
