"""Checkpoints that tests build on the fly, and where things lie."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 1234567 degrees!",
    "def main(argv):\n    return [x ** 2 for x in range(10)]\n",
    "Größe, naïve café, 東京 and москва: caf\u00e9 \U0001f600\n\n\t tabs   spaces",
]


QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(directory: Path, vocab_size: int = 400, special: Sequence[str] = ()) -> None:
    """A byte-level BPE tokenizer that splits as Qwen's does and speaks ChatML, trained on a few sentences.

    `special` are more special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_REGEX), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 8,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "model_max_length": 512,
        "chat_template": "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


COMMON = {
    "vocab_size": 400,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}

GRANITE: dict[str, object] = {
    "num_local_experts": 4,
    "attention_multiplier": 0.02,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}

LATENT: dict[str, object] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
}

DEEPSEEK_YARN: dict[str, object] = {
    "rope_type": "yarn",
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
}

# llama.cpp takes queries without a low rank in deepseek2 models of 26 or 27 layers only.
LITE: dict[str, object] = {
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
}

GPT_OSS_YARN: dict[str, object] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "rope_theta": 150000.0,
    "original_max_position_embeddings": 4096,
}

SCOUT_ROPE: dict[str, object] = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "rope_theta": 500000.0,
    "original_max_position_embeddings": 64,
}

# llama.cpp tells Llama 4 models without norms of queries and keys by their number of experts.
MAVERICK: dict[str, object] = {
    "num_experts": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 1,
    "intermediate_size": 64,
    "interleave_moe_layer_step": 4,
    "use_qk_norm": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}

# A tiny model of every family: what its configuration needs beside COMMON, by transformers' class prefix.
FAMILIES: dict[str, dict[str, object]] = {
    "DeepseekV2": {**LATENT, "scoring_func": "softmax"},
    "DeepseekV3": {**LATENT, "scoring_func": "sigmoid", "n_group": 4, "topk_group": 2},
    "Ernie4_5_Moe": {"num_hidden_layers": 3, "moe_num_shared_experts": 1},
    "Glm4Moe": {"num_hidden_layers": 3, "n_routed_experts": 4, "head_dim": 64, "routed_scaling_factor": 2.5},
    "GptOss": {"head_dim": 64, "sliding_window": 16, "rope_parameters": GPT_OSS_YARN},
    "GraniteMoe": GRANITE,
    "GraniteMoeShared": {**GRANITE, "shared_intermediate_size": 128},
    "Llama4": {
        "head_dim": 64,
        "intermediate_size": 256,
        "intermediate_size_mlp": 512,
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "rope_parameters": {**SCOUT_ROPE, "high_freq_factor": 4.0},
    },
    "Mixtral": {},
    "Olmoe": {"num_key_value_heads": 4},
    "Qwen2Moe": {"shared_expert_intermediate_size": 256},
    "Qwen3Moe": {"head_dim": 64, "norm_topk_prob": True},
    # Wider weights make transformers' chunked linear attention differ by 3e-5 from its own one token at a time.
    "Qwen3Next": {
        "head_dim": 64,
        "initializer_range": 0.05,
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 256,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}

# Families whose checkpoints hold experts as transformers has them in memory.
SAVED_FUSED = ("GptOss", "Llama4")

# Special tokens that llama.cpp's converter looks for in a family's vocabulary.
SPECIAL = {"Glm4Moe": ("[gMASK]", "<|user|>", "<|observation|>")}

# Layouts that every family is tested in, and variants of some.
LAYOUTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    **{f"{family} fused": {"family": family, "fused": True} for family in FAMILIES if family not in SAVED_FUSED},
    "DeepseekV2 lite": {"family": "DeepseekV2", **LITE, "rope_parameters": DEEPSEEK_YARN},
    "DeepseekV3 with YaRN": {
        "family": "DeepseekV3",
        "tie_word_embeddings": True,
        "rope_parameters": {**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "Glm4Moe with query norms and biases": {"family": "Glm4Moe", "use_qk_norm": True, "attention_bias": True},
    "Ernie4_5_Moe without shared experts": {
        "family": "Ernie4_5_Moe",
        "moe_num_shared_experts": 0,
        "tie_word_embeddings": True,
    },
    "Mixtral tied, with wide heads": {"family": "Mixtral", "tie_word_embeddings": True, "head_dim": 128},
    "Mixtral in bfloat16": {"family": "Mixtral", "dtype": "bfloat16"},
    "GraniteMoe tied, with biases": {"family": "GraniteMoe", "tie_word_embeddings": True, "attention_bias": True},
    "Llama4 as Maverick": {"family": "Llama4", **MAVERICK},
    "Llama4 tied, with Scout's rope scaling": {
        "family": "Llama4",
        "tie_word_embeddings": True,
        "rope_parameters": SCOUT_ROPE,
    },
    "Qwen3Next tied, another order of layers": {
        "family": "Qwen3Next",
        "tie_word_embeddings": True,
        "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_num_value_heads": 2,
    },
}

_ROUTER = re.compile(r"\.(gate|router)\.weight$")


def build_moe(
    directory: Path,
    family: str = "Qwen2Moe",
    *,
    dtype: str = "float32",
    shards: bool = False,
    fused: bool = False,
    draft: bool = True,
    **changes: object,
) -> Path:
    """A random checkpoint by transformers: 2 layers, 4 experts of width 256, 400 tokens.

    `fused` writes the tensors as transformers holds them in memory, experts fused; `shards` splits the weights.
    `draft` adds the draft layer that some families' checkpoints have and transformers leaves out.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    model_class = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**COMMON, **FAMILIES[family], **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if _ROUTER.search(name):
                parameter.mul_(4)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model = model.to(getattr(torch, dtype)).eval()
    if fused:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(directory, max_shard_size="1MB" if shards else "1GB")
    if draft and family in ("DeepseekV3", "Glm4Moe", "Qwen3Next"):
        _add_draft_layer(directory / "model.safetensors", model.config)
    if family == "Ernie4_5_Moe":
        from tokenizer_files import write_sentencepiece

        write_sentencepiece(directory, vocab_size=400)
        return directory
    write_tokenizer(directory, special=SPECIAL.get(family, ()))
    return directory


def _add_draft_layer(path: Path, config: Any) -> None:
    """A layer like the last one, with what joins it to the model."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    n_layers, width = config.num_hidden_layers, config.hidden_size
    if config.model_type == "qwen3_next":
        layer, root, joint = "mtp.layers.0.", "mtp.", "fc"
        norms, embeddings = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"), ()
    else:
        layer, joint = f"model.layers.{n_layers}.", "eh_proj"
        root, norms, embeddings = layer, ("enorm", "hnorm", "shared_head.norm"), ("embed_tokens", "shared_head.head")
    last = f"model.layers.{n_layers - 1}."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[layer + name.removeprefix(last)] = tensors[name].flip(-1)
    shapes = {joint: (width, 2 * width)} | dict.fromkeys(norms, (width,))
    shapes |= dict.fromkeys(embeddings, (config.vocab_size, width))
    for name, shape in shapes.items():
        tensors[f"{root}{name}.weight"] = torch.randn(shape).to(tensors["model.norm.weight"].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
