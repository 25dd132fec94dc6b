"""Checkpoints that tests build on the fly, and where things lie."""

from __future__ import annotations

import json
import re
from pathlib import Path

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


def write_tokenizer(directory: Path, vocab_size: int = 400, regex: str | None = QWEN2_REGEX) -> None:
    """A byte-level BPE tokenizer with a splitting regex (None: GPT-2's) and ChatML, trained on a few sentences."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 8,
        special_tokens=special,
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

# A tiny model of every family: what its configuration needs beside COMMON, by transformers' class prefix.
FAMILIES: dict[str, dict[str, object]] = {
    "Qwen2Moe": {"shared_expert_intermediate_size": 256},
    "Qwen3Moe": {"head_dim": 64, "norm_topk_prob": True},
}

_ROUTER = re.compile(r"\.(gate|router)\.weight$")


def build_moe(
    directory: Path,
    family: str = "Qwen2Moe",
    *,
    dtype: str = "float32",
    shards: bool = False,
    fused: bool = False,
    **changes: object,
) -> Path:
    """A random checkpoint by transformers: 2 layers, 4 experts of width 256, 400 tokens.

    `fused` writes the tensors as transformers holds them in memory, experts fused; `shards` splits the weights.
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
            if parameter.ndim == 1:
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
    write_tokenizer(directory)
    return directory
